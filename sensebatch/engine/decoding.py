"""Decodes the text of several sequences in step, one token of each at a time.

`PlainDecoder` runs the network's ordinary passes and works everywhere. `FastDecoder` keeps the
caches of all sequences in one buffer and computes a step with a few kernels a layer: as a CUDA
graph if the weights that it needs stay on the device, else as a graph for each layer. The steps of
several decoders can be computed side by side, so that weights that are streamed come once for all
of them; each computes what it would alone. Shape suffixes: S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sensebatch.engine.graphs import Recorder, Recordings, uncollected
from sensebatch.engine.model.kv_cache import KVCache, SharedRoom, part_caches
from sensebatch.engine.model.lockstep import Pass, run, run_together
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.transformer import DecoderLayer, SparseMlp
from sensebatch.plan.computation import TILE_SIDE
from sensebatch.plan.passes import ROOM_SPARE, ROOM_TOKENS

if TYPE_CHECKING:
    from sensebatch.engine.model.triton_operations import DecodingOperations

Extend = Callable[[Sequence[tuple[KVCache, Sequence[int]]]], Pass[Tensor]]
"""Returns a pass that caches tokens of some sequences and returns the outputs of their last ones,
`[S, D]`."""

Choose = Callable[[Tensor, Sequence[int]], list[int]]
"""Returns the next tokens after logits `[S, V]`, which are of these sequences."""


Taken = Sequence[tuple[int, int]]
"""Tokens of a step, as (sequence, token)."""


class Decoder(Protocol):
    """Caches one token of some sequences and chooses the next ones."""

    def step(self, taken: Taken) -> list[int]:
        """Returns the choices after tokens."""

    def begin(self, taken: Taken) -> Pass[None]:
        """Returns the pass of a step, to be run before `end`."""

    def end(self, taken: Taken) -> list[int]:
        """Returns the choices that a step's pass came to."""

    def grow(self, num_tokens: int) -> None:
        """Makes room for so many more tokens of every sequence.

        Decoders do it themselves where there is none left.
        """


def step_together(steps: Sequence[tuple[Decoder, Taken]]) -> list[list[int]]:
    """Returns the choices of each decoder after its tokens; see `Decoder.step`."""
    run_together([decoder.begin(taken) for decoder, taken in steps])
    return [decoder.end(taken) for decoder, taken in steps]


class PlainDecoder:
    """Decodes by the same passes that read prompts.

    Args:
        caches: The cache of each sequence.
        extend: Returns such a pass.
        logits: Returns a pass that comes to the logits `[S, V]` of outputs `[S, D]`.
        choose: Chooses by them; the most probable tokens if None.
    """

    def __init__(
        self,
        caches: Sequence[KVCache],
        extend: Extend,
        logits: Callable[[Tensor], Pass[Tensor]],
        choose: Choose | None = None,
    ) -> None:
        self._caches = caches
        self._extend = extend
        self._logits = logits
        self._choose = choose or choose_greedily
        self._logits_SV: Tensor | None = None

    def step(self, taken: Taken) -> list[int]:
        """See `Decoder`."""
        run(self.begin(taken))
        return self.end(taken)

    def begin(self, taken: Taken) -> Pass[None]:
        """See `Decoder`."""
        hidden = yield from self._extend([(self._caches[i], [token]) for i, token in taken])
        self._logits_SV = yield from self._logits(hidden)

    def end(self, taken: Taken) -> list[int]:
        """See `Decoder`."""
        logits_SV, self._logits_SV = self._logits_SV, None
        assert logits_SV is not None, "a step must have begun"
        return self._choose(logits_SV, [index for index, _ in taken])

    def grow(self, num_tokens: int) -> None:
        """See `Decoder`."""
        # With room for what leads over from text to an image.
        for cache in self._caches:
            cache.reserve(num_tokens + ROOM_SPARE)


def choose_greedily(logits_SV: Tensor, _: Sequence[int]) -> list[int]:
    """Returns the most probable token of each sequence; see `Choose`."""
    return logits_SV.argmax(-1).tolist()


class FastDecoder:
    """Decodes with kernels that are made for it.

    All sequences take part in every step, even those that have ended, because reading the weights
    is what takes the time. What it writes after the end of a sequence is ignored.

    Args:
        network: Is loaded.
        operations: What `decoding_operations` returns for this network.
        caches: The cache of each sequence, on the device or waiting; at most
            `operations.max_sequences`. They share one buffer as long as the decoder lives.
        most_tokens: Most tokens of any sequence.
        as_graph: Whether a step is captured as a graph, because its weights stay where they are
            once used; embeddings may be in host memory.
        choose: Chooses by logits; None takes the most probable tokens, which is part of the graph.
        room_tokens: Room to begin with; None for as much as decoders make themselves.
        recorder: Records what is computed with each layer, unless a step is captured. Decoders may
            share it. None computes every step with a launch for each kernel.
    """

    def __init__(
        self,
        network: Network,
        operations: DecodingOperations,
        caches: Sequence[KVCache],
        most_tokens: int,
        *,
        as_graph: bool,
        choose: Choose | None = None,
        room_tokens: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._network = network
        self._operations = operations
        self._caches = caches
        self._left = most_tokens
        self._as_graph = as_graph
        self._recordings = None if recorder is None or as_graph else Recordings(recorder)
        self._choose = choose
        count, device = len(caches), network.device
        hidden = network.arch.hidden_size
        self._x_SD = torch.zeros(count, hidden, dtype=network.dtype, device=device)
        self._choices_S = torch.zeros(count, dtype=torch.int64, device=device)
        chosen_from = 0 if choose is None else network.arch.vocab_size
        self._logits_SV = self._x_SD.new_zeros(count, chosen_from)
        self._lengths_S = torch.zeros_like(self._choices_S)
        self._angles_S = torch.zeros_like(self._choices_S)
        self._places_S = torch.zeros_like(self._choices_S)
        self._sequences_S = torch.arange(count, device=device)
        self._given = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
        # The first step also loads the kernels that its size needs, which must happen before
        # anything is captured.
        self._is_first = True
        self._room: SharedRoom | None = None
        self.grow(ROOM_TOKENS if room_tokens is None else room_tokens)

    def grow(self, num_tokens: int) -> None:
        """Gives every sequence room for more tokens, at an address that a graph may rely on."""
        network = self._network
        # An old graph frees its memory before more is taken. The caches alone still hold an old
        # room, and leave it layer by layer.
        self._graph: torch.cuda.CUDAGraph | None = None
        if self._recordings is not None:
            self._recordings.clear()
        self._room = None
        if self._as_graph:
            self._is_first = True
        room = min(self._left, num_tokens)
        self._room = SharedRoom(self._caches, room)
        ends = [cache.next_t + room + ROOM_SPARE for cache in self._caches]
        # Text has no rows and columns.
        positions = torch.arange(max(ends), device=network.device).repeat(3, 1)
        positions[1:] = 0
        self._rotary = network.token_rotary(positions)
        self._lengths_S.copy_(torch.tensor([cache.length for cache in self._caches]))
        self._angles_S.copy_(torch.tensor([cache.next_t for cache in self._caches]))
        self._left_in_room = room

    def step(self, taken: Taken) -> list[int]:
        """See `Decoder`."""
        self._take(taken)
        self._run()
        return self.end(taken)

    def begin(self, taken: Taken) -> Pass[None]:
        """See `Decoder`."""
        self._take(taken)
        return self._compute()

    def _take(self, taken: Taken) -> None:
        if self._left_in_room == 0:
            self.grow(ROOM_TOKENS)
        for index, token in taken:
            self._given[index] = token
        # Outside the graph: the table may be in host memory.
        self._x_SD.copy_(self._network.embed_text(self._given))

    def end(self, taken: Taken) -> list[int]:
        """See `Decoder`."""
        sequences = [index for index, _ in taken]
        for index in sequences:
            cache = self._caches[index]
            cache.advance(1, cache.next_t + 1)
        self._left -= 1
        self._left_in_room -= 1
        if self._choose is not None:
            return self._choose(self._logits_SV[sequences], sequences)
        choices = self._choices_S.tolist()
        return [choices[index] for index in sequences]

    def _run(self) -> None:
        if not self._as_graph or self._is_first:
            run(self._compute())
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            captured = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
            with uncollected(), captured:
                run(self._compute())
        self._graph.replay()

    def _compute(self) -> Pass[None]:
        """Computes the next choices from embedded tokens, with the same allocations each time."""
        network, expert, room = self._network, self._network.understanding, self._room
        assert room is not None
        recordings = None if self._is_first else self._recordings
        self._places_S.copy_(room.places(self._sequences_S, self._lengths_S))
        for index in range(len(expert.layers)):
            layer = yield expert.lend, index
            assert isinstance(layer, DecoderLayer)
            compute = partial(self._through, layer, room.layer(index))
            if recordings is None:
                compute()
            else:
                recordings.run(layer, index, compute)
        self._is_first = False
        normed = network.operations.rms_norm(self._x_SD, expert.norm, network.arch.rms_norm_eps)
        logits = yield from network.lm_head.through(normed)
        if self._choose is None:
            self._choices_S.copy_(logits.argmax(-1))
        else:
            self._logits_SV.copy_(logits)
        # Sequences that have ended stay at the last place of their room.
        self._lengths_S.add_(1).clamp_(max=room.num_tokens - 1)
        self._angles_S.add_(1).clamp_(max=self._rotary[0].shape[0] - 1)

    def _through(self, layer: DecoderLayer, cache: tuple[Tensor, Tensor]) -> None:
        """Takes the tokens through a layer, in the memory of its input."""
        network, decoding, x_SD = self._network, self._operations, self._x_SD
        rms_norm, eps = network.operations.rms_norm, network.arch.rms_norm_eps
        normed = rms_norm(x_SD, layer.input_norm, eps)
        q_SHE = decoding.heads(
            decoding.product(normed, layer.qkv),
            (layer.q_norm, layer.k_norm),
            self._rotary,
            eps=eps,
            cache=cache,
            rotary_rows_S=self._angles_S,
            places_S=self._places_S,
        )
        attended = decoding.attend(q_SHE, cache, self._lengths_S)
        decoding.product(attended, layer.o, residual=x_SD, out=x_SD)
        normed = rms_norm(x_SD, layer.post_norm, eps)
        if isinstance(layer.mlp, SparseMlp):
            layer.mlp.add_to(x_SD, normed, in_place=True)
            return
        hidden = decoding.product(normed, layer.mlp.gate_up, swiglu=True)
        decoding.product(hidden, layer.mlp.down, residual=x_SD, out=x_SD)


def decoding_operations(network: Network) -> DecodingOperations | None:
    """Returns what `FastDecoder` computes with, or None if it cannot decode with a network.

    It knows no matrices whose sides no tile fits.
    """
    arch = network.arch
    known = arch.hidden_size % TILE_SIDE == arch.intermediate_size % TILE_SIDE == 0
    return network.operations.decoding if known else None


def _operations_for(network: Network, num_sequences: int) -> DecodingOperations | None:
    """Returns what decodes so many sequences in one room, or None if nothing does."""
    operations = decoding_operations(network)
    if operations is None or num_sequences > operations.max_sequences:
        return None
    return operations


def end_text(network: Network, caches: Sequence[KVCache], more_tokens: int = 0) -> None:
    """Frees the room for text that was not written.

    Args:
        network: The network of the caches.
        caches: The caches that text was added to together.
        more_tokens: Tokens that will be added to each of them before text is decoded again. Caches
            that share a room then share one until then as well: if they grew one by one, they
            would leave holes on the device that are too small for later caches.
    """
    if more_tokens and _operations_for(network, len(caches)) is not None:
        SharedRoom(caches, more_tokens)
    else:
        part_caches(caches)


def new_decoder(
    network: Network,
    caches: Sequence[KVCache],
    most_tokens: int,
    *,
    extend: Extend,
    as_graph: bool,
    choose: Choose | None = None,
    room_tokens: int | None = None,
    recorder: Recorder | None = None,
) -> Decoder:
    """Returns the fastest decoder that a network allows.

    Args:
        network: Is loaded.
        caches: See `FastDecoder`.
        most_tokens: See `FastDecoder`.
        extend: See `PlainDecoder`.
        as_graph: See `FastDecoder`.
        choose: See `PlainDecoder`.
        room_tokens: See `FastDecoder`.
        recorder: See `FastDecoder`.
    """
    operations = _operations_for(network, len(caches))
    if operations is not None:
        on_gpu = network.device.type == "cuda"
        return FastDecoder(
            network,
            operations,
            caches,
            most_tokens,
            as_graph=as_graph and on_gpu,
            choose=choose,
            room_tokens=room_tokens,
            recorder=recorder,
        )
    for cache in caches:
        cache.bring()
    plain = PlainDecoder(caches, extend, network.lm_head.through, choose)
    if room_tokens is not None:
        plain.grow(room_tokens)
    return plain
