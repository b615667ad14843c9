"""Reading with several threads: failures, and what they leave to the next call."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, wait
from functools import partial

import pytest
import torch

from sensebatch.engine.memory import readers as readers_module
from sensebatch.engine.memory.readers import Readers
from sensebatch.errors import CheckpointError


def fail(message: str) -> None:
    raise CheckpointError(message)


def test_tasks_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    readers = Readers()
    # Passes only where all four wait together.
    met = threading.Barrier(4, timeout=30)
    readers.run([met.wait] * 4)
    readers.close()


def test_no_task_of_a_failed_call_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    readers = Readers()
    failing, cancelled, ended = threading.Event(), threading.Event(), []

    def slow() -> None:
        failing.wait(30)
        ended.append("slow")

    def broken() -> None:
        failing.set()
        fail("the disk was removed")

    def later() -> None:
        cancelled.wait(30)
        ended.append("later")

    def wait_for(tasks: list[Future[object]]) -> object:
        # What runs now may end; nothing else is begun any more.
        cancelled.set()
        return wait(tasks)

    monkeypatch.setattr(readers_module, "wait", wait_for)
    with pytest.raises(CheckpointError, match="the disk was removed"):
        readers.run([broken, slow, *([later] * 100)])
    count = len(ended)
    assert "slow" in ended
    readers.run([lambda: None])
    assert len(ended) == count <= 1 + 2
    readers.close()


def test_a_failed_call_does_not_fail_another() -> None:
    readers = Readers()
    for _ in range(20):
        with pytest.raises(CheckpointError):
            readers.run([partial(fail, "removed")] * 5)
        done: list[int] = []
        readers.run([partial(done.append, number) for number in range(5)])
        assert sorted(done) == list(range(5))
    readers.close()


def test_threads_of_readers_work_alone_and_others_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        readers = Readers()
        seen: list[int] = []
        readers.run([lambda: seen.append(torch.get_num_threads())] * 4)
        assert set(seen) == {1}
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen[-1] == torch.get_num_threads() == 3
        readers.close()
    finally:
        torch.set_num_threads(before)
