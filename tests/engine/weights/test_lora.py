"""LoRAs in every naming are merged as the golden ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.engine.weights.lora import Lora
from tests.checkpoint.lora_files import (
    Tensors,
    alphas,
    as_kohya,
    as_peft,
    lora_tensors,
    ranks,
    write,
    write_config,
)
from tests.golden_data import golden_architecture, load_case

EXPECTED = expected_tensors(golden_architecture("dense_fm"))
PATH = "language_model.model.layers.0.self_attn.k_proj"


def release(folder: Path, tensors: Tensors) -> Path:
    return write(folder / "lora.safetensors", tensors)


def kohya(folder: Path, tensors: Tensors) -> Path:
    return write(folder / "lora.safetensors", as_kohya(tensors))


def peft(folder: Path, tensors: Tensors) -> Path:
    write(folder / "adapter_model.safetensors", as_peft(tensors))
    write_config(
        folder, r=1, lora_alpha=1, rank_pattern=ranks(tensors), alpha_pattern=alphas(tensors)
    )
    return folder


@pytest.mark.parametrize("form", [release, kohya, peft])
@pytest.mark.parametrize("name", ["lora_plain", "lora_diffusion_model_prefix"])
def test_merge_equals_the_golden_weights(
    tmp_path: Path, name: str, form: Callable[[Path, Tensors], Path]
) -> None:
    case = load_case("common", name)
    lora = Lora.open(form(tmp_path, lora_tensors(case)), EXPECTED)
    for side, weight_name in case.params["weight_names"].items():
        assert weight_name in lora
        merged = lora.apply(weight_name, case.tensor(f"{side}_weight"))
        assert torch.allclose(merged, case.tensor(f"{side}_merged"), rtol=1e-6, atol=1e-7)
        if f"{side}_weight_bf16" in case:
            merged = lora.apply(weight_name, case.tensor(f"{side}_weight_bf16").bfloat16())
            assert merged.dtype == torch.bfloat16
            assert torch.equal(merged.float(), case.tensor(f"{side}_merged_bf16"))


def test_matrices_in_half_precision_are_merged(tmp_path: Path) -> None:
    case = load_case("common", "lora_plain")
    tensors = {key: tensor.bfloat16() for key, tensor in lora_tensors(case).items()}
    lora = Lora.open(release(tmp_path, tensors), EXPECTED)
    for side, weight_name in case.params["weight_names"].items():
        merged = lora.apply(weight_name, case.tensor(f"{side}_weight"))
        torch.testing.assert_close(merged, case.tensor(f"{side}_merged"), rtol=0.02, atol=0.02)


def test_weights_that_the_file_leaves_alone_come_back_as_they_are(tmp_path: Path) -> None:
    lora = Lora.open(release(tmp_path, lora_tensors(load_case("common", "lora_plain"))), EXPECTED)
    weight = torch.zeros(3)
    assert lora.apply("language_model.model.norm.weight", weight) is weight
    assert "language_model.model.norm.weight" not in lora
    assert f"{PATH}.weight" in lora
