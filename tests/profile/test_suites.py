"""The suites are those that were asked for, and their manifests say what they claim."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sensebatch.config import TINY_MODEL, MemoryConfig
from sensebatch.errors import ConfigError
from sensebatch.jobs import Job
from sensebatch.manifest.read import read_manifest
from sensebatch.profile.expected import expectation
from sensebatch.profile.published import SOURCES, published
from sensebatch.profile.suites import (
    Case,
    Scale,
    Suite,
    chosen_cases,
    default_steps,
    in_bytes,
    run_arguments,
    suite_cases,
    write_manifest,
)
from sensebatch.resolutions import Resolution
from sensebatch.settings import resolve_settings
from sensebatch.tasks import Task
from sensebatch.units import GIB

pytestmark = pytest.mark.slow

NUM_JOBS = {
    "interleave": 1, "interleave-4": 4, "interleave-13gib": 1, "plain-16": 16, "think-16": 16,
    "think-16-7gib": 16, "think-64-7gib": 64, "think-64-7gib-int8": 64, "t2i-1024": 32,
    "t2i-1024-no-compile": 32, "answers": 32,
    "answers-7gib": 32, "choices": 128, "choices-2048": 32, "choices-balanced": 128,
    "choices-7gib": 128,
}  # fmt: skip
"""Jobs of the cases that do not have as many as the scale says."""
SETTINGS = {
    Suite.MODES: {
        "full": "--vram-mode full",
        "fast": "--vram-mode fast",
        "balanced": "--vram-mode balanced",
        "low": "--vram-mode low",
    },
    Suite.BUDGETS: {
        "full": "--vram-mode full",
        "27gib": "--max-memory 0=27GiB",
        "20gib": "--max-memory 0=20GiB",
        "13gib": "--max-memory 0=13GiB",
        "9gib": "--max-memory 0=9GiB",
        "7gib": "--max-memory 0=7GiB",
        "7gib-cpu20gib": "--max-memory 0=7GiB,cpu=20GiB",
    },
    Suite.SPEED: {
        "t2i": "--vram-mode full",
        "t2i-no-compile": "--vram-mode full --no-compile",
        "t2i-fp8": "--vram-mode full --precision fp8",
        "t2i-int8": "--vram-mode full --precision int8",
        "t2i-1024": "--vram-mode full",
        "t2i-1024-no-compile": "--vram-mode full --no-compile",
        "edit": "--vram-mode full",
        "edit-no-compile": "--vram-mode full --no-compile",
        "balanced": "--vram-mode balanced",
        "balanced-no-compile": "--vram-mode balanced --no-compile",
        "balanced-fp8": "--vram-mode balanced --precision fp8",
        "balanced-int8": "--vram-mode balanced --precision int8",
        "7gib": "--max-memory 0=7GiB",
        "7gib-no-compile": "--max-memory 0=7GiB --no-compile",
        "7gib-fp8": "--max-memory 0=7GiB --precision fp8",
        "7gib-int8": "--max-memory 0=7GiB --precision int8",
    },
    Suite.NIGHT: {"night": ""},
    Suite.ASK: {
        "answers": "--vram-mode full",
        "answers-7gib": "--max-memory 0=7GiB",
        "choices": "--vram-mode full",
        "choices-2048": "--vram-mode full",
        "choices-balanced": "--vram-mode balanced",
        "choices-7gib": "--max-memory 0=7GiB",
    },
    Suite.FEW: {
        "few-2048": "--vram-mode full",
        "few-2048-fp8": "--vram-mode full --precision fp8",
        "few-1024": "--vram-mode full",
        "few-512": "--vram-mode full",
    },
    Suite.QUALITY: {"converged": "", "exact": "", "high": "", "fast": ""},
    Suite.TASKS: {
        "t2i": "--vram-mode full",
        "t2i-think": "--vram-mode full",
        "edit": "--vram-mode full",
        "edit-13gib": "--max-memory 0=13GiB",
        "interleave": "--vram-mode full",
        "interleave-4": "--vram-mode full",
        "interleave-13gib": "--max-memory 0=13GiB",
        "plain-16": "--vram-mode full",
        "think-16": "--vram-mode full",
        "think-16-7gib": "--max-memory 0=7GiB",
        "think-64-7gib": "--max-memory 0=7GiB",
        "think-64-7gib-int8": "--max-memory 0=7GiB --precision int8-all",
    },
}
OTHER_JOBS = (Suite.NIGHT, Suite.ASK, Suite.FEW)
"""Suites whose jobs are not those of the published tables."""


@pytest.mark.parametrize("suite", Suite)
def test_cases_have_the_settings_of_the_published_tables(suite: Suite) -> None:
    cases = suite_cases(suite, Scale(model="some/checkpoint"))
    assert {case.name: case.setting for case in cases} == SETTINGS[suite]


def _jobs(case: Case, scale: Scale, folder: Path) -> list[Job]:
    config = resolve_settings(flags={"model.model": scale.model})
    return list(read_manifest(write_manifest(case, scale, folder), config))


def test_cases_of_suite_quality_differ_in_their_steps_alone(tmp_path: Path) -> None:
    scale = Scale(num_steps=30, num_jobs=2)
    cases = suite_cases(Suite.QUALITY, scale)
    steps = {}
    for case in cases:
        jobs = _jobs(case, scale, tmp_path)
        assert {job.sampling.num_steps for job in jobs} == {case.num_steps(scale)}
        assert [(job.seed, job.sampling.cfg_scale) for job in jobs] == [(42, 4.0), (43, 4.0)]
        steps[case.name] = round(jobs[0].drawing.cost)
    assert steps == {"converged": 256, "exact": 100, "high": 46, "fast": 31}


def test_cases_of_suite_few_have_few_steps_and_no_guidance(tmp_path: Path) -> None:
    scale = Scale(num_steps=6, num_jobs=2)
    sizes = {}
    for case in suite_cases(Suite.FEW, scale):
        jobs = _jobs(case, scale, tmp_path)
        assert case.num_steps(scale) == 6
        assert {job.drawing.num_evaluations for job in jobs if job.drawing} == {6}
        sizes[case.name] = (len(jobs), str(jobs[0].resolution))
    assert sizes == {
        "few-2048": (4, "2048x2048"),
        "few-2048-fp8": (4, "2048x2048"),
        "few-1024": (16, "1024x1024"),
        "few-512": (16, "512x512"),
    }
    assert (default_steps(Suite.FEW), default_steps(Suite.SPEED)) == (8, 50)


@pytest.mark.parametrize("num_jobs", [1, 2, 3])
def test_scaled_down_cases_of_suite_few_have_three_batches_or_more(
    tmp_path: Path, num_jobs: int
) -> None:
    size = Resolution(height=64, width=64)
    scale = Scale(model=TINY_MODEL, num_jobs=num_jobs, resolution=size)
    for case in suite_cases(Suite.FEW, scale):
        most = resolve_settings(flags=case.flags).memory.max_batch_size
        assert f"--max-batch-size {most}" in case.setting
        assert len(_jobs(case, scale, tmp_path)) / most > 2


@pytest.mark.parametrize("suite", Suite)
def test_full_size_cases_fit_their_budgets(suite: Suite, tmp_path: Path) -> None:
    scale = Scale()
    for case in suite_cases(suite, scale):
        manifest = write_manifest(case, scale, tmp_path)
        placement = expectation(case, scale.model, manifest, "bfloat16").placements.leanest
        assert placement.device_bytes <= (in_bytes(case.device_gib) or 100 * GIB)
        assert placement.mode == case.vram_mode or case.vram_mode == "auto"


@pytest.mark.parametrize(
    ("resolution", "sizes"),
    [
        (None, {(2048, 2048), (1024, 1024), (2048, 1152)}),
        (Resolution(height=64, width=64), {(64, 64), (32, 32), (64, 32)}),
    ],
)
def test_a_night_has_jobs_of_all_kinds(
    resolution: Resolution | None, sizes: set[tuple[int, int]], tmp_path: Path
) -> None:
    scale = Scale(num_steps=2, resolution=resolution)
    (night,) = suite_cases(Suite.NIGHT, scale)
    jobs = _jobs(night, scale, tmp_path)
    assert Counter(job.task for job in jobs) == {Task.T2I: 24, Task.EDIT: 10, Task.INTERLEAVE: 6}
    assert sum(job.think for job in jobs if job.task is Task.T2I) == 4
    assert {(job.resolution.width, job.resolution.height) for job in jobs} == sizes
    assert all(job.images for job in jobs if job.task is Task.EDIT)
    assert night.num_jobs == len(jobs) == len({job.id for job in jobs}) == 40
    assert night.max_images == 24 + 10 + 6 * 6


def test_synthetic_weights_think_and_write_exactly_so_much(tmp_path: Path) -> None:
    for case in suite_cases(Suite.TASKS, Scale()):
        for job in _jobs(case, Scale(), tmp_path):
            sampling = job.sampling
            if job.task is Task.INTERLEAVE:
                assert sampling.max_new_tokens // sampling.max_images == 300
            elif job.think:
                assert sampling.max_think_tokens == 300


def test_a_real_checkpoint_is_not_cut_short(tmp_path: Path) -> None:
    scale = Scale(model="some/checkpoint")
    for case in suite_cases(Suite.TASKS, scale):
        for job in _jobs(case, scale, tmp_path):
            assert (job.sampling.max_think_tokens, job.sampling.max_new_tokens) == (1024, 8192)


def test_flags_say_what_the_command_line_says() -> None:
    case = Case(name="x", num_jobs=2, device_gib=7, host_gib=20)
    assert case.setting == "--max-memory 0=7GiB,cpu=20GiB"
    config = resolve_settings(flags=case.flags)
    assert (config.model.compile, config.model.quantised) == (True, None)
    assert config.memory == MemoryConfig(vram_budget_bytes=7 * GIB, host_budget_bytes=20 * GIB)
    other = replace(case, compile=False, precision="fp8")
    assert other.setting == "--max-memory 0=7GiB,cpu=20GiB --no-compile --precision fp8"
    model = resolve_settings(flags=other.flags).model
    assert (model.compile, model.quantised) == (False, "fp8")


def test_variants_are_held_against_what_they_vary() -> None:
    cases = {case.name: case for case in suite_cases(Suite.SPEED, Scale())}
    for name, case in cases.items():
        plain = re.sub("-(no-compile|fp8|int8)$", "", name)
        if plain != name:
            changes = {"compile": True} if name.endswith("compile") else {"precision": "auto"}
            assert replace(case, name=plain, **changes) == replace(cases[plain], baseline=plain)
    assert [cases[name].baseline for name in ("t2i", "balanced", "7gib")] == [None, "t2i", "t2i"]


@pytest.mark.parametrize("suite", [s for s in Suite if s not in OTHER_JOBS])
def test_manifests_are_jobs_of_the_published_size(suite: Suite, tmp_path: Path) -> None:
    scale = Scale(model="some/checkpoint")
    for case in suite_cases(suite, scale):
        jobs = _jobs(case, scale, tmp_path)
        story = case.task is Task.INTERLEAVE
        size = "2048x1152" if story else "1024x1024" if "1024" in case.name else "2048x2048"
        assert len(jobs) == NUM_JOBS.get(case.name, 8)
        assert len({job.seed for job in jobs}) == len(jobs)
        for job in jobs:
            assert (job.task, job.think) == (case.task, case.think)
            assert str(job.resolution) == size
            assert (job.sampling.num_steps, job.sampling.cfg_scale) == (case.num_steps(scale), 4.0)
            assert job.sampling.timestep_shift == 3.0 or suite is Suite.QUALITY
            assert [(image.width, image.height) for image in job.images] == (
                [(2048, 2048)] if case.task is Task.EDIT else []
            )
            assert not story or job.sampling.max_images == 6


def test_questions_are_about_one_image_each_and_draw_nothing(tmp_path: Path) -> None:
    for case in suite_cases(Suite.ASK, Scale()):
        jobs = _jobs(case, Scale(), tmp_path)
        assert (case.max_images, len(jobs)) == (0, NUM_JOBS[case.name])
        side = 2048 if "2048" in case.name else 1024
        for job in jobs:
            assert (job.task, job.resolution) == (Task.ASK, None)
            assert [(image.width, image.height) for image in job.images] == [(side, side)]
            assert job.sampling.choices == (("yes", "no") if "choices" in case.name else ())
            assert job.max_text_tokens == (0 if "choices" in case.name else 300)


def test_a_suite_can_be_scaled_down(tmp_path: Path) -> None:
    scale = Scale(
        model="synthetic:tiny", num_steps=2, num_jobs=3, resolution=Resolution(height=32, width=64)
    )
    for case in suite_cases(Suite.TASKS, scale):
        jobs = _jobs(case, scale, tmp_path)
        assert {(str(job.resolution), job.sampling.num_steps) for job in jobs} == {("64x32", 2)}
        assert len(jobs) == NUM_JOBS.get(case.name, 3)


def test_a_case_is_an_ordinary_run() -> None:
    scale = Scale()
    case = suite_cases(Suite.BUDGETS, scale)[-1]
    assert run_arguments(case, scale, Path("a.yaml"), Path("out")) == [
        "run", "a.yaml", "--model", "synthetic:8b", "--max-memory", "0=7GiB,cpu=20GiB",
        "--output-dir", "out", "--json",
    ]  # fmt: skip


def test_cases_are_chosen_by_name() -> None:
    cases = suite_cases(Suite.MODES, Scale())
    assert [case.name for case in chosen_cases(cases, ["low", "full"])] == ["full", "low"]
    assert chosen_cases(cases, []) == cases
    with pytest.raises(ConfigError, match=r"--only: expected one of full, fast, .*found 'lean'"):
        chosen_cases(cases, ["lean"])


@pytest.mark.parametrize("suite", Suite)
def test_published_rows_are_of_cases_and_name_their_source(suite: Suite) -> None:
    rows = published(suite)
    assert {row.case for row in rows} <= set(SETTINGS[suite])
    assert {row.source for row in rows} <= set(SOURCES)
    for row in rows:
        if row.seconds_per_image and row.image_tok_per_s:
            tokens = 2304 if row.case == "interleave" else 4096
            expected = 4029 if row.case == "edit" else tokens
            assert row.seconds_per_image * row.image_tok_per_s == pytest.approx(expected, rel=2e-3)
