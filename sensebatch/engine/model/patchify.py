"""Turns pixels into tokens and back: layouts, the two patch embedders, the two image heads.

An image token is a square of 32 by 32 pixels: 2 by 2 patches of 16 by 16. The sampler's state keeps
a token's pixels as (y, x, channel); the embedders read those of a patch as (channel, y, x).

Shape suffixes: B images of one size, N tokens of an image, P patches, D hidden, C patch channels,
x numbers of a patch or token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import Architecture, HeadKind
from sensebatch.checkpoint.heads import MLP_HIDDEN, PIXEL_CHANNELS, PIXEL_OUT, PIXEL_REACH
from sensebatch.engine.model.rope import Rotary, rotate_patches
from sensebatch.plan.passes import head_parts
from sensebatch.resolutions import PATCH_PIXELS, TOKEN_NUMBERS

MERGE = 2
"""Patches along a side of a token."""
PATCH = PATCH_PIXELS // MERGE
"""Pixels along a side of a patch."""


def image_to_tokens(image_B3HW: Tensor) -> Tensor:
    """Returns `[B, N, 3072]` from `[B, 3, height, width]`; tokens row-major, pixels (y, x, c)."""
    height, width = image_B3HW.shape[-2:]
    rows, columns = height // PATCH_PIXELS, width // PATCH_PIXELS
    cut = image_B3HW.reshape(-1, 3, rows, PATCH_PIXELS, columns, PATCH_PIXELS)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, rows * columns, TOKEN_NUMBERS)


def tokens_to_image(tokens_BNx: Tensor, height: int, width: int) -> Tensor:
    """Returns `[B, 3, height, width]`, the inverse of `image_to_tokens`."""
    rows, columns = height // PATCH_PIXELS, width // PATCH_PIXELS
    cut = tokens_BNx.reshape(-1, rows, columns, PATCH_PIXELS, PATCH_PIXELS, 3)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, height, width)


def tokens_to_patches(tokens_BNx: Tensor, height: int, width: int) -> Tensor:
    """Returns patch rows `[B * patches, 768]`, row-major over each image, pixels (c, y, x)."""
    rows, columns = height // PATCH_PIXELS, width // PATCH_PIXELS
    cut = tokens_BNx.reshape(-1, rows, columns, MERGE, PATCH, MERGE, PATCH, 3)
    return cut.permute(0, 1, 3, 2, 5, 7, 4, 6).reshape(-1, 3 * PATCH * PATCH)


class PatchEmbedding(nn.Module):
    """Embeds patches as tokens: a convolution per patch, 2-D RoPE, a convolution per 2 by 2.

    Args:
        arch: The network's shape.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        channels = arch.vision_hidden_size
        self.patch_embedding = nn.Conv2d(3, channels, PATCH, PATCH)
        self.dense_embedding = nn.Conv2d(channels, arch.hidden_size, MERGE, MERGE)

    def forward(self, patches_Px: Tensor, grid: tuple[int, int], rotary: Rotary) -> Tensor:
        """Returns `[tokens, D]`, with the tokens of each image row-major.

        The windows of neither convolution overlap, so both are matrix products over all images.

        Args:
            patches_Px: `[patches, 768]` rows of any number of images of one size.
            grid: (rows, columns) of the patches of an image.
            rotary: What `rope.patch_rotary` returns for that grid.
        """
        first, second = self.patch_embedding, self.dense_embedding
        x_PC = F.linear(patches_Px.to(first.weight.dtype), first.weight.flatten(1), first.bias)
        x_PC = rotate_patches(F.gelu(x_PC), rotary)
        rows, columns = grid
        cut = x_PC.reshape(-1, rows // MERGE, MERGE, columns // MERGE, MERGE, x_PC.shape[-1])
        squares = cut.permute(0, 1, 3, 5, 2, 4).reshape(-1, second.weight[0].numel())
        return F.linear(squares, second.weight.flatten(1), second.bias)


class MlpHead(nn.Module):
    """Predicts an image from hidden states, token by token.

    Args:
        arch: The network's shape.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.first = nn.Linear(arch.hidden_size, MLP_HIDDEN)
        self.second = nn.Linear(MLP_HIDDEN, TOKEN_NUMBERS)

    def forward(self, x_BND: Tensor, height: int, width: int) -> Tensor:  # noqa: ARG002
        """Returns predicted images `[B, N, 3072]`; this head does not need their sides."""
        return self.second(F.gelu(self.first(x_BND)))


class PixelHead(nn.Module):
    """Predicts an image from hidden states by convolutions over the whole image.

    Args:
        arch: The network's shape.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(arch.hidden_size // 4, PIXEL_CHANNELS, 3, padding=1)
        self.conv2 = nn.Conv2d(PIXEL_CHANNELS // 4, PIXEL_OUT, 3, padding=1)

    def forward(self, x_BND: Tensor, height: int, width: int) -> Tensor:
        """Returns predicted images `[B, N, 3072]` of this height and width in pixels.

        A large image goes through some of its rows at a time, each time with those around them
        that their pixels depend on. So temporaries do not grow with the image.
        """
        rows, columns = height // PATCH_PIXELS, width // PATCH_PIXELS
        x_BRCD = x_BND.unflatten(1, (rows, columns))
        parts = head_parts(rows, columns, PIXEL_REACH)
        if len(parts) == 1:
            return self._predict(x_BRCD)
        x_BRCx = x_BND.new_empty(*x_BRCD.shape[:3], TOKEN_NUMBERS)
        for part, seen in parts:
            own = slice(part.start - seen.start, part.stop - seen.start)
            predicted = self._predict(x_BRCD[:, seen]).unflatten(1, (-1, columns))
            x_BRCx[:, part] = predicted[:, own]
            del predicted
        return x_BRCx.flatten(1, 2)

    def _predict(self, x_BRCD: Tensor) -> Tensor:
        """Returns `[B, N, 3072]` of rows of tokens as if there were nothing around them."""
        x = x_BRCD.permute(0, 3, 1, 2)
        # Otherwise cuDNN may round float32 to the 10 bits of TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            # One statement a step, so that a step's input is freed once its output is there.
            x = F.pixel_shuffle(x, 2)
            x = self.conv1(x)
            x = F.gelu(x)
            x = F.pixel_shuffle(x, 2)
            x = self.conv2(x)
        x = F.pixel_shuffle(x, 8)
        return image_to_tokens(x)


HEAD_MODULES: Mapping[HeadKind, Callable[[Architecture], MlpHead | PixelHead]] = {
    HeadKind.MLP: MlpHead,
    HeadKind.PIXEL: PixelHead,
}
"""The module of every head; `checkpoint.heads.HEADS` has the facts that others need."""
