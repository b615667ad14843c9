"""Computes what a training step minimises, with the engine's own network on packed rows.

The understanding path reads all rows first and keeps its keys and values. The images being denoised
attend to them, as they attend to a cache when a job runs.

Shape suffixes: R rows, U understanding tokens of a row, S slots of a row, G image tokens of a row
(S times those of the largest image), T all tokens of a pass, D hidden, H query heads, K
key/value heads, E head_dim, B images, N tokens of an image.
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
    """How images and text are weighed against each other."""

    t_mean: float = -0.8
    t_std: float = 0.8
    """Mean and deviation of the normal numbers whose sigmoid gives the timesteps."""
    min_remaining: float = 0.1
    """Smallest divisor 1 - t of a velocity, so that nearly clean images do not dominate a step."""
    text_weight: float = 0.1
    """Weight of the cross-entropy relative to the velocity loss."""
    answer_weight: float = 0.3
    """The same of the answers to questions."""
    faint: tuple[float, float] = (0.35, 0.65)
    """Least and most share of the other image where two are blended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The losses of one step, as scalars."""

    total: Tensor
    velocity: Tensor
    image: Tensor
    """Unweighted mean squared error of the predicted images."""
    text: Tensor
    """Cross-entropy of thoughts and stories."""
    answer: Tensor
    """Cross-entropy of answers to questions."""


class _Keep:
    """Attends within the understanding rows, and keeps each layer's keys and values."""

    def __init__(self, bias_R1UU: Tensor) -> None:
        self._bias = bias_R1UU
        self.kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:  # noqa: ARG002
        """Returns the attention of all rows, `[T, H, E]`."""
        rows = self._bias.shape[0]
        q, k, v = (_by_row(x, rows) for x in (q_THE, k_TKE, v_TKE))
        self.kept.append((k, v))
        return _attend(q, k, v, self._bias)


class _Read:
    """Attends from the images being denoised, to the keys that were kept and to their own."""

    def __init__(self, bias_R1GL: Tensor, kept: list[tuple[Tensor, Tensor]]) -> None:
        self._bias = bias_R1GL
        self._kept = kept

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Returns the attention of all rows, `[T, H, E]`."""
        rows = self._bias.shape[0]
        q, k, v = (_by_row(x, rows) for x in (q_THE, k_TKE, v_TKE))
        keys, values = self._kept[layer]
        keys, values = torch.cat((keys[:rows], k), dim=2), torch.cat((values[:rows], v), dim=2)
        return _attend(q, keys, values, self._bias)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """Returns `[R, heads, tokens, E]` from `[R * tokens, heads, E]`."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Returns the attention of all rows under an additive mask, `[T, H, E]`."""
    groups = q.shape[1] // k.shape[1]
    # Repeated explicitly: with a mask, torch's fused kernels do not take grouped heads.
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
    """Returns the normed outputs of both paths. All shapes are fixed, so it compiles once."""
    keep, eps = _Keep(understood_bias), network.arch.rms_norm_eps
    understood = _run_layers(network.understanding, understood_TD, understood_rotary, keep, eps)
    read = _Read(noisy_bias, keep.kept)
    return understood, _run_layers(network.generation, noisy_TD, noisy_rotary, read, eps)


def _run_layers(
    expert: Expert, x_TD: Tensor, rotary: Rotary, context: _Keep | _Read, eps: float
) -> Tensor:
    """Returns what `Expert.forward` returns, without lending layers, which would not compile."""
    for index, layer in enumerate(expert.layers):
        assert isinstance(layer, DecoderLayer)
        q_THE, k_TKE, v_TKE = layer.project(x_TD, rotary)
        x_TD = layer.finish(x_TD, context.attend(index, q_THE, k_TKE, v_TKE))
    return rms_norm(x_TD, expert.norm, eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The three functions that are worth compiling."""

    paint: Callable[..., Tensor] = paint
    run_experts: Callable[..., tuple[Tensor, Tensor]] = run_experts

    @classmethod
    def compiled(cls) -> Kernels:
        """Returns the functions compiled for a GPU."""
        return cls(
            paint=torch.compile(paint, dynamic=True),
            run_experts=torch.compile(run_experts, dynamic=False),
        )


class Objective:
    """Computes the losses of packed batches.

    Args:
        network: Is in float32, and runs under autocast on a GPU.
        packing: What a batch holds.
        config: How images and text are weighed.
        kernels: The functions, plain or compiled.
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
            batch: A batch of `packing.make_batch`, moved by `to_device`.
            generator: Draws noise and timesteps, on the same device.
        """
        images = self.draw(batch)
        clean = image_to_tokens(images * 2 - 1)[batch.drawn_scene]
        t = self._timesteps(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        remaining = (1 - t)[:, None, None]
        scale = image_noise_scale(self._network.arch, batch.resolution)
        noisy = t[:, None, None] * clean + remaining * scale * noise
        predicted, hidden_TD = self.predict(batch, images, noisy, t)
        errors = (predicted.float() - clean).square().mean(dim=(1, 2))
        velocity = (errors / (1 - t).clamp(min=self._config.min_remaining).square()).mean()
        logits = self._network.logits(hidden_TD[batch.label_place]).float()
        entropy = F.cross_entropy(logits, batch.label, reduction="none")
        text = _mean(entropy, (batch.answer_weight == 0).float())
        answer = _mean(entropy, batch.answer_weight)
        config = self._config
        total = velocity + config.text_weight * text + config.answer_weight * answer
        return Losses(total=total, velocity=velocity, image=errors.mean(), text=text, answer=answer)

    def predict(
        self, batch: PackedBatch, images: Tensor, noisy_BNx: Tensor, t_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the predicted clean images `[B, N, 3072]` and the rows' output `[R * U, D]`.

        Args:
            batch: A batch on the network's device.
            images: All images of the batch, from `draw`.
            noisy_BNx: The noisy images as tokens, in the order of `drawn_slot`.
            t_B: Their timesteps.
        """
        hidden_u, hidden_g = self._kernels.run_experts(
            self._network,
            self._embed_rows(batch, images),
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
        """Returns every image of the batch, float32 `[B, 3, height, width]` in [0, 1]."""
        size = batch.resolution
        if size not in self._patterns:
            weights = [background_weight(p, size.height, size.width) for p in Pattern]
            self._patterns[size] = torch.stack(weights).to(self._network.device)
        weight = self._patterns[size][batch.pattern]
        with torch.no_grad():
            return self._kernels.paint(
                weight, batch.soft, batch.shape, batch.geometry, batch.colour
            )

    def understanding_bias(self, batch: PackedBatch) -> Tensor:
        """Returns the additive mask of the understanding path, `[R, 1, U, U]`.

        A token sees the tokens before it in its own sequence, and all tokens of its own image, but
        none of another question.
        """
        sequence, fork, t = batch.sequence, batch.fork, batch.positions[0]
        index = torch.arange(sequence.shape[1], device=sequence.device)
        same = sequence[:, :, None] == sequence[:, None, :]
        earlier = index[None, :, None] >= index[None, None, :]
        same &= (fork[:, None, :] == 0) | (fork[:, :, None] == fork[:, None, :])
        allowed = same & (earlier | (t[:, :, None] == t[:, None, :]))
        return self._bias(allowed)

    def generation_bias(self, batch: PackedBatch) -> Tensor:
        """Returns the additive mask of the generation path, `[R, 1, G, U + G]`.

        An image sees its sequence up to its `<img>`, and itself. Empty places see one another,
        because a query that sees nothing would give NaN.
        """
        index = torch.arange(batch.sequence.shape[1], device=batch.sequence.device)
        rows, slots = batch.slot_sequence.shape
        prefix = (batch.slot_sequence[:, :, None] == batch.sequence[:rows, None, :]) & (
            index < batch.slot_prefix[:, :, None]
        )
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
        """Returns the positions of image tokens, `[3, R * G]`; zeros where a slot is not full."""
        size, width = batch.resolution, self._packing.slot_tokens
        device = batch.slot_t.device
        index = torch.arange(width, device=device)
        columns = size.width // PATCH_PIXELS
        t = batch.slot_t[:, :, None].expand(-1, -1, width)
        row = (index // columns).expand_as(t)
        column = (index % columns).expand_as(t)
        return torch.stack((t, row, column)).flatten(1)

    def _embed_images(
        self, embedding: PatchEmbedding, tokens_BNx: Tensor, size: Resolution
    ) -> Tensor:
        """Embeds images with one of the patch embedders; returns `[B, N, D]`."""
        grid = (size.height // PATCH, size.width // PATCH)
        rotary = self._network.patch_rotary(grid)
        patches = tokens_to_patches(tokens_BNx, size.height, size.width)
        return embedding(patches, grid, rotary).unflatten(0, (len(tokens_BNx), -1))

    def _embed_rows(self, batch: PackedBatch, images: Tensor) -> Tensor:
        x_TD = self._network.embed_tokens(batch.token_ids.flatten())
        mean = images.new_tensor(IMAGE_MEAN)[:, None, None]
        std = images.new_tensor(IMAGE_STD)[:, None, None]
        tokens = image_to_tokens((self._read_images(batch, images) - mean) / std)
        embeds = self._embed_images(self._network.understanding_vision, tokens, batch.resolution)
        read = embeds.flatten(0, 1).to(x_TD.dtype)
        return x_TD.index_copy(0, batch.image_tokens.flatten(), read)

    def _read_images(self, batch: PackedBatch, images: Tensor) -> Tensor:
        """Returns the images that the understanding path reads, those to be blended blended."""
        read = images[batch.image_scene]
        count = len(batch.faint_read)
        share = torch.linspace(*self._config.faint, count, device=images.device)
        first, other = read[batch.faint_read], images[batch.faint_scene]
        blends = torch.lerp(first, other, share[:, None, None, None])
        return read.index_copy(0, batch.faint_read, blends)

    def _embed_slots(self, batch: PackedBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """Returns embedded noisy images in their slots, `[R * G, D]`; zeros in empty places."""
        network, size = self._network, batch.resolution
        embeds = self._embed_images(network.generation_vision, noisy, size)
        condition = network.condition(t, image_noise_scale(network.arch, size))
        x_BND = embeds + condition[:, None, :]
        width = self._packing.slot_tokens
        padded = F.pad(x_BND, (0, 0, 0, width - size.image_tokens))
        placed = padded.new_zeros(batch.slot_sequence.numel(), width, padded.shape[-1])
        return placed.index_copy(0, batch.drawn_slot, padded).flatten(0, 1).float()

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(count, generator=generator, device=self._network.device)
        return torch.sigmoid(self._config.t_mean + self._config.t_std * normal)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted mean; 0 if there is nothing, as in a small batch without any text."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Returns the batch with its tensors on a device, without waiting for the device."""

    def moved(value: Tensor) -> Tensor:
        pinned = value.pin_memory() if device.type == "cuda" else value
        return pinned.to(device, non_blocking=True)

    tensors: dict[str, Any] = {
        item.name: moved(value)
        for item in fields(batch)
        if isinstance(value := getattr(batch, item.name), Tensor)
    }
    return replace(batch, **tensors)
