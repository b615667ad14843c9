"""config.json: what is understood, and what is refused by field and value."""

from __future__ import annotations

from typing import Any

import pytest

from sensebatch.checkpoint.architecture import HeadKind, parse_architecture
from sensebatch.errors import CheckpointError
from tests.golden_data import golden_architecture, golden_config


def edited(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Sets the field at a dotted path."""
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    return config


def test_golden_configurations_are_understood() -> None:
    dense = golden_architecture("dense_fm")
    assert (dense.hidden_size, dense.num_layers, dense.head_dim) == (64, 3, 32)
    assert dense.head is HeadKind.MLP
    assert not dense.is_moe
    pixel = golden_architecture("dense_pixel")
    assert pixel.head is HeadKind.PIXEL
    assert pixel.noise_scale_max_value == 16.0


def test_generation_experts_differ_from_understanding_ones_and_default_to_them() -> None:
    moe = golden_architecture("moe")
    assert moe.understanding_moe is not None
    assert moe.generation_moe is not None
    assert (moe.understanding_moe.num_experts, moe.generation_moe.num_experts) == (8, 4)
    config = golden_config("moe")
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        del config["llm_config"][f"gen_{name}"]
    config["llm_config"]["decoder_sparse_step"] = 2
    moe = parse_architecture(config)
    assert moe.understanding_moe is not None
    assert moe.generation_moe is not None
    assert moe.generation_moe.num_experts == 8
    assert moe.understanding_moe.sparse_layers == (False, True)
    assert moe.generation_moe.sparse_layers == (True, True)


def test_weights_of_experts_are_renormalised_only_where_the_field_says_so() -> None:
    """As transformers reads a Qwen3-MoE configuration."""
    for value, expected in ((True, True), (False, False), (None, False)):
        config = edited(golden_config("moe"), "llm_config.norm_topk_prob", value)
        moe = parse_architecture(config)
        assert moe.understanding_moe is not None
        assert moe.generation_moe is not None
        assert moe.understanding_moe.norm_topk_prob is expected
        assert moe.generation_moe.norm_topk_prob is expected
    del config["llm_config"]["norm_topk_prob"]
    assert parse_architecture(config) == moe


def test_a_list_of_one_counts_as_its_element() -> None:
    config = edited(golden_config("dense_fm"), "downsample_ratio", [0.5])
    assert parse_architecture(config) == golden_architecture("dense_fm")


@pytest.mark.parametrize(
    ("model_type", "num_experts", "is_moe"),
    [("qwen3", 8, True), ("qwen3_moe", 1, True), ("qwen3", 1, False)],
)
def test_a_sparse_backbone_is_recognised_by_its_experts_or_its_name(
    model_type: str, num_experts: int, is_moe: bool
) -> None:
    config = edited(golden_config("moe"), "llm_config.model_type", model_type)
    for name in ("num_experts", "gen_num_experts"):
        config["llm_config"][name] = num_experts
        config["llm_config"][f"{name}_per_tok"] = 1
    assert parse_architecture(config).is_moe == is_moe


def test_the_number_of_experts_is_read_where_transformers_5_writes_it() -> None:
    config = golden_config("moe")
    config["llm_config"]["num_local_experts"] = config["llm_config"].pop("num_experts")
    assert parse_architecture(config) == golden_architecture("moe")
    del config["llm_config"]["num_local_experts"]
    with pytest.raises(CheckpointError, match=r"llm_config\.num_experts: expected, not found"):
        parse_architecture(config)


def test_theta_is_read_where_transformers_5_writes_it() -> None:
    config = golden_config("dense_fm")
    del config["llm_config"]["rope_theta"], config["llm_config"]["rope_scaling"]
    config["llm_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    arch = parse_architecture(config)
    assert (arch.rope_theta, arch.rope_theta_hw) == (1e6, 1e4)
    config["llm_config"]["rope_parameters"]["rope_type"] = "yarn"
    with pytest.raises(CheckpointError, match=r"rope_parameters\.rope_type: .* found 'yarn'"):
        parse_architecture(config)
    config["llm_config"]["rope_parameters"] = {"rope_type": "default"}
    with pytest.raises(CheckpointError, match=r"rope_parameters\.rope_theta: expected, not found"):
        parse_architecture(config)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_an_image_head_of_up_to_two_layers_is_supported(layers: int) -> None:
    config = edited(golden_config("dense_fm"), "fm_head_layers", layers)
    assert parse_architecture(config) == golden_architecture("dense_fm")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("template", "neo2_0"),
        ("use_adaLN", True),
        ("concat_time_token_num", 1),
        ("fm_head_layers", 3),
        ("noise_scale_mode", "other"),
        ("downsample_ratio", 0.25),
        ("noise_scale_max_value", 0),
        ("llm_config.hidden_act", "gelu"),
        ("llm_config.attention_bias", True),
        ("llm_config.rope_scaling", {"type": "yarn"}),
        ("llm_config.use_sliding_window", True),
        ("llm_config.num_key_value_heads", 3),
        ("llm_config.head_dim", 20),
        ("llm_config.num_hidden_layers", 0),
        ("llm_config.hidden_size", "64"),
        ("llm_config.num_experts_per_tok", 9),
        ("llm_config.decoder_sparse_step", 0),
        ("llm_config.vocab_size", None),
        ("vision_config.hidden_size", 50),
        ("vision_config", []),
    ],
)
def test_unsupported_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as raised:
        parse_architecture(edited(golden_config("moe"), field, value))
    message = str(raised.value)
    assert field.split(".")[-1] in message
    assert value in (None, []) or str(value) in message or repr(value) in message
