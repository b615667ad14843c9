"""Runs prompts and pictures of several sequences through the network, and times it.

Joins the network with the prompts' layout; which prompts, and what is decoded or drawn behind
them, is the tasks' business. Shape suffixes: T tokens of a pass, S sequences, D hidden.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sensebatch.checkpoint.tokenizer import IMG_CONTEXT, IMG_END
from sensebatch.contract import Phase, Progress
from sensebatch.engine.decoding import new_decoder
from sensebatch.engine.model.attention import Attention
from sensebatch.engine.model.kv_cache import KVCache, Parcel, Span
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.tokenizer import Tokenizer
from sensebatch.engine.preprocess import Patches
from sensebatch.engine.prompts import Grid, ImageSpan, Prompt, positions, segments
from sensebatch.engine.sampling.text import Step
from sensebatch.errors import BatchStoppedError
from sensebatch.plan.passes import MAX_PREFILL_TOKENS, TOKENS_PER_PASS, images_per_pass
from sensebatch.resolutions import Resolution


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Tokens to be put behind what a sequence has cached."""

    cache: KVCache
    prompt: Prompt
    embeds: Sequence[Tensor] = ()
    """Of each image of the prompt, `[tokens, D]`."""
    num_shared: int = 0
    """Cached tokens that other sequences begin with too."""


class Weights(Protocol):
    """Told what comes next, so that the weights for it can be brought."""

    @property
    def keeps_text(self) -> bool:
        """Whether what decoding needs, once used, stays where it is until the next phase."""

    def prefill(self, *, decodes: bool) -> None:
        """One pass of prompts, with logits behind it where text follows."""

    def decode(self) -> None:
        """Many passes of the understanding expert with logits."""

    def denoise(self) -> None:
        """Many passes of the generation expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLimits:
    """How much goes through the network at a time."""

    image_tokens: int = TOKENS_PER_PASS
    """Most image tokens denoised together; one picture always is."""
    park: Callable[[int], Parcel] | None = None
    """Gives host memory in which prefixes wait while other jobs' images are drawn; None lets
    them stay on the device."""
    draws_once: bool = False
    """Whether a batch has one pass or round, and so is finished once its prompts are read."""

    def together(self, resolution: Resolution) -> int:
        """Returns how many pictures of a size are drawn together at most."""
        return images_per_pass(resolution.image_tokens, self.image_tokens)


class Runner:
    """The network with its tokenizer, attention and clock.

    Args:
        network: Loaded.
        tokenizer: Of the same checkpoint.
        attention: How one run or picture attends.
        progress: Told where a phase is.
        weights: Told which phase comes next; None where they stay where they are.
        limits: How much goes through the network at a time.
        system_turns: Cached system turns by their tokens, kept from batch to batch.
        stop: Whether the run is to stop.
    """

    def __init__(
        self,
        *,
        network: Network,
        tokenizer: Tokenizer,
        attention: Attention,
        progress: Callable[[Progress], None] = lambda _: None,
        weights: Weights | None = None,
        limits: PassLimits | None = None,
        system_turns: dict[tuple[int, ...], KVCache] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.attention = attention
        self.progress = progress
        self.limits = PassLimits() if limits is None else limits
        self.system_turns = {} if system_turns is None else system_turns
        self._weights = weights
        self._stop = stop
        self.seconds: dict[Phase, float] = defaultdict(float)
        """Wall seconds by phase."""
        self.worked: tuple[float, float] | None = None
        """Start of the first phase and end of the last one, of `time.perf_counter`."""
        self.num_denoise_steps = 0
        self.num_kept_images = 0
        """Pictures of the batch's results that were taken from checkpoints."""

    def heed_stop(self) -> None:
        """Ends the batch if it is to stop; called where no image is half drawn.

        Raises:
            BatchStoppedError: It is to stop.
        """
        if not self.limits.draws_once and self._stop():
            raise BatchStoppedError("the run was stopped between two passes of a batch")

    def _attend_to_prompts(
        self, q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool
    ) -> Tensor:
        """Attends as `attention` does, unless the run is to stop and nothing is drawn yet.

        A long prompt takes a CPU minutes, and nothing is lost if it is read again.
        """
        if not self.num_denoise_steps and self._stop():
            raise BatchStoppedError("the run was stopped while a batch read its prompts")
        return self.attention(q_QHE, k_LKE, v_LKE, causal)

    @contextmanager
    def prefilling(self, *, decodes: bool) -> Iterator[None]:
        """The phase of prompts: one pass of the understanding expert."""
        with self._phase(Phase.PREFILL):
            if self._weights is not None:
                self._weights.prefill(decodes=decodes)
            yield

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """The phase of text: many passes of the understanding expert."""
        with self._phase(Phase.THINK):
            if self._weights is not None:
                self._weights.decode()
            yield

    @contextmanager
    def denoising(self) -> Iterator[None]:
        """The phase of pictures: many passes of the generation expert."""
        with self._phase(Phase.DENOISE):
            if self._weights is not None:
                self._weights.denoise()
            yield

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        """Counts the time of a block; the device has finished it when the block ends."""
        start = time.perf_counter()
        yield
        if self.network.device.type == "cuda":
            torch.cuda.synchronize(self.network.device)
        end = time.perf_counter()
        self.seconds[phase] += end - start
        self.worked = (start if self.worked is None else self.worked[0], end)

    def embed_images(self, images: Iterable[Patches]) -> list[Tensor]:
        """Returns `[tokens, D]` of each input image.

        One at a time, so that patches which are made as they are asked for are not all there.
        """
        return [self.network.embed_image(image.rows_PD, image.grid_hw) for image in images]

    def new_extension(self, prompt: Prompt, embeds: Sequence[Tensor] = ()) -> Extension:
        """Returns a prompt with its images' embeds, to be cached as a new sequence."""
        return Extension(cache=self.network.new_cache(), prompt=prompt, embeds=embeds)

    def prefill(self, extensions: Sequence[Extension]) -> Tensor:
        """Caches prompts, so many in a pass as `MAX_PREFILL_TOKENS` allows; see `extend`.

        Tokens that were shared count as well: every sequence gets memory of its own for them.
        """
        hidden = []
        group: list[Extension] = []
        num_tokens = 0
        for extension in extensions:
            length = extension.num_shared + len(extension.prompt.token_ids)
            if group and num_tokens + length > MAX_PREFILL_TOKENS:
                hidden.append(self._prefill_together(group))
                group, num_tokens = [], 0
            group.append(extension)
            num_tokens += length
        hidden.append(self._prefill_together(group))
        return torch.cat(hidden)

    def _prefill_together(self, extensions: Sequence[Extension]) -> Tensor:
        caches = [extension.cache for extension in extensions]
        self.bring(cache for cache in caches if cache.length)
        hidden = self.extend(extensions, attention=self._attend_to_prompts)
        self.park(caches)
        return hidden

    def park(self, caches: Iterable[KVCache]) -> None:
        """Lets caches wait in host memory, where the limits say so."""
        if self.limits.park is not None:
            for cache in caches:
                cache.park(self.limits.park)

    def bring(self, caches: Iterable[KVCache]) -> None:
        """Brings caches to the device, to be added to."""
        for cache in caches:
            cache.bring()

    def extend(
        self, extensions: Sequence[Extension], *, attention: Attention | None = None
    ) -> Tensor:
        """Caches tokens of several sequences in one pass.

        Args:
            extensions: Tokens of each sequence.
            attention: How one run attends; as in every pass if None.

        Returns:
            `[S, D]`, the normed output of each sequence's last token.
        """
        device = self.network.device
        ids = torch.tensor([i for e in extensions for i in e.prompt.token_ids])
        x_TD = self.network.embed_text(ids)
        spans, places, next_ts, start = [], [], [], 0
        for extension in extensions:
            prompt = extension.prompt
            for image, embeds in zip(prompt.images, extension.embeds, strict=True):
                x_TD[start + image.start : start + image.end] = embeds
            relative = torch.from_numpy(positions(prompt))
            relative[0] += extension.cache.next_t
            places.append(relative)
            next_ts.append(int(relative[0].max()) + 1)
            runs = [run for run in segments(prompt) if run.end > run.start]
            num_tokens = len(prompt.token_ids)
            spans.append(Span(cache=extension.cache, num_tokens=num_tokens, segments=runs))
            start += num_tokens
        attention = self.attention if attention is None else attention
        hidden_TD = self.network.understand(x_TD, torch.cat(places, 1), spans, attention)
        for span, next_t in zip(spans, next_ts, strict=True):
            span.cache.advance(span.num_tokens, next_t)
        ends = torch.tensor([span.num_tokens for span in spans], device=device).cumsum(0) - 1
        return hidden_TD[ends]

    def choose(self, hidden_SD: Tensor) -> list[int]:
        """Returns the greedy choice behind each sequence's last token."""
        return self.network.logits(hidden_SD).argmax(-1).tolist()

    def text_step(self, caches: Sequence[KVCache], most_tokens: int) -> Step:
        """Returns the step that decodes text behind sequences; it tells the progress.

        It heeds a stop while nothing is drawn: text is not kept, so that to finish it would be
        in vain. Text behind a picture may be the last that its batch needs.

        Args:
            caches: Of each sequence, wherever they wait; they are on the device afterwards.
            most_tokens: No sequence is given more.
        """
        numbers = itertools.count(1)
        decoder = new_decoder(
            self.network,
            caches,
            most_tokens,
            extend=self.append_tokens,
            choose=self.choose,
            as_graph=self._weights is None or self._weights.keeps_text,
        )

        def step(taken: Sequence[tuple[int, int]]) -> list[int]:
            if not self.num_denoise_steps:
                self.heed_stop()
            self.progress(Progress(phase=Phase.THINK, step=next(numbers), num_steps=0))
            return decoder.step(taken)

        return step

    def append_tokens(self, taken: Sequence[tuple[KVCache, Sequence[int]]]) -> Tensor:
        """Caches text tokens; see `extend`."""
        return self.extend(
            [Extension(cache=cache, prompt=Prompt(token_ids=tuple(ids))) for cache, ids in taken]
        )

    def generated_image(self, cache: KVCache, grid: Grid, embeds: Tensor) -> Extension:
        """Returns a drawn picture and its `</img>` as tokens to follow a cached `<img>`."""
        context = self.tokenizer.token_id(IMG_CONTEXT)
        ids = (*([context] * math.prod(grid)), self.tokenizer.token_id(IMG_END))
        return Extension(
            cache=cache,
            prompt=Prompt(token_ids=ids, images=(ImageSpan(0, grid),)),
            embeds=(embeds,),
        )
