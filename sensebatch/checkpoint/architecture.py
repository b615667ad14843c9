"""What `config.json` says of a network's shape. No torch; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from sensebatch.bounded import quoted
from sensebatch.errors import CheckpointError
from sensebatch.jobs import MAX_COUNT

TIMESTEP_FREQUENCIES = 256
"""Sinusoids of a timestep or noise scale, cosines and sines together."""
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_EXPERTS = 4096
MAX_WIDTH = 2**20
"""Largest size of a vector or matrix."""
MAX_VOCABULARY = 2**24
MAX_TENSORS = 200_000
"""Most matrices of experts. All bounds are far above those of any model, and low enough that no
`config.json` takes more than seconds to work out."""
NOISE_SCALE_MODES = ("resolution", "dynamic", "dynamic_sqrt")
TEMPLATES = ("neo1_0",)

OFFICIAL_8B: Mapping[str, Any] = {
    "model_type": "neo_chat",
    "template": "neo1_0",
    "patch_size": 16,
    "downsample_ratio": 0.5,
    "use_pixel_head": False,
    "fm_head_layers": 2,
    "concat_time_token_num": 0,
    "noise_scale": 1.0,
    "noise_scale_mode": "resolution",
    "noise_scale_base_image_seq_len": 64,
    "noise_scale_max_value": 8.0,
    "add_noise_scale_embedding": True,
    "llm_config": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 42,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "rope_theta_hw": 10000.0,
        "attention_bias": False,
    },
    "vision_config": {
        "hidden_size": 1024,
        "patch_size": 16,
        "rope_theta_vision": 10000.0,
    },
}
"""The `config.json` of SenseNova-U1-8B-MoT as far as it is read, for synthetic weights."""
OFFICIAL_U15: Mapping[str, Any] = {
    **OFFICIAL_8B,
    "use_pixel_head": True,
    "noise_scale_max_value": 16.0,
}
"""The same of SenseNova-U1.5-8B-MoT."""
A3B: Mapping[str, Any] = {
    **OFFICIAL_8B,
    "llm_config": {
        **OFFICIAL_8B["llm_config"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "gen_num_experts": 32,
    },
}
"""A `config.json` for synthetic weights of the size of SenseNova-U1-A3B-MoT, which is described as
Qwen3-MoE with about 39 B weights: the understanding expert has the shape of Qwen3-30B-A3B, and 32
experts a layer of the generation expert make up the rest."""


class HeadKind(StrEnum):
    """What turns hidden states into pixels; `heads.HEADS` has a row of facts for each."""

    MLP = "mlp"
    PIXEL = "pixel"
    """Convolutions over the whole image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """The sparse feed-forward blocks of one expert path (Qwen3-MoE rules)."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    sparse_layers: tuple[bool, ...]
    """For each layer, whether its block is sparse rather than a dense SwiGLU."""

    def __str__(self) -> str:
        """Returns the sizes in words."""
        sparse, layers = sum(self.sparse_layers), len(self.sparse_layers)
        return (
            f"{self.num_experts} experts of {self.intermediate_size}, {self.num_experts_per_tok} "
            f"a token, in {sparse} of {layers} layers"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of a SenseNova-U1 network."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_theta_hw: float
    vision_hidden_size: int
    vision_rope_theta: float
    patch_size: int
    """Pixels a side of a patch; a token is a square of 2 by 2 patches."""
    head: HeadKind
    add_noise_scale_embedding: bool
    noise_scale: float
    noise_scale_mode: str
    noise_scale_base_image_seq_len: int
    noise_scale_max_value: float
    understanding_moe: Moe | None
    generation_moe: Moe | None

    @property
    def is_moe(self) -> bool:
        """Whether the backbone is Qwen3-MoE."""
        return self.generation_moe is not None


class _Fields:
    """Reads typed values from one level of `config.json`, naming the field in every complaint."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Returns a value of `kind`; a list of one counts as its element (an upstream habit)."""
        value = self._values.get(name)
        if isinstance(value, list | tuple) and len(value) == 1 and kind is not list:
            value = value[0]
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json: {self._prefix}{name}: expected, not found")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(
                f"config.json: {self._prefix}{name}: expected {kind.__name__}, "
                f"found {quoted(value)}"
            )
        return value

    def count(self, name: str, most: int, default: int | None = None, *, least: int = 1) -> int:
        """Returns a whole number within bounds."""
        value: int = self.get(name, int, default)
        if not least <= value <= most:
            raise CheckpointError(
                f"config.json: {self._prefix}{name}: expected {least:,} to {most:,}, "
                f"found {quoted(value)}"
            )
        return value

    def section(self, name: str) -> _Fields:
        value = self._values.get(name)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {self._prefix}{name}: expected a section")
        return _Fields(value, f"{self._prefix}{name}.")

    def reject(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"config.json: {self._prefix}{name}: expected {expected}, found {quoted(value)}; "
            "this checkpoint is not supported"
        )


def _require(fields: _Fields, name: str, kind: type, default: Any, allowed: tuple[Any, ...]) -> Any:
    value = fields.get(name, kind, default)
    if value not in allowed:
        raise fields.reject(name, value, " or ".join(repr(item) for item in allowed))
    return value


def _num_experts(llm: _Fields) -> str:
    """Returns the name of the field; transformers 5 writes another one."""
    return "num_local_experts" if llm.has("num_local_experts") else "num_experts"


def _moe(llm: _Fields, num_layers: int) -> tuple[Moe, Moe]:
    num_experts = llm.count(_num_experts(llm), MAX_EXPERTS)
    per_tok = llm.count("num_experts_per_tok", MAX_EXPERTS)
    intermediate = llm.count("moe_intermediate_size", MAX_WIDTH)
    norm_topk = llm.get("norm_topk_prob", bool, False)
    step = llm.count("decoder_sparse_step", MAX_LAYERS, 1)
    listed = llm.get("mlp_only_layers", list, [])
    if not all(isinstance(index, int) for index in listed):
        raise llm.reject("mlp_only_layers", listed, "numbers of layers")
    dense_only = set(listed)
    understanding = Moe(
        num_experts=num_experts,
        num_experts_per_tok=per_tok,
        intermediate_size=intermediate,
        norm_topk_prob=norm_topk,
        sparse_layers=tuple(i not in dense_only and (i + 1) % step == 0 for i in range(num_layers)),
    )
    generation = Moe(
        num_experts=llm.count("gen_num_experts", MAX_EXPERTS, num_experts),
        num_experts_per_tok=llm.count("gen_num_experts_per_tok", MAX_EXPERTS, per_tok),
        intermediate_size=llm.count("gen_moe_intermediate_size", MAX_WIDTH, intermediate),
        norm_topk_prob=norm_topk,
        sparse_layers=(True,) * num_layers,
    )
    return understanding, generation


def _rope_theta(llm: _Fields) -> float:
    """Returns the base of the t angles, which transformers 5 writes inside `rope_parameters`."""
    if not llm.has("rope_parameters"):
        return float(llm.get("rope_theta", float, 5e6))
    rope = llm.section("rope_parameters")
    _require(rope, "rope_type", str, "default", ("default",))
    return float(rope.get("rope_theta", float))


def parse_architecture(config: Mapping[str, Any]) -> Architecture:
    """Returns the network's shape from the parsed `config.json`.

    Raises:
        CheckpointError: A field is missing, of the wrong type, or asks for something that is not
            supported; the message names the field and its value.
    """
    top = _Fields(config)
    llm = top.section("llm_config")
    vision = top.section("vision_config")
    _reject_unsupported(top, llm)
    num_layers = llm.count("num_hidden_layers", MAX_LAYERS)
    num_experts = llm.count(_num_experts(llm), MAX_EXPERTS, 0, least=0)
    is_moe = num_experts > 1 or "moe" in llm.get("model_type", str, "")
    understanding_moe, generation_moe = _moe(llm, num_layers) if is_moe else (None, None)
    heads = llm.count("num_attention_heads", MAX_HEADS)
    hidden = llm.count("hidden_size", MAX_WIDTH)
    arch = Architecture(
        hidden_size=hidden,
        intermediate_size=llm.count("intermediate_size", MAX_WIDTH),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=llm.count("num_key_value_heads", MAX_HEADS, heads),
        head_dim=llm.count("head_dim", MAX_WIDTH, max(hidden // heads, 1)),
        vocab_size=llm.count("vocab_size", MAX_VOCABULARY),
        rms_norm_eps=llm.get("rms_norm_eps", float, 1e-6),
        rope_theta=_rope_theta(llm),
        rope_theta_hw=llm.get("rope_theta_hw", float, 1e4),
        vision_hidden_size=vision.count("hidden_size", MAX_WIDTH),
        vision_rope_theta=vision.get("rope_theta_vision", float, 1e4),
        patch_size=_require(top, "patch_size", int, vision.get("patch_size", int, 16), (16,)),
        head=HeadKind.PIXEL if top.get("use_pixel_head", bool, False) else HeadKind.MLP,
        add_noise_scale_embedding=top.get("add_noise_scale_embedding", bool, False),
        noise_scale=top.get("noise_scale", float, 1.0),
        noise_scale_mode=_require(
            top, "noise_scale_mode", str, NOISE_SCALE_MODES[0], NOISE_SCALE_MODES
        ),
        noise_scale_base_image_seq_len=top.count("noise_scale_base_image_seq_len", MAX_COUNT, 64),
        noise_scale_max_value=top.get("noise_scale_max_value", float, 8.0),
        understanding_moe=understanding_moe,
        generation_moe=generation_moe,
    )
    _check_shapes(arch)
    return arch


def _reject_unsupported(top: _Fields, llm: _Fields) -> None:
    """Raises where a field asks for what the network does not do."""
    _require(top, "model_type", str, "", ("neo_chat",))
    _require(top, "template", str, TEMPLATES[0], TEMPLATES)
    _require(top, "concat_time_token_num", int, 0, (0,))
    _require(top, "downsample_ratio", float, 0.5, (0.5,))
    _require(top, "use_adaLN", bool, False, (False,))
    _require(llm, "hidden_act", str, "silu", ("silu",))
    _require(llm, "attention_bias", bool, False, (False,))
    _require(llm, "use_sliding_window", bool, False, (False,))
    if llm.has("rope_scaling"):
        raise llm.reject("rope_scaling", llm.get("rope_scaling", object), "null")
    fm_head_layers = top.get("fm_head_layers", int, 2)
    if fm_head_layers > 2:
        # Up to here the field changes nothing: the head has two linear layers, or is convolutional.
        raise top.reject("fm_head_layers", fm_head_layers, "at most 2")


def _check_number_of_tensors(arch: Architecture) -> None:
    """Raises where there are more than can be listed in a reasonable time."""
    experts = sum(
        sum(moe.sparse_layers) * moe.num_experts
        for moe in (arch.understanding_moe, arch.generation_moe)
        if moe is not None
    )
    if 3 * experts > MAX_TENSORS:
        raise CheckpointError(
            f"config.json: llm_config: expected at most {MAX_TENSORS:,} matrices of experts, "
            f"found {3 * experts:,}"
        )


def _check_shapes(arch: Architecture) -> None:
    """Raises where sizes contradict one another, before a layer fails on it."""
    for field in fields(arch):
        value = getattr(arch, field.name)
        if isinstance(value, float) and not value > 0:
            raise CheckpointError(
                f"config.json: {field.name}: expected more than 0, found {value!r}"
            )
    _check_number_of_tensors(arch)
    for moe in (arch.understanding_moe, arch.generation_moe):
        if moe is not None and not 0 < moe.num_experts_per_tok <= moe.num_experts:
            raise CheckpointError(
                "config.json: llm_config.num_experts_per_tok: expected 1 to "
                f"{moe.num_experts} experts, found {moe.num_experts_per_tok}"
            )
    if arch.num_heads % arch.num_kv_heads:
        raise CheckpointError(
            f"config.json: llm_config.num_key_value_heads: expected a divisor of "
            f"num_attention_heads ({arch.num_heads}), found {arch.num_kv_heads}"
        )
    if arch.head_dim % 8:
        raise CheckpointError(
            "config.json: llm_config.head_dim: expected a multiple of 8 (halves for t, quarters "
            f"for h and w, rotated in pairs), found {arch.head_dim}"
        )
    if arch.head is HeadKind.PIXEL and arch.hidden_size % 4:
        raise CheckpointError(
            "config.json: llm_config.hidden_size: expected a multiple of 4 for the convolutional "
            f"head, found {arch.hidden_size}"
        )
    if arch.vision_hidden_size % 4:
        raise CheckpointError(
            "config.json: vision_config.hidden_size: expected a multiple of 4, found "
            f"{arch.vision_hidden_size}"
        )
