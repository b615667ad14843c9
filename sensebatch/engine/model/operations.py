"""The small operations between a layer's matrix products, in torch.

They run everywhere and can be differentiated. `triton_operations` has the same as kernels for
GPUs, which give the same numbers up to rounding. A network is made with one of the two.

Shape suffixes: T tokens of a pass, D hidden, H query heads, K key/value heads, E head_dim,
I intermediate, X experts of a sparse block, C choices of a token, x numbers of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.engine.model.quantized import (
    BY_DTYPE,
    Numbers,
    Quantised,
    quantise_rows,
)
from sensebatch.engine.model.rope import Rotary, rotate_token_heads

if TYPE_CHECKING:
    from sensebatch.engine.model.triton_operations import DecodingOperations, RunOperations

Room = tuple[Tensor, Tensor]
"""Contiguous `[T, K, E]` for keys and for values."""


class Operations:
    """What a layer computes between its matrix products."""

    decoding: DecodingOperations | None = None
    """What a step of decoding text is made of; None where there are no kernels for it."""
    runs: RunOperations | None = None
    """Attention of many runs at once; None where there are no kernels for it."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Returns the rows of `[T, D]` normed; see the function `rms_norm`."""
        return rms_norm(x_TD, weight_D, eps)

    def heads(
        self,
        qkv_Tx: Tensor,
        norms: tuple[Tensor, Tensor],
        rotary: Rotary,
        *,
        num_kv_heads: int,
        eps: float,
        room: Room | None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns normed and rotated queries, normed and rotated keys, and values.

        Args:
            qkv_Tx: Rows of query, key and value heads.
            norms: `[2, head_dim / 2]` of queries and of keys; see `transformer.DecoderLayer`.
            rotary: Rotation angles of the tokens.
            num_kv_heads: Key heads, and value heads.
            eps: Added to the mean square in the norms.
            room: Where kernels put keys and values; torch puts them elsewhere.
        """
        heads_TxE = qkv_Tx.unflatten(-1, (-1, 2 * norms[0].shape[1]))
        num_heads = heads_TxE.shape[1] - 2 * num_kv_heads
        q_THE, k_TKE, v_TKE = heads_TxE.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        return (
            rotate_token_heads(_norm_halves(q_THE, norms[0], eps), rotary),
            rotate_token_heads(_norm_halves(k_TKE, norms[1], eps), rotary),
            v_TKE,
        )

    def swiglu(self, gate_up_Tx: Tensor, *, in_place: bool) -> Tensor:
        """Returns `silu(gate) * up`, `[T, I]`.

        Args:
            gate_up_Tx: `[T, 2 * I]`, gates first.
            in_place: Whether to save memory in a way that no gradient survives.
        """
        gate_TI, up_TI = gate_up_Tx.chunk(2, dim=-1)
        activated_TI = F.silu(gate_TI)
        return activated_TI.mul_(up_TI) if in_place else activated_TI * up_TI

    def add_experts(
        self,
        residual_TD: Tensor,
        x_TD: Tensor,
        logits_TX: Tensor,
        matrices: tuple[Tensor, Tensor],
        moe: Moe,
        *,
        in_place: bool,
    ) -> Tensor:
        """Returns the residual plus the output of the experts that each token goes to.

        Softmax over all experts in float32, then the most probable ones.

        Args:
            residual_TD: What is added to.
            x_TD: The input of a sparse block.
            logits_TX: The product with its router.
            matrices: Gate and up projections of all experts, `[X, 2 * I, D]`, and down
                projections, `[X, D, I]`.
            moe: How experts are chosen.
            in_place: See `transformer.DecoderLayer.finish`.
        """
        probabilities_TX = logits_TX.softmax(dim=-1, dtype=torch.float32)
        weights_TC, chosen_TC = probabilities_TX.topk(moe.num_experts_per_tok, dim=-1)
        if moe.norm_topk_prob:
            weights_TC = weights_TC / weights_TC.sum(-1, keepdim=True)
        weights_TC = weights_TC.to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for expert, (gate_up, down) in enumerate(zip(*matrices, strict=True)):
            rows, choices = torch.where(chosen_TC == expert)
            if rows.numel() == 0:
                continue
            gate, up = F.linear(x_TD[rows], gate_up).chunk(2, dim=-1)
            expert_out = F.linear(F.silu(gate) * up, down)
            out_TD.index_add_(0, rows, expert_out * weights_TC[rows, choices, None])
        return residual_TD.add_(out_TD) if in_place else residual_TD + out_TD

    def quantise(
        self, x_TI: Tensor, numbers: Numbers, norm_I: Tensor | None = None, eps: float = 0.0
    ) -> Quantised:
        """Returns rows quantised, normed first if there is a norm."""
        return quantise_rows(x_TI if norm_I is None else rms_norm(x_TI, norm_I, eps), numbers)

    def quantised_swiglu(self, gate_up_Tx: Tensor, numbers: Numbers) -> Quantised:
        """Returns `swiglu` quantised."""
        return quantise_rows(self.swiglu(gate_up_Tx, in_place=True), numbers)

    def scaled_product(
        self,
        tokens: Quantised,
        weight_OI: Tensor,
        scale_O: Tensor,
        dtype: torch.dtype,
        residual_TO: Tensor | None = None,
    ) -> Tensor:
        """Returns quantised tokens by quantised weights, `[T, O]`.

        Args:
            tokens: What `quantise` or `quantised_swiglu` returns.
            weight_OI: Weights of the same numbers.
            scale_O: The scales of their rows.
            dtype: Of what is returned.
            residual_TO: Is added, in its own memory.
        """
        product_TO = BY_DTYPE[weight_OI.dtype].product(tokens, weight_OI, scale_O, dtype)
        return product_TO if residual_TO is None else residual_TO.add_(product_TO)

    def warm_up(
        self,
        arch: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        numbers: Numbers | None = None,
    ) -> None:
        """Compiles what a network will use, or fetches it from a cache on disk: nothing here."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last axis in float32, casts back, then scales by `weight`.

    Source: Qwen3 (the weight multiplies after the cast, unlike `torch.nn.functional.rms_norm`).
    """
    x_float = x.float()
    scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return weight * (x_float * scale).to(x.dtype)


def _norm_halves(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x.unflatten(-1, (2, -1)), weight, eps).flatten(-2)


def choose_operations(*, fused: bool) -> Operations:
    """Returns the operations that a network is made with.

    Args:
        fused: Whether chains of small operations are one kernel each, which needs Triton.
    """
    if not fused:
        return Operations()
    from sensebatch.engine.model.triton_operations import TritonOperations

    return TritonOperations()
