"""The operations of a layer, and those of a decoding step, as Triton kernels.

Importing this module needs Triton, which PyTorch for CUDA brings.

Shape suffixes: S sequences; see `operations` for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.model import attention_kernels, decode_kernels, kernels
from sensebatch.engine.model.operations import Operations, Quantised, Room
from sensebatch.engine.model.rope import Rotary


class DecodingOperations:
    """What a step is made of that decodes one token of each of a few sequences."""

    max_sequences = decode_kernels.MAX_SEQUENCES
    """Most sequences that share a step."""

    def product(
        self,
        x_SD: Tensor,
        weight: Tensor,
        *,
        swiglu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Returns a product with a weight matrix; see `decode_kernels.product`."""
        return decode_kernels.product(x_SD, weight, swiglu=swiglu, residual=residual)

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
        self, arch: Architecture, dtype: torch.dtype, device: torch.device, num_sequences: int
    ) -> None:
        """Compiles what a step of so many sequences will use."""
        decode_kernels.warm_up(arch, dtype, device, num_sequences)


class TritonOperations(Operations):
    """The operations of a layer as one kernel a chain."""

    decoding = DecodingOperations()

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

    def quantise(self, x_TI: Tensor, norm_I: Tensor | None = None, eps: float = 0.0) -> Quantised:
        """See `Operations.quantise`."""
        return kernels.quantise_rows(x_TI.contiguous(), norm_I, eps)

    def quantised_swiglu(self, gate_up_Tx: Tensor) -> Quantised:
        """See `Operations.quantised_swiglu`."""
        return kernels.swiglu_quantised(gate_up_Tx)

    def warm_up(
        self, arch: Architecture, dtype: torch.dtype, device: torch.device, *, quantised: bool
    ) -> None:
        """See `Operations.warm_up`."""
        kernels.warm_up(arch, dtype, device, quantised=quantised)
        attention_kernels.warm_up_runs(arch, dtype, device)
