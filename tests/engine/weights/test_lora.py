"""LoRA files: merged as the golden ones, refused by name where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.engine.weights.lora import Lora
from sensebatch.errors import CheckpointError
from tests.golden_data import Case, golden_architecture, load_case

EXPECTED = expected_tensors(golden_architecture("dense_fm"))
PATH = "language_model.model.layers.0.self_attn.k_proj"


def lora_tensors(case: Case) -> dict[str, torch.Tensor]:
    return {
        key: case.tensor(name).reshape(()) if name.endswith("alpha") else case.tensor(name)
        for name, key in case.params["lora_keys"].items()
    }


def write(file: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return file


@pytest.mark.parametrize("name", ["lora_plain", "lora_diffusion_model_prefix"])
def test_merge_equals_the_golden_weights(tmp_path: Path, name: str) -> None:
    case = load_case("common", name)
    lora = Lora.open(write(tmp_path / "lora.safetensors", lora_tensors(case)), EXPECTED)
    assert lora.unused() == sorted(case.params["weight_names"].values())
    for side, weight_name in case.params["weight_names"].items():
        merged = lora.apply(weight_name, case.tensor(f"{side}_weight"))
        assert torch.allclose(merged, case.tensor(f"{side}_merged"), rtol=1e-6, atol=1e-7)
        if f"{side}_weight_bf16" in case:
            merged = lora.apply(weight_name, case.tensor(f"{side}_weight_bf16").bfloat16())
            assert merged.dtype == torch.bfloat16
            assert torch.equal(merged.float(), case.tensor(f"{side}_merged_bf16"))
    assert lora.unused() == []


def test_mixed_prefix_is_refused(tmp_path: Path) -> None:
    case = load_case("common", "lora_mixed_prefix")
    file = write(tmp_path / "lora.safetensors", lora_tensors(case))
    with pytest.raises(CheckpointError, match=r"expected diffusion_model\. before all keys or"):
        Lora.open(file, EXPECTED)


def test_weights_that_the_file_leaves_alone_come_back_as_they_are(tmp_path: Path) -> None:
    case = load_case("common", "lora_plain")
    lora = Lora.open(write(tmp_path / "lora.safetensors", lora_tensors(case)), EXPECTED)
    weight = torch.zeros(3)
    assert lora.apply("language_model.model.norm.weight", weight) is weight
    assert "language_model.model.norm.weight" not in lora
    assert f"{PATH}.weight" in lora


def without_alpha(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{PATH}.alpha"]


def without_up(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{PATH}.lora_up.weight"]


def unknown_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["language_model.model.layers.9.self_attn.k_proj.alpha"] = torch.ones(())


def unknown_ending(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PATH}.dora_scale"] = torch.ones(1)


def wrong_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PATH}.lora_up.weight"] = torch.zeros(64, 5)


def no_matrix(tensors: dict[str, torch.Tensor]) -> None:
    for role in ("lora_up", "lora_down"):
        tensors[f"language_model.model.norm.{role}.weight"] = torch.zeros(64, 1)
    tensors["language_model.model.norm.alpha"] = torch.ones(1)


def infinite_alpha(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PATH}.alpha"] = torch.tensor(float("inf"))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (without_alpha, r"k_proj\.alpha: expected, not found"),
        (without_up, r"k_proj\.lora_up\.weight: expected, not found"),
        (unknown_weight, r"1 keys fit no weight.*layers\.9\.self_attn\.k_proj\.alpha"),
        (unknown_ending, r"1 keys fit no weight.*k_proj\.dora_scale"),
        (wrong_rank, r"k_proj: expected lora_up \[64, rank\].*found \[64, 5\] and \[4, 64\]"),
        (no_matrix, r"model\.norm: expected lora_up"),
        (infinite_alpha, r"k_proj\.alpha: expected one finite number"),
        (dict.clear, "found no tensors"),
    ],
)
def test_file_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], None], complaint: str
) -> None:
    tensors = lora_tensors(load_case("common", "lora_plain"))
    spoil(tensors)
    with pytest.raises(CheckpointError, match=complaint):
        Lora.open(write(tmp_path / "lora.safetensors", tensors), EXPECTED)


def test_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    with pytest.raises(CheckpointError, match="expected a LoRA in safetensors"):
        Lora.open(file, EXPECTED)
    file.write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="expected a LoRA in safetensors"):
        Lora.open(file, EXPECTED)
