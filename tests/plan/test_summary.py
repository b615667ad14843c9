from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sensebatch.config import MemoryConfig, default_config
from sensebatch.jobs import Job
from sensebatch.plan import device, footprint, seconds, weight_bytes, work
from sensebatch.plan.batches import Plan, make_plan, plan_entry
from sensebatch.plan.summary import memory_summary, plan_summary
from sensebatch.plan.work import Machine
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from sensebatch.units import GIB
from tests.executor.fakes import make_job
from tests.plan.test_seconds import H200

NIGHT = default_config("synthetic:8b")
GPU = Machine(free_bytes=30 * GIB, speeds=H200)


def plan_of_sizes(count: int, task: Task = Task.INTERLEAVE) -> Plan:
    """Returns a plan of so many groups."""
    sampling = NIGHT.tasks[task].sampling
    jobs = (
        make_job(
            f"{number}",
            task,
            resolution=Resolution(height=1024, width=1024 + 32 * number),
            sampling=sampling,
            think=True,
        )
        for number in range(count)
    )
    return make_plan(map(plan_entry, jobs), NIGHT.memory)


def test_summary_counts_interleave_with_the_most_it_may_draw() -> None:
    jobs = [make_job("a"), make_job("b"), make_job("story", Task.INTERLEAVE)]
    summary = plan_summary(make_plan(map(plan_entry, jobs), MemoryConfig()))
    assert (summary["jobs"], summary["images"], summary["images_exact"]) == (3, 2 + 4, False)
    first, second = summary["groups"]
    assert (first["task"], first["width"], first["height"]) == ("t2i", 64, 32)
    assert (first["jobs"], first["batches"], first["images_exact"]) == (2, 1, True)
    assert (second["task"], second["images"], second["images_exact"]) == ("interleave", 4, False)


def test_the_seconds_of_a_run_are_those_of_its_groups() -> None:
    (placement,) = memory_summary(plan_of_sizes(3), NIGHT, GPU) or []
    for name in ("images", "text"):
        own = [group["seconds"][name] for group in placement["groups"]]
        assert min(own) > 0
        assert placement["seconds"][name] == pytest.approx(sum(own))


def test_the_cost_of_a_plan_per_group_does_not_include_listing_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counts calls: tensors are listed a few times a run, and a few options weighed per group."""
    calls: Counter[str] = Counter()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[function.__name__] += 1
            return function(*args, **options)

        return call

    for module, name in (
        (weight_bytes, "expected_tensors"),
        (work, "expected_tensors"),
        (device, "working_bytes"),
        (device, "prepared_bytes"),
        (footprint, "prompt_bytes"),
        (seconds, "understanding_work"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))

    def counts(num_groups: int) -> Counter[str]:
        calls.clear()
        memory_summary(plan_of_sizes(num_groups), replace(NIGHT, memory=MemoryConfig()), GPU)
        return Counter(calls)

    few, many = counts(2), counts(12)
    assert many["expected_tensors"] == few["expected_tensors"] <= 4
    assert 0 < many["prepared_bytes"] <= 4 * 12
    assert 0 < many["working_bytes"] == many["prompt_bytes"] <= 4 * 12
    # Silent and with all text, a few passes for each of ten images.
    assert 0 < many["understanding_work"] <= 60 * 12


@pytest.mark.parametrize("heavy_level", [0, 1])
def test_jobs_of_all_levels_count_for_the_memory_of_their_group(heavy_level: int) -> None:
    heavy = make_job("heavy", prompt="x" * 20_000, level=heavy_level)
    light = make_job("light", level=1 - heavy_level)
    other = make_job("other", resolution=Resolution(height=64, width=64), level=1)

    def planned(*jobs: Job) -> list[dict[str, Any]]:
        return memory_summary(make_plan(map(plan_entry, jobs), NIGHT.memory), NIGHT, None) or []

    for alone, both in zip(planned(heavy), planned(light, other, heavy), strict=True):
        assert both["device_bytes"] >= alone["device_bytes"]
        assert len(both["groups"]) == 3
        large = max(group["device_bytes"] for group in both["groups"])
        assert large >= alone["groups"][0]["device_bytes"]


def test_refused_jobs_are_counted_on_their_level() -> None:
    heavy = [make_job(f"heavy{n}", prompt="x" * 4_000_000, level=1) for n in range(2)]
    jobs = [make_job("light"), *heavy, make_job("fits", level=1)]
    plan = make_plan(map(plan_entry, jobs), NIGHT.memory)
    (found,) = memory_summary(plan, NIGHT, GPU) or []
    assert [group["refused_jobs"] for group in found["groups"]] == [0, 2]
