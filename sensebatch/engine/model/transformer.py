"""The backbone: two experts of pre-norm Qwen3 layers over one key/value cache.

Both experts have the same layers with their own weights; which tokens see which is the business
of the attention context they are given. Tokens of all sequences of a pass are packed along one
axis, so every matrix product runs over all of them.

The chains of small operations between the matrix products are written twice: here in torch, which
runs everywhere and can be differentiated, and in `kernels`, one kernel each, for GPUs.

Shape suffixes: T tokens of a pass, D hidden, H query heads, K key/value heads, E head_dim,
I intermediate, X feed-forward experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.engine.model.quantized import Fp8Linear
from sensebatch.engine.model.rope import Rotary, rotate_token_heads
from sensebatch.plan import passes

Linear = nn.Linear | Fp8Linear


class AttentionContext(Protocol):
    """What a layer's attention may see."""

    def parts(self, num_tokens: int) -> Sequence[slice]:
        """Returns the tokens in parts that need nothing of one another inside a layer."""

    def room(self, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Returns where a part's keys and values may be put at once, if there is such a place."""

    def attend(
        self, layer: int, part: slice, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor
    ) -> Tensor:
        """Returns `[T, H, E]` of a part."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last axis in float32, casts back, then scales by `weight`.

    Source: Qwen3 (the weight multiplies after the cast, unlike `torch.nn.functional.rms_norm`).
    """
    x_float = x.float()
    scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return weight * (x_float * scale).to(x.dtype)


class SwiGLU(nn.Module):
    """Dense feed-forward block; gate and up are one matrix."""

    def __init__(self, hidden: int, intermediate: int, *, fused: bool) -> None:
        super().__init__()
        self.gate_up: Linear = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down: Linear = nn.Linear(intermediate, hidden, bias=False)
        self._fused = fused

    def add_activated(self, residual_TD: Tensor, gate_up: Tensor, *, in_place: bool) -> Tensor:
        """Returns the residual and what follows the first product, `[T, 2 * I]`.

        Args:
            residual_TD: The block's own input, not normed.
            gate_up: Of the layer's `gate_up`.
            in_place: See `DecoderLayer.finish`.
        """
        if self._fused:
            from sensebatch.engine.model import kernels

            if isinstance(self.down, Fp8Linear):
                hidden = kernels.swiglu_quantised(gate_up)
                return residual_TD.add_(self.down.multiply(*hidden, gate_up.dtype))
            return _add_linear(residual_TD, self.down, kernels.swiglu(gate_up), in_place)
        gate_TI, up_TI = gate_up.chunk(2, dim=-1)
        hidden_TI = F.silu(gate_TI)
        hidden_TI = hidden_TI.mul_(up_TI) if in_place else hidden_TI * up_TI
        return _add_linear(residual_TD, self.down, hidden_TI, in_place)


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

    def add_to(self, residual_TD: Tensor, x_TD: Tensor, *, in_place: bool) -> Tensor:
        """Returns the sum of `residual_TD` and the block's output; see `DecoderLayer.finish`."""
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
        return residual_TD.add_(out_TD) if in_place else residual_TD + out_TD


def _add_linear(residual_TD: Tensor, linear: Linear, x: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return residual_TD + linear(x)
    if isinstance(linear, nn.Linear):
        return torch.addmm(residual_TD, x, linear.weight.t(), out=residual_TD)
    return residual_TD.add_(linear(x))


class DecoderLayer(nn.Module):
    """One layer of one expert; query, key and value projections are one matrix.

    Args:
        arch: The network's shape.
        moe: Its sparse feed-forward block; None for a dense one.
        fused: Whether chains of small operations are one kernel each; needs Triton.
    """

    def __init__(self, arch: Architecture, moe: Moe | None, *, fused: bool = False) -> None:
        super().__init__()
        self._fused = fused
        self._num_heads = arch.num_heads
        self._num_kv_heads = arch.num_kv_heads
        self._head_dim = arch.head_dim
        self._eps = arch.rms_norm_eps
        hidden, head_dim = arch.hidden_size, arch.head_dim
        self.input_norm = nn.Parameter(torch.empty(hidden))
        self.qkv: Linear = nn.Linear(
            hidden, (arch.num_heads + 2 * arch.num_kv_heads) * head_dim, bias=False
        )
        # Row 0 normalises the half of a head that follows t, row 1 the half that follows h and w.
        self.q_norm = nn.Parameter(torch.empty(2, head_dim // 2))
        self.k_norm = nn.Parameter(torch.empty(2, head_dim // 2))
        self.o: Linear = nn.Linear(arch.num_heads * head_dim, hidden, bias=False)
        self.post_norm = nn.Parameter(torch.empty(hidden))
        self.mlp: SwiGLU | SparseMlp = (
            SwiGLU(hidden, arch.intermediate_size, fused=fused)
            if moe is None
            else SparseMlp(hidden, moe)
        )

    def project(
        self, x_TD: Tensor, rotary: Rotary, room: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries, rotated keys and values.

        Args:
            x_TD: The layer's input.
            rotary: Of the tokens.
            room: Contiguous `[T, K, E]` for keys and values; used by the fused chain only.
        """
        qkv = self._normed_product(self.qkv, x_TD, self.input_norm)
        if self._fused:
            return self._fused_heads(qkv, rotary, room)
        q_THE, k_TKE, v_TKE = qkv.unflatten(-1, (-1, self._head_dim)).split(
            [self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1
        )
        return (
            rotate_token_heads(self._norm_halves(q_THE, self.q_norm), rotary),
            rotate_token_heads(self._norm_halves(k_TKE, self.k_norm), rotary),
            v_TKE,
        )

    def _fused_heads(
        self, qkv: Tensor, rotary: Rotary, room: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from sensebatch.engine.model import kernels

        if room is None:
            shape = (qkv.shape[0], self._num_kv_heads, self._head_dim)
            room = qkv.new_empty(shape), qkv.new_empty(shape)
        q_THE = kernels.norm_rotate(
            qkv,
            self.q_norm,
            self.k_norm,
            rotary,
            eps=self._eps,
            k_TKE=room[0],
            v_TKE=room[1],
        )
        return q_THE, *room

    def _normed_product(self, linear: Linear, x_TD: Tensor, norm: Tensor) -> Tensor:
        if self._fused and isinstance(linear, Fp8Linear):
            from sensebatch.engine.model import kernels

            return linear.multiply(*kernels.quantise_rows(x_TD, norm, self._eps), x_TD.dtype)
        product: Tensor = linear(self._norm(x_TD, norm))
        return product

    def _norm(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        return norm_rows(x_TD, weight, self._eps, fused=self._fused)

    def _norm_halves(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x.unflatten(-1, (2, -1)), weight, self._eps).flatten(-2)

    def finish(self, x_TD: Tensor, attended_THE: Tensor, *, in_place: bool = False) -> Tensor:
        """Returns the layer's output from its input and what attention gave.

        Args:
            x_TD: The layer's input.
            attended_THE: Of attention.
            in_place: Whether the output takes the input's memory; not with gradients.
        """
        x_TD = _add_linear(x_TD, self.o, attended_THE.flatten(1), in_place)
        if isinstance(self.mlp, SparseMlp):
            return self.mlp.add_to(x_TD, self._norm(x_TD, self.post_norm), in_place=in_place)
        gate_up = self._normed_product(self.mlp.gate_up, x_TD, self.post_norm)
        return self.mlp.add_activated(x_TD, gate_up, in_place=in_place)


class Expert(nn.Module):
    """The layers of one path and its final norm. Its forward pass is for inference only.

    Args:
        arch: The network's shape.
        moe: The sparse blocks of this path; None where all are dense.
        fused: Whether chains of small operations are one kernel each; needs Triton.
    """

    def __init__(self, arch: Architecture, moe: Moe | None, *, fused: bool = False) -> None:
        super().__init__()
        self._eps = arch.rms_norm_eps
        self._fused = fused
        self.layers = nn.ModuleList(
            DecoderLayer(
                arch, moe if moe is not None and moe.sparse_layers[i] else None, fused=fused
            )
            for i in range(arch.num_layers)
        )
        self.norm = nn.Parameter(torch.empty(arch.hidden_size))
        self.lend: Callable[[int], AbstractContextManager[nn.Module]] = self._own
        """Gives a layer that can be computed with for as long as the context is open. Its own
        by default; replaced where weights are not on the device all the time."""

    def use_fp8(self) -> None:
        """Makes the linear layers float8 ones, on the meta device; sparse blocks stay."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.qkv, layer.o = self._in_fp8(layer.qkv), self._in_fp8(layer.o)
            if isinstance(layer.mlp, SwiGLU):
                layer.mlp.gate_up = self._in_fp8(layer.mlp.gate_up)
                layer.mlp.down = self._in_fp8(layer.mlp.down)

    def _in_fp8(self, linear: Linear) -> Fp8Linear:
        assert isinstance(linear, nn.Linear)
        device = torch.device("meta")
        return Fp8Linear(linear.in_features, linear.out_features, device, fused=self._fused)

    def _own(self, index: int) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.layers[index])

    def forward(self, x_TD: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Returns the normed output `[T, D]` of all layers; overwrites `x_TD`."""
        parts = context.parts(x_TD.shape[0])
        angles = [(rotary[0][part], rotary[1][part]) for part in parts]
        for index in range(len(self.layers)):
            with self.lend(index) as layer:
                assert isinstance(layer, DecoderLayer)
                for part, of_part in zip(parts, angles, strict=True):
                    room = context.room(part.stop - part.start)
                    # Not named, so that they are gone when the second half begins.
                    attended_THE = context.attend(
                        index, part, *_project(layer, x_TD[part], of_part, room)
                    )
                    _finish(layer, x_TD[part], attended_THE)
                    # Gone before the next part or layer attends.
                    del attended_THE
        for rows_TD in x_TD.split(passes.ROWS):
            rows_TD.copy_(norm_rows(rows_TD, self.norm, self._eps, fused=self._fused))
        return x_TD


def norm_rows(x_TD: Tensor, weight: Tensor, eps: float, *, fused: bool) -> Tensor:
    """`rms_norm` of rows, as one kernel if `fused`."""
    if not fused:
        return rms_norm(x_TD, weight, eps)
    from sensebatch.engine.model import kernels

    return kernels.rms_norm(x_TD, weight, eps)


def _project(
    layer: DecoderLayer, x_TD: Tensor, rotary: Rotary, room: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`DecoderLayer.project`, `ROWS` tokens at a time."""
    num_tokens = x_TD.shape[0]
    if num_tokens <= passes.ROWS:
        return layer.project(x_TD, rotary, room)
    outputs: tuple[Tensor, ...] = ()
    for start in range(0, num_tokens, passes.ROWS):
        rows = slice(start, start + passes.ROWS)
        parts = layer.project(x_TD[rows], (rotary[0][rows], rotary[1][rows]))
        if not outputs:
            outputs = tuple(part.new_empty(num_tokens, *part.shape[1:]) for part in parts)
        for output, part in zip(outputs, parts, strict=True):
            output[rows] = part
        # Gone before the next rows need the same again.
        del parts, part
    q_THE, k_TKE, v_TKE = outputs
    return q_THE, k_TKE, v_TKE


def _finish(layer: DecoderLayer, x_TD: Tensor, attended_THE: Tensor) -> None:
    """`DecoderLayer.finish` in the input's memory, `ROWS` tokens at a time."""
    for start in range(0, x_TD.shape[0], passes.ROWS):
        rows = slice(start, start + passes.ROWS)
        layer.finish(x_TD[rows], attended_THE[rows], in_place=True)
