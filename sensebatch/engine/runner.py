"""Runs prompts and images of several sequences through the network, and times it.

Joins the network with the layout of prompts. Tasks decide which prompts there are, and what is
decoded or drawn after them. Shape suffixes: T tokens of a pass, S sequences, D hidden.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sensebatch.checkpoint.tokenizer import IMG_CONTEXT, IMG_END
from sensebatch.contract import Phase, Progress
from sensebatch.engine import graphs
from sensebatch.engine.decoding import (
    Choose,
    choose_greedily,
    new_decoder,
)
from sensebatch.engine.model.attention import Attention
from sensebatch.engine.model.copies import to_device
from sensebatch.engine.model.kv_cache import KVCache, Parcel, Span
from sensebatch.engine.model.lockstep import Pass, run
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.steps import Paced, Steps, by_block, run_through
from sensebatch.engine.model.tokenizer import Tokenizer
from sensebatch.engine.preprocess import Patches
from sensebatch.engine.prompts import Grid, ImageSpan, Prompt, positions, segments
from sensebatch.engine.sampling.text import Step, decode_text
from sensebatch.engine.writing import Text, TextRoom, finish_texts, write_together
from sensebatch.errors import BatchStoppedError
from sensebatch.plan.passes import (
    MAX_PREFILL_TOKENS,
    TOKENS_PER_PASS,
    images_per_pass,
)
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Tokens to be cached after those that a sequence has."""

    cache: KVCache
    prompt: Prompt
    embeds: Sequence[Tensor] = ()
    """The embedding of each image of the prompt, `[tokens, D]`."""
    num_shared: int = 0
    """How many cached tokens other sequences begin with as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrompts:
    """The prompts of a batch's jobs, after the network has read them."""

    caches: Sequence[Mapping[Branch, KVCache]]
    """The caches of each job, by the branches of its guidance."""
    hidden_SD: Tensor
    """The normed output after each prompt that was read."""
    rows: Sequence[int]
    """Which of these belongs to each job's conditional prompt."""


class Weights(Protocol):
    """Learns which phase is next, so that it can bring the weights for it."""

    @property
    def keeps_text(self) -> bool:
        """Whether weights for decoding stay where they are from their first use in a phase."""

    def prefill(self, *, decodes: bool) -> None:
        """Prepares for one pass of prompts, with logits after it if text is decoded."""

    def decode(self) -> None:
        """Prepares for many passes of the understanding expert with logits."""

    def lending(self) -> AbstractContextManager[Callable[[int], None]]:
        """Gives up memory on the device, but for what streaming needs, while the context is open.

        It is a function that keeps as many blocks for decoding as fit so many bytes, until it is
        called again; 0 gives up all.
        """

    def denoise(self) -> None:
        """Prepares for many passes of the generation expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLimits:
    """How much goes through the network at a time."""

    image_tokens: int = TOKENS_PER_PASS
    """Most image tokens that are denoised together; one image always fits."""
    park: Callable[[int], Parcel] | None = None
    """Returns host memory in which prefixes wait while other jobs' images are drawn; None leaves
    them on the device."""
    text_bytes: int | None = None
    """Device memory for texts, and beside them for weights that would otherwise be streamed, while
    text is decoded that nothing was drawn before; None leaves weights what they have."""
    draws_once: bool = False
    """Whether a batch has one pass or round, and so is finished once its prompts are read."""

    def together(self, resolution: Resolution) -> int:
        """Returns how many images of a size are drawn together at most."""
        return images_per_pass(resolution.image_tokens, self.image_tokens)


Mark: TypeAlias = "torch.cuda.Event | float"
"""A moment: of the device where that computes beside the host."""


def new_mark(device: torch.device) -> Mark:
    """Returns the moment at which the device is through with everything so far."""
    if device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record(torch.cuda.current_stream(device))
    return mark


def await_device(device: torch.device) -> None:
    """Returns once the device is through with everything so far; sleeps meanwhile."""
    if device.type == "cuda":
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


def seconds_between(start: Mark, end: Mark) -> float:
    """Returns the seconds between two marks, which the device has reached."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000


def _copied(tensor: Tensor) -> np.ndarray:
    copied: np.ndarray = tensor.cpu().numpy()
    return copied


def prompt_passes(lengths: Sequence[int]) -> list[slice]:
    """Returns which prompts share a pass, by their tokens; see `Runner.prefill`."""
    passes: list[slice] = []
    start, num_tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > start and num_tokens + length > MAX_PREFILL_TOKENS:
            passes.append(slice(start, index))
            start, num_tokens = index, 0
        num_tokens += length
    return [*passes, slice(start, len(lengths))]


class Runner:
    """The network with its tokenizer, attention and clock.

    Args:
        network: Is loaded.
        tokenizer: The checkpoint's.
        attention: How one run or image attends.
        progress: Is called with the progress of a phase.
        weights: Learns which phase is next; None if weights stay where they are.
        limits: How much goes through the network at a time.
        system_turns: Cached system turns by their tokens, kept for the next batch.
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
        self.observe: Callable[[int, Tensor], None] = lambda _step, _velocities: None
        """Is called with the index and the velocities of each step before it is taken."""
        self.copy_images: Callable[[Tensor], Tensor] = Tensor.cpu
        """Copies the images of a pass to the host, where they stay while they are kept. They are
        there once the device is through with what it was asked for so far."""
        self.copy_pixels: Callable[[Tensor], np.ndarray] = _copied
        """Copies what results hold to the host, where it stays as long as they do. It is there once
        the device is through with what it was asked for so far."""
        self.reading_ahead: Paced[CachedPrompts] | None = None
        """The reading of the batch's prompts, if it began while another one was drawn."""
        self.limits = PassLimits() if limits is None else limits
        self.system_turns = {} if system_turns is None else system_turns
        self._weights = weights
        self._stop = stop
        self.seconds: dict[Phase, float] = defaultdict(float)
        """Wall-clock seconds of each phase."""
        self.worked: tuple[float, float] | None = None
        """Start of the first phase and end of the last one, by `time.perf_counter`."""
        self._others: list[tuple[Mark, Mark]] = []
        """What others had the device do in a phase, by when it began and ended."""
        self.num_denoise_steps = 0
        self.num_kept_images = 0
        """Images of the batch's results that were kept images."""

    def heed_stop(self, *, others_write: bool = False) -> None:
        """Ends the batch if the run is to stop; called where no image is half drawn.

        A batch of one pass or round is finished, unless texts of others would have to be as well.

        Raises:
            BatchStoppedError: It is to stop.
        """
        if (others_write or not self.limits.draws_once) and self._stop():
            raise BatchStoppedError("the run was stopped between two passes of a batch")

    def _attend_to_prompts(
        self, q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool
    ) -> Tensor:
        """Attends as `attention` does, unless the run is to stop and nothing has been drawn.

        A CPU takes minutes to read a long prompt, and reading it again loses nothing else.
        """
        if not self.num_denoise_steps and self._stop():
            raise BatchStoppedError("the run was stopped while a batch read its prompts")
        return self.attention(q_QHE, k_LKE, v_LKE, causal)

    @contextmanager
    def prefilling(self, *, decodes: bool) -> Iterator[None]:
        """Times the phase that reads prompts: one pass of the understanding expert."""
        with self.reading():
            self.bring_for_prompts(decodes=decodes)
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Times the phase that reads prompts, in any number of passes."""
        with self._phase(Phase.PREFILL):
            yield

    def bring_for_prompts(self, *, decodes: bool) -> None:
        """Has weights brought for a pass of prompts, and for logits after it if text follows."""
        if self._weights is not None:
            self._weights.prefill(decodes=decodes)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Times the phase that decodes text: many passes of the understanding expert."""
        with self._phase(Phase.THINK):
            if self._weights is not None:
                self._weights.decode()
            yield

    @contextmanager
    def denoising(self) -> Iterator[None]:
        """Times the phase that draws images: many passes of the generation expert."""
        with self._phase(Phase.DENOISE):
            if self._weights is not None:
                self._weights.denoise()
            yield

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        """Times a block, up to when the device has finished it, without what others had it do."""
        start = time.perf_counter()
        yield
        await_device(self.network.device)
        end = time.perf_counter()
        others = sum(seconds_between(*marks) for marks in self._others)
        self._others.clear()
        self.seconds[phase] += end - start - others
        self.worked = (start if self.worked is None else self.worked[0], end)

    def pause(self, progress: Progress) -> None:
        """Reports progress between two steps, when others may have the device do something.

        What they have it do comes before the next step, and does not count as this batch's phase.
        """
        start = new_mark(self.network.device)
        self.progress(progress)
        self._others.append((start, new_mark(self.network.device)))

    def embed_images(self, images: Iterable[Patches]) -> list[Tensor]:
        """Returns the embedding of each input image, `[tokens, D]`.

        Images are taken one at a time, so that an iterable need not hold all patches at once.
        """
        return [self.network.embed_image(image.rows_PD, image.grid_hw) for image in images]

    def new_extension(self, prompt: Prompt, embeds: Sequence[Tensor] = ()) -> Extension:
        """Returns a prompt with the embeddings of its images, to be cached as a new sequence."""
        return Extension(cache=self.network.new_cache(), prompt=prompt, embeds=embeds)

    def prefill(self, extensions: Sequence[Extension]) -> Tensor:
        """Caches prompts, as many in a pass as `MAX_PREFILL_TOKENS` allows; see `extend`.

        Shared tokens count as well, because every sequence gets memory of its own for them.
        """
        return run_through(self.prefill_by_layer(extensions))

    def prefill_by_layer(self, extensions: Sequence[Extension]) -> Steps[Tensor]:
        """Computes what `prefill` returns; each layer of each pass is a step."""
        lengths = [e.num_shared + len(e.prompt.token_ids) for e in extensions]
        hidden = []
        for together in prompt_passes(lengths):
            members = extensions[together]
            caches = [extension.cache for extension in members]
            self.bring(cache for cache in caches if cache.length)
            attending = self._extending(members, self._attend_to_prompts)
            hidden.append((yield from by_block(attending)))
            self.park(caches)
        return torch.cat(hidden)

    def park(self, caches: Iterable[KVCache]) -> None:
        """Moves caches to host memory if the limits say so."""
        if self.limits.park is not None:
            for cache in caches:
                cache.park(self.limits.park)

    def bring(self, caches: Iterable[KVCache]) -> None:
        """Brings caches back to the device, where tokens can be added to them."""
        for cache in caches:
            cache.bring()

    def extend(
        self, extensions: Sequence[Extension], *, attention: Attention | None = None
    ) -> Tensor:
        """Caches tokens of several sequences in one pass.

        Args:
            extensions: Tokens of each sequence.
            attention: How one run attends; the runner's own attention if None.

        Returns:
            The normed output of each sequence's last token, `[S, D]`.
        """
        return run(self._extending(extensions, self.attention if attention is None else attention))

    def _extending(self, extensions: Sequence[Extension], attention: Attention) -> Pass[Tensor]:
        """Returns a pass that computes what `extend` returns."""
        hidden_TD = yield from self._caching(extensions, attention)
        ends = itertools.accumulate(len(extension.prompt.token_ids) for extension in extensions)
        return hidden_TD[to_device(torch.tensor(list(ends)) - 1, hidden_TD.device)]

    def extend_whole(self, extensions: Sequence[Extension]) -> Sequence[Tensor]:
        """Caches tokens as `extend` does; returns the outputs of all of them, `[tokens, D]`."""
        hidden_TD = run(self._caching(extensions, self.attention))
        return hidden_TD.split([len(extension.prompt.token_ids) for extension in extensions])

    def _caching(self, extensions: Sequence[Extension], attention: Attention) -> Pass[Tensor]:
        """Returns a pass that caches tokens of several sequences, to their outputs, `[T, D]`."""
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
        hidden_TD = yield from self.network.understanding_pass(
            x_TD, torch.cat(places, 1), spans, attention
        )
        for span, next_t in zip(spans, next_ts, strict=True):
            span.cache.advance(span.num_tokens, next_t)
        return hidden_TD

    def choose(self, hidden_SD: Tensor, choose: Choose = choose_greedily) -> list[int]:
        """Returns the choice after each sequence's last token."""
        return choose(self.network.logits(hidden_SD), range(len(hidden_SD)))

    def text_step(
        self, caches: Sequence[KVCache], most_tokens: int, choose: Choose | None = None
    ) -> Step:
        """Returns a step that decodes text after sequences and reports its progress.

        It heeds a stop while nothing has been drawn: text is not kept, so finishing it would be in
        vain. After an image, the text may be the last that its batch needs.

        Args:
            caches: The cache of each sequence, wherever it is; they end up on the device.
            most_tokens: Most tokens of any sequence.
            choose: Chooses by logits; None takes the most probable tokens.
        """
        numbers = itertools.count(1)
        stays = self._weights is None or self._weights.keeps_text
        decoder = new_decoder(
            self.network,
            caches,
            most_tokens,
            extend=self.appending,
            as_graph=stays,
            choose=choose,
            recorder=None if stays else graphs.new_recorder(self.network.device),
        )

        def step(taken: Sequence[tuple[int, int]]) -> list[int]:
            self.report_token(next(numbers))
            return decoder.step(taken)

        return step

    def report_token(self, number: int, num_together: int = 0) -> None:
        """Reports a step of decoding before it is made, and heeds a stop as `text_step` says.

        Args:
            number: The step's, from 1.
            num_together: See `Progress`.
        """
        if not self.num_denoise_steps:
            self.heed_stop(others_write=num_together > 0)
        self.progress(
            Progress(phase=Phase.THINK, step=number, num_steps=0, num_together=num_together)
        )

    def write(self, texts: Sequence[Text]) -> None:
        """Decodes texts that nothing was drawn before, one of each batch, and what comes after.

        Each batch makes the operations that it would make alone, so its text and caches are the
        same to the bit. See `text_step`.
        """
        num_bytes = self.limits.text_bytes
        if self._weights is not None and num_bytes is not None:
            with self._weights.lending() as fill, self.decoding():
                write_together(self, texts, TextRoom(num_bytes=num_bytes, fill=fill))
            return
        with self.decoding():
            if len(texts) > 1:
                write_together(self, texts, None)
                return
            (text,) = texts
            step = self.text_step(text.caches, text.writing.most_tokens, text.choose)
            decode_text(text.writing, step)
            finish_texts(self, texts)

    def append_tokens(self, taken: Sequence[tuple[KVCache, Sequence[int]]]) -> Tensor:
        """Caches text tokens; see `extend`."""
        return run(self.appending(taken))

    def appending(self, taken: Sequence[tuple[KVCache, Sequence[int]]]) -> Pass[Tensor]:
        """Returns a pass that does what `append_tokens` does."""
        extensions = [
            Extension(cache=cache, prompt=Prompt(token_ids=tuple(ids))) for cache, ids in taken
        ]
        return self._extending(extensions, self.attention)

    def generated_image(self, cache: KVCache, grid: Grid, embeds: Tensor) -> Extension:
        """Returns a drawn image and its `</img>` as tokens that follow a cached `<img>`."""
        context = self.tokenizer.token_id(IMG_CONTEXT)
        ids = (*([context] * math.prod(grid)), self.tokenizer.token_id(IMG_END))
        return Extension(
            cache=cache,
            prompt=Prompt(token_ids=ids, images=(ImageSpan(0, grid),)),
            embeds=(embeds,),
        )
