"""Texts of several batches are written side by side, to the bytes that each comes to alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sensebatch.contract import Channel
from sensebatch.engine.decoding import FastDecoder
from sensebatch.engine.model.kv_cache import KVCache, SharedRoom, room_bytes
from sensebatch.engine.model.lockstep import Pass, run, run_together
from sensebatch.engine.prompts import Prompt
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.text import Writing
from sensebatch.engine.tasks.ask import RUNNER as ASK
from sensebatch.engine.tasks.registry import TaskRunner
from sensebatch.engine.tasks.single_image import RUNNER as SINGLE_IMAGE
from sensebatch.engine.tasks.state import PreparedJob
from sensebatch.engine.writing import Text, TextRoom, _make_rooms, write_together
from sensebatch.jobs import Failure, JobResult
from sensebatch.plan import passes
from tests.engine.golden_model import build_job, build_runner, infer
from tests.engine.test_batches import fresh
from tests.engine.test_kernels import interpreted
from tests.golden_data import load_case

SYSTEM = "Draw. "


def thinking(config: str, fused: bool = False) -> tuple[Runner, list[list[PreparedJob]]]:
    """Returns batches of thinking jobs that end at different lengths."""
    name = "t2i_think_max"
    case = load_case(config, name)
    job = build_job(case, SYSTEM)
    batches = [
        [longest(job, 3), longest(job, 5)],
        [longest(job, 6)],
        [longest(job, 1), longest(job, 2), longest(job, 4)],
    ]
    return build_runner(case, fused=fused), batches


def longest(job: PreparedJob, tokens: int) -> PreparedJob:
    sampling = replace(job.job.sampling, max_think_tokens=tokens)
    return replace(job, job=replace(job.job, sampling=sampling))


def held_bytes(caches: Sequence[KVCache]) -> int:
    """Returns the bytes of device memory that caches take, rooms that they share counted once."""
    storages = [layer.untyped_storage() for cache in caches for layer in cache.layers]
    held = {one.data_ptr(): one.nbytes() for one in storages}
    return sum(map(passes.reserved_bytes, held.values()))


def outputs(results: Sequence[JobResult | Failure]) -> list[tuple[Any, ...]]:
    found = []
    for result in results:
        assert isinstance(result, JobResult), result
        images = [image.tobytes() for image in result.images]
        scores = result.choice_log_probabilities
        found.append((images, result.text, scores, result.finish_reason, result.think_tokens))
    return found


def alone(
    task: TaskRunner, runner: Runner, batches: Sequence[Sequence[PreparedJob]]
) -> list[list[tuple[Any, ...]]]:
    return [
        outputs(task.run(runner, fresh(list(jobs)), kept=(), channel=Channel())) for jobs in batches
    ]


def together(
    task: TaskRunner, runner: Runner, batches: Sequence[Sequence[PreparedJob]]
) -> list[list[tuple[Any, ...]]]:
    assert task.together is not None
    written = task.together.write(runner, [fresh(list(jobs)) for jobs in batches], None)
    return [outputs(task.together.finish(runner, one, (), Channel())) for one in written]


def text_after(
    runner: Runner, prompts: Sequence[tuple[int, ...]], limit: int, *, is_last: bool = False
) -> Text:
    """Returns a text of so many tokens after each prompt."""
    extensions = [runner.new_extension(Prompt(token_ids=ids)) for ids in prompts]
    first = dict(enumerate(runner.choose(runner.extend(extensions))))
    return Text(
        caches=[extension.cache for extension in extensions],
        writing=Writing(first, dict.fromkeys(first, limit), stop_before=frozenset()),
        is_last=is_last,
    )


@pytest.mark.parametrize("num_texts", [1, 2])
def test_caches_that_nothing_comes_after_are_freed(num_texts: int) -> None:
    runner, _ = thinking("dense_fm")
    with infer():
        texts = [text_after(runner, [(5, 9), (7,)], 2, is_last=True), text_after(runner, [(3,)], 4)]
        runner.write(texts[:num_texts])
    lengths = [[cache.length for cache in text.caches] for text in texts]
    assert lengths == [[0, 0], [1 if num_texts == 1 else 1 + 4]]
    assert not any(layer.numel() for cache in texts[0].caches for layer in cache.layers)


def test_a_text_gets_no_more_room_than_it_may_write() -> None:
    runner, _ = thinking("dense_fm")
    with infer():
        text = text_after(runner, [(5, 9), (7, 3)], 3)
        counted = room_bytes(text.caches, 3)
        _make_rooms(runner, [text], None, passes.TEXT_ROOM_TOKENS)
        assert 0 < held_bytes(text.caches) <= counted
        # One that is shared is there once.
        SharedRoom(text.caches, 5)
        assert held_bytes(text.caches) == room_bytes(text.caches, 5)


@pytest.mark.parametrize("spare", [-1, 0, 1 << 20])
def test_weights_get_what_rooms_leave_while_a_layer_moves(spare: int) -> None:
    runner, _ = thinking("dense_fm")
    fills: list[int] = []
    with infer():
        texts = [text_after(runner, [(5, 9), (7,)], 9), text_after(runner, [(3,)], 2)]
        rooms = [room_bytes(texts[0].caches, 9), room_bytes(texts[1].caches, 2)]
        layer = max(rooms) // runner.network.arch.num_layers
        room = TextRoom(num_bytes=sum(rooms) + layer + spare, fill=fills.append)
        active = _make_rooms(runner, texts, room, passes.TEXT_ROOM_TOKENS)
        assert active == texts
    assert fills == [max(spare, 0)]


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=[interpreted, pytest.mark.slow])]
)
def test_weights_give_up_what_they_have_where_a_room_finds_no_memory(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """Caches that were half moved are moved again."""
    runner, _ = thinking("dense_fm", fused=fused)
    monkeypatch.setattr(passes, "TEXT_ROOM_TOKENS", 2)
    monkeypatch.setattr("sensebatch.engine.model.attention_kernels.ATTENTION_SPLITS", 2)
    fills: list[int] = []
    left: list[int] = []
    new_empty = torch.Tensor.new_empty

    def fill(num_bytes: int) -> None:
        fills.append(num_bytes)
        left.clear()
        if num_bytes and not is_roomy:
            # A layer of the first cache or room does not fit.
            left.append(1)

    def limited(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        found = new_empty(self, *args, **options)
        if left and found.numel():
            if not left[0]:
                left.clear()
                raise torch.OutOfMemoryError("CUDA out of memory")
            left[0] -= 1
        return found

    monkeypatch.setattr(torch.Tensor, "new_empty", limited)
    found = []
    with infer():
        for is_roomy in (True, False):
            texts = [text_after(runner, [(5, 9), (7,)], 3), text_after(runner, [(3,)], 5)]
            fills.clear()
            write_together(runner, texts, TextRoom(num_bytes=1 << 30, fill=fill))
            decoded = [text.writing.decoded for text in texts]
            caches = [cache for text in texts for cache in text.caches]
            found.append((decoded, [[*cache.read(0), *cache.read(-1)] for cache in caches]))
            assert (
                [bool(num_bytes) for num_bytes in fills] == [True] * 3
                if is_roomy
                else [True, False] * 3
            )
    (expected, expected_keys), (decoded, keys) = found
    assert decoded == expected
    for own, others in zip(keys, expected_keys, strict=True):
        assert all(map(torch.equal, own, others))


@pytest.mark.parametrize("config", ["dense_fm", "moe"])
def test_batches_that_think_together_end_in_the_bytes_of_each_alone(config: str) -> None:
    runner, batches = thinking(config)
    with infer():
        expected = alone(SINGLE_IMAGE, runner, batches)
        assert together(SINGLE_IMAGE, runner, batches) == expected
        assert together(SINGLE_IMAGE, runner, batches[::-1]) == expected[::-1]
        assert together(SINGLE_IMAGE, runner, batches[1:]) == expected[1:]


@interpreted
def test_kernels_decode_batches_together_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms are replaced on the way, at other steps in each batch."""
    runner, _ = thinking("dense_fm", fused=True)
    batches: list[tuple[list[tuple[int, ...]], int]] = [
        ([(5, 9), (7,)], 1),
        ([(3,)], 2),
    ]
    begun = []
    begin = FastDecoder.begin

    def watched(self: FastDecoder, taken: Any) -> Pass[None]:
        begun.append(id(self))
        return begin(self, taken)

    def content(text: Text) -> list[Any]:
        cached = [
            tensor.numpy().tobytes()
            for cache in text.caches
            for layer in range(cache.num_layers)
            for tensor in cache.read(layer)
        ]
        return [text.writing.decoded, cached]

    monkeypatch.setattr("sensebatch.engine.decoding.ROOM_TOKENS", 1)
    monkeypatch.setattr(FastDecoder, "begin", watched)
    with infer():
        alone = [text_after(runner, *batch) for batch in batches]
        for text in alone:
            runner.write([text])
        assert not begun
        texts = [text_after(runner, *batch) for batch in batches]
        runner.write(texts)
    assert len(begun) == sum(limit for _, limit in batches)
    assert [content(text) for text in texts] == [content(text) for text in alone]


@pytest.mark.parametrize("think", [False, True])
def test_questions_of_several_batches_get_the_answers_of_each_alone(think: bool) -> None:
    case = load_case("dense_fm", "ask_1img")
    runner, job = build_runner(case), build_job(case, "")
    none = build_job(load_case("dense_fm", "ask_noimg"), "")

    def asked(one: PreparedJob, **sampling: Any) -> PreparedJob:
        changed = replace(one.job, think=think, sampling=replace(one.job.sampling, **sampling))
        return replace(one, job=changed)

    batches = [
        [asked(job), asked(none, do_sample=True, temperature=2.0)],
        [asked(job, choices=("red", "read", "rose", "a")), asked(job, max_new_tokens=2)],
        [asked(none, choices=("yes", "no"))],
    ]
    with infer():
        expected = alone(ASK, runner, batches)
        assert together(ASK, runner, batches) == expected


def test_blocks_are_lent_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, batches = thinking("dense_fm")
    network, lent = runner.network, []
    own = network.understanding.lend

    @contextmanager
    def counted(index: int) -> Iterator[nn.Module]:
        lent.append(index)
        with own(index) as layer:
            yield layer

    with infer():
        assert SINGLE_IMAGE.together is not None
        monkeypatch.setattr(network.understanding, "lend", counted)
        SINGLE_IMAGE.together.write(runner, [fresh(jobs) for jobs in batches], None)
    num_layers = network.arch.num_layers
    # The turn that all begin with is kept. Prompts of each batch, steps of the longest text, and
    # what leads over to the images.
    prompts, ending, longest_text = len(batches), 1, 6
    assert lent.count(0) <= 1 + prompts + longest_text + ending
    assert len(lent) == num_layers * lent.count(0)


def test_passes_that_ask_for_other_blocks_are_refused() -> None:
    @contextmanager
    def lend(_: int) -> Iterator[nn.Module]:
        yield nn.Identity()

    def walk(*blocks: int) -> Pass[int]:
        for block in blocks:
            yield lend, block
        return len(blocks)

    assert run(walk(1, 2, 3)) == 3
    assert run_together([walk(1, 2), walk(1, 2)]) == [2, 2]
    with pytest.raises(AssertionError, match="same blocks"):
        run_together([walk(1, 2), walk(1, 3)])
    with pytest.raises(AssertionError, match="after the same block"):
        run_together([walk(1, 2), walk(1)])
    assert torch.is_inference_mode_enabled() is False
