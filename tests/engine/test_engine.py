"""The engine as the executor meets it, with the embedded checkpoint."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.config import MemoryConfig, RunConfig, default_config
from sensebatch.contract import Channel, Drawn, Progress
from sensebatch.engine import engine as engine_module
from sensebatch.engine.engine import SenseNovaEngine, load_engine
from sensebatch.engine.memory import places as places_module
from sensebatch.engine.memory.lanes import CpuLane
from sensebatch.engine.memory.places import Places
from sensebatch.engine.tasks import single_image
from sensebatch.engine.tasks.denoise import draw_noise
from sensebatch.engine.tasks.noise import Noise, NoiseAhead
from sensebatch.engine.tasks.state import job_generator
from sensebatch.errors import ConfigError, JobError, OutOfMemoryError
from sensebatch.jobs import (
    MAX_SEED,
    Batch,
    BatchResult,
    InputImage,
    Job,
    ModelIdentity,
    Source,
    VramMode,
    batch_id,
    group_key,
)
from sensebatch.plan.batches import make_plan, plan_entry
from sensebatch.plan.computation import Computation
from sensebatch.plan.fallback import leaner
from sensebatch.plan.load import Load, group_load
from sensebatch.plan.placement import Placement, Placements
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, SystemPromptKind, Task
from sensebatch.units import MIB
from tests.engine.golden_model import KeptImages, succeeded

pytestmark = pytest.mark.slow


def make_config(vram_mode: str = "auto", **memory: Any) -> RunConfig:
    mode = VramMode(vram_mode)
    return replace(default_config(), memory=MemoryConfig(vram_mode=mode, **memory))


def load(config: RunConfig, model: str = "tiny", loads: Sequence[Load] = ()) -> SenseNovaEngine:
    return load_engine(
        config,
        checkpoint=open_checkpoint(model),
        identity=ModelIdentity(
            checkpoint="tiny",
            lora=None,
            dtype="float32",
            generation_prompt="You draw.",
            interleave_prompt="You tell.",
        ),
        system_prompt_source=dict.fromkeys(Task, "test"),
        device="cpu",
        loads=loads,
    )


def make_job(name: str, **changes: Any) -> Job:
    sampling = replace(default_config().tasks[Task.T2I].sampling, num_steps=2, max_think_tokens=5)
    job = Job(
        id=name,
        task=Task.T2I,
        prompt=f"Draw a red circle {name}",
        resolution=Resolution(height=64, width=96),
        seed=len(name),
        think=False,
        sampling=sampling,
        source=Source(file="test", row="0"),
    )
    return replace(job, **changes)


def generate(
    engine: SenseNovaEngine,
    *jobs: Job,
    kept: KeptImages | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> BatchResult:
    keys = tuple(job.id for job in jobs)
    batch = Batch(id=batch_id(keys), group=group_key(jobs[0]), jobs=jobs, keys=keys)
    prepared = [engine.prepare(job, ()) for job in jobs]
    kept = KeptImages(len(jobs)) if kept is None else kept
    channel = Line(kept, progress, stop)
    return engine.generate(batch, prepared, kept=kept.load(), channel=channel)


class Line(Channel):
    """A channel made of functions."""

    def __init__(
        self,
        kept: KeptImages,
        progress: Callable[[Progress], None],
        stop: Callable[[], bool],
    ) -> None:
        self._kept, self._progress, self._stop = kept, progress, stop

    def progress(self, progress: Progress) -> None:
        self._progress(progress)

    def keep(self, drawn: Drawn) -> None:
        self._kept.keep(drawn)

    def is_stopped(self) -> bool:
        return self._stop()


def planned(width: int, height: int) -> InputImage:
    """Returns what a manifest's reading finds of `png(width, height)`."""
    return InputImage(path="in.png", sha256="0", height=height, width=width)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(result: BatchResult) -> list[bytes]:
    return [image.tobytes() for job in succeeded(result.results) for image in job.images]


def test_what_an_engine_says_is_read_without_torch() -> None:
    engine, kept, said = load(make_config()), KeptImages(1), list[Progress]()
    result = generate(engine, make_job("circle"), kept=kept, progress=said.append)
    for news in (engine.info, result.metrics, said, kept.load()):
        words = {str(found) for _, found, _ in pickletools.genops(pickle.dumps(news)) if found}
        assert not [word for word in words if word.split(".")[0] == "torch"]


def test_figures_of_a_batch_add_up() -> None:
    metrics = generate(load(make_config()), make_job("a", think=True), make_job("bb", think=True))
    assert metrics.metrics.num_denoise_steps == 2
    parts = metrics.metrics
    assert 0 < parts.prefill_s + parts.think_s + parts.denoise_s <= parts.total_s


def test_the_waiting_between_two_batches_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(make_config())
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert generate(engine, make_job("a")).metrics.wait_s is None
    now += 3.0
    assert generate(engine, make_job("a")).metrics.wait_s == 3.0
    with monkeypatch.context() as patch:
        single_images_run(patch, raising(ValueError("broken")))
        with pytest.raises(ValueError, match="broken"):
            generate(engine, make_job("a"))
    assert generate(engine, make_job("a")).metrics.wait_s is None


def test_many_input_images_are_each_made_smaller() -> None:
    engine = load(make_config())
    prepared = engine.prepare(
        make_job("b", task=Task.EDIT, images=(planned(512, 512),) * 8), [png(512, 512)] * 8
    )
    # 4 x 2 x 256 x 256 pixels for the eight, whose limit alone is 2 x 256 x 256.
    assert [image.token_grid for image in prepared.images] == [(8, 8)] * 8


@pytest.mark.parametrize(
    ("max_pixels", "grid"), [(None, (6, 8)), (128 * 128, (4, 5)), (256 * 256, (7, 10))]
)
def test_inputs_of_an_edit_are_brought_to_the_jobs_number_of_pixels(
    max_pixels: int | None, grid: tuple[int, int]
) -> None:
    engine = load(make_config())
    job = make_job("b", task=Task.EDIT, images=(planned(256, 192),), input_max_pixels=max_pixels)
    prepared = engine.prepare(job, [png(256, 192)])
    assert [image.token_grid for image in prepared.images] == [grid]


@pytest.mark.parametrize("task", list(Task))
def test_a_job_reads_its_own_system_prompt_before_the_runs(task: Task) -> None:
    engine = load(make_config())
    own, runs = (
        engine.prepare(make_job("b", task=task, system_prompt=prompt), ()).prompts[Branch.COND]
        for prompt in ("Speak in rhymes.", None)
    )
    decode = engine._tokenizer.decode
    assert decode(own.system_ids) == "system\nSpeak in rhymes.\n"
    kind = task.spec.prompt.system
    said = {
        None: "",
        SystemPromptKind.GENERATION: "system\nYou draw.\n",
        SystemPromptKind.INTERLEAVE: "system\nYou tell.\n",
    }
    assert decode(runs.system_ids) == said[kind]


def test_a_scale_below_1_draws_what_1_draws() -> None:
    engine = load(make_config())
    drawn = [
        pixels(
            generate(engine, make_job("a", sampling=replace(make_job("a").sampling, cfg_scale=c)))
        )
        for c in (1.0, 0.5, 1.5)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_seed_keeps_all_its_bits() -> None:
    engine = load(make_config())
    for seed in (2**32 + 5, MAX_SEED):
        prepared = engine.prepare(make_job("a", seed=seed), ())
        assert prepared.generator.initial_seed() == seed


def test_a_job_that_cannot_be_laid_out_is_refused_before_any_batch() -> None:
    engine = load(make_config())
    with pytest.raises(JobError, match="expected valid Unicode"):
        engine.prepare(make_job("b", prompt="\ud800"), ())
    with pytest.raises(JobError, match="one <image> mark per image, found 1 for 0"):
        engine.prepare(make_job("b", task=Task.EDIT, prompt="<image>"), ())
    with pytest.raises(JobError, match="input image 1: expected an image"):
        engine.prepare(make_job("b", task=Task.EDIT, images=(planned(8, 8),)), [b"no image"])


def test_what_was_prepared_gives_the_same_images_every_time() -> None:
    # Synthetic weights, so that images are certain to be drawn.
    engine = load(make_config(), "synthetic:tiny")
    sampling = replace(make_job("a").sampling, max_new_tokens=4, max_images=2)
    job = make_job("a", task=Task.INTERLEAVE, sampling=sampling)
    batch = Batch(id="b", group=group_key(job), jobs=(job,), keys=("k",))
    prepared = [engine.prepare(job, ())]
    first, again = (engine.generate(batch, prepared, kept=(), channel=Channel()) for _ in range(2))
    assert len(pixels(first)) == 2
    assert pixels(first) == pixels(again)


@pytest.mark.parametrize("task", [Task.T2I, Task.EDIT])
def test_noise_drawn_ahead_is_that_of_the_seed(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[Noise] = []
    monkeypatch.setattr(NoiseAhead, "announce", lambda _, noise: announced.append(noise))
    engine = load(make_config())
    job = make_job("abc", task=task)
    prepared = engine.prepare(job, ())
    assert announced == [prepared.noise]
    generator = job_generator(job.seed)
    expected = draw_noise(open_checkpoint("tiny").architecture, job.resolution, generator)
    for _ in range(2):
        assert torch.equal(prepared.noise.to("cpu"), expected)


def test_images_that_go_through_pinned_memory_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "PinnedMemory", lambda _: None)
    engine = load(make_config())
    jobs = [make_job(name) for name in ("a", "bc", "def")]
    expected = pixels(generate(engine, *jobs))
    of_pixels = Places(CpuLane())
    monkeypatch.setattr(engine, "_pixels", of_pixels)
    monkeypatch.setattr(engine, "_ahead", NoiseAhead(take=Places(CpuLane()).take))
    results = [generate(engine, *jobs) for _ in range(2)]
    assert [pixels(result) for result in results] == [expected] * 2
    # Both results are still held.
    assert of_pixels._held_bytes == 2 * sum(map(len, expected))


def test_making_room_keeps_the_images_the_same_until_none_is_left() -> None:
    engine = load(make_config(vram_mode="full"))
    jobs = (make_job("a"), make_job("bb"))
    expected = generate(engine, jobs[0])
    modes = [engine.info.vram_mode]
    while (said := engine.make_room()) is not None:
        assert "memory ran out" in said
        modes.append(engine.info.vram_mode)
        assert pixels(generate(engine, jobs[0])) == pixels(expected)
    assert modes[:2] == ["full", "fast"]
    assert modes[-2:] == ["balanced", "low"]
    # Drawn one by one, as the last resort draws them.
    assert len(pixels(generate(engine, *jobs))) == 2


def test_each_group_has_its_own_placement_and_the_same_images() -> None:
    large = Resolution(height=512, width=512)
    jobs = make_job("a"), make_job("bb", resolution=large), make_job("ccc")
    loads = [group_load(make_plan([plan_entry(job)], MemoryConfig()).groups[0]) for job in jobs[:2]]
    engine = load(make_config(vram_budget_bytes=264 * MIB), loads=loads)
    expected = load(make_config(vram_mode="full"))
    buffers = []
    for job in jobs:
        assert pixels(generate(engine, job)) == pixels(generate(expected, job))
        buffers.append(engine._placement.num_buffers)
    assert buffers[0] == buffers[2] > buffers[1]
    # What memory was not enough for is asked for by no later group.
    assert engine.make_room() is not None
    generate(engine, jobs[1])
    generate(engine, jobs[0])
    assert engine._placement.num_buffers < buffers[0]


def test_a_leaner_placement_takes_less_each_time() -> None:
    computation = Computation(arch=open_checkpoint("tiny").architecture, item_bytes=4)
    placement = Placement(
        mode=VramMode.FULL,
        num_buffers=None,
        embed_on_device=True,
        tokens_per_pass=64,
        park_caches=False,
        host_block_bytes=None,
        device_bytes=10**9,
        host_bytes=0,
        reason="",
    )
    placements: Placements | None = Placements(groups={}, leanest=placement)
    group = group_key(make_job("a"))
    peaks = []
    while placements is not None:
        peaks.append(placements.of(group).device_bytes)
        placements = leaner(computation, placements, group)
    assert peaks[:-1] == sorted(set(peaks), reverse=True)


def load_for_a_large_and_a_small_job() -> tuple[SenseNovaEngine, tuple[Job, Job]]:
    """Returns an engine that is to keep more weights for the second job than for the first."""
    jobs = make_job("a", resolution=Resolution(height=512, width=512)), make_job("bb")
    loads = [group_load(make_plan([plan_entry(job)], MemoryConfig()).groups[0]) for job in jobs]
    return load(make_config(vram_budget_bytes=264 * MIB), loads=loads), jobs


def test_memory_for_more_weights_that_is_not_there_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, jobs = load_for_a_large_and_a_small_job()
    expected = pixels(generate(load(make_config(vram_mode="full")), jobs[1]))
    generate(engine, jobs[0])
    few = engine._placement.num_buffers
    most = engine._residency._pool.num_bytes

    def new_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
        if num_bytes > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    monkeypatch.setattr("sensebatch.engine.weights.residency.new_buffer", new_buffer)
    assert pixels(generate(engine, jobs[1])) == expected
    assert engine._placement.num_buffers == few
    assert engine.info.vram_mode == "balanced"
    # What is given up next is less than what is there.
    engine.make_room()
    assert engine._placement.num_buffers < few


def test_room_is_made_for_the_group_whose_weights_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, jobs = load_for_a_large_and_a_small_job()
    wanted = engine._placements.of(group_key(jobs[1])).num_buffers
    enough = engine._residency._buffer_bytes(2)

    def new_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
        if num_bytes > enough:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    monkeypatch.setattr("sensebatch.engine.weights.residency.new_buffer", new_buffer)
    with pytest.raises(OutOfMemoryError):
        generate(engine, jobs[1])
    tried = []
    while engine._placement.num_buffers > 2:
        with pytest.raises(OutOfMemoryError):
            generate(engine, jobs[1])
        assert engine.make_room() is not None
        tried.append(engine._placement.num_buffers)
    assert tried[0] == max(wanted // 2, 2)
    assert len(pixels(generate(engine, jobs[1]))) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory: you tried to allocate"),
    ],
)
def test_memory_errors_of_torch_become_ours(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    engine = load(make_config())
    single_images_run(monkeypatch, raising(error))
    with pytest.raises(OutOfMemoryError, match=r"a batch of 1 \(t2i 96x64\) did not fit: .*emory"):
        generate(engine, make_job("a"))


def test_memory_that_the_host_does_not_give_becomes_our_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = load(make_config())

    def take_far_too_much(*_: Any, **__: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    single_images_run(monkeypatch, take_far_too_much)
    with pytest.raises(OutOfMemoryError, match=r"did not fit: .*you tried to allocate"):
        generate(engine, make_job("a"))


def single_images_run(patch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Has another function run t2i and edit jobs."""
    patch.setattr(single_image, "RUNNER", replace(single_image.RUNNER, run=run))


def raising(error: Exception) -> Callable[..., None]:
    def raise_it(*_: Any, **__: Any) -> None:
        raise error

    return raise_it


def test_flash_attention_is_refused_where_it_cannot_be_used() -> None:
    config = make_config()
    config = replace(config, model=replace(config.model, attn_backend="flash"))
    with pytest.raises(ConfigError, match="attn_backend: expected flash to be usable"):
        load(config)


def test_the_engine_says_and_warms_up_for_the_batch_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warmed: list[Load] = []
    monkeypatch.setattr(engine_module, "warm_up", lambda _, __, loads: warmed.extend(loads))
    jobs = [make_job("a" * length) for length in range(1, 9)]
    (plan,) = make_plan(map(plan_entry, jobs), MemoryConfig()).groups
    engine = load(make_config(vram_budget_bytes=256 * MIB), loads=[group_load(plan)])
    size = engine.largest_batch(plan.group)
    assert size is not None
    assert size < len(jobs)
    assert [load.batch_size for load in warmed] == [size]
