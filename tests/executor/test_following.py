"""Batches whose texts can be written together are prepared together, and run one by one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sensebatch.executor.schedule import Assignment, Schedule
from sensebatch.jobs import Job
from tests.executor.crews import ThreadCrew, run_crew
from tests.executor.fakes import FakeEngine, make_config, make_job, outcome, run_folder


def thinking(count: int = 8, **prompts: str) -> list[Job]:
    """Returns jobs that think, of which some have other prompts."""
    names = [f"j{number}" for number in range(count)]
    return [
        make_job(name, think=True, prompt=prompts.get(name, f"an image of {name}"))
        for name in names
    ]


def test_batches_are_handed_over_with_those_that_follow(tmp_path: Path) -> None:
    jobs = [*thinking(10), make_job("plain")]
    engine = FakeEngine(together=3)
    ran = run_folder(tmp_path / "together", jobs, engine=engine)
    assert ran.summary.failed == 0
    assert engine.waves == [[("j2", "j3"), ("j4", "j5")], [("j8", "j9")]]
    # Each is run, and committed, on its own.
    assert engine.batches[:5] == [(f"j{n}", f"j{n + 1}") for n in range(0, 10, 2)]
    run_folder(tmp_path / "alone", jobs)
    assert outcome(tmp_path / "together") == outcome(tmp_path / "alone")


def test_a_job_that_cannot_be_prepared_is_not_handed_over(tmp_path: Path) -> None:
    jobs = thinking(6, j2="unusable", j4="unusable", j5="unusable")
    engine = FakeEngine(together=3)
    ran = run_folder(tmp_path / "together", jobs, engine=engine)
    assert engine.waves == [[("j3",)]]
    assert (ran.summary.done, ran.summary.failed) == (3, 3)
    run_folder(tmp_path / "alone", jobs)
    assert outcome(tmp_path / "together") == outcome(tmp_path / "alone")


def test_a_batch_is_run_alone_where_those_that_follow_fail(tmp_path: Path) -> None:
    jobs = thinking(6, j3="poison")
    engine = FakeEngine(together=3)
    ran = run_folder(tmp_path / "together", jobs, engine=engine)
    assert (ran.summary.done, ran.summary.failed) == (5, 1)
    assert engine.batches[:2] == [("j0", "j1")] * 2
    run_folder(tmp_path / "alone", jobs)
    assert outcome(tmp_path / "together") == outcome(tmp_path / "alone")


@pytest.mark.parametrize("steps", range(1, 5))
def test_a_run_that_is_stopped_between_texts_and_images_ends_as_any_other(
    tmp_path: Path, steps: int
) -> None:
    jobs, stop = thinking(8), threading.Event()
    engine = FakeEngine(together=4)

    def stops() -> None:
        if engine.steps == steps:
            stop.set()

    engine.on_step = stops
    run_folder(tmp_path / "stopped", jobs, engine=engine, stop=stop)
    again = FakeEngine(together=3)
    run_folder(tmp_path / "stopped", jobs, engine=again)
    assert len(again.batches) == 4 - steps
    run_folder(tmp_path / "whole", jobs)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_schedule_names_what_comes_next_up_to_the_end_of_a_group() -> None:
    groups: list[list[tuple[str, ...]]] = [[("a", "b"), ("c",), ("d",)], [("e",)]]
    schedule = Schedule(recorded=[(7, ("r",))], groups=groups)

    def take() -> Assignment:
        found = schedule.next()
        assert isinstance(found, Assignment)
        return found

    def upcoming(count: int) -> list[tuple[str, ...]]:
        return [one.ids for one in schedule.upcoming(current, count)]

    current = take()
    assert upcoming(3) == []
    schedule.done(current)
    current = take()
    assert (current.ids, upcoming(0), upcoming(1)) == (("a", "b"), [], [("c",)])
    assert upcoming(9) == [("c",), ("d",)]
    schedule.split(current, [(8, ("a",)), (9, ("b",))])
    current = take()
    assert (current.ids, upcoming(2)) == (("a",), [("b",), ("c",)])
    schedule.done(take())
    schedule.done(take())
    assert upcoming(2) == [("d",)]
    schedule.done(take())
    assert upcoming(2) == []
    assert take().ids == ("e",)


@pytest.mark.slow
def test_workers_get_enough_batches_to_write_together(tmp_path: Path) -> None:
    jobs = thinking(17, j6="unusable", j7="unusable", j11="poison")
    engines: list[FakeEngine] = []

    def make_engine(_number: int, _crew: ThreadCrew) -> FakeEngine:
        engines.append(FakeEngine(together=4))
        return engines[-1]

    crew = ThreadCrew(2, make_config(), jobs, make_engine)
    summary = run_crew(tmp_path / "crew", jobs, make_config(), crew)
    assert not summary.counts.remaining
    # Nine batches, of which one has no job that can be prepared: it follows the first batch of a
    # worker, or was met before.
    assert all(len(engine.waves[0]) in (2, 3) for engine in engines)
    run_folder(tmp_path / "alone", jobs)
    found, expected = outcome(tmp_path / "crew"), outcome(tmp_path / "alone")
    assert found[0] == expected[0]
