"""Content Credentials with a certificate made for the test, read back by c2pa itself."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensebatch.dataset.records import open_dataset
from sensebatch.errors import ConfigError
from sensebatch.export.run import ExportConfig, export
from sensebatch.export.target import open_target
from sensebatch.manifest.inputs import InputReader
from tests.export.folders import make_folder, mixed_jobs, parquet_rows, records_of

c2pa: Any = pytest.importorskip("c2pa", reason="c2pa-python is not installed")

from sensebatch.export.signing import Signer  # noqa: E402
from tests.export.certificates import make_certificate  # noqa: E402

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def credentials(content: bytes, kind: str = "image/png") -> dict[str, Any]:
    """Returns the active manifest of a signed image, after checking its hashes and signature."""
    found = json.loads(c2pa.Reader(kind, io.BytesIO(content)).json())
    assert found["validation_state"] == "Valid"
    return found["manifests"][found["active_manifest"]]


def actions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    (assertion,) = (one for one in manifest["assertions"] if one["label"] == "c2pa.actions.v2")
    return assertion["data"]["actions"]


def test_exported_images_carry_credentials_and_the_same_pixels(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "run", mixed_jobs(tmp_path / "inputs"))
    signer = Signer(*make_certificate(tmp_path / "keys"))
    config = ExportConfig(format="hf", signer=signer.fingerprint)
    out = tmp_path / "out"
    for expected in (4, 0):  # a second export signs nothing again
        with open_dataset(root) as dataset:
            done = export(
                dataset,
                open_target(str(out)),
                config,
                read_input=InputReader().read,
                sign=signer,
            )
        assert bool(done.written_shards) == bool(expected)
    rows = {row["id"]: row for row in parquet_rows(out)}
    records = records_of(root)
    drawn = credentials(rows["thinks"]["image"]["bytes"])
    (created,) = actions(drawn)
    assert created["action"] == "c2pa.created"
    assert created["digitalSourceType"] == f"{SOURCE_TYPES}trainedAlgorithmicMedia"
    assert created["softwareAgent"] == {"name": "fake"}
    assert drawn["claim_generator_info"][0]["name"] == "sensebatch"
    edited = credentials(rows["edit-two"]["output"]["bytes"])
    opened, edit = actions(edited)
    assert (opened["action"], edit["action"]) == ("c2pa.opened", "c2pa.edited")
    assert edit["digitalSourceType"] == f"{SOURCE_TYPES}compositeWithTrainedAlgorithmicMedia"
    assert [one["relationship"] for one in edited["ingredients"]] == ["parentOf", "inputTo"]
    for image in [part["image"] for part in rows["grows"]["parts"] if part["image"]]:
        credentials(image["bytes"])
    for job_id, row in rows.items():
        signed = row.get("image") or row.get("output")
        if signed is not None:
            pixels, original = (
                np.asarray(Image.open(source))
                for source in (io.BytesIO(signed["bytes"]), records[job_id].image_files[0])
            )
            assert np.array_equal(pixels, original)
    inputs = records["edit"].job.images
    assert rows["edit"]["input_images"][0]["bytes"] == Path(inputs[0].path).read_bytes()


def test_certificate_that_cannot_sign_is_one_error(tmp_path: Path) -> None:
    chain, key = make_certificate(tmp_path / "one")
    _, other = make_certificate(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"expected the key of .*chain.pem, found another one"):
        Signer(chain, other)
    with pytest.raises(ConfigError, match="expected a private key in PEM"):
        Signer(chain, chain)
    with pytest.raises(ConfigError, match="expected certificates in PEM"):
        Signer(key, key)
    with pytest.raises(ConfigError, match="expected a PEM file: No such file"):
        Signer(tmp_path / "none.pem", key)
    with pytest.raises(ConfigError, match="expected a certificate that is valid today"):
        Signer(*make_certificate(tmp_path / "old", days=-1))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(ConfigError, match=r"pip install 'sensebatch\[c2pa\]'"):
        Signer(Path("chain.pem"), Path("key.pem"))
