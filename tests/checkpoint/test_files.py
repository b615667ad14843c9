"""Checkpoint folders: what is read, and what is refused by name."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sensebatch.checkpoint.architecture import HeadKind
from sensebatch.checkpoint.files import (
    check_tensors,
    compare_tensors,
    open_checkpoint,
    read_folder,
    read_header,
)
from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
from sensebatch.errors import CheckpointError
from sensebatch.plan.work import network_sizes
from tests.checkpoint.folders import write_folder, zeros

SHARD = "model-00002-of-00003.safetensors"
NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize("num_shards", [1, 3])
def test_single_and_sharded_folders_are_read_and_complete(tmp_path: Path, num_shards: int) -> None:
    checkpoint = open_checkpoint(str(write_folder(tmp_path, num_shards=num_shards)))
    check_tensors(checkpoint)
    assert checkpoint.architecture.hidden_size == 64
    assert len({tensor.file for tensor in checkpoint.tensors.values()}) == num_shards


def test_offsets_point_at_the_tensors_bytes(tmp_path: Path) -> None:
    tensors = zeros()
    tensors[NORM] = np.arange(64, dtype=np.float16)
    tensor = read_folder(write_folder(tmp_path, tensors)).tensors[NORM]
    data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert np.array_equal(np.frombuffer(data, dtype=np.float16), tensors[NORM])


def test_missing_extra_and_misshapen_tensors_are_listed_in_one_error(tmp_path: Path) -> None:
    tensors = zeros()
    for name in [name for name in tensors if "layers.1.self_attn" in name]:
        del tensors[name]
    tensors["language_model.model.rotary_emb.inv_freq"] = np.zeros(8, dtype=np.float32)
    tensors[NORM] = np.zeros(63, dtype=np.float16)
    tensors["language_model.lm_head.weight"] = np.zeros((512, 64), dtype=np.int8)
    with pytest.raises(CheckpointError) as raised:
        check_tensors(read_folder(write_folder(tmp_path, tensors)))
    message = str(raised.value)
    assert "16 missing:" in message
    assert "... and 11 more" in message
    assert "1 not expected:\n  language_model.model.rotary_emb.inv_freq" in message
    assert f"{NORM}: expected [64], found [63]" in message
    assert "lm_head.weight: expected F64 or F32 or F16 or BF16, found I8" in message


def test_complete_checkpoint_has_no_differences(tmp_path: Path) -> None:
    assert not compare_tensors(read_folder(write_folder(tmp_path)))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"0")


def garble_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:20] = b"not a header"
    file.write_bytes(bytes(data))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def shift(file: Path) -> None:
    """Makes a tensor overlap its neighbour; the header keeps its length."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin - 2, end - 2]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    file.write_bytes(data[:8] + text + data[8 + size :])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (cut, "not copied or downloaded to its end"),
        (grow, "it has a tail"),
        (garble_header, "a header that cannot be read"),
        (empty, "without its header"),
        (shift, "expected its data at byte"),
        (Path.unlink, "named by model.safetensors.index.json, not found"),
    ],
)
def test_damaged_shard_is_named(
    tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    write_folder(tmp_path, num_shards=3)
    damage(tmp_path / SHARD)
    with pytest.raises(CheckpointError, match=complaint) as raised:
        read_folder(tmp_path)
    assert SHARD in str(raised.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read_as_safetensors_reads_them(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    try:
        names = set(read_header(file))
    except CheckpointError:
        return
    with safe_open(file, "numpy") as opened:
        assert set(opened.keys()) == names


def test_tensor_that_the_index_promises_must_be_in_its_file(tmp_path: Path) -> None:
    index = write_folder(tmp_path, num_shards=3) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["surprise"] = SHARD
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{SHARD}: surprise: promised by"):
        read_folder(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, num_shards=3)
    (tmp_path / SHARD).write_bytes((tmp_path / SHARD.replace("00002-", "00001-")).read_bytes())
    with pytest.raises(CheckpointError, match="also in model-00001-of-00003"):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": 1}}', "{}"])
def test_unusable_index_is_refused(tmp_path: Path, content: str) -> None:
    (write_folder(tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_folder(tmp_path)


def test_folder_without_weights_or_with_several_loose_files_is_refused(tmp_path: Path) -> None:
    file = write_folder(tmp_path) / "model.safetensors"
    file.rename(tmp_path / "a.safetensors")
    read_folder(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found a.safetensors, b.safetensors"):
        read_folder(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found none"):
        read_folder(tmp_path)


def test_names_of_nothing_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for model, complaint in [
        (str(tmp_path / "nowhere"), "no such folder"),
        ("no-owner", "no such folder"),
        (str(file), "found a file"),
    ]:
        with pytest.raises(CheckpointError, match=complaint):
            open_checkpoint(model)
    with pytest.raises(CheckpointError, match="expected a JSON file"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="expected a Hub id beside revision 'main'"):
        open_checkpoint(str(write_folder(tmp_path)), "main")


OFFLINE_SCRIPT = """
import sys
from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.errors import CheckpointError
print(open_checkpoint("owner/cached").path)
try:
    open_checkpoint("owner/absent")
except CheckpointError as error:
    print(error)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_hub_id_is_read_from_the_cache_without_a_network(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--owner--cached"
    commit = "0" * 40
    write_folder(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_SCRIPT],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, error = done.stdout.splitlines()
    assert path == str(cache / "snapshots" / commit)
    assert error.startswith("owner/absent: no such folder, not in the Hub cache")


def test_synthetic_checkpoints_have_both_heads() -> None:
    mlp, pixel = (open_checkpoint(f"synthetic:{size}") for size in ("8b", "u1.5"))
    assert (mlp.architecture.head, pixel.architecture.head) == (HeadKind.MLP, HeadKind.PIXEL)
    of_mlp = replace(pixel.architecture, head=HeadKind.MLP, noise_scale_max_value=8.0)
    assert of_mlp == mlp.architecture
    assert pixel.architecture.noise_scale_max_value == 16.0
    assert "fm_modules.fm_head.conv2.weight" in set(pixel.tensors) - set(mlp.tensors)


def test_synthetic_u15_has_its_generation_expert_in_float32() -> None:
    checkpoint = open_checkpoint("synthetic:u1.5")
    specs = expected_tensors(checkpoint.architecture)
    for name, tensor in checkpoint.tensors.items():
        wide = specs[name].group is TensorGroup.GENERATION
        assert tensor.dtype == ("F32" if wide else "BF16"), name
        assert tensor.nbytes == (4 if wide else 2) * specs[name].num_elements
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == pytest.approx(
        50.2e9, rel=0.03
    )
    check_tensors(checkpoint)


def test_the_sparse_synthetic_checkpoint_has_the_published_number_of_weights() -> None:
    checkpoint = open_checkpoint("synthetic:a3b")
    weights = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert weights / 1e9 == pytest.approx(39, rel=0.01)
    sizes = network_sizes(checkpoint.architecture)
    assert 2.5e9 < sizes.generation_matrices < sizes.understanding_matrices < 3.5e9


@pytest.mark.parametrize("model", ["", " "])
def test_empty_name_is_not_the_current_folder(model: str) -> None:
    with pytest.raises(CheckpointError, match="found an empty text"):
        open_checkpoint(model)
