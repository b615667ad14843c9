"""Grouped-query attention of one sequence, and of the runs of a prompt.

On a CUDA device two kernels share the work: long runs of image tokens go to the backend of the
settings, everything else (text, small images) to one that computes the same bytes from the same
numbers each time. Torch's own choice does not: for one query after many keys it takes cuDNN's
kernel that splits the keys, which sums the splits in the order in which they happen to end.

Shape suffixes: Q query tokens, L key tokens, H query heads, K key/value heads, E head_dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sensebatch.plan.passes import LONG_RUN, RUN_SCORES

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(q_QHE, k_LKE, v_LKE, causal) -> `[Q, H, E]`; causal aligns the last query with the last key."""

FLASH_LEAST_CAPABILITY = (8, 0)
"""The first CUDA devices that torch has its own FlashAttention for."""
FEW_QUERIES = 8
"""Most queries that are attended one by one where a mask would cost too much."""
FLASH_MODULES = {
    "flash_attn_interface": "flash_attn_interface",
    "flash_attn.cute": "flash_attn",
    "flash_attn": "flash_attn",
}
"""Modules with `flash_attn_func`, the newest first, and the packages they are in."""

Segment = tuple[int, int, bool]
"""(start, end, is_image): a run of new tokens; the tokens of an image see one another."""


def shared(images: Attention, runs: Attention) -> Attention:
    """Returns attention that sends long runs of image tokens to one kernel, the rest to another.

    Args:
        images: Attends without a mask.
        runs: Attends with and without.
    """

    def attend(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
        kernel = runs if causal or q_QHE.shape[0] < LONG_RUN else images
        return kernel(q_QHE, k_LKE, v_LKE, causal)

    return attend


def sdpa(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
    """Torch's own attention; see `Attention`."""
    num_queries, num_keys = q_QHE.shape[0], k_LKE.shape[0]
    mask = None
    if causal and 1 < num_queries < num_keys:
        places = torch.arange(num_keys, device=q_QHE.device)
        mask = places <= places[num_keys - num_queries :, None]
    out = F.scaled_dot_product_attention(
        q_QHE.transpose(0, 1)[None],
        k_LKE.transpose(0, 1)[None],
        v_LKE.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal and num_queries == num_keys > 1,
        enable_gqa=q_QHE.shape[1] != k_LKE.shape[1],
    )
    return out[0].transpose(0, 1)


def torch_runs(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
    """Torch's attention for runs of any length on a CUDA device without kernels of ours.

    Torch has two kernels for grouped heads that compute the same bytes each time:
    FlashAttention, which takes no mask, needs half precision and a device of compute capability
    8.0, and one that forms all scores.
    Source: torch's documentation of `scaled_dot_product_attention`, `enable_gqa`.
    """
    capability = torch.cuda.get_device_capability(q_QHE.device)
    has_flash = q_QHE.dtype != torch.float32 and capability >= FLASH_LEAST_CAPABILITY
    attend = attend_without_mask if has_flash else sdpa
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return attend(q_QHE, k_LKE, v_LKE, causal)


def attend_without_mask(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
    """Torch's own attention, never with a mask; see `Attention`.

    A few queries after earlier keys go one by one. More get idle ones before them, one for each
    earlier key.
    """
    num_queries, num_keys = q_QHE.shape[0], k_LKE.shape[0]
    num_earlier = num_keys - num_queries
    if not causal or num_queries == 1 or num_earlier == 0:
        return sdpa(q_QHE, k_LKE, v_LKE, causal)
    if num_queries <= FEW_QUERIES:
        ends = range(num_earlier + 1, num_keys + 1)
        return torch.cat(
            [
                sdpa(q_1HE, k_LKE[:end], v_LKE[:end], False)
                for q_1HE, end in zip(q_QHE.split(1), ends, strict=True)
            ]
        )
    padded = q_QHE.new_zeros(num_keys, *q_QHE.shape[1:])
    padded[num_earlier:] = q_QHE
    return sdpa(padded, k_LKE, v_LKE, True)[num_earlier:]


def cudnn(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
    """cuDNN's attention, for long runs of image tokens; see `Attention`."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q_QHE, k_LKE, v_LKE, causal)


def flash(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
    """The flash-attn package's attention; see `Attention`. Needs half precision and CUDA."""
    out = _flash_function()(q_QHE[None], k_LKE[None], v_LKE[None], causal=causal)
    # Its newer forms also return the logarithms of the sums.
    return (out[0] if isinstance(out, tuple) else out)[0]


@functools.cache
def _flash_function() -> Callable[..., Any]:
    name = flash_module()
    assert name is not None
    return importlib.import_module(name).flash_attn_func


def flash_module() -> str | None:
    """Returns the newest form of flash-attn that is installed: FlashAttention 3, CuTe or 2."""
    for name, package in FLASH_MODULES.items():
        if importlib.util.find_spec(package) is not None and (
            package == name or importlib.util.find_spec(name) is not None
        ):
            return name
    return None


@dataclass(frozen=True, slots=True)
class Run:
    """New tokens of one sequence that attend to its keys up to a place."""

    start: int
    """The first of them, counted in the sequence's new tokens."""
    end: int
    num_keys: int
    """Keys up to the last of them, cached ones included."""
    causal: bool
    """Whether a token sees no later one."""


def runs_of(segments: Sequence[Segment], num_cached: int) -> list[Run]:
    """Returns the runs in which a prompt's new tokens attend.

    A token sees all earlier ones; the tokens of one image also see the later ones of that image.
    Going run by run, and through long text in runs of `RUN_SCORES`, never forms the prompt's whole
    score matrix or mask.

    Args:
        segments: The new tokens, in order and without gaps.
        num_cached: Tokens of the sequence before them.
    """
    runs = []
    for first, last, is_image in segments:
        size = last - first
        if not is_image:
            size = min(size, max(RUN_SCORES // (num_cached + last), 1))
        for start in range(first, last, size):
            end = min(start + size, last)
            runs.append(Run(start, end, num_cached + end, not is_image))
    return runs


def attend_each(
    attention: Attention,
    q_QHE: Tensor,
    k_LKE: Tensor,
    v_LKE: Tensor,
    runs: Sequence[Run],
    out_QHE: Tensor,
) -> None:
    """Attends from runs of one sequence, one after the other.

    Args:
        attention: How one run attends.
        q_QHE: Queries of the new tokens.
        k_LKE: Keys of the cached tokens and, after them, of the new ones.
        v_LKE: Values, likewise.
        runs: Runs of the new tokens.
        out_QHE: Where the results are written.
    """
    for run in runs:
        keys, values = k_LKE[: run.num_keys], v_LKE[: run.num_keys]
        out_QHE[run.start : run.end] = attention(
            q_QHE[run.start : run.end], keys, values, run.causal
        )
