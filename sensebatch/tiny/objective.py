"""What a training step minimises, computed with the engine's own network on packed rows.

The understanding path reads all rows first and leaves its keys and values behind; the pictures
being denoised read them, as they read a cache when a job runs.

Shape suffixes: R rows, U understanding tokens of a row, S slots of a row, G image tokens of a row
(S times those of the largest picture), T all tokens of a pass, D hidden, H query heads, K
key/value heads, E head_dim, B pictures, N tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import rms_norm
from sensebatch.engine.model.patchify import (
    PATCH,
    PatchEmbedding,
    image_to_tokens,
    tokens_to_patches,
)
from sensebatch.engine.model.rope import Rotary
from sensebatch.engine.model.transformer import DecoderLayer, Expert
from sensebatch.engine.preprocess import IMAGE_MEAN, IMAGE_STD
from sensebatch.engine.tasks.denoise import image_noise_scale
from sensebatch.resolutions import PATCH_PIXELS, Resolution
from sensebatch.tiny.packing import PackedBatch, PackingConfig
from sensebatch.tiny.world.draw import background_weight, paint
from sensebatch.tiny.world.scene import Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """How pictures and text are learned."""

    t_mean: float = -0.8
    t_std: float = 0.8
    """Timesteps are the sigmoid of a normal number of this mean and deviation."""
    min_remaining: float = 0.1
    """Least 1 - t in the velocity's divisor, so that no step is ruled by nearly clean pictures."""
    text_weight: float = 0.1
    """Of the cross-entropy beside the velocity loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Scalars of one step."""

    total: Tensor
    velocity: Tensor
    image: Tensor
    """Mean squared error of the predicted pictures, not weighted."""
    text: Tensor


class _Keep:
    """Attention of the understanding rows; keeps each layer's keys and values."""

    def __init__(self, bias_R1UU: Tensor) -> None:
        self._bias = bias_R1UU
        self.kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:  # noqa: ARG002
        """Returns `[T, H, E]` of all rows."""
        rows = self._bias.shape[0]
        q, k, v = (_by_row(x, rows) for x in (q_THE, k_TKE, v_TKE))
        self.kept.append((k, v))
        return _attend(q, k, v, self._bias)


class _Read:
    """Attention of the pictures being denoised: to what was kept, then to themselves."""

    def __init__(self, bias_R1GL: Tensor, kept: list[tuple[Tensor, Tensor]]) -> None:
        self._bias = bias_R1GL
        self._kept = kept

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Returns `[T, H, E]` of all rows."""
        rows = self._bias.shape[0]
        q, k, v = (_by_row(x, rows) for x in (q_THE, k_TKE, v_TKE))
        keys, values = self._kept[layer]
        return _attend(q, torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2), self._bias)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """Returns `[R, heads, tokens, E]` from `[R * tokens, heads, E]`."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Returns `[T, H, E]`."""
    groups = q.shape[1] // k.shape[1]
    # Repeated by hand: with a mask, torch's fused kernels take no grouped heads.
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    dtype = bias.dtype
    out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=bias)
    return out.transpose(1, 2).flatten(0, 1)


def run_experts(
    network: Network,
    understood_TD: Tensor,
    understood_rotary: Rotary,
    understood_bias: Tensor,
    noisy_TD: Tensor,
    noisy_rotary: Rotary,
    noisy_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the normed outputs of both paths; all shapes fixed, so it compiles once."""
    keep, eps = _Keep(understood_bias), network.arch.rms_norm_eps
    understood = _run_layers(network.understanding, understood_TD, understood_rotary, keep, eps)
    read = _Read(noisy_bias, keep.kept)
    return understood, _run_layers(network.generation, noisy_TD, noisy_rotary, read, eps)


def _run_layers(
    expert: Expert, x_TD: Tensor, rotary: Rotary, context: _Keep | _Read, eps: float
) -> Tensor:
    """Returns `Expert.forward` without lent layers, which a compiler cannot follow."""
    for index, layer in enumerate(expert.layers):
        assert isinstance(layer, DecoderLayer)
        q_THE, k_TKE, v_TKE = layer.project(x_TD, rotary)
        x_TD = layer.finish(x_TD, context.attend(index, q_THE, k_TKE, v_TKE))
    return rms_norm(x_TD, expert.norm, eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The three functions worth compiling."""

    paint: Callable[..., Tensor] = paint
    run_experts: Callable[..., tuple[Tensor, Tensor]] = run_experts

    @classmethod
    def compiled(cls) -> Kernels:
        """Returns them compiled, for a GPU."""
        return cls(
            paint=torch.compile(paint, dynamic=True),
            run_experts=torch.compile(run_experts, dynamic=False),
        )


class Objective:
    """Losses of packed batches.

    Args:
        network: In float32; computed with under autocast on a GPU.
        packing: Of the batches.
        config: How pictures and text are learned.
        kernels: Plain or compiled.
    """

    def __init__(
        self,
        network: Network,
        packing: PackingConfig,
        config: ObjectiveConfig,
        kernels: Kernels,
    ) -> None:
        self._network = network
        self._packing = packing
        self._config = config
        self._kernels = kernels
        self._patterns: dict[Resolution, Tensor] = {}

    def losses(self, batch: PackedBatch, generator: torch.Generator) -> Losses:
        """Returns the losses of a batch whose tensors are on the network's device.

        Args:
            batch: Of `packing.make_batch`, moved by `to_device`.
            generator: Of noise and timesteps, on the same device.
        """
        pictures = self.draw(batch)
        clean = image_to_tokens(pictures * 2 - 1)[batch.drawn_scene]
        t = self._timesteps(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        remaining = (1 - t)[:, None, None]
        scale = image_noise_scale(self._network.arch, batch.resolution)
        noisy = t[:, None, None] * clean + remaining * scale * noise
        predicted, hidden_TD = self.predict(batch, pictures, noisy, t)
        errors = (predicted.float() - clean).square().mean(dim=(1, 2))
        velocity = (errors / (1 - t).clamp(min=self._config.min_remaining).square()).mean()
        logits = self._network.logits(hidden_TD[batch.label_place]).float()
        # A small batch may have nothing to say, of which the mean would be NaN.
        text = F.cross_entropy(logits, batch.label, reduction="sum") / max(1, len(batch.label))
        total = velocity + self._config.text_weight * text
        return Losses(total=total, velocity=velocity, image=errors.mean(), text=text)

    def predict(
        self, batch: PackedBatch, pictures: Tensor, noisy_BNx: Tensor, t_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the predicted clean pictures `[B, N, 3072]` and the rows' output `[R * U, D]`.

        Args:
            batch: On the network's device.
            pictures: Of `draw`.
            noisy_BNx: The batch's denoised pictures as tokens, in the order of `drawn_slot`.
            t_B: Their timesteps.
        """
        hidden_u, hidden_g = self._kernels.run_experts(
            self._network,
            self._embed_rows(batch, pictures),
            self._network.token_rotary(batch.positions.flatten(1)),
            self.understanding_bias(batch),
            self._embed_slots(batch, noisy_BNx, t_B),
            self._network.token_rotary(self._slot_positions(batch)),
            self.generation_bias(batch),
        )
        size = batch.resolution
        slots = hidden_g.unflatten(0, (-1, self._packing.slot_tokens))[batch.drawn_slot]
        predicted = self._network.head(slots[:, : size.image_tokens], size.height, size.width)
        return predicted, hidden_u

    def draw(self, batch: PackedBatch) -> Tensor:
        """Returns every picture of the batch, float32 `[B, 3, height, width]` in [0, 1]."""
        drawing, device = batch.drawing, self._network.device
        size = batch.resolution
        if size not in self._patterns:
            weights = [background_weight(p, size.height, size.width) for p in Pattern]
            self._patterns[size] = torch.stack(weights).to(device)
        arrays = (drawing.soft, drawing.shape, drawing.geometry, drawing.colour)
        soft, shape, geometry, colour = (torch.from_numpy(a).to(device) for a in arrays)
        pattern = torch.from_numpy(drawing.pattern).to(device)
        with torch.no_grad():
            return self._kernels.paint(self._patterns[size][pattern], soft, shape, geometry, colour)

    def understanding_bias(self, batch: PackedBatch) -> Tensor:
        """Returns the additive mask of the understanding path, `[R, 1, U, U]`.

        A token sees what is before it in its own sequence, and the tokens of its own image.
        """
        sequence, t = batch.sequence, batch.positions[0]
        index = torch.arange(sequence.shape[1], device=sequence.device)
        same = sequence[:, :, None] == sequence[:, None, :]
        earlier = index[None, :, None] >= index[None, None, :]
        allowed = same & (earlier | (t[:, :, None] == t[:, None, :]))
        return self._bias(allowed)

    def generation_bias(self, batch: PackedBatch) -> Tensor:
        """Returns the additive mask of the generation path, `[R, 1, G, U + G]`.

        A picture sees its sequence up to its `<img>`, and itself. Empty places see one another,
        for a query that sees nothing would give NaN.
        """
        index = torch.arange(batch.sequence.shape[1], device=batch.sequence.device)
        prefix = (batch.slot_sequence[:, :, None] == batch.sequence[:, None, :]) & (
            index < batch.slot_prefix[:, :, None]
        )
        rows, slots = batch.slot_sequence.shape
        width = self._packing.slot_tokens
        filled = torch.arange(width, device=index.device) < batch.resolution.image_tokens
        own = torch.eye(slots, dtype=torch.bool, device=index.device)
        seen = own[:, None, :, None] & (filled[:, None] == filled)[None, :, None, :]
        seen = seen.reshape(slots * width, slots * width).expand(rows, -1, -1)
        prefix = prefix.repeat_interleave(width, dim=1) & filled.repeat(slots)[None, :, None]
        return self._bias(torch.cat((prefix, seen), dim=2))

    def _bias(self, allowed: Tensor) -> Tensor:
        half = allowed.device.type == "cuda"
        bias = torch.zeros(
            allowed.shape, dtype=torch.bfloat16 if half else torch.float32, device=allowed.device
        )
        return bias.masked_fill_(~allowed, float("-inf"))[:, None]

    def _slot_positions(self, batch: PackedBatch) -> Tensor:
        """Returns `[3, R * G]`; zeros in the places of a slot that a small picture leaves."""
        size, width = batch.resolution, self._packing.slot_tokens
        device = batch.slot_t.device
        index = torch.arange(width, device=device)
        columns = size.width // PATCH_PIXELS
        t = batch.slot_t[:, :, None].expand(-1, -1, width)
        row = (index // columns).expand_as(t)
        column = (index % columns).expand_as(t)
        return torch.stack((t, row, column)).flatten(1)

    def _embed_pictures(
        self, embedding: PatchEmbedding, tokens_BNx: Tensor, size: Resolution
    ) -> Tensor:
        """Returns `[B, N, D]` of pictures through one of the patch embedders."""
        grid = (size.height // PATCH, size.width // PATCH)
        rotary = self._network.patch_rotary(grid)
        patches = tokens_to_patches(tokens_BNx, size.height, size.width)
        return embedding(patches, grid, rotary).unflatten(0, (len(tokens_BNx), -1))

    def _embed_rows(self, batch: PackedBatch, pictures: Tensor) -> Tensor:
        x_TD = self._network.embed_tokens(batch.token_ids.flatten())
        mean = pictures.new_tensor(IMAGE_MEAN)[:, None, None]
        std = pictures.new_tensor(IMAGE_STD)[:, None, None]
        tokens = image_to_tokens((pictures - mean) / std)
        embeds = self._embed_pictures(self._network.understanding_vision, tokens, batch.resolution)
        read = embeds[batch.image_scene].flatten(0, 1).to(x_TD.dtype)
        return x_TD.index_copy(0, batch.image_tokens.flatten(), read)

    def _embed_slots(self, batch: PackedBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """Returns `[R * G, D]`, zeros where a slot or a place in it is empty."""
        network, size = self._network, batch.resolution
        embeds = self._embed_pictures(network.generation_vision, noisy, size)
        condition = network.condition(t, image_noise_scale(network.arch, size))
        x_BND = embeds + condition[:, None, :]
        width = self._packing.slot_tokens
        padded = F.pad(x_BND, (0, 0, 0, width - size.image_tokens))
        placed = padded.new_zeros(batch.slot_sequence.numel(), width, padded.shape[-1])
        return placed.index_copy(0, batch.drawn_slot, padded).flatten(0, 1).float()

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(count, generator=generator, device=self._network.device)
        return torch.sigmoid(self._config.t_mean + self._config.t_std * normal)


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Returns the batch with its tensors on a device; the drawing's arrays stay."""
    tensors: dict[str, Any] = {
        item.name: value.to(device, non_blocking=True)
        for item in fields(batch)
        if isinstance(value := getattr(batch, item.name), Tensor)
    }
    return replace(batch, **tensors)
