"""Where each tensor of a checkpoint goes in the network: one flat table of names.

The network joins what is computed together (query, key and value; gate and up; the norms of a
head's halves; the experts of a sparse block), so a checkpoint tensor may be part of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.checkpoint.heads import head_of
from sensebatch.checkpoint.tensors import head_part_rows

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the network's parameters for a checkpoint tensor, or for some of its rows."""

    parameter: str
    index: Index = ()
    """Which part of the parameter, always a contiguous one; empty for all of it."""
    rows: tuple[int, int] | None = None
    """Which rows (start, end) of the checkpoint tensor go here; None for all."""

    def view(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the part as a view that can be copied into."""
        parameter = parameters[self.parameter]
        return parameter[self.index] if self.index else parameter


def checkpoint_slots(arch: Architecture) -> dict[str, tuple[Slot, ...]]:
    """Returns the slots of every checkpoint tensor by name; only the head's has more than one."""
    slots = {"language_model.model.embed_tokens.weight": Slot("embed_tokens.weight")}
    slots |= _expert(arch, "understanding", "", arch.understanding_moe)
    slots |= _expert(arch, "generation", "_mot_gen", arch.generation_moe)
    slots |= _vision("vision_model", "understanding_vision")
    slots |= _vision("fm_modules.vision_model_mot_gen", "generation_vision")
    names = {"timestep_embedder.mlp.0": "timestep_embedder.first"}
    names["timestep_embedder.mlp.2"] = "timestep_embedder.second"
    if arch.add_noise_scale_embedding:
        names["noise_scale_embedder.mlp.0"] = "noise_scale_embedder.first"
        names["noise_scale_embedder.mlp.2"] = "noise_scale_embedder.second"
    names |= {layer.tensor: f"head.{layer.module}" for layer in head_of(arch).layers}
    for name, module in names.items():
        for kind in ("weight", "bias"):
            slots[f"fm_modules.{name}.{kind}"] = Slot(f"{module}.{kind}")
    whole = {name: (slot,) for name, slot in slots.items()}
    return whole | {"language_model.lm_head.weight": _head(arch)}


def state_dict(network: nn.Module, arch: Architecture) -> dict[str, Tensor]:
    """Returns the network's weights as checkpoint tensors."""
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return {
        name: torch.cat([slot.view(parameters) for slot in slots]).contiguous()
        if len(slots) > 1
        else slots[0].view(parameters).contiguous()
        for name, slots in checkpoint_slots(arch).items()
    }


def _head(arch: Architecture) -> tuple[Slot, ...]:
    slots, start = [], 0
    for part, rows in enumerate(head_part_rows(arch)):
        slots.append(Slot(f"lm_head.parts.{part}.weight", rows=(start, start + rows)))
        start += rows
    return tuple(slots)


def _vision(name: str, module: str) -> dict[str, Slot]:
    return {
        f"{name}.embeddings.{part}.{kind}": Slot(f"{module}.{part}.{kind}")
        for part in ("patch_embedding", "dense_embedding")
        for kind in ("weight", "bias")
    }


def _expert(arch: Architecture, expert: str, suffix: str, moe: Moe | None) -> dict[str, Slot]:
    slots = {f"language_model.model.norm{suffix}.weight": Slot(f"{expert}.norm")}
    for layer in range(arch.num_layers):
        source = f"language_model.model.layers.{layer}."
        target = f"{expert}.layers.{layer}."
        sparse = moe if moe is not None and moe.sparse_layers[layer] else None
        slots |= dict(_attention(arch, source, target, suffix))
        slots |= dict(_mlp(arch, f"{source}mlp{suffix}.", f"{target}mlp.", sparse))
    return slots


def _attention(
    arch: Architecture, source: str, target: str, suffix: str
) -> Iterator[tuple[str, Slot]]:
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    rows = {
        "q": slice(0, query),
        "k": slice(query, query + key),
        "v": slice(query + key, query + 2 * key),
    }
    for name, part in rows.items():
        yield f"{source}self_attn.{name}_proj{suffix}.weight", Slot(f"{target}qkv.weight", (part,))
    yield f"{source}self_attn.o_proj{suffix}.weight", Slot(f"{target}o.weight")
    for name in ("q_norm", "k_norm"):
        yield f"{source}self_attn.{name}{suffix}.weight", Slot(f"{target}{name}", (0,))
        yield f"{source}self_attn.{name}_hw{suffix}.weight", Slot(f"{target}{name}", (1,))
    yield f"{source}input_layernorm{suffix}.weight", Slot(f"{target}input_norm")
    yield f"{source}post_attention_layernorm{suffix}.weight", Slot(f"{target}post_norm")


def _mlp(
    arch: Architecture, source: str, target: str, moe: Moe | None
) -> Iterator[tuple[str, Slot]]:
    if moe is None:
        yield from _swiglu(source, target, ".weight", (), arch.intermediate_size)
        return
    yield f"{source}gate.weight", Slot(f"{target}gate.weight")
    for expert in range(moe.num_experts):
        yield from _swiglu(
            f"{source}experts.{expert}.", target, "", (expert,), moe.intermediate_size
        )


def _swiglu(
    source: str, target: str, ending: str, index: Index, intermediate: int
) -> Iterator[tuple[str, Slot]]:
    gate, up = slice(0, intermediate), slice(intermediate, 2 * intermediate)
    yield f"{source}gate_proj.weight", Slot(f"{target}gate_up{ending}", (*index, gate))
    yield f"{source}up_proj.weight", Slot(f"{target}gate_up{ending}", (*index, up))
    yield f"{source}down_proj.weight", Slot(f"{target}down{ending}", index)
