"""The backbone: two experts of pre-norm Qwen3 layers over one key/value cache.

Both experts have the same layers with their own weights; which tokens see which is decided by the
attention context they are given. Tokens of all sequences of a pass are packed along one axis, so
every matrix product runs over all of them. What lies between the products is in `operations`.

Shape suffixes: T tokens of a pass, D hidden, H query heads, K key/value heads, E head_dim,
I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.engine.model.lockstep import Lend, Pass, run
from sensebatch.engine.model.operations import Operations, Room
from sensebatch.engine.model.quantized import Numbers, QuantisedLinear
from sensebatch.engine.model.rope import Rotary
from sensebatch.plan import passes
from sensebatch.plan.passes import middle_layers

Linear = nn.Linear | QuantisedLinear


class AttentionContext(Protocol):
    """Says what the tokens of a pass attend to."""

    def parts(self, num_tokens: int) -> Sequence[slice]:
        """Returns the tokens in parts that do not depend on one another inside a layer."""

    def room(self, num_tokens: int) -> Room | None:
        """Returns where a part's keys and values are to be written, or None for anywhere."""

    def attend(
        self, layer: int, part: slice, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor
    ) -> Tensor:
        """Returns the attention of a part's tokens, `[T, H, E]`."""


class SwiGLU(nn.Module):
    """A dense feed-forward block; gate and up projections are one matrix."""

    def __init__(self, hidden: int, intermediate: int, operations: Operations) -> None:
        super().__init__()
        self.gate_up: Linear = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down: Linear = nn.Linear(intermediate, hidden, bias=False)
        self.operations = operations

    def add_activated(self, residual_TD: Tensor, gate_up_Tx: Tensor, *, in_place: bool) -> Tensor:
        """Returns the residual plus the block's output, from the product with `gate_up`.

        Args:
            residual_TD: The block's input before its norm.
            gate_up_Tx: `[T, 2 * I]`.
            in_place: See `DecoderLayer.finish`.
        """
        if isinstance(self.down, QuantisedLinear):
            tokens = self.operations.quantised_swiglu(gate_up_Tx, self.down.numbers)
            return self.down.add_to(residual_TD, tokens, in_place=in_place)
        hidden_TI = self.operations.swiglu(gate_up_Tx, in_place=in_place)
        return _add_linear(residual_TD, self.down, hidden_TI, in_place)


class SparseMlp(nn.Module):
    """A mixture of SwiGLU experts, a few of which each token goes to.

    Source: Qwen3-MoE.
    """

    def __init__(self, hidden: int, moe: Moe, operations: Operations) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, moe.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.intermediate_size, hidden))
        self.down = nn.Parameter(torch.empty(moe.num_experts, hidden, moe.intermediate_size))
        self.operations = operations
        self._moe = moe

    def add_to(self, residual_TD: Tensor, x_TD: Tensor, *, in_place: bool) -> Tensor:
        """Returns the sum of `residual_TD` and the block's output; see `DecoderLayer.finish`."""
        matrices = self.gate_up, self.down
        return self.operations.add_experts(
            residual_TD, x_TD, self.gate(x_TD), matrices, self._moe, in_place=in_place
        )


def _add_linear(residual_TD: Tensor, linear: Linear, x: Tensor, in_place: bool) -> Tensor:
    if isinstance(linear, QuantisedLinear):
        return linear.add_product(residual_TD, x, in_place=in_place)
    if not in_place:
        return residual_TD + linear(x)
    return torch.addmm(residual_TD, x, linear.weight.t(), out=residual_TD)


class DecoderLayer(nn.Module):
    """One layer of one expert; query, key and value projections are one matrix.

    Args:
        arch: The network's shape.
        moe: Its sparse feed-forward block; None for a dense one.
        operations: What it computes between matrix products.
    """

    def __init__(self, arch: Architecture, moe: Moe | None, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self._num_kv_heads = arch.num_kv_heads
        self._eps = arch.rms_norm_eps
        hidden, head_dim = arch.hidden_size, arch.head_dim
        self.input_norm = nn.Parameter(torch.empty(hidden))
        self.qkv: Linear = nn.Linear(
            hidden, (arch.num_heads + 2 * arch.num_kv_heads) * head_dim, bias=False
        )
        # Row 0 norms the half of a head that follows t, row 1 the half that follows h and w.
        self.q_norm = nn.Parameter(torch.empty(2, head_dim // 2))
        self.k_norm = nn.Parameter(torch.empty(2, head_dim // 2))
        self.o: Linear = nn.Linear(arch.num_heads * head_dim, hidden, bias=False)
        self.post_norm = nn.Parameter(torch.empty(hidden))
        self.mlp: SwiGLU | SparseMlp = (
            SwiGLU(hidden, arch.intermediate_size, operations)
            if moe is None
            else SparseMlp(hidden, moe, operations)
        )

    def project(
        self, x_TD: Tensor, rotary: Rotary, room: Room | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries, rotated keys and values.

        Args:
            x_TD: The layer's input.
            rotary: Rotation angles of the tokens.
            room: See `Operations.heads`.
        """
        return self.operations.heads(
            self._normed_product(self.qkv, x_TD, self.input_norm),
            (self.q_norm, self.k_norm),
            rotary,
            num_kv_heads=self._num_kv_heads,
            eps=self._eps,
            room=room,
        )

    def _normed_product(self, linear: Linear, x_TD: Tensor, norm: Tensor) -> Tensor:
        if isinstance(linear, QuantisedLinear):
            tokens = self.operations.quantise(x_TD, linear.numbers, norm, self._eps)
            return linear.multiply(tokens, x_TD.dtype)
        product: Tensor = linear(self._norm(x_TD, norm))
        return product

    def _norm(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        return self.operations.rms_norm(x_TD, weight, self._eps)

    def finish(self, x_TD: Tensor, attended_THE: Tensor, *, in_place: bool = False) -> Tensor:
        """Returns the layer's output from its input and the output of attention.

        Args:
            x_TD: The layer's input.
            attended_THE: The output of attention.
            in_place: Whether the output overwrites the input, which no gradient survives.
        """
        x_TD = _add_linear(x_TD, self.o, attended_THE.flatten(1), in_place)
        if isinstance(self.mlp, SparseMlp):
            return self.mlp.add_to(x_TD, self._norm(x_TD, self.post_norm), in_place=in_place)
        gate_up = self._normed_product(self.mlp.gate_up, x_TD, self.post_norm)
        return self.mlp.add_activated(x_TD, gate_up, in_place=in_place)


@dataclass(slots=True, kw_only=True)
class Middle:
    """What the middle layers added in a pass, for later passes over the same evaluations."""

    again: Sequence[int] | None = None
    """Which of the kept evaluations the next pass makes, without these layers; None to keep."""
    kept_TD: Tensor | None = None

    def added(self, x_TD: Tensor) -> Tensor:
        """Returns what was added in the evaluations of a pass that does without these layers."""
        assert self.again is not None
        assert self.kept_TD is not None
        if len(self.kept_TD) == len(x_TD):
            return self.kept_TD
        kept_BND = self.kept_TD.unflatten(0, (-1, len(x_TD) // len(self.again)))
        return kept_BND[list(self.again)].flatten(0, 1)


class Expert(nn.Module):
    """The layers of one path and its final norm. Its forward pass is for inference only.

    Args:
        arch: The network's shape.
        moe: The sparse blocks of this path; None where all are dense.
        operations: What layers compute between matrix products.
    """

    def __init__(self, arch: Architecture, moe: Moe | None, operations: Operations) -> None:
        super().__init__()
        self._eps = arch.rms_norm_eps
        self._operations = operations
        self.layers = nn.ModuleList(
            DecoderLayer(
                arch, moe if moe is not None and moe.sparse_layers[i] else None, operations
            )
            for i in range(arch.num_layers)
        )
        self.norm = nn.Parameter(torch.empty(arch.hidden_size))
        self.lend: Lend = self._own
        """Lends a layer with its weights on the device while the context is open. Replaced where
        weights are not on the device all the time."""

    def quantise(self, numbers: Numbers) -> None:
        """Replaces linear layers by quantised ones on the meta device; sparse blocks stay."""

        def quantised(linear: Linear) -> QuantisedLinear:
            assert isinstance(linear, nn.Linear)
            return QuantisedLinear(
                linear.in_features,
                linear.out_features,
                numbers,
                torch.device("meta"),
                self._operations,
            )

        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.qkv, layer.o = quantised(layer.qkv), quantised(layer.o)
            if isinstance(layer.mlp, SwiGLU):
                layer.mlp.gate_up = quantised(layer.mlp.gate_up)
                layer.mlp.down = quantised(layer.mlp.down)

    def _own(self, index: int) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.layers[index])

    def forward(
        self,
        x_TD: Tensor,
        rotary: Rotary,
        context: AttentionContext,
        middle: Middle | None = None,
    ) -> Tensor:
        """Returns the normed output of all layers, `[T, D]`, in the memory of `x_TD`.

        Args:
            x_TD: The input of the first layer.
            rotary: Rotation angles of the tokens.
            context: What the tokens attend to.
            middle: What the middle layers add: is used, or else kept here; None to do neither.
        """
        return run(self.through(x_TD, rotary, context, middle))

    def through(
        self,
        x_TD: Tensor,
        rotary: Rotary,
        context: AttentionContext,
        middle: Middle | None = None,
    ) -> Pass[Tensor]:
        """Returns a pass that computes what `forward` returns."""
        num_layers = len(self.layers)
        between = range(0) if middle is None else middle_layers(num_layers)
        yield from self._layers(x_TD, rotary, context, range(between.start))
        if middle is not None and between:
            if middle.again is None:
                # Freed before there is another.
                middle.kept_TD = None
                before_TD = x_TD.clone()
                yield from self._layers(x_TD, rotary, context, between)
                middle.kept_TD = torch.sub(x_TD, before_TD, out=before_TD)
            else:
                x_TD += middle.added(x_TD)
        yield from self._layers(x_TD, rotary, context, range(between.stop, num_layers))
        return self._normed(x_TD)

    def _normed(self, x_TD: Tensor) -> Tensor:
        for rows_TD in x_TD.split(passes.ROWS):
            rows_TD.copy_(self._operations.rms_norm(rows_TD, self.norm, self._eps))
        return x_TD

    def _layers(
        self, x_TD: Tensor, rotary: Rotary, context: AttentionContext, chosen: range
    ) -> Pass[None]:
        """Returns a pass through some of the layers, in the memory of `x_TD`."""
        parts = context.parts(x_TD.shape[0])
        angles = [(rotary[0][part], rotary[1][part]) for part in parts]
        for index in chosen:
            layer = yield self.lend, index
            assert isinstance(layer, DecoderLayer)
            for part, of_part in zip(parts, angles, strict=True):
                room = context.room(part.stop - part.start)
                # Not named, so that they are freed before the second half begins.
                attended_THE = context.attend(
                    index, part, *_project(layer, x_TD[part], of_part, room)
                )
                _finish(layer, x_TD[part], attended_THE)
                # Freed before the next part or layer attends.
                del attended_THE


def _project(
    layer: DecoderLayer, x_TD: Tensor, rotary: Rotary, room: Room | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `DecoderLayer.project` returns, computed for `ROWS` tokens at a time."""
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
        # Freed before the next rows need as much.
        del parts, part
    q_THE, k_TKE, v_TKE = outputs
    return q_THE, k_TKE, v_TKE


def _finish(layer: DecoderLayer, x_TD: Tensor, attended_THE: Tensor) -> None:
    """Applies `DecoderLayer.finish` in place, to `ROWS` tokens at a time."""
    for start in range(0, x_TD.shape[0], passes.ROWS):
        rows = slice(start, start + passes.ROWS)
        layer.finish(x_TD[rows], attended_THE[rows], in_place=True)
