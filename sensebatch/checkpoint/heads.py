"""The image heads, from hidden states to pixels: one row of facts for each. No torch.

What reads a head's tensors, counts its memory or its time asks the row. The modules themselves are
in `engine.model.patchify`, a row each as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture, HeadKind
from sensebatch.resolutions import TOKEN_NUMBERS

MLP_HIDDEN = 4096
"""Hidden width of the MLP head; it does not depend on the backbone."""
PIXEL_CHANNELS = 1024
"""Channels of the convolutional head's first convolution."""
PIXEL_OUT = 3 * 8 * 8
"""Channels of its second: the last shuffle makes each place a square of 8 by 8 pixels."""

PIXEL_REACH = 1
"""Rows of tokens on either side that its pixels depend on: the first convolution sees half a token
beyond its own, the second a quarter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayer:
    """A matrix or convolution of a head; it has a bias."""

    tensor: str
    """Its name in the checkpoint, below `fm_modules`."""
    module: str
    """Its name in the head's module."""
    weight_shape: Callable[[Architecture], tuple[int, ...]]
    rows_per_token: int
    """Rows of a matrix product that a token of an image becomes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the rest of the program knows of a head."""

    layers: tuple[HeadLayer, ...]
    working_numbers: Callable[[Architecture], int]
    """Numbers that a token takes at most while the head runs, its hidden state not counted."""
    reach: int | None = None
    """Rows of tokens on either side that a prediction depends on, where large images go through
    the head some rows at a time (`plan.passes.head_parts`); None where they go through whole."""


HEADS: Mapping[HeadKind, Head] = {
    HeadKind.MLP: Head(
        layers=(
            HeadLayer(
                tensor="fm_head.0",
                module="first",
                weight_shape=lambda arch: (MLP_HIDDEN, arch.hidden_size),
                rows_per_token=1,
            ),
            HeadLayer(
                tensor="fm_head.2",
                module="second",
                weight_shape=lambda _: (TOKEN_NUMBERS, MLP_HIDDEN),
                rows_per_token=1,
            ),
        ),
        # Before and after the activation; the output comes when the first of them is freed.
        working_numbers=lambda _: MLP_HIDDEN + max(MLP_HIDDEN, TOKEN_NUMBERS),
    ),
    HeadKind.PIXEL: Head(
        # A token's square is doubled to 2 by 2 places, then to 4 by 4, then to 32 by 32 pixels.
        layers=(
            HeadLayer(
                tensor="fm_head.conv1",
                module="conv1",
                weight_shape=lambda arch: (PIXEL_CHANNELS, arch.hidden_size // 4, 3, 3),
                rows_per_token=4,
            ),
            HeadLayer(
                tensor="fm_head.conv2",
                module="conv2",
                weight_shape=lambda _: (PIXEL_OUT, PIXEL_CHANNELS // 4, 3, 3),
                rows_per_token=16,
            ),
        ),
        # The first convolution beside its input; then before and after the activation.
        working_numbers=lambda arch: 4 * PIXEL_CHANNELS + max(arch.hidden_size, 4 * PIXEL_CHANNELS),
        reach=PIXEL_REACH,
    ),
}


def head_of(arch: Architecture) -> Head:
    """Returns the facts of a network's head."""
    return HEADS[arch.head]
