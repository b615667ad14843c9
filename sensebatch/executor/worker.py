"""An engine as a worker: speaks plain data, and runs in whichever process the engine is in."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from sensebatch.contract import (
    Channel,
    Concerns,
    Engine,
    Following,
    Kept,
    Prepared,
    Raised,
    Reading,
)
from sensebatch.executor.ahead import Ahead
from sensebatch.executor.guard import guarded
from sensebatch.jobs import Batch, BatchResult, EngineInfo, GroupKey, Job


class EngineWorker:
    """Implements `Worker` with an engine of its own process.

    Args:
        engine: Loaded.
        number: The worker's number in the run.
    """

    def __init__(self, engine: Engine, number: int = 0) -> None:
        self.number = number
        self.node = socket.gethostname()
        self._engine = engine
        self._prepared: dict[int, dict[int, Prepared]] = {}
        """What was prepared of each assignment, by the jobs' places in it."""
        self._ahead = Ahead(engine)

    @property
    def info(self) -> EngineInfo:
        """What the log says of the engine."""
        return self._engine.info

    def largest_batch(self, group: GroupKey) -> int | None:
        """Returns how many jobs of a group fit the memory together; None if all planned do."""
        return self._engine.largest_batch(group)

    def prepare(self, number: int, place: int, job: Job, inputs: Sequence[bytes]) -> Raised | None:
        """Prepares a job of an assignment; see `contract.Worker.prepare`."""
        prepared = guarded(lambda: self._engine.prepare(job, inputs))
        if isinstance(prepared, Raised):
            return prepared
        # One operation, because several threads get here for the first job of an assignment.
        self._prepared.setdefault(number, {})[place] = prepared
        return None

    def expect(self, number: int) -> None:
        """Takes note that an assignment is prepared; see `contract.Worker.expect`."""
        self._ahead.expect(number, self._in_order(number))

    def num_following(self, group: GroupKey, batch: str | None = None) -> int:
        """Returns how many batches are of use to `generate` of one; see `contract.Engine`."""
        return self._engine.num_following(group, batch)

    def generate(
        self,
        number: int,
        batch: Batch,
        *,
        kept: Kept,
        channel: Channel,
        following: Sequence[tuple[int, Batch]] = (),
    ) -> BatchResult | Raised:
        """Runs a batch; see `contract.Worker.generate`.

        If it cannot be run beside others, it is run alone.
        """
        prepared = self._in_order(number)
        others = [(other, self._in_order(number)) for number, other in following]

        def run(
            channel: Channel, reading: Reading | None, others: Following = ()
        ) -> BatchResult | Raised:
            return guarded(
                lambda: _checked(
                    batch,
                    self._engine.generate(
                        batch,
                        prepared,
                        kept=kept,
                        channel=channel,
                        reading=reading,
                        following=others,
                    ),
                )
            )

        outcome = run(self._ahead.beside(channel), self._ahead.take(number), others)
        if _ran_out(outcome) and self._ahead.drop():
            # It may have fitted without what was read of the next one.
            outcome = run(channel, None)
        elif others and isinstance(outcome, Raised) and outcome.concerns is not Concerns.RUN:
            # One of the others may be to blame.
            outcome = run(self._ahead.beside(channel), None)
        return outcome

    def _in_order(self, number: int) -> list[Prepared]:
        """Returns what was prepared of an assignment, in the order of its jobs."""
        prepared = self._prepared.get(number, {})
        return [prepared[place] for place in sorted(prepared)]

    def make_room(self) -> str | Raised | None:
        """Continues with less memory; see `contract.Worker.make_room`."""
        self._ahead.drop()
        return guarded(self._engine.make_room)

    def release(self, number: int) -> None:
        """Forgets what was prepared of an assignment, and what was read of it."""
        self._prepared.pop(number, None)
        self._ahead.forget(number)


class NoEngine:
    """Implements `Engine` without weights, for as long as functions do every job.

    Args:
        info: What the log says of it.
    """

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    def largest_batch(self, group: GroupKey) -> int | None:  # noqa: ARG002
        """Returns None."""
        return None

    def num_following(self, group: GroupKey, batch: str | None = None) -> int:  # noqa: ARG002
        """Returns 0."""
        return 0

    def make_room(self) -> str | None:
        """Returns None."""
        return None

    def prepare(self, job: Job, inputs: Sequence[bytes]) -> Prepared:  # noqa: ARG002
        """Is never called."""
        raise AssertionError(job.id)

    def read(self, prepared: Sequence[Prepared]) -> Reading | None:
        """Is never called."""
        raise AssertionError(prepared)

    def generate(self, batch: Batch, *_: object, **__: object) -> BatchResult:
        """Is never called."""
        raise AssertionError(batch.id)


def _ran_out(outcome: BatchResult | Raised) -> bool:
    return isinstance(outcome, Raised) and outcome.concerns is Concerns.MEMORY


def _checked(batch: Batch, result: BatchResult) -> BatchResult:
    if len(result.results) != len(batch.jobs):
        raise ValueError(f"expected {len(batch.jobs)} results, found {len(result.results)}")
    return result
