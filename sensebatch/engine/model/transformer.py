"""The backbone: two experts of pre-norm Qwen3 layers over one key/value cache.

Both experts have the same layers with their own weights; which tokens see which is the business
of the attention context they are given. Tokens of all sequences of a pass are packed along one
axis, so every matrix product runs over all of them.

Shape suffixes: T tokens of a pass, D hidden, H query heads, K key/value heads, E head_dim,
I intermediate, X feed-forward experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.engine.model.rope import Rotary, rotate_token_heads
from sensebatch.vram import ROWS


class AttentionContext(Protocol):
    """What a layer's attention may see."""

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Returns `[T, H, E]`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last axis in float32, casts back, then scales by `weight`.

    Source: Qwen3 (the weight multiplies after the cast, unlike `torch.nn.functional.rms_norm`).
    """
    x_float = x.float()
    scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return weight * (x_float * scale).to(x.dtype)


class SwiGLU(nn.Module):
    """Dense feed-forward block; gate and up are one matrix."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Returns `[T, D]`."""
        gate_TI, up_TI = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate_TI) * up_TI)


class SparseMlp(nn.Module):
    """Mixture of SwiGLU experts: softmax over all in float32, top-k, renormalised.

    Source: Qwen3-MoE.
    """

    def __init__(self, hidden: int, moe: Moe) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, moe.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.intermediate_size, hidden))
        self.down = nn.Parameter(torch.empty(moe.num_experts, hidden, moe.intermediate_size))
        self._top_k = moe.num_experts_per_tok
        self._norm_topk_prob = moe.norm_topk_prob

    def forward(self, x_TD: Tensor) -> Tensor:
        """Returns `[T, D]`."""
        probabilities_TX = self.gate(x_TD).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = probabilities_TX.topk(self._top_k, dim=-1)
        if self._norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for expert in range(self.gate_up.shape[0]):
            rows, slots = torch.where(chosen == expert)
            if rows.numel() == 0:
                continue
            gate, up = F.linear(x_TD[rows], self.gate_up[expert]).chunk(2, dim=-1)
            expert_out = F.linear(F.silu(gate) * up, self.down[expert])
            out_TD.index_add_(0, rows, expert_out * weights[rows, slots, None])
        return out_TD


class DecoderLayer(nn.Module):
    """One layer of one expert; query, key and value projections are one matrix.

    Args:
        arch: The network's shape.
        moe: Its sparse feed-forward block; None for a dense one.
    """

    def __init__(self, arch: Architecture, moe: Moe | None) -> None:
        super().__init__()
        self._num_heads = arch.num_heads
        self._num_kv_heads = arch.num_kv_heads
        self._head_dim = arch.head_dim
        self._eps = arch.rms_norm_eps
        hidden, head_dim = arch.hidden_size, arch.head_dim
        self.input_norm = nn.Parameter(torch.empty(hidden))
        self.qkv = nn.Linear(
            hidden, (arch.num_heads + 2 * arch.num_kv_heads) * head_dim, bias=False
        )
        # Row 0 normalises the half of a head that follows t, row 1 the half that follows h and w.
        self.q_norm = nn.Parameter(torch.empty(2, head_dim // 2))
        self.k_norm = nn.Parameter(torch.empty(2, head_dim // 2))
        self.o = nn.Linear(arch.num_heads * head_dim, hidden, bias=False)
        self.post_norm = nn.Parameter(torch.empty(hidden))
        self.mlp: nn.Module = (
            SwiGLU(hidden, arch.intermediate_size) if moe is None else SparseMlp(hidden, moe)
        )

    def project(self, x_TD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries, rotated keys and values."""
        qkv = self.qkv(rms_norm(x_TD, self.input_norm, self._eps))
        q_THE, k_TKE, v_TKE = qkv.unflatten(-1, (-1, self._head_dim)).split(
            [self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1
        )
        return (
            rotate_token_heads(self._norm_halves(q_THE, self.q_norm), rotary),
            rotate_token_heads(self._norm_halves(k_TKE, self.k_norm), rotary),
            v_TKE,
        )

    def _norm_halves(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x.unflatten(-1, (2, -1)), weight, self._eps).flatten(-2)

    def finish(self, x_TD: Tensor, attended_THE: Tensor) -> Tensor:
        """Returns the layer's output from its input and what attention gave."""
        x_TD = x_TD + self.o(attended_THE.flatten(1))
        return x_TD + self.mlp(rms_norm(x_TD, self.post_norm, self._eps))


class Expert(nn.Module):
    """The layers of one path and its final norm.

    Args:
        arch: The network's shape.
        moe: The sparse blocks of this path; None where all are dense.
    """

    def __init__(self, arch: Architecture, moe: Moe | None) -> None:
        super().__init__()
        self._eps = arch.rms_norm_eps
        self.layers = nn.ModuleList(
            DecoderLayer(arch, moe if moe is not None and moe.sparse_layers[i] else None)
            for i in range(arch.num_layers)
        )
        self.norm = nn.Parameter(torch.empty(arch.hidden_size))
        self.lend: Callable[[int], AbstractContextManager[nn.Module]] = self._own
        """Gives a layer that can be computed with for as long as the context is open. Its own
        by default; replaced where weights are not on the device all the time."""

    def _own(self, index: int) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.layers[index])

    def forward(self, x_TD: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Returns the normed output `[T, D]` of all layers."""
        for index in range(len(self.layers)):
            with self.lend(index) as layer:
                assert isinstance(layer, DecoderLayer)
                q_THE, k_TKE, v_TKE = _project(layer, x_TD, rotary)
                attended_THE = context.attend(index, q_THE, k_TKE, v_TKE)
                del q_THE, k_TKE, v_TKE
                x_TD = _finish(layer, x_TD, attended_THE)
        return _norm(x_TD, self.norm, self._eps)


def _norm(x_TD: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm`, `ROWS` tokens at a time; overwrites `x_TD` where there are more."""
    if x_TD.shape[0] <= ROWS or torch.is_grad_enabled():
        return rms_norm(x_TD, weight, eps)
    for rows_TD in x_TD.split(ROWS):
        rows_TD.copy_(rms_norm(rows_TD, weight, eps))
    return x_TD


def _project(layer: DecoderLayer, x_TD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """`DecoderLayer.project`, `ROWS` tokens at a time."""
    if x_TD.shape[0] <= ROWS or torch.is_grad_enabled():
        return layer.project(x_TD, rotary)
    num_tokens = x_TD.shape[0]
    outputs: tuple[Tensor, ...] = ()
    for start in range(0, num_tokens, ROWS):
        rows = slice(start, start + ROWS)
        parts = layer.project(x_TD[rows], (rotary[0][rows], rotary[1][rows]))
        if not outputs:
            outputs = tuple(part.new_empty(num_tokens, *part.shape[1:]) for part in parts)
        for output, part in zip(outputs, parts, strict=True):
            output[rows] = part
    q_THE, k_TKE, v_TKE = outputs
    return q_THE, k_TKE, v_TKE


def _finish(layer: DecoderLayer, x_TD: Tensor, attended_THE: Tensor) -> Tensor:
    """`DecoderLayer.finish`, `ROWS` tokens at a time; overwrites `x_TD` where there are more."""
    if x_TD.shape[0] <= ROWS or torch.is_grad_enabled():
        return layer.finish(x_TD, attended_THE)
    for start in range(0, x_TD.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        x_TD[rows] = layer.finish(x_TD[rows], attended_THE[rows])
    return x_TD
