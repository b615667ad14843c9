"""Keys and values of one sequence, for every layer, and what a packed pass reads of them.

Shape suffixes: T tokens of a pass, S sequences, L cached tokens, H query heads, K key/value heads,
E head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sensebatch.engine.model.attention import Attention, Segment, attend_each, runs_of
from sensebatch.engine.model.runs import (
    Addresses,
    goes_together,
    table_of_prefixes,
    table_of_runs,
)
from sensebatch.plan.passes import GROWTH_TOKENS, ROOM_SPARE, reserved_bytes

if TYPE_CHECKING:
    from sensebatch.engine.model.triton_operations import RunOperations


class Parcel(Protocol):
    """Host memory by the byte."""

    def write(self, start: int, source: Tensor) -> None:
        """Copies a contiguous tensor's bytes to a place."""

    def read(self, start: int, target: Tensor) -> None:
        """Copies the bytes at a place into a contiguous tensor."""


class KVCache:
    """The cached keys and values of one sequence; it grows and is cut at its end alone.

    Each layer has memory of its own: where it must move or grow, one layer at a time does, so
    that no more than one exists twice. A cache may wait in host memory; it is brought back before
    it is read or added to.

    Args:
        num_layers: Layers of the backbone.
        num_kv_heads: Key/value heads of a layer.
        head_dim: Channels of a head.
        dtype: The dtype of keys and values.
        device: Where they are kept.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        empty = torch.empty(2, 0, num_kv_heads, head_dim, dtype=dtype, device=device)
        self._empty = empty
        self._layers = [empty] * num_layers
        self._parcel: Parcel | None = None
        """Where keys and values wait, layer by layer; None while they are on the device."""
        self.length = 0
        """Cached tokens."""
        self.next_t = 0
        """Position t of the next text token."""

    @property
    def device(self) -> torch.device:
        """Where keys and values are kept, unless they wait."""
        return self._empty.device

    def reserve(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` after the cached ones.

        For one token it makes room for more, because text comes token by token.
        """
        assert self._parcel is None, "a waiting cache must be brought back first"
        needed = self.length + num_tokens
        # That is what the layer that grows last has, in case memory ran out before it did.
        capacity = self._layers[-1].shape[1]
        if needed <= capacity:
            return
        size = capacity + GROWTH_TOKENS if num_tokens == 1 else needed
        for index, old in enumerate(self._layers):
            grown = old.new_empty(2, size, *old.shape[2:])
            grown[:, : self.length] = old[:, : self.length]
            self._layers[index] = grown

    def upto(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys and values, cached and after `num_tokens` more, each `[L, K, E]`.

        The new ones are in reserved room, to be written; `advance` makes them count.
        """
        end = self.length + num_tokens
        keys, values = self._layers[layer]
        return keys[:end], values[:end]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns a layer's cached keys and values, each `[L, K, E]`."""
        assert self._parcel is None, "a waiting cache must be brought back first"
        keys, values = self._layers[layer]
        return keys[: self.length], values[: self.length]

    def new_rows(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns uninitialised keys and values of so many tokens, each `[tokens, K, E]`."""
        shape = (num_tokens, *self._empty.shape[2:])
        return self._empty.new_empty(shape), self._empty.new_empty(shape)

    def fork(self, num_tokens: int = 0) -> KVCache:
        """Returns a cache that begins with the same tokens and grows independently.

        With room for `num_tokens` it has memory of its own, copied at once: the host would take
        longer to launch a copy for each layer. Without, it shares the memory until it is added to.
        """
        twin = copy.copy(self)
        twin._layers = cached = [layer[:, : self.length] for layer in self._layers]
        if num_tokens:
            assert self._parcel is None, "a waiting cache must be brought back first"
            size = (2, self.length + num_tokens, *self._empty.shape[2:])
            twin._layers = [self._empty.new_empty(size) for _ in cached]
            halves = [half[: self.length] for layer in twin._layers for half in layer.unbind()]
            torch._foreach_copy_(halves, [half for layer in cached for half in layer.unbind()])
        return twin

    def park(self, take: Callable[[int], Parcel]) -> None:
        """Moves keys and values to host memory; does nothing if they are there already.

        Args:
            take: Returns room for so many bytes.
        """
        if self._parcel is not None:
            return
        parcel = take(self.num_layers * 2 * self._half_bytes)
        for index, layer in enumerate(self._layers):
            for half in (0, 1):
                parcel.write(self._place(index, half), layer[half, : self.length])
            self._layers[index] = self._empty
        self._parcel = parcel

    def bring(self) -> None:
        """Brings keys and values back to memory of their own on the device, to be added to."""
        if self._parcel is None:
            return
        for index in range(self.num_layers):
            layer = self._empty.new_empty(2, self.length, *self._empty.shape[2:])
            self.copy_layer(index, layer)
            self._layers[index] = layer
        self._parcel = None

    def brought(self) -> KVCache:
        """Returns the cache on the device, to be read: itself unless it waits."""
        if self._parcel is None:
            return self
        twin = self.fork()
        twin.bring()
        return twin

    def copy_layer(self, layer: int, target: Tensor) -> None:
        """Copies cached keys and values into `[2, L, K, E]`, wherever they are."""
        for half in (0, 1):
            if self._parcel is None:
                target[half].copy_(self._layers[layer][half, : self.length])
            else:
                self._parcel.read(self._place(layer, half), target[half])

    def replace_layer(self, layer: int, room: Tensor) -> None:
        """Replaces a layer by a copy that has room after it."""
        self._layers[layer] = room
        if layer == self.num_layers - 1:
            self._parcel = None

    @property
    def _half_bytes(self) -> int:
        """Bytes of a layer's cached keys, and of its values."""
        return self.length * self._empty.shape[2:].numel() * self._empty.itemsize

    def _place(self, layer: int, half: int) -> int:
        """Returns where a layer's keys or values begin in a parcel."""
        return (2 * layer + half) * self._half_bytes

    @property
    def layers(self) -> Sequence[Tensor]:
        """Keys and values of each layer on the device, with the room after them; empty if the cache
        waits."""
        return self._layers

    @property
    def addresses(self) -> Addresses:
        """Where the keys and values of each layer begin, until the cache moves or grows."""
        assert self._parcel is None, "a waiting cache must be brought back first"
        return [
            (layer.data_ptr(), layer.data_ptr() + layer.stride(0) * layer.itemsize)
            for layer in self._layers
        ]

    @property
    def num_layers(self) -> int:
        """The number of layers that it caches."""
        return len(self._layers)

    def trim(self, layer: int) -> None:
        """Moves a layer to memory of its own, without room after the cached tokens."""
        self._layers[layer] = self._layers[layer][:, : self.length].clone()

    def free(self) -> None:
        """Forgets all tokens and their memory."""
        self._layers = [self._empty] * self.num_layers
        self._parcel = None
        self.cut(0, 0)

    def advance(self, num_tokens: int, next_t: int) -> None:
        """Counts tokens that every layer has written."""
        self.length += num_tokens
        self.next_t = next_t

    def cut(self, length: int, next_t: int) -> None:
        """Forgets the tokens after the first `length`; their room stays for others."""
        self.length = length
        self.next_t = next_t


class SharedRoom:
    """One buffer for each layer for the caches of several sequences, with room after each.

    The caches become views of it and stay so until they are moved or outgrow it.

    Args:
        caches: On the device or waiting.
        num_tokens: Room after the longest of them.
    """

    def __init__(self, caches: Sequence[KVCache], num_tokens: int) -> None:
        self.num_tokens = max(cache.length for cache in caches) + num_tokens + ROOM_SPARE
        """Room of one sequence."""
        self._layers = []
        for index in range(caches[0].num_layers):
            keys, _ = caches[0].new_rows(0)
            room = keys.new_empty(2, len(caches), self.num_tokens, *keys.shape[1:])
            for row, cache in enumerate(caches):
                cache.copy_layer(index, room[:, row, : cache.length])
                # Frees the old memory before the next layer takes as much.
                cache.replace_layer(index, room[:, row])
            self._layers.append(room)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys and values, each `[S, L, K, E]`."""
        keys, values = self._layers[index]
        return keys, values

    def places(self, sequences_S: Tensor, tokens_S: Tensor) -> Tensor:
        """Returns the element of a layer's keys or values where a token of a sequence begins."""
        heads, dim = self._layers[0].shape[3:]
        return (sequences_S * self.num_tokens + tokens_S) * (heads * dim)


def room_bytes(caches: Sequence[KVCache], num_tokens: int) -> int:
    """Returns the bytes of device memory of a room after so many tokens more."""
    tokens = max(cache.length for cache in caches) + num_tokens + ROOM_SPARE
    keys, _ = caches[0].new_rows(0)
    of_token = 2 * keys.shape[1:].numel() * keys.itemsize
    return caches[0].num_layers * reserved_bytes(len(caches) * tokens * of_token)


def part_caches(caches: Sequence[KVCache]) -> None:
    """Gives caches memory of their own, one layer at a time, so that a shared room is freed.

    Otherwise the whole room stays until the last of its caches has outgrown it.
    """
    for layer in range(caches[0].num_layers):
        for cache in caches:
            cache.trim(layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One sequence's tokens in a packed pass."""

    cache: KVCache
    num_tokens: int
    segments: Sequence[Segment] = ()
    """Runs of the understanding path; the generation path has none."""


class UnderstandingContext:
    """Attention of prompt tokens: they are cached, and see what came before them.

    Args:
        spans: The tokens of each sequence.
        attention: How one run attends.
        operations: How many runs attend at once; None where they attend one by one.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        attention: Attention,
        operations: RunOperations | None = None,
    ) -> None:
        self._spans = spans
        self._attention = attention
        self._operations = operations
        for span in spans:
            span.cache.reserve(span.num_tokens)
        self._runs = [runs_of(span.segments, span.cache.length) for span in spans]
        self._together_LRx: Tensor | None = None
        if operations is not None:
            self._join_runs()

    def _join_runs(self) -> None:
        """Has runs that can attend together do so."""
        first_rows = accumulate((span.num_tokens for span in self._spans), initial=0)
        together = []
        for span, first, runs in zip(self._spans, first_rows, self._runs, strict=False):
            joined = [run for run in runs if goes_together(run)]
            addresses = span.cache.addresses if joined else ()
            together += [(addresses, first, run) for run in joined]
        if together:
            device = self._spans[0].cache.device
            self._together_LRx = table_of_runs(together, device)
            self._most_tokens = max(run.end - run.start for _, _, run in together)
            self._runs = [[run for run in runs if not goes_together(run)] for runs in self._runs]

    def parts(self, num_tokens: int) -> Sequence[slice]:
        """Returns all tokens as one part: sequences may be of very different lengths."""
        return (slice(0, num_tokens),)

    def room(self, num_tokens: int) -> None:
        """Returns None: every sequence has a cache of its own."""

    def attend(
        self,
        layer: int,
        part: slice,  # noqa: ARG002
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
    ) -> Tensor:
        """Returns `[T, H, E]`; writes the layer's keys and values to the caches."""
        sizes = [span.num_tokens for span in self._spans]
        read = [span.cache.upto(layer, span.num_tokens) for span in self._spans]
        _write_ends([keys for keys, _ in read], k_TKE.split(sizes))
        _write_ends([values for _, values in read], v_TKE.split(sizes))
        out_THE = torch.empty_like(q_THE)
        if self._together_LRx is not None:
            assert self._operations is not None
            self._operations.of_prompts(
                q_THE, self._together_LRx[layer], self._most_tokens, k_TKE.shape[1], out_THE
            )
        for runs, (keys, values), q_SHE, out_SHE in zip(
            self._runs, read, q_THE.split(sizes), out_THE.split(sizes), strict=True
        ):
            attend_each(self._attention, q_SHE, keys, values, runs, out_SHE)
        return out_THE


def _write_ends(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source to the last rows of its target, with one launch for many of them."""
    ends = [target[-len(source) :] for target, source in zip(targets, sources, strict=True)]
    torch._foreach_copy_(ends, list(sources))


class SmallImagesContext:
    """Attention of images being denoised that are too small for the backend, all of a part at once.

    Args:
        prefixes_LBx: See `prefix_table`.
        num_tokens: Tokens of one image.
        parts: See `GenerationContext`.
        operations: How they attend.
    """

    def __init__(
        self,
        prefixes_LBx: Tensor,
        num_tokens: int,
        parts: Sequence[slice],
        operations: RunOperations,
    ) -> None:
        self._prefixes_LBx = prefixes_LBx
        self._num_tokens = num_tokens
        self._parts = parts
        self._operations = operations

    def parts(self, num_tokens: int) -> Sequence[slice]:  # noqa: ARG002
        """Returns the tokens of the images of each part."""
        return _token_parts(self._parts, self._num_tokens)

    def room(self, num_tokens: int) -> None:
        """Returns None: images attend to their keys wherever these are."""

    def attend(
        self, layer: int, part: slice, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor
    ) -> Tensor:
        """Returns `[T, H, E]` of the images of a part."""
        images = slice(part.start // self._num_tokens, part.stop // self._num_tokens)
        table_Bx = self._prefixes_LBx[layer, images]
        return self._operations.of_images(q_THE, (k_TKE, v_TKE), table_Bx)


def prefix_table(caches: Sequence[KVCache]) -> Tensor:
    """Returns where the prefix of each image is, int64 `[layers, images, COLUMNS]`.

    Caches must neither move nor grow while it is used.
    """
    # Many images share one.
    addresses = {id(cache): cache.addresses for cache in caches}
    prefixes = [(addresses[id(cache)], cache.length) for cache in caches]
    return table_of_prefixes(prefixes, caches[0].device)


def _token_parts(parts: Sequence[slice], num_tokens: int) -> Sequence[slice]:
    """Returns the tokens of the images of each part, of which each has so many."""
    return [slice(part.start * num_tokens, part.stop * num_tokens) for part in parts]


class GenerationContext:
    """Attention of image tokens being denoised: they see the prefix and their own image.

    Nothing is cached. Several images may share one cache, which is only read. Keys lie in one
    buffer that all images and layers use in turn, the image's own first and its prefix after
    them: attention without a mask does not depend on the order, and a projection can write its
    keys where they are read.

    Args:
        caches: The prefix of each image.
        num_tokens: Tokens of one image.
        parts: Which images go through half a layer together; see `passes.evaluation_parts`.
        attention: How one image attends.
    """

    def __init__(
        self,
        caches: Sequence[KVCache],
        num_tokens: int,
        parts: Sequence[slice],
        attention: Attention,
    ) -> None:
        self._caches = caches
        self._num_tokens = num_tokens
        self._parts = parts
        self._attention = attention
        longest = max(cache.length for cache in caches)
        self._keys, self._values = caches[0].new_rows(num_tokens + longest)
        self._own = self._keys[:num_tokens], self._values[:num_tokens]
        # Made once, since a layer has little time for each image.
        self._seen = {
            length: tuple(buffer[: num_tokens + length] for buffer in (self._keys, self._values))
            for length in {cache.length for cache in caches}
        }
        self._prefixes = {
            length: [buffer[num_tokens:] for buffer in both] for length, both in self._seen.items()
        }

    def parts(self, num_tokens: int) -> Sequence[slice]:  # noqa: ARG002
        """Returns the tokens of the images of each part."""
        return _token_parts(self._parts, self._num_tokens)

    def room(self, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Returns the beginning of the buffer where a part is one image."""
        return self._own if num_tokens == self._num_tokens else None

    def attend(
        self, layer: int, part: slice, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor
    ) -> Tensor:
        """Returns `[T, H, E]` of the images of a part."""
        num_tokens = self._num_tokens
        first = part.start // num_tokens
        outputs = []
        for index in range(q_THE.shape[0] // num_tokens):
            rows = slice(index * num_tokens, (index + 1) * num_tokens)
            self._fill(layer, first + index, k_TKE[rows], v_TKE[rows])
            keys, values = self._seen[self._caches[first + index].length]
            outputs.append(self._attention(q_THE[rows], keys, values, False))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _fill(self, layer: int, image: int, k_NKE: Tensor, v_NKE: Tensor) -> None:
        """Lays out what one image attends to."""
        cache = self._caches[image]
        targets, sources = self._prefixes[cache.length], [*cache.read(layer)]
        if k_NKE.data_ptr() != self._keys.data_ptr():
            targets, sources = [*targets, *self._own], [*sources, k_NKE, v_NKE]
        torch._foreach_copy_(targets, sources)
