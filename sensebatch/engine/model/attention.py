"""Grouped-query attention of one sequence, and of the runs of a prompt.

Shape suffixes: Q query tokens, L key tokens, H query heads, K key/value heads, E head_dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(q_QHE, k_LKE, v_LKE, causal) -> `[Q, H, E]`; causal aligns the last query with the last key."""

CUDNN_LEAST_QUERIES = 1024
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


def sdpa(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
    """Torch's own attention; see `Attention`."""
    num_queries, num_keys = q_QHE.shape[0], k_LKE.shape[0]
    mask = None
    if causal and 1 < num_queries < num_keys:
        if _forms_scores(q_QHE):
            return attend_without_mask(q_QHE, k_LKE, v_LKE)
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_QHE.device)
        mask = mask.tril(num_keys - num_queries)
    out = F.scaled_dot_product_attention(
        q_QHE.transpose(0, 1)[None],
        k_LKE.transpose(0, 1)[None],
        v_LKE.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal and num_queries == num_keys > 1,
        enable_gqa=q_QHE.shape[1] != k_LKE.shape[1],
    )
    return out[0].transpose(0, 1)


def _forms_scores(q_QHE: Tensor) -> bool:
    """Returns whether a mask would keep torch from the one kernel that forms no scores.

    On CUDA it has two for grouped heads: FlashAttention, which takes no mask, needs half precision
    and a device of compute capability 8.0, and one that forms all scores.
    Source: torch's documentation of `scaled_dot_product_attention`, `enable_gqa`.
    """
    if not q_QHE.is_cuda or q_QHE.dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(q_QHE.device) >= FLASH_LEAST_CAPABILITY


def attend_without_mask(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor) -> Tensor:
    """Attends causally from queries behind earlier keys; see `Attention`.

    A few queries go one by one. More get idle ones in front of them, one for each earlier key.
    """
    num_queries, num_keys = q_QHE.shape[0], k_LKE.shape[0]
    num_earlier = num_keys - num_queries
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
    """cuDNN's attention for pictures, torch's own choice otherwise; see `Attention`.

    cuDNN plans anew for every number of keys, some 40 ms each, so it is for long runs of queries.
    """
    if causal or q_QHE.shape[0] < CUDNN_LEAST_QUERIES:
        return sdpa(q_QHE, k_LKE, v_LKE, causal)
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


def attend_segments(
    attention: Attention,
    q_QHE: Tensor,
    k_LKE: Tensor,
    v_LKE: Tensor,
    segments: Sequence[Segment],
    out_QHE: Tensor,
) -> None:
    """Attends from a prompt's new tokens to everything before them and to themselves.

    A token sees all earlier ones; the tokens of one image also see the later ones of that image.
    Going run by run never forms the prompt's whole score matrix or mask.

    Args:
        attention: How one run attends.
        q_QHE: Queries of the new tokens.
        k_LKE: Keys of the cached tokens and, behind them, of the new ones.
        v_LKE: Values, likewise.
        segments: The runs of the new tokens, in order and without gaps.
        out_QHE: Where the result is written.
    """
    num_cached = k_LKE.shape[0] - q_QHE.shape[0]
    for start, end, is_image in segments:
        keys, values = k_LKE[: num_cached + end], v_LKE[: num_cached + end]
        out_QHE[start:end] = attention(q_QHE[start:end], keys, values, not is_image)
