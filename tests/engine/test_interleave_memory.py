"""What interleave jobs no longer need is freed before the next images are drawn."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from sensebatch.contract import Channel
from sensebatch.engine.model.kv_cache import KVCache, SharedRoom, part_caches
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.text import Script, Step
from sensebatch.engine.tasks import interleave
from sensebatch.engine.tasks.denoise import Canvas, denoise
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.state import PreparedJob
from sensebatch.tasks import Branch
from tests.engine.golden_model import infer, succeeded
from tests.engine.memory.tracker import LiveBytes
from tests.engine.test_batches import jobs_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SCRIPT = Script(word=65, image_start=260)


def with_images(job: PreparedJob, max_images: int) -> PreparedJob:
    sampling = replace(
        job.job.sampling, max_images=max_images, max_new_tokens=2 * max_images, num_steps=1
    )
    return replace(job, job=replace(job.job, sampling=sampling))


def test_caches_leave_a_shared_room_layer_by_layer() -> None:
    caches = [
        KVCache(num_layers=6, num_kv_heads=1, head_dim=4, dtype=torch.float32, device=CPU)
        for _ in range(3)
    ]
    for cache in caches:
        cache.reserve(50)
        cache.advance(50, 50)
    with LiveBytes() as live:
        SharedRoom(caches, 20)
        room = live.now
        part_caches(caches)
        assert live.peak <= room + room // 6
        assert live.now < room
        for cache in caches:
            cache.reserve(1000)
    grown = 3 * 6 * 2 * 1050 * 4 * 4
    assert live.now == grown
    assert live.peak <= grown + grown // 6


def test_no_room_for_text_is_left_while_an_image_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, jobs = jobs_of("dense_fm", "il_text_nothink")
    script = replace(SCRIPT, image_start=runner.tokenizer.token_id("<img>"))
    rooms = []

    def step(caches: Sequence[KVCache], most_tokens: int) -> Step:
        room = SharedRoom(caches, most_tokens)
        rooms.append(weakref.ref(room.layer(0)[0].untyped_storage()))
        return Runner.text_step(runner, caches, most_tokens)

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        gc.collect()
        assert rooms[-1]() is None
        return denoise(*args, **options)

    monkeypatch.setattr(runner, "text_step", step)
    monkeypatch.setattr(interleave, "denoise", watched)
    jobs = [with_images(job, 2) for job in jobs]
    with infer():
        run_interleave(runner, jobs, kept=(), channel=Channel(), script=script)
    assert len(rooms) == 2


def test_finished_jobs_and_earlier_images_take_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, (first, second, _) = jobs_of("dense_fm", "il_text_nothink")
    script = replace(SCRIPT, image_start=runner.tokenizer.token_id("<img>"))
    earlier: list[weakref.ref[torch.UntypedStorage]] = []
    caches: list[list[weakref.ref[object]]] = []

    def watched(_: object, canvases: Sequence[Canvas], *args: Any, **options: Any) -> object:
        gc.collect()
        assert all(image() is None for image in earlier)
        if caches:
            ended, going_on = caches[0]
            assert (ended() is None, going_on() is None) == (True, False)
        caches.append([weakref.ref(canvas.caches[Branch.COND]) for canvas in canvases])
        images = denoise(runner, canvases, *args, **options)
        earlier.append(weakref.ref(images.untyped_storage()))
        return images

    monkeypatch.setattr(interleave, "denoise", watched)
    jobs = [with_images(first, 1), with_images(second, 3)]
    with infer():
        results = succeeded(run_interleave(runner, jobs, kept=(), channel=Channel(), script=script))
    assert [len(result.images) for result in results] == [1, 3]
    assert [len(drawn) for drawn in caches] == [2, 1, 1]
