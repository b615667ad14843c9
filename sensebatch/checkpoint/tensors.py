"""Which tensors a checkpoint of an architecture holds: one flat table of names. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from sensebatch.checkpoint.architecture import (
    TIMESTEP_FREQUENCIES,
    Architecture,
    Moe,
)
from sensebatch.checkpoint.heads import head_of
from sensebatch.resolutions import PATCH_PIXELS

MAX_HEAD_PARTS = 1024
"""Most parts of the vocabulary head, however small the layers are."""
GENERATION_SUFFIX = "_mot_gen"
"""What marks the generation expert's weights inside the language model."""


class TensorGroup(StrEnum):
    """Which part of the network a tensor belongs to; every tensor belongs to one."""

    UNDERSTANDING = "understanding"
    """Text and input images: decoder layers, final norm, vision embedder."""
    GENERATION = "generation"
    """The image being denoised: decoder layers, final norm, vision embedder, timestep and noise
    scale embedders, image head."""
    SHARED = "shared"
    """`embed_tokens` and `lm_head`, which the published memory tables list apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a tensor of the checkpoint must look like."""

    shape: tuple[int, ...]
    group: TensorGroup
    layer: int | None = None
    """Index of its decoder layer; None outside the layers."""

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def expected_tensors(arch: Architecture) -> dict[str, TensorSpec]:
    """Returns every tensor of a checkpoint by name: no more and no fewer may be in its files."""
    specs = _vision("vision_model", arch, TensorGroup.UNDERSTANDING)
    vocabulary = TensorSpec(shape=(arch.vocab_size, arch.hidden_size), group=TensorGroup.SHARED)
    specs["language_model.model.embed_tokens.weight"] = vocabulary
    for layer in range(arch.num_layers):
        for group in (TensorGroup.UNDERSTANDING, TensorGroup.GENERATION):
            for name, shape in _layer(arch, layer, group).items():
                full_name = f"language_model.model.layers.{layer}.{name}"
                specs[full_name] = TensorSpec(shape=shape, group=group, layer=layer)
    for group in (TensorGroup.UNDERSTANDING, TensorGroup.GENERATION):
        name = f"language_model.model.norm{_suffix(group)}.weight"
        specs[name] = TensorSpec(shape=(arch.hidden_size,), group=group)
    specs["language_model.lm_head.weight"] = vocabulary
    specs |= _vision("fm_modules.vision_model_mot_gen", arch, TensorGroup.GENERATION)
    for name, shape in (_image_head(arch) | _embedders(arch)).items():
        specs[f"fm_modules.{name}"] = TensorSpec(shape=shape, group=TensorGroup.GENERATION)
    return specs


def largest_layer_elements(arch: Architecture) -> int:
    """Returns how many numbers the largest decoder layer of either expert holds."""
    return max(
        sum(math.prod(shape) for shape in _layer(arch, layer, group).values())
        for layer in range(arch.num_layers)
        for group in (TensorGroup.UNDERSTANDING, TensorGroup.GENERATION)
    )


def head_part_rows(arch: Architecture) -> list[int]:
    """Returns the rows of `lm_head` in each of its parts, none larger than a decoder layer.

    The head is computed part by part wherever it is kept, so that its logits do not depend on it.
    """
    num_parts = -(-arch.vocab_size * arch.hidden_size // largest_layer_elements(arch))
    num_parts = min(num_parts, MAX_HEAD_PARTS)
    rows = -(-arch.vocab_size // num_parts)
    return [min(rows, arch.vocab_size - start) for start in range(0, arch.vocab_size, rows)]


def _suffix(group: TensorGroup) -> str:
    return GENERATION_SUFFIX if group is TensorGroup.GENERATION else ""


def _layer(arch: Architecture, layer: int, group: TensorGroup) -> dict[str, tuple[int, ...]]:
    """Returns one expert's tensors of a decoder layer, named from the layer on."""
    suffix = _suffix(group)
    hidden = arch.hidden_size
    query = arch.num_heads * arch.head_dim
    key = arch.num_kv_heads * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.q_proj{suffix}.weight": (query, hidden),
        f"self_attn.k_proj{suffix}.weight": (key, hidden),
        f"self_attn.v_proj{suffix}.weight": (key, hidden),
        f"self_attn.o_proj{suffix}.weight": (hidden, query),
        f"input_layernorm{suffix}.weight": (hidden,),
        f"post_attention_layernorm{suffix}.weight": (hidden,),
    }
    for norm in ("q_norm", "k_norm", "q_norm_hw", "k_norm_hw"):
        shapes[f"self_attn.{norm}{suffix}.weight"] = (arch.head_dim // 2,)
    moe = arch.generation_moe if group is TensorGroup.GENERATION else arch.understanding_moe
    if moe is not None and moe.sparse_layers[layer]:
        return shapes | _sparse_mlp(f"mlp{suffix}", hidden, moe)
    return shapes | _dense_mlp(f"mlp{suffix}", hidden, arch.intermediate_size)


def _dense_mlp(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }


def _sparse_mlp(prefix: str, hidden: int, moe: Moe) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.gate.weight": (moe.num_experts, hidden)}
    for expert in range(moe.num_experts):
        shapes |= _dense_mlp(f"{prefix}.experts.{expert}", hidden, moe.intermediate_size)
    return shapes


def _vision(prefix: str, arch: Architecture, group: TensorGroup) -> dict[str, TensorSpec]:
    vision, hidden, patch = arch.vision_hidden_size, arch.hidden_size, arch.patch_size
    merge = PATCH_PIXELS // patch
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (vision, 3, patch, patch),
        "patch_embedding.bias": (vision,),
        "dense_embedding.weight": (hidden, vision, merge, merge),
        "dense_embedding.bias": (hidden,),
    }
    return {
        f"{prefix}.embeddings.{name}": TensorSpec(shape=shape, group=group)
        for name, shape in shapes.items()
    }


def _image_head(arch: Architecture) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in head_of(arch).layers:
        shape = layer.weight_shape(arch)
        shapes[f"{layer.tensor}.weight"] = shape
        shapes[f"{layer.tensor}.bias"] = shape[:1]
    return shapes


def _embedders(arch: Architecture) -> dict[str, tuple[int, ...]]:
    names = ["timestep_embedder"]
    if arch.add_noise_scale_embedding:
        names.append("noise_scale_embedder")
    hidden = arch.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes[f"{name}.mlp.0.weight"] = (hidden, TIMESTEP_FREQUENCIES)
        shapes[f"{name}.mlp.0.bias"] = (hidden,)
        shapes[f"{name}.mlp.2.weight"] = (hidden, hidden)
        shapes[f"{name}.mlp.2.bias"] = (hidden,)
    return shapes
