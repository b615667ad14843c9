from __future__ import annotations

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from sensebatch.config import OutputConfig
from sensebatch.store.images import encode_image, image_metadata
from sensebatch.store.provenance import public_name, xmp_packet
from sensebatch.tasks import Task
from tests.executor.fakes import SMALL, FakeEngine, drawn_image, make_input, make_job, to_pixels

PIXELS = to_pixels(drawn_image(SMALL, "pixels"))
INFO = FakeEngine().info
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
FORMATS = ["png", "webp", "jpeg"]


def metadata(task: Task = Task.T2I, **changes: Any) -> dict[str, Any]:
    images = (make_input("in.png"),) if task is Task.EDIT else ()
    job = make_job("a", task, images=images)
    return image_metadata(job, "k" * 64, replace(INFO, **changes), 0)


def properties(packet: bytes) -> dict[str, str | None]:
    """Returns the properties of a packet by their last name."""
    (description,) = ElementTree.fromstring(packet).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    return {child.tag.partition("}")[2]: child.text for child in description}


def embedded(image_format: str, *, embed: bool = True) -> bytes | None:
    output = OutputConfig(image_format=image_format, embed_metadata=embed)
    with Image.open(io.BytesIO(encode_image(PIXELS, output, metadata()))) as image:
        return image.info.get("xmp")


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_says_that_a_model_drew_the_image(image_format: str) -> None:
    packet = embedded(image_format)
    assert packet is not None
    assert properties(packet) == {
        "CreatorTool": "sensebatch 0.1.0",
        "DigitalSourceType": f"{SOURCE_TYPES}trainedAlgorithmicMedia",
        "AISystemUsed": "fake",
        "AISystemVersionUsed": "c" * 64,
        "ModelLicense": "apache-2.0",
    }


@pytest.mark.parametrize("image_format", FORMATS)
def test_without_metadata_there_is_no_xmp(image_format: str) -> None:
    assert embedded(image_format, embed=False) is None


def test_image_made_of_images_is_a_composite() -> None:
    found = properties(xmp_packet(metadata(Task.EDIT)))
    assert found["DigitalSourceType"] == f"{SOURCE_TYPES}compositeWithTrainedAlgorithmicMedia"


def test_unknown_licence_is_left_out() -> None:
    assert "ModelLicense" not in properties(xmp_packet(metadata(model_license=None)))


def test_image_of_an_earlier_version_says_what_it_knows() -> None:
    old = {key: value for key, value in metadata().items() if key not in ("software", "model")}
    del old["model_license"]
    assert properties(xmp_packet(old)) == {
        "DigitalSourceType": f"{SOURCE_TYPES}trainedAlgorithmicMedia",
        "AISystemVersionUsed": "c" * 64,
    }


def test_hostile_names_stay_text() -> None:
    found = properties(xmp_packet(metadata(model="/a/<b>&\x00é\ud800", model_license="]]>")))
    assert found["AISystemUsed"] == "<b>&\ufffdé\ufffd"
    assert found["ModelLicense"] == "]]>"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiny", "tiny"),
        ("synthetic:8b", "synthetic:8b"),
        ("sensenova/SenseNova-U1-8B-MoT", "sensenova/SenseNova-U1-8B-MoT"),
        ("/home/somebody/models/U1", "U1"),
        ("~/U1", "U1"),
        ("./U1/", "U1"),
        ("models/from/somewhere", "somewhere"),
    ],
)
def test_public_name_has_no_folders_of_this_machine(model: str, name: str) -> None:
    assert public_name(model) == name


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_exiftool_reads_the_provenance_of_every_format(tmp_path: Path) -> None:
    for image_format in FORMATS:
        for task in (Task.T2I, Task.EDIT):
            data = encode_image(PIXELS, OutputConfig(image_format=image_format), metadata(task))
            (tmp_path / f"{task}.{image_format}").write_bytes(data)
    command = ["exiftool", "-json", "-G1", "-a", "-validate", "-warning", str(tmp_path)]
    command[2:2] = ["-XMP-iptcExt:all", "-XMP-xmp:all", "-XMP-sensebatch:all"]
    read = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert len(read) == 6
    for found in read:
        is_edit = Path(found["SourceFile"]).stem == "edit"
        word = "compositeWithTrainedAlgorithmicMedia" if is_edit else "trainedAlgorithmicMedia"
        assert found["XMP-iptcExt:DigitalSourceType"].endswith(f"/{word}")
        assert found["XMP-iptcExt:AISystemUsed"] == "fake"
        assert found["XMP-xmp:CreatorTool"] == "sensebatch 0.1.0"
        assert found["XMP-sensebatch:ModelLicense"] == "apache-2.0"
        warnings = found.get("ExifTool:Warning", [])
        assert "XMP" not in str(warnings)
