"""Keys and values of one sequence, for every layer, and what a packed pass reads of them.

Shape suffixes: T tokens of a pass, L cached tokens, H query heads, K key/value heads, E head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensebatch.engine.model.attention import Attention, Segment, attend_segments

GROWTH_TOKENS = 128
"""A cache that must grow grows by at least this many tokens."""


class KVCache:
    """The cached keys and values of one sequence; it only ever grows at the end.

    Args:
        num_layers: Layers of the backbone.
        num_kv_heads: Key/value heads of a layer.
        head_dim: Channels of a head.
        dtype: Of keys and values.
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
        self._data = torch.empty(
            num_layers, 2, 0, num_kv_heads, head_dim, dtype=dtype, device=device
        )
        self.length = 0
        """Cached tokens."""
        self.next_t = 0
        """Position t of the next text token."""

    def reserve(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` behind the cached ones."""
        needed = self.length + num_tokens
        capacity = self._data.shape[2]
        if needed <= capacity:
            return
        layers, _, _, heads, dim = self._data.shape
        grown = self._data.new_empty(layers, 2, max(needed, capacity + GROWTH_TOKENS), heads, dim)
        grown[:, :, : self.length] = self._data[:, :, : self.length]
        self._data = grown

    def write(self, layer: int, k_TKE: Tensor, v_TKE: Tensor) -> tuple[Tensor, Tensor]:
        """Puts a layer's new keys and values behind the cached ones, in reserved room.

        Returns:
            Keys and values of that layer, cached and new. `advance` makes the new ones count.
        """
        end = self.length + k_TKE.shape[0]
        self._data[layer, 0, self.length : end] = k_TKE
        self._data[layer, 1, self.length : end] = v_TKE
        return self._data[layer, 0, :end], self._data[layer, 1, :end]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns a layer's cached keys and values, each `[L, K, E]`."""
        return self._data[layer, 0, : self.length], self._data[layer, 1, : self.length]

    def on(self, device: torch.device) -> KVCache:
        """Returns the cache on a device, to be read: itself where it is there already."""
        if self._data.device == device:
            return self
        twin = copy.copy(self)
        twin._data = self._data[:, :, : self.length].to(device)
        return twin

    def move(self, device: torch.device) -> None:
        """Moves keys and values to a device."""
        self._data = self._data[:, :, : self.length].to(device)

    def advance(self, num_tokens: int, next_t: int) -> None:
        """Counts tokens that every layer has written."""
        self.length += num_tokens
        self.next_t = next_t


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One sequence's tokens in a packed pass."""

    cache: KVCache
    num_tokens: int
    segments: Sequence[Segment] = ()
    """Runs of the understanding path; the generation path has none."""


class UnderstandingContext:
    """Attention of prompt tokens: they are cached, and see what came before them."""

    def __init__(self, spans: Sequence[Span], attention: Attention) -> None:
        self._spans = spans
        self._attention = attention
        for span in spans:
            span.cache.reserve(span.num_tokens)

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Returns `[T, H, E]`; writes the layer's keys and values to the caches."""
        out_THE = torch.empty_like(q_THE)
        start = 0
        for span in self._spans:
            end = start + span.num_tokens
            keys, values = span.cache.write(layer, k_TKE[start:end], v_TKE[start:end])
            attend_segments(
                self._attention, q_THE[start:end], keys, values, span.segments, out_THE[start:end]
            )
            start = end
        return out_THE


class GenerationContext:
    """Attention of image tokens being denoised: they see the prefix and their own image.

    Nothing is cached. Several images may share one cache, which is only read.
    """

    def __init__(self, caches: Sequence[KVCache], num_tokens: int, attention: Attention) -> None:
        self._caches = caches
        self._num_tokens = num_tokens
        self._attention = attention

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Returns `[T, H, E]`, T being the tokens of all images, one after the other."""
        out_THE = torch.empty_like(q_THE)
        for index, cache in enumerate(self._caches):
            rows = slice(index * self._num_tokens, (index + 1) * self._num_tokens)
            keys, values = cache.read(layer)
            out_THE[rows] = self._attention(
                q_THE[rows],
                torch.cat((keys, k_TKE[rows])),
                torch.cat((values, v_TKE[rows])),
                False,
            )
        return out_THE
