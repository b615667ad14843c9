"""The whole network: embedders, the two experts and the heads. Knows neither prompts nor sampling.

Shape suffixes: T tokens of a pass, D hidden, V vocabulary, B images of one size, N tokens of an
image, P patches, A the axes t, h, w.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import TIMESTEP_FREQUENCIES, Architecture
from sensebatch.checkpoint.tensors import head_part_rows
from sensebatch.engine.model.attention import Attention
from sensebatch.engine.model.copies import to_device
from sensebatch.engine.model.kv_cache import (
    GenerationContext,
    KVCache,
    SmallImagesContext,
    Span,
    UnderstandingContext,
    prefix_table,
)
from sensebatch.engine.model.lockstep import Lend, Pass, run
from sensebatch.engine.model.operations import Operations
from sensebatch.engine.model.patchify import (
    HEAD_MODULES,
    MERGE,
    PatchEmbedding,
    tokens_to_patches,
)
from sensebatch.engine.model.rope import Rotary, patch_rotary, token_rotary
from sensebatch.engine.model.transformer import AttentionContext, Expert, Middle
from sensebatch.plan.passes import LONG_RUN, evaluation_parts, images_per_part
from sensebatch.resolutions import PATCH_PIXELS, Resolution


class ScalarEmbedder(nn.Module):
    """Turns a number in [0, 1] into a vector of hidden size: sinusoids, then an MLP.

    Args:
        hidden: Size of the vector.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(TIMESTEP_FREQUENCIES, hidden)
        self.second = nn.Linear(hidden, hidden)

    def forward(self, value_B: Tensor) -> Tensor:
        """Returns `[B, D]` from float32 `[B]`; cosines first, without DiT's factor of 1000.

        Source: `TimestepEmbedder` of the SenseNova-U1 release, which follows DiT.
        """
        half = TIMESTEP_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=value_B.device) / half
        angles = value_B.float()[:, None] * (10000.0**-exponents)[None, :]
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class HeadPart(nn.Module):
    """Some rows of the vocabulary head.

    Args:
        num_rows: How many.
        hidden: Size of a row.
    """

    def __init__(self, num_rows: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden))


class VocabularyHead(nn.Module):
    """Turns hidden states into logits, in parts (`checkpoint.tensors.head_part_rows`).

    Args:
        arch: The network's shape.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            HeadPart(rows, arch.hidden_size) for rows in head_part_rows(arch)
        )
        self.lend: Lend = self._own
        """Lends a part with its weights on the device; see `Expert.lend`."""

    def _own(self, index: int) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.parts[index])

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Returns the logits, `[T, V]`."""
        return run(self.through(hidden_TD))

    def through(self, hidden_TD: Tensor) -> Pass[Tensor]:
        """Returns a pass that computes what `forward` returns."""
        logits = []
        for index in range(len(self.parts)):
            part = yield self.lend, index
            assert isinstance(part, HeadPart)
            logits.append(F.linear(hidden_TD, part.weight))
        return torch.cat(logits, dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePositions:
    """What all denoising steps of the same images share, computed once."""

    resolution: Resolution
    token_rotary: Rotary
    """Rotation angles of all tokens of all images."""
    patch_rotary: Rotary
    """Rotation angles of the patches of one image."""
    patch_grid: tuple[int, int]
    """(rows, columns) of the patches of one image."""
    prefixes_LBx: Tensor | None
    """See `kv_cache.prefix_table`; None for images that attend one by one."""


class Network(nn.Module):
    """The network of SenseNova-U1.

    Args:
        arch: The network's shape.
        operations: What layers compute between matrix products; torch's if None.
    """

    def __init__(self, arch: Architecture, operations: Operations | None = None) -> None:
        super().__init__()
        self.arch = arch
        self.operations = Operations() if operations is None else operations
        hidden = arch.hidden_size
        # Not initialised: on the meta device, that would import torch's compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(arch.vocab_size, hidden), freeze=False
        )
        self.lm_head = VocabularyHead(arch)
        self.understanding = Expert(arch, arch.understanding_moe, self.operations)
        self.generation = Expert(arch, arch.generation_moe, self.operations)
        self.understanding_vision = PatchEmbedding(arch)
        self.generation_vision = PatchEmbedding(arch)
        self.timestep_embedder = ScalarEmbedder(hidden)
        self.noise_scale_embedder = (
            ScalarEmbedder(hidden) if arch.add_noise_scale_embedding else None
        )
        self.head = HEAD_MODULES[arch.head](arch)

    @property
    def device(self) -> torch.device:
        """The device that the network computes on."""
        return self.understanding.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.understanding.norm.dtype

    def new_cache(self) -> KVCache:
        """Returns an empty cache for one sequence."""
        return KVCache(
            num_layers=self.arch.num_layers,
            num_kv_heads=self.arch.num_kv_heads,
            head_dim=self.arch.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def token_rotary(self, positions_AT: Tensor) -> Rotary:
        """Returns the angles of tokens at these positions; see `rope.token_rotary`."""
        return token_rotary(
            positions_AT,
            head_dim=self.arch.head_dim,
            theta=self.arch.rope_theta,
            theta_hw=self.arch.rope_theta_hw,
            dtype=self.dtype,
        )

    def embed_image(self, patches_Px: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embeds an input image for the understanding path; returns `[tokens, D]`.

        Args:
            patches_Px: `[patches, 768]` normalised rows, (channel, y, x).
            grid: (rows, columns) of patches.
        """
        rotary = self.patch_rotary(grid)
        embeds_TD: Tensor = self.understanding_vision(patches_Px.to(self.device), grid, rotary)
        return embeds_TD

    def patch_rotary(self, grid: tuple[int, int]) -> Rotary:
        """Returns the angles of an image's patches; see `rope.patch_rotary`."""
        return patch_rotary(
            grid,
            channels=self.arch.vision_hidden_size,
            theta=self.arch.vision_rope_theta,
            device=self.device,
        )

    def understand(
        self, x_TD: Tensor, positions_AT: Tensor, spans: Sequence[Span], attention: Attention
    ) -> Tensor:
        """Runs prompt tokens of several sequences and caches them; returns normed `[T, D]`."""
        return run(self.understanding_pass(x_TD, positions_AT, spans, attention))

    def understanding_pass(
        self, x_TD: Tensor, positions_AT: Tensor, spans: Sequence[Span], attention: Attention
    ) -> Pass[Tensor]:
        """Returns a pass that caches prompt tokens of several sequences; see `understand`.

        The caller advances the caches.

        Args:
            x_TD: Embedded tokens of all sequences, in the order of `spans`.
            positions_AT: int64 `[3, T]`, rows t, h, w.
            spans: Each sequence's cache, number of tokens and segments.
            attention: How one run attends.
        """
        context = UnderstandingContext(spans, attention, self.operations.runs)
        rotary = self.token_rotary(to_device(positions_AT, self.device))
        return self.understanding.through(x_TD, rotary, context)

    def image_positions(self, caches: Sequence[KVCache], resolution: Resolution) -> ImagePositions:
        """Returns the positions of one image after each cache.

        They hold as long as the caches neither move nor grow.
        """
        rows, columns = resolution.height // PATCH_PIXELS, resolution.width // PATCH_PIXELS
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
        positions = [
            torch.cat((torch.full((1, rows * columns), cache.next_t), grid)) for cache in caches
        ]
        patch_grid = (rows * MERGE, columns * MERGE)
        return ImagePositions(
            resolution=resolution,
            token_rotary=self.token_rotary(to_device(torch.cat(positions, dim=1), self.device)),
            patch_rotary=self.patch_rotary(patch_grid),
            patch_grid=patch_grid,
            prefixes_LBx=prefix_table(caches) if self._attends_at_once(resolution) else None,
        )

    def _attends_at_once(self, resolution: Resolution) -> bool:
        """Returns whether all images of a part attend in one launch."""
        return self.operations.runs is not None and resolution.image_tokens < LONG_RUN

    def condition(self, t_B: Tensor, noise_scale: float) -> Tensor:
        """Returns `[B, D]`, what is added to every token of an image at each of these timesteps.

        Args:
            t_B: float32 timesteps, from 0 (noise) to 1 (image).
            noise_scale: Standard deviation of the noise that the images started from.
        """
        condition_BD: Tensor = self.timestep_embedder(t_B)
        if self.noise_scale_embedder is not None:
            ratio = noise_scale / self.arch.noise_scale_max_value
            condition_BD = condition_BD + self.noise_scale_embedder(torch.full_like(t_B, ratio))
        return condition_BD

    def predict_image(
        self,
        z_JNx: Tensor,
        condition_D: Tensor,
        caches: Sequence[KVCache],
        positions: ImagePositions,
        attention: Attention,
        images: Sequence[int] | None = None,
        middle: Middle | None = None,
    ) -> Tensor:
        """Returns the predicted clean images, float32 `[B, N, 3072]`.

        Args:
            z_JNx: Noisy images as tokens (y, x, channel).
            condition_D: What `condition` returns for the timestep of all evaluations.
            caches: The prefix of each evaluation; only read.
            positions: What `image_positions` returns for the same caches.
            attention: How one image attends.
            images: Which image each evaluation is of; None for one evaluation of each.
            middle: See `Expert.forward`.
        """
        size = positions.resolution
        seen = range(len(caches)) if images is None else images
        parts = evaluation_parts(seen, size.image_tokens)
        x_TD = self.embed_noisy(z_JNx, condition_D, positions, seen)
        # Not named, so that a key/value buffer is freed before the head runs.
        x_TD = self.generation(
            x_TD,
            positions.token_rotary,
            self._image_context(caches, positions, parts, attention),
            middle,
        )
        x_BND = x_TD.unflatten(0, (len(caches), -1))
        x_BNx = z_JNx.new_empty(len(caches), *z_JNx.shape[1:], dtype=torch.float32)
        for part in parts:
            x_BNx[part] = self.head(x_BND[part], size.height, size.width)
        return x_BNx

    def _image_context(
        self,
        caches: Sequence[KVCache],
        positions: ImagePositions,
        parts: Sequence[slice],
        attention: Attention,
    ) -> AttentionContext:
        """Returns what images attend to; see `predict_image`."""
        num_tokens, prefixes_LBx = positions.resolution.image_tokens, positions.prefixes_LBx
        if prefixes_LBx is None:
            return GenerationContext(caches, num_tokens, parts, attention)
        assert self.operations.runs is not None
        return SmallImagesContext(prefixes_LBx, num_tokens, parts, self.operations.runs)

    def embed_noisy(
        self,
        z_JNx: Tensor,
        condition_D: Tensor,
        positions: ImagePositions,
        images: Sequence[int],
    ) -> Tensor:
        """Returns the input of the generation expert, `[B * N, D]`; see `predict_image`."""
        size = positions.resolution
        x_BND = condition_D.new_empty(len(images), size.image_tokens, self.arch.hidden_size)
        # A part at a time, so that temporaries stay as small as in a layer. Each image is embedded
        # once for all its evaluations.
        at_a_time = images_per_part(size.image_tokens)
        for start in range(0, len(z_JNx), at_a_time):
            z_part = z_JNx[start : start + at_a_time]
            embedded_TD = self.generation_vision(
                tokens_to_patches(z_part, size.height, size.width),
                positions.patch_grid,
                positions.patch_rotary,
            )
            embedded = embedded_TD.unflatten(0, (len(z_part), -1))
            for row, image in enumerate(images):
                if start <= image < start + at_a_time:
                    torch.add(embedded[image - start], condition_D, out=x_BND[row])
        return x_BND.flatten(0, 1)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Returns the logits of normed outputs, `[T, V]`."""
        return self.lm_head(hidden_TD)

    def embed_text(self, ids_T: Tensor) -> Tensor:
        """Returns embedded tokens `[T, D]` on the network's device.

        The table itself may be in host memory.
        """
        ids_T = to_device(ids_T, self.embed_tokens.weight.device)
        return to_device(self.embed_tokens(ids_T), self.device)
