"""A run that is stopped at any step and started again equals one that was not stopped."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.config import ExecutionConfig
from sensebatch.executor import recovery
from sensebatch.jobs import Job
from sensebatch.store.database import Database
from sensebatch.tasks import Task
from tests.executor.fakes import (
    FakeEngine,
    make_config,
    make_input,
    make_job,
    mixed_jobs,
    outcome,
    run_folder,
)

pytestmark = pytest.mark.slow

CONFIG = make_config(execution=ExecutionConfig(max_attempts=2))


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where a disk that is flushed thousands of times does not take its time."""


class Killed(BaseException):
    """Stands for the end of the process."""


class Life:
    """Counts the steps of a process and ends it at one; the dead do nothing more."""

    def __init__(self, steps: int | None) -> None:
        self.left = steps
        self.taken = 0

    def step(self) -> None:
        self.taken += 1
        if self.left is not None and self.taken > self.left:
            raise Killed


@contextmanager
def mortal(life: Life) -> Iterator[None]:
    """Makes every operation on the disk, and every step of the engine, a step of a life."""
    replace, fsync, transaction = os.replace, os.fsync, Database.transaction

    def step_then(call: Any) -> Any:
        def stepping(*args: Any, **options: Any) -> Any:
            life.step()
            return call(*args, **options)

        return stepping

    @contextmanager
    def mortal_transaction(self: Database) -> Iterator[Any]:
        life.step()
        with transaction(self) as connection:
            yield connection
            life.step()
        life.step()

    with pytest.MonkeyPatch.context() as patch:
        # Batches that processes die of again and again are another matter: test_recovery.py.
        patch.setattr(recovery, "MAX_DEATHS", 1000)
        patch.setattr(os, "replace", step_then(replace))
        patch.setattr(os, "fsync", step_then(fsync))
        patch.setattr(Path, "unlink", step_then(Path.unlink))
        patch.setattr(Database, "transaction", mortal_transaction)
        yield


def live(root: Path, steps: int | None, jobs: Sequence[Job] | None = None) -> bool:
    """Runs jobs for a number of steps; returns whether the run came to its end."""
    life = Life(steps)
    try:
        with mortal(life):
            run_folder(root, jobs or mixed_jobs(), CONFIG, engine=FakeEngine(life.step))
    except Killed:
        return False
    return True


@pytest.fixture
def memory_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("uninterrupted")
    assert live(root, None)
    return outcome(root)


@settings(max_examples=30)
@given(lives=st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_killed_at_any_step_and_resumed_equals_uninterrupted(
    uninterrupted: Any, lives: list[int]
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder) / "run"
        for steps in lives:
            if live(root, steps):
                break
        assert live(root, None)
        found = outcome(root)
        assert found[1] == uninterrupted[1]
        assert found[0] == uninterrupted[0]
        assert not [path for path in root.rglob("*") if path.name.endswith(".tmp")]
        assert not list((root / "checkpoints").iterdir())


SMALL_RUNS = {
    "an input is missing": ["missing", "in1", "in2"],
    "a batch fails": ["poison", "in1", "in2"],
    "a batch grows": ["grows0", "grows1"],
}


@pytest.mark.parametrize("names", SMALL_RUNS.values(), ids=SMALL_RUNS)
def test_killed_at_every_single_step_and_resumed_equals_uninterrupted(
    names: list[str], memory_path: Path
) -> None:
    task = Task.INTERLEAVE if "grows0" in names else Task.EDIT
    jobs = [
        make_job(name, task, prompt=name, images=() if "grows" in name else (make_input(name),))
        for name in names
    ]
    jobs = [replace(job, sampling=replace(job.sampling, max_images=3)) for job in jobs]
    assert live(memory_path / "whole", None, jobs)
    whole = outcome(memory_path / "whole")
    for steps in itertools.count(1):
        root = memory_path / str(steps)
        if live(root, steps, jobs):
            break
        assert live(root, None, jobs)
        assert outcome(root) == whole
    assert steps > 50


def test_sigkill_at_random_moments_leaves_a_run_that_resumes_exactly(tmp_path: Path) -> None:
    """A real process, killed several times between two random steps of the engine."""
    choice = random.Random(5)
    command = [sys.executable, "-m", "tests.executor.killed_run"]
    kills = 0
    while kills < 5:
        with subprocess.Popen(
            [*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(choice.randrange(1, 7)):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    killed, whole = outcome(tmp_path / "killed"), outcome(tmp_path / "whole")
    assert killed[1] == whole[1]
    assert killed[0] == whole[0]
