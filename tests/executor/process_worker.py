"""A worker in a process of its own: every message of the contract crosses a pipe, pickled.

The child hosts its engine in an `EngineWorker`, as the executor's process does, with one thread
that prepares and one that does the rest.
"""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from sensebatch.contract import Channel, Drawn, Engine, Kept, Progress, Raised, Stop
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import Batch, BatchResult, EngineInfo, Failure, GroupKey, Job

PATIENCE_S = 60.0
POLL_S = 0.01


class Call(NamedTuple):
    """Asks for a method of the worker."""

    method: str
    values: tuple[Any, ...]


class Answer(NamedTuple):
    """What a method of the worker returned, and what its engine is like now."""

    value: Any
    info: EngineInfo


class PipeChannel(Channel):
    """The child's end of a batch's channel."""

    def __init__(self, connection: Connection, stop: Stop) -> None:
        self._connection, self._stop = connection, stop
        self._sending = threading.Lock()

    def progress(self, progress: Progress) -> None:
        with self._sending:
            self._connection.send(progress)

    def keep(self, drawn: Drawn) -> None:
        with self._sending:
            self._connection.send(list(drawn))

    def is_stopped(self) -> bool:
        return self._stop.is_set()


def serve(
    connection: Connection,
    preparations: Connection,
    stop: Stop,
    make_engine: Callable[[Stop], Engine],
) -> None:
    """Answers calls until the other ends are closed; the child's whole life."""
    worker = EngineWorker(make_engine(stop))
    connection.send(Answer(None, worker.info))
    preparing = threading.Thread(target=_answer_all, args=(preparations, worker, stop))
    preparing.start()
    _answer_all(connection, worker, stop)
    preparing.join()


def _answer_all(connection: Connection, worker: EngineWorker, stop: Stop) -> None:
    while True:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        if method == "generate":
            number, batch, kept = values
            channel = PipeChannel(connection, stop)
            value: Any = worker.generate(number, batch, kept=kept, channel=channel)
        else:
            value = getattr(worker, method)(*values)
        connection.send(Answer(value, worker.info))


class ProcessWorker(AbstractContextManager["ProcessWorker"]):
    """Implements `Worker` with an engine in a child process; a context that ends the child.

    Args:
        make_engine: Returns the engine, in the child; it is given the stop as the child sees it.
    """

    def __init__(self, make_engine: Callable[[Stop], Engine]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, connection = context.Pipe()
        self._preparations, preparations = context.Pipe()
        self._stop = context.Event()
        self._process = context.Process(
            target=serve, args=(connection, preparations, self._stop, make_engine), daemon=True
        )
        self._process.start()
        connection.close()
        preparations.close()
        self._preparing = threading.Lock()
        self.number = 0
        self.node = socket.gethostname()
        self.info: EngineInfo = self._connection.recv().info
        self.crossed: set[str] = set()
        """What passed between the processes, in words."""

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._preparations.close()
        self._process.join(PATIENCE_S)
        assert self._process.exitcode == 0

    def largest_batch(self, group: GroupKey) -> int | None:
        fitting: int | None = self._call("largest_batch", group)
        return fitting

    def prepare(self, number: int, place: int, job: Job, inputs: Sequence[bytes]) -> Raised | None:
        with self._preparing:
            self._preparations.send(Call("prepare", (number, place, job, list(inputs))))
            raised: Raised | None = self._preparations.recv().value
        self._saw("input images" if inputs else "", "a job that cannot be prepared" * bool(raised))
        return raised

    def expect(self, number: int) -> None:
        self._preparations.send(Call("expect", (number,)))
        self._preparations.recv()

    def num_following(self, group: GroupKey, batch: str | None = None) -> int:  # noqa: ARG002
        return 0

    def generate(
        self,
        number: int,
        batch: Batch,
        *,
        kept: Kept,
        channel: Channel,
        following: Sequence[tuple[int, Batch]] = (),
    ) -> BatchResult | Raised:
        assert not following
        self._connection.send(Call("generate", (number, batch, kept)))
        self._saw("kept images, in" if any(kept) else "")
        while True:
            if channel.is_stopped():
                self._stop.set()
            if not self._connection.poll(POLL_S):
                continue
            message = self._connection.recv()
            if isinstance(message, Progress):
                self._saw("progress")
                channel.progress(message)
            elif isinstance(message, list):
                self._saw("kept images, out")
                channel.keep(message)
            else:
                return self._outcome(message)

    def _outcome(self, answer: Answer) -> BatchResult | Raised:
        outcome: BatchResult | Raised = answer.value
        self.info = answer.info
        if isinstance(outcome, Raised):
            self._saw(f"a batch that failed: {outcome.failure.type}")
        else:
            failed = any(isinstance(result, Failure) for result in outcome.results)
            self._saw("results", "a job that failed" * failed)
        return outcome

    def make_room(self) -> str | Raised | None:
        said: str | Raised | None = self._call("make_room")
        self._saw("a note" if said else "")
        return said

    def release(self, number: int) -> None:
        self._call("release", number)

    def _call(self, method: str, *values: object) -> Any:
        self._connection.send(Call(method, values))
        answer = self._connection.recv()
        self.info = answer.info
        return answer.value

    def _saw(self, *words: str) -> None:
        self.crossed.update(filter(None, words))
