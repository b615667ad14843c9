"""What is run, skipped and compared, with children that only write files."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sensebatch.manifest.read import read_manifest
from sensebatch.settings import amount_bytes, resolve_settings
from sensebatch.tasks import Task
from sensebatch.units import GIB
from sensebatch.verify.check import Machine, Verdict, verify
from sensebatch.verify.child import NOWHERE
from sensebatch.verify.jobs import GROUPS, Scale, write_jobs
from sensebatch.verify.promises import TRIALS, chosen_trials
from sensebatch.verify.table import format_verdicts

pytestmark = pytest.mark.slow

SCALE = Scale(model="synthetic:tiny", side=128)
CPU = Machine(
    has_gpu=False, kernels_obstacle="it needs a CUDA device", fp8_obstacle="it needs another GPU"
)
GPU = Machine(has_gpu=True, free_bytes=130 << 30)


class Children:
    """Stands in for the processes of runs.

    Args:
        level: Of the pixels that a run writes, by its arguments.
        codes: Exit codes of the first runs; the others succeed, and a run that is to be killed is.
        ends_before_kill: Which run that is to be killed ends before; 0 for none.
    """

    def __init__(
        self,
        level: Callable[[Sequence[str]], int] = lambda _: 0,
        codes: Sequence[int] = (),
        ends_before_kill: int = 0,
    ) -> None:
        self._ends_before_kill = ends_before_kill
        self._kills = 0
        self.calls: list[Sequence[str]] = []
        self._level = level
        self._codes = list(codes)

    def launch(self, arguments: Sequence[str], messages: Path) -> int:
        self.calls.append(arguments)
        if self._codes and (code := self._codes.pop(0)):
            messages.write_text("reading\nsensebatch: no room\n")
            return code
        self._kills += arguments[1] != NOWHERE
        if arguments[1] != NOWHERE and self._kills != self._ends_before_kill:
            return -signal.SIGKILL
        images = Path(arguments[-1]) / "images"
        images.mkdir(parents=True)
        for group in GROUPS:
            Image.new("RGB", (2, 2), (self._level(arguments),) * 3).save(images / f"{group}-1.png")
        return 0


def check(
    tmp_path: Path,
    children: Children,
    only: Sequence[str] = (),
    machine: Machine = CPU,
    scale: Scale = SCALE,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Verdict]:
    found = verify(
        chosen_trials(only),
        scale,
        machine,
        tmp_path / "runs",
        launch=children.launch,
        say=lambda _: None,
        stopped=stopped,
    )
    return {verdict.trial.name: verdict for verdict in found}


def test_equal_files_keep_every_promise_a_cpu_can_check(tmp_path: Path) -> None:
    found = check(tmp_path, Children())
    assert list(found) == [trial.name for trial in TRIALS]
    assert {name for name, verdict in found.items() if verdict.skipped} == {
        *("budget", "fp8", "fp8-balanced", "fp8-killed", "plain", "plain-again"),
    }
    compared = [verdict for verdict in found.values() if verdict.holds is not None]
    assert all(verdict.holds and set(verdict.outcomes) == set(GROUPS) for verdict in compared)
    assert len(compared) == 9


def test_a_file_that_differs_breaks_its_promise_alone(tmp_path: Path) -> None:
    children = Children(level=lambda arguments: 3 if "low" in arguments else 0)
    found = check(tmp_path, children, ["fast", "low"])
    assert (found["fast"].holds, found["low"].holds) == (True, False)
    table = format_verdicts(list(found.values()), chosen_trials(["fast", "low"]))
    assert "| `--vram-mode low` | `--vram-mode full` | 1 of 1 files differ |" in table
    assert "| 3 of 255, 100.0% of the values |" in table


def test_a_killed_run_is_started_again_until_it_ends(tmp_path: Path) -> None:
    children = Children()
    found = check(tmp_path, children, ["killed"])
    kept = str(tmp_path / "runs" / "killed" / "checkpoints")
    assert [call[1] for call in children.calls] == [NOWHERE, kept, kept, NOWHERE]
    assert len({tuple(call[2:]) for call in children.calls[1:]}) == 1
    assert found["killed"].holds


def test_a_run_that_ends_before_it_is_killed_proves_nothing(tmp_path: Path) -> None:
    found = check(tmp_path, Children(codes=[0, 75]), ["killed"])
    assert found["killed"].holds is False
    assert found["killed"].error == "it was to be killed, and ended with exit code 75"


def test_one_kill_is_enough_where_a_second_one_finds_the_run_at_its_end(tmp_path: Path) -> None:
    children = Children(ends_before_kill=2)
    found = check(tmp_path, children, ["killed"])
    assert [call[1] == NOWHERE for call in children.calls] == [True, False, False]
    assert found["killed"].holds


def test_a_reference_that_fails_takes_its_comparisons_with_it(tmp_path: Path) -> None:
    children = Children(codes=[2])
    found = check(tmp_path, children, ["low", "lora-balanced"])
    assert found["full"].error == "exit code 2: sensebatch: no room"
    assert found["low"].skipped == "full failed"
    assert found["lora-balanced"].holds
    table = format_verdicts(list(found.values()), chosen_trials(["low", "lora-balanced"]))
    assert "failed: exit code 2: sensebatch: no room" in table


def test_memory_is_fragmented_for_all_but_references_and_budgets(tmp_path: Path) -> None:
    children = Children()
    check(tmp_path, children, ["again", "budget"], GPU, replace(SCALE, model="synthetic:8b"))
    assert [call[0] != "0" for call in children.calls] == [False, True, False]


def test_the_budget_keeps_some_of_the_weights(tmp_path: Path) -> None:
    children = Children()
    scale = Scale(model="synthetic:8b", side=2048)
    check(tmp_path, children, ["budget"], GPU, scale)
    words = children.calls[-1]
    assert "--vram-mode" not in words
    found = amount_bytes(words[words.index("--vram-budget") + 1])
    assert 10 * GIB < found < 25 * GIB


def test_modes_that_do_not_fit_are_skipped_and_the_largest_that_does_is_the_reference(
    tmp_path: Path,
) -> None:
    children = Children()
    small = replace(GPU, free_bytes=22 << 30)
    scale = Scale(model="synthetic:8b", side=2048)
    found = check(tmp_path, children, ["fast", "balanced"], small, scale)
    assert "fast" in children.calls[0]
    assert str(found["fast"].skipped).startswith("it is the reference here")
    assert found["balanced"].holds


def test_a_stop_ends_the_check_and_names_what_is_missing(tmp_path: Path) -> None:
    children = Children()
    found = check(tmp_path, children, ["fast", "low"], stopped=lambda: len(children.calls) > 1)
    assert list(found) == ["full"]
    table = format_verdicts(list(found.values()), chosen_trials(["fast", "low"]))
    assert "Stopped before these were run: fast, low." in table


def test_every_job_is_valid_and_has_a_group(tmp_path: Path) -> None:
    config = resolve_settings(flags={"model.model": "tiny"})
    jobs = [*read_manifest(write_jobs(SCALE, tmp_path), config)]
    assert {job.id.rpartition("-")[0] for job in jobs} == set(GROUPS)
    assert {job.task for job in jobs} == set(Task)
    assert any(job.think for job in jobs)
    drawings = [job.drawing for job in jobs if job.drawing is not None]
    assert any(drawing.num_whole_steps < drawing.num_steps for drawing in drawings)
    assert any(drawing.num_guided_steps < drawing.num_steps for drawing in drawings)
