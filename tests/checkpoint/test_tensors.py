"""The tensor table against the manifests of the golden models and the published sizes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from sensebatch.checkpoint.architecture import parse_architecture
from sensebatch.checkpoint.tensors import TensorGroup, TensorSpec, expected_tensors
from tests.golden_data import CONFIGS, GOLDEN, golden_architecture


def official_config(*, pixel_head: bool) -> dict[str, Any]:
    """The published 8B configuration, as far as it decides shapes."""
    return {
        "model_type": "neo_chat",
        "use_pixel_head": pixel_head,
        "add_noise_scale_embedding": True,
        "vision_config": {"hidden_size": 1024, "patch_size": 16},
        "llm_config": {
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 42,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    }


def official_tensors(*, pixel_head: bool) -> dict[str, TensorSpec]:
    return expected_tensors(parse_architecture(official_config(pixel_head=pixel_head)))


@pytest.mark.parametrize("config", CONFIGS)
def test_table_equals_the_manifest_of_a_golden_model(config: str) -> None:
    manifest = json.loads((GOLDEN / config / "weights_manifest.json").read_text())
    expected = {entry["name"]: tuple(entry["shape"]) for entry in manifest}
    specs = expected_tensors(golden_architecture(config))
    assert {name: spec.shape for name, spec in specs.items()} == expected


@pytest.mark.parametrize(("pixel_head", "billions"), [(False, 17.552), (True, 17.533)])
def test_official_checkpoints_have_the_published_size(pixel_head: bool, billions: float) -> None:
    specs = official_tensors(pixel_head=pixel_head)
    assert len(specs) == 1116
    assert round(sum(spec.num_elements for spec in specs.values()) / 1e9, 3) == billions


def test_groups_have_the_published_bytes() -> None:
    sizes: Counter[TensorGroup] = Counter()
    for spec in official_tensors(pixel_head=False).values():
        sizes[spec.group] += 2 * spec.num_elements
    gib = {group: round(size / 2**30, 2) for group, size in sizes.items()}
    assert gib == {
        TensorGroup.UNDERSTANDING: 15.13,
        TensorGroup.GENERATION: 15.25,
        TensorGroup.SHARED: 2.32,
    }


def test_layers_are_numbered() -> None:
    specs = official_tensors(pixel_head=True)
    assert specs["language_model.model.layers.41.mlp_mot_gen.up_proj.weight"].layer == 41
    assert specs["fm_modules.fm_head.conv1.weight"].layer is None


def test_dense_layers_of_a_sparse_model_are_on_the_understanding_path_only() -> None:
    config = json.loads((GOLDEN / "moe" / "config.json").read_text())
    config["llm_config"]["mlp_only_layers"] = [1]
    specs = expected_tensors(parse_architecture(config))
    layer = "language_model.model.layers.1."
    assert specs[layer + "mlp.gate_proj.weight"].shape == (128, 64)
    assert layer + "mlp.gate.weight" not in specs
    assert specs[layer + "mlp_mot_gen.gate.weight"].shape == (4, 64)
