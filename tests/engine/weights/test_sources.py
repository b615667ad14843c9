"""Where weights come from: rows of a tensor are what the whole holds there."""

from __future__ import annotations

from pathlib import Path
from threading import local
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from sensebatch.checkpoint.files import Checkpoint, open_checkpoint, read_header
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.engine.weights import tensor_files
from sensebatch.engine.weights.lora import Lora
from sensebatch.engine.weights.sources import FileWeights, SyntheticWeights, WeightSource
from sensebatch.engine.weights.tensor_files import CONVERTED_BYTES
from sensebatch.errors import CheckpointError
from tests.engine.memory.tracker import LiveBytes

GATE = "language_model.model.layers.0.mlp_mot_gen.gate_proj.weight"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("tiny")


def make_lora(checkpoint: Checkpoint, folder: Path) -> Lora:
    num_rows, num_columns = checkpoint.tensors[GATE].shape
    generator = torch.Generator().manual_seed(3)
    base = GATE.removesuffix(".weight")
    tensors = {
        f"{base}.lora_down.weight": torch.randn(4, num_columns, generator=generator),
        f"{base}.lora_up.weight": torch.randn(num_rows, 4, generator=generator),
        f"{base}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, folder / "lora.safetensors")
    return Lora.open(folder / "lora.safetensors", expected_tensors(checkpoint.architecture))


def by_rows(source: WeightSource, name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    weight = torch.empty(shape)
    for start in range(0, shape[0], step):
        rows = (start, min(start + step, shape[0]))
        source.read_into(name, rows, weight[slice(*rows)])
    return weight


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("with_lora", [False, True])
def test_rows_of_a_file_are_those_of_the_whole(
    checkpoint: Checkpoint, tmp_path: Path, step: int, with_lora: bool
) -> None:
    lora = make_lora(checkpoint, tmp_path) if with_lora else None
    source = FileWeights(checkpoint, lora)
    shape = tuple(checkpoint.tensors[GATE].shape)
    whole = torch.empty(shape)
    source.read_into(GATE, None, whole)
    plain = torch.empty(shape)
    FileWeights(checkpoint).read_into(GATE, None, plain)
    assert torch.equal(whole, plain) == (not with_lora)
    found = by_rows(source, GATE, shape, step)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-2 if with_lora else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once_and_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tensor_files, "_OF_THREAD", local())
    # Not a multiple of what is read at a time, nor of a row.
    weight = torch.randn(1100, 700, generator=torch.Generator().manual_seed(0))
    source = one_tensor(tmp_path, weight)
    found = torch.empty(900, 700, dtype=dtype)
    with LiveBytes() as live:
        source.read_into("a.weight", (50, 950), found)
    assert torch.equal(found, weight[50:950].to(dtype))
    assert live.peak < 1.1 * CONVERTED_BYTES < weight.nbytes


def test_synthetic_weights_in_float32_are_the_same_once_rounded(checkpoint: Checkpoint) -> None:
    shape = tuple(checkpoint.tensors[GATE].shape)
    plain, rounded = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
    exact = torch.empty(shape)
    SyntheticWeights(torch.bfloat16).read_into(GATE, None, plain)
    source = SyntheticWeights(torch.bfloat16, wide=[GATE])
    source.read_into(GATE, None, rounded)
    source.read_into(GATE, None, exact)
    assert torch.equal(rounded, plain)
    assert torch.equal(exact.bfloat16(), plain)
    assert not torch.equal(exact, plain.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_synthetic_weights_are_those_of_the_whole(dtype: torch.dtype) -> None:
    source = SyntheticWeights(dtype)
    # More numbers than the table has, so that it is used more than once.
    whole = torch.empty(3000, 700, dtype=dtype)
    source.read_into("a.weight", None, whole)
    rows = torch.empty(1500, 700, dtype=dtype)
    source.read_into("a.weight", (1000, 2500), rows)
    assert torch.equal(rows, whole[1000:2500])
    assert whole.float().std() == pytest.approx(700**-0.5, rel=0.01)
    assert not torch.equal(whole[0], whole[1])


def test_a_lora_is_merged_into_synthetic_weights_too(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    lora = make_lora(checkpoint, tmp_path)
    plain, merged = (torch.empty(tuple(checkpoint.tensors[GATE].shape)) for _ in range(2))
    SyntheticWeights(torch.float32).read_into(GATE, None, plain)
    SyntheticWeights(torch.float32, lora).read_into(GATE, None, merged)
    assert torch.equal(merged, lora.apply(GATE, plain))
    assert not torch.equal(merged, plain)
    source = SyntheticWeights(torch.float32, lora)
    found = by_rows(source, GATE, tuple(plain.shape), 7)
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_found_where_they_are_read(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    weight = torch.zeros(40, 30, dtype=dtype)
    weight[21, 17] = value
    source = one_tensor(tmp_path, weight)
    source.read_into("a.weight", (0, 21), torch.empty(21, 30))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: a\.weight: .* NaN or infinite"):
        source.read_into("a.weight", (14, 28), torch.empty(14, 30, dtype=dtype))


def test_large_finite_numbers_are_read_and_those_too_large_for_the_dtype_are_not(
    tmp_path: Path,
) -> None:
    # The sum of each row is infinite.
    source = one_tensor(tmp_path, torch.full((4, 8), 3e38))
    source.read_into("a.weight", None, torch.empty(4, 8))
    source.read_into("a.weight", None, torch.empty(4, 8, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="finite in float16, found NaN or infinite"):
        source.read_into("a.weight", None, torch.empty(4, 8, dtype=torch.float16))


def one_tensor(folder: Path, weight: torch.Tensor) -> FileWeights:
    """Returns the weights of a checkpoint with this one alone."""
    save_file({"a.weight": weight}, folder / "x.safetensors")
    return FileWeights(Mock(tensors=read_header(folder / "x.safetensors")))
