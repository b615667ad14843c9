"""What an earlier process left on record, and which jobs it may have died of.

A process that is killed (by the kernel for lack of host memory, say) says nothing of why. What is
known is which batches were under way: their starts are on record and neither a commit nor a clean
stop is. A batch that processes died of is taken apart, and its jobs run at the end with nothing
beside them; a job that a process then dies of is given up, so that it cannot stop every restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sensebatch.config import MemoryConfig
from sensebatch.errors import ProcessDiedError, RunFolderError, RunStoppedError
from sensebatch.executor.schedule import Recorded
from sensebatch.jobs import Failure, GroupKey, group_key
from sensebatch.plan.batches import batch_size
from sensebatch.store.state import State
from sensebatch.store.store import Store
from sensebatch.store.tables import StartedBatch
from sensebatch.units import counted

MAX_DEATHS = 2
"""Deaths, without an image that was kept in between, after which a batch is taken apart, and after
which a job that ran alone is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The batches on record when a run begins."""

    recorded: tuple[Recorded, ...]
    """To be run first, as they were."""
    doubtful: frozenset[int]
    """Numbers of those that a process may have died of."""
    suspects: tuple[Recorded, ...]
    """Single jobs that run last, with nothing beside them."""
    given_up: tuple[Recorded, ...]
    """Single jobs that are no longer run."""


class Blame:
    """Batches whose start counts against them if this process is killed.

    Args:
        state: The run's.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._seqs: set[int] = set()

    def take(self, seq: int) -> None:
        """Blames a batch, whose start is on record."""
        self._seqs.add(seq)

    def drop(self, seq: int) -> None:
        """Blames a batch no longer, which is committed or no longer on record."""
        self._seqs.discard(seq)

    def forgive(self, seq: int) -> None:
        """Takes the start of a batch back, if it is blamed."""
        if seq in self._seqs:
            self._seqs.discard(seq)
            self._state.forgive(seq)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Blames no batch for the end of the process if the block ends as a run is meant to end."""
        try:
            yield
        except (RunStoppedError, RunFolderError, KeyboardInterrupt):
            # If it is the disk that failed, the starts stay as they are.
            with suppress(RunStoppedError, RunFolderError):
                self._forgive_all()
            raise
        self._forgive_all()

    def _forgive_all(self) -> None:
        for seq in sorted(self._seqs):
            self.forgive(seq)


def recover(
    store: Store,
    fitting: Callable[[GroupKey], int | None],
    memory: MemoryConfig,
    note: Callable[[str], None],
) -> Recovered:
    """Returns what is on record, after taking apart what cannot run as it was.

    Args:
        store: The run's folder.
        fitting: How many jobs of a group fit the device's memory; None for any number.
        memory: How many jobs of a group are wanted in a batch.
        note: Takes what a person may want to know.
    """
    _take_apart(store, note)
    _drop_too_large(store.state, fitting, memory, note)
    batches = store.state.started_batches()
    others = [batch for batch in batches if not batch.is_suspect]
    suspects = [batch for batch in batches if batch.is_suspect]
    return Recovered(
        recorded=_recorded(others),
        doubtful=frozenset(batch.seq for batch in others if _deaths(store, batch)),
        suspects=_recorded([one for one in suspects if _deaths(store, one) < MAX_DEATHS]),
        given_up=_recorded([one for one in suspects if _deaths(store, one) >= MAX_DEATHS]),
    )


def death() -> Failure:
    """Returns why a job is given up that processes died of."""
    return Failure.of(
        ProcessDiedError(
            f"the process was killed {MAX_DEATHS} times while this job ran alone, perhaps because "
            "the host ran out of memory; --retry-failed runs the job again"
        )
    )


def worker_death() -> Failure:
    """Returns why a job is given up that workers died of."""
    return Failure.of(
        ProcessDiedError(
            f"{MAX_DEATHS} workers died while they ran this job alone, perhaps because their host "
            "ran out of memory; --retry-failed runs the job again"
        )
    )


def _deaths(store: Store, batch: StartedBatch) -> int:
    """Returns how often in a row the process ended during a batch, for all that is known."""
    has_progressed = store.kept.num_rounds(batch.seq) > batch.rounds
    return 0 if has_progressed else batch.starts


def _take_apart(store: Store, note: Callable[[str], None]) -> None:
    for batch in store.state.started_batches():
        if _deaths(store, batch) >= MAX_DEATHS and not batch.is_suspect:
            parts = [[member] for member in batch.members]
            store.state.split(batch.seq, parts, is_suspect=True)
            note(
                f"the process was killed {counted(batch.starts, 'time')} during a batch of "
                f"{counted(len(batch.members), 'job')}: run one by one, after all others"
            )


def _drop_too_large(
    state: State,
    fitting: Callable[[GroupKey], int | None],
    memory: MemoryConfig,
    note: Callable[[str], None],
) -> None:
    too_large = []
    for batch in state.started_batches():
        group = group_key(state.jobs(batch.ids[:1])[0].job)
        if len(batch.members) > batch_size(group, memory, fitting(group)):
            too_large.append(batch.seq)
            note(f"batch of {counted(len(batch.members), 'job')} is planned again")
    state.drop_batches(too_large)


def _recorded(batches: list[StartedBatch]) -> tuple[Recorded, ...]:
    return tuple((batch.seq, batch.ids) for batch in batches)
