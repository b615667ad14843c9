"""Runs the mixed jobs with the fake engine in a process of its own, to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sensebatch.config import ExecutionConfig
from tests.executor.fakes import FakeEngine, make_config, mixed_jobs, run_folder


def say_step() -> None:
    """Says that the engine is at work, and gives the other process a moment to end this one."""
    print("step", flush=True)
    time.sleep(0.01)


if __name__ == "__main__":
    config = make_config(execution=ExecutionConfig(max_attempts=2))
    run_folder(Path(sys.argv[1]), mixed_jobs(), config, engine=FakeEngine(say_step))
