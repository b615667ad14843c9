"""The operations of a layer, and those of a decoding step, as Triton kernels.

Importing this module needs Triton, which PyTorch for CUDA brings.

Shape suffixes: S sequences; see `operations` for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.engine.model import (
    attention_kernels,
    decode_kernels,
    expert_kernels,
    int8_kernels,
    kernels,
)
from sensebatch.engine.model.operations import Operations, Room
from sensebatch.engine.model.quantized import Numbers, Quantised, QuantisedLinear
from sensebatch.engine.model.rope import Rotary

PRODUCTS = {torch.int8: int8_kernels.product}
"""Products of quantised tokens and weights that torch has no single kernel for, by their dtype."""
WARM_UPS = {torch.int8: int8_kernels.warm_up}
"""What compiles them."""


class DecodingOperations:
    """What a step is made of that decodes one token of each of a few sequences."""

    max_sequences = decode_kernels.MAX_SEQUENCES
    """Most sequences that share a step."""

    def product(
        self,
        x_SD: Tensor,
        linear: nn.Linear | QuantisedLinear,
        *,
        swiglu: bool = False,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns a product with a layer's weights; see `decode_kernels.product`.

        Only weights are quantised here: reading them takes the time, and tokens are as they were.
        """
        scale = linear.scale if isinstance(linear, QuantisedLinear) else None
        return decode_kernels.product(
            x_SD, linear.weight, scale, swiglu=swiglu, residual=residual, out=out
        )

    def heads(
        self,
        qkv_Sx: Tensor,
        norms: tuple[Tensor, Tensor],
        rotary: Rotary,
        *,
        eps: float,
        cache: Room,
        rotary_rows_S: Tensor,
        places_S: Tensor,
    ) -> Tensor:
        """Returns normed and rotated queries, and puts keys and values into a layer's cache.

        Args:
            qkv_Sx: See `Operations.heads`.
            norms: See `Operations.heads`.
            rotary: Rotation angles of every position.
            eps: Added to the mean square in the norms.
            cache: A layer's keys and values.
            rotary_rows_S: int64 row of the rotary table of each token.
            places_S: int64 element of the cache where each token's heads begin.
        """
        return kernels.norm_rotate(
            qkv_Sx,
            *norms,
            rotary,
            eps=eps,
            k_TKE=cache[0],
            v_TKE=cache[1],
            rotary_rows_T=rotary_rows_S,
            places_T=places_S,
        )

    def attend(self, q_SHE: Tensor, cache: Room, lengths_S: Tensor) -> Tensor:
        """Returns the attention of one new token each; see `attention_kernels.attend_token`."""
        return attention_kernels.attend_token(q_SHE, *cache, lengths_S)

    def warm_up(
        self,
        arch: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        num_sequences: int,
        numbers: Numbers | None = None,
    ) -> None:
        """Compiles what a step of so many sequences will use."""
        decode_kernels.warm_up(arch, dtype, device, num_sequences, numbers)


class RunOperations:
    """Attention of many runs in one launch."""

    def of_prompts(
        self, q_THE: Tensor, table_Rx: Tensor, num_tokens: int, num_kv_heads: int, out_THE: Tensor
    ) -> None:
        """Attends from runs of several prompts, whose rows of `out_THE` it writes.

        Args:
            q_THE: Contiguous queries of the pass.
            table_Rx: A layer of `runs.table_of_runs`.
            num_tokens: The most queries of a run.
            num_kv_heads: Key/value heads.
            out_THE: Contiguous.
        """
        attention_kernels.attend_runs(
            q_THE,
            None,
            table_Rx,
            num_tokens=num_tokens,
            num_kv_heads=num_kv_heads,
            out_THE=out_THE,
        )

    def of_images(self, q_THE: Tensor, own: Room, table_Rx: Tensor) -> Tensor:
        """Returns the attention of images of one size, `[T, H, E]`.

        Args:
            q_THE: Contiguous queries, one image after the other.
            own: The keys and values of the same tokens, which each image sees before its prefix.
            table_Rx: A layer of `runs.table_of_prefixes`, the rows of these images.
        """
        out_THE = torch.empty_like(q_THE)
        attention_kernels.attend_runs(
            q_THE,
            own,
            table_Rx,
            num_tokens=q_THE.shape[0] // table_Rx.shape[0],
            num_kv_heads=own[0].shape[1],
            out_THE=out_THE,
        )
        return out_THE


class TritonOperations(Operations):
    """The operations of a layer as one kernel a chain."""

    decoding = DecodingOperations()
    runs = RunOperations()

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `Operations.rms_norm`."""
        return kernels.rms_norm(x_TD, weight_D, eps)

    def heads(
        self,
        qkv_Tx: Tensor,
        norms: tuple[Tensor, Tensor],
        rotary: Rotary,
        *,
        num_kv_heads: int,
        eps: float,
        room: Room | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Operations.heads`."""
        if room is None:
            shape = (qkv_Tx.shape[0], num_kv_heads, 2 * norms[0].shape[1])
            room = qkv_Tx.new_empty(shape), qkv_Tx.new_empty(shape)
        q_THE = kernels.norm_rotate(qkv_Tx, *norms, rotary, eps=eps, k_TKE=room[0], v_TKE=room[1])
        return q_THE, *room

    def swiglu(self, gate_up_Tx: Tensor, *, in_place: bool) -> Tensor:  # noqa: ARG002
        """See `Operations.swiglu`."""
        return kernels.swiglu(gate_up_Tx)

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
        """See `Operations.add_experts`."""
        out_TD = residual_TD if in_place else torch.empty_like(residual_TD)
        expert_kernels.add_experts(residual_TD, x_TD, logits_TX, matrices, moe, out_TD)
        return out_TD

    def quantise(
        self, x_TI: Tensor, numbers: Numbers, norm_I: Tensor | None = None, eps: float = 0.0
    ) -> Quantised:
        """See `Operations.quantise`."""
        return kernels.quantise_rows(x_TI.contiguous(), numbers, norm_I, eps)

    def quantised_swiglu(self, gate_up_Tx: Tensor, numbers: Numbers) -> Quantised:
        """See `Operations.quantised_swiglu`."""
        return kernels.swiglu_quantised(gate_up_Tx, numbers)

    def scaled_product(
        self,
        tokens: Quantised,
        weight_OI: Tensor,
        scale_O: Tensor,
        dtype: torch.dtype,
        residual_TO: Tensor | None = None,
    ) -> Tensor:
        """See `Operations.scaled_product`."""
        if weight_OI.dtype not in PRODUCTS:
            return super().scaled_product(tokens, weight_OI, scale_O, dtype, residual_TO)
        return PRODUCTS[weight_OI.dtype](tokens, weight_OI, scale_O, dtype, residual_TO)

    def warm_up(
        self,
        arch: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        numbers: Numbers | None = None,
    ) -> None:
        """See `Operations.warm_up`."""
        kernels.warm_up(arch, dtype, device, numbers)
        if numbers is not None and numbers.dtype in WARM_UPS:
            WARM_UPS[numbers.dtype](arch, dtype, device)
        attention_kernels.warm_up_runs(arch, dtype, device)
        expert_kernels.warm_up(arch, dtype, device)
