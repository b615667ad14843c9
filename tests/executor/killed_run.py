"""Runs jobs with the fake engine in a process of its own, to be killed.

`ROOT` alone runs the mixed jobs and says each step; `ROOT WORD` runs jobs of which the one with the
word in its prompt kills the process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from sensebatch.config import ExecutionConfig
from sensebatch.executor import recovery
from sensebatch.jobs import Job
from sensebatch.tasks import Task
from tests.executor.fakes import (
    FakeEngine,
    make_config,
    make_input,
    make_job,
    mixed_jobs,
    run_folder,
)


def jobs_with_a_killer(word: str) -> list[Job]:
    """Returns edits of three batches, of which one in the second kills."""
    prompts = {"e3": word}
    return [
        make_job(name, Task.EDIT, prompt=prompts.get(name, name), images=(make_input(name),))
        for name in (f"e{number}" for number in range(6))
    ]


def say_step() -> None:
    """Says that the engine is at work, and gives the other process a moment to end this one."""
    print("step", flush=True)
    time.sleep(0.01)


if __name__ == "__main__":
    config = make_config(execution=ExecutionConfig(max_attempts=2))
    if len(sys.argv) > 2:
        engine = FakeEngine(kill=lambda: os.kill(os.getpid(), signal.SIGKILL))
        run_folder(Path(sys.argv[1]), jobs_with_a_killer(sys.argv[2]), config, engine=engine)
    else:
        # Kills from outside say nothing of a batch, and may come twice in the same one.
        recovery.MAX_DEATHS = 1000
        run_folder(Path(sys.argv[1]), mixed_jobs(), config, engine=FakeEngine(say_step))
