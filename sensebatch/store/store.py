"""A run's folder, opened: its lock held, its state, its kept images and its log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sensebatch.errors import RunFolderError, RunStoppedError
from sensebatch.jobs import Job, ModelIdentity
from sensebatch.store import tables
from sensebatch.store.attempts import Attempt
from sensebatch.store.files import repair_command, storage_errors
from sensebatch.store.ingest import Changes
from sensebatch.store.kept import KeptImages
from sensebatch.store.log import Log
from sensebatch.store.manifests import ManifestFiles
from sensebatch.store.run_dir import RunDir
from sensebatch.store.shards import Shard
from sensebatch.store.state import State
from sensebatch.store.tables import WHOLE, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """The folder of a run that this process holds."""

    run_dir: RunDir
    state: State
    kept: KeptImages
    log: Log

    def ingest(
        self,
        jobs: Iterable[Job],
        identity: ModelIdentity,
        *,
        limit: int | None = None,
        files: ManifestFiles | None = None,
        shard: Shard | None = None,
        approve: Callable[[Changes], None] = lambda _: None,
    ) -> Changes:
        """Makes `jobs` the run's manifest; see `State.ingest`.

        Raises:
            ManifestError: Two jobs have the same id.
            RunFolderError: The folder belongs to other manifests, or to another shard.
            StorageError: The folder cannot be read or written.
        """
        root = self.run_dir.root
        changes = self.state.ingest(
            jobs, identity, root, limit=limit, files=files, shard=shard, approve=approve
        )
        self.remove_stale(self.state.stale_files())
        if self.state.log_digest(tables.LOG) is None:
            self.run_dir.require_in_place()
            self.log.write()
        return changes

    def write_as(self, extension: str) -> None:
        """Says which images this process writes; removes those that a killed one wrote otherwise.

        Raises:
            StorageError: The folder cannot be read or written.
        """
        self.state.write_as(extension, self.run_dir.root)
        self.remove_stale(self.state.stale_files())

    def commit(self, seq: int, attempts: Sequence[Attempt], *, max_attempts: int) -> None:
        """Commits a batch whose files are in place, then removes what it replaced.

        Raises:
            StorageFullError: The disk is full; either all of the batch is committed or nothing.
            StorageError: The folder cannot be written, or is not where it was; likewise.
        """
        self.run_dir.require_in_place()
        stale = self.state.commit(seq, attempts, max_attempts=max_attempts)
        self.remove_stale(stale)
        self.kept.discard(seq, self.state.needs_kept_images)
        self.log.update()

    def settle(self, span: Span = WHOLE, *, keep_rejected: bool) -> None:
        """Lets jobs run that may run now; see `State.settle_chains`.

        Args:
            span: The jobs of the lane.
            keep_rejected: Whether images that were rejected stay. If not, they are removed once
                that is on record, so a kill in between leaves them to the next process.

        Raises:
            StorageError: The folder cannot be written, or is not where it was.
        """
        self.state.settle_chains(span)
        if keep_rejected:
            return
        dropped = self.state.drop_rejected(span)
        if dropped:
            self.run_dir.require_in_place()
            self.remove_stale(dropped)

    @contextmanager
    def complete_log(self) -> Iterator[None]:
        """Writes every row at the end of the block, even if the run was stopped."""
        try:
            yield
        except RunStoppedError:
            # If it is the disk that failed, the next run writes the log.
            with suppress(RunStoppedError, RunFolderError):
                self.run_dir.require_in_place()
                self.log.write()
            raise
        self.run_dir.require_in_place()
        self.log.write()

    def remove_stale(self, names: Sequence[str]) -> None:
        """Removes files that a commit replaced, or that a batch without one left."""
        if not names:
            return
        for name in names:
            path = self.run_dir.root / PurePosixPath(name)
            with storage_errors(path):
                path.unlink(missing_ok=True)
            if path.parent.parent == self.run_dir.images:
                with suppress(OSError):  # not empty
                    path.parent.rmdir()
        self.state.forget_stale(names)


@contextmanager
def open_store(root: Path, *, state_dir: Path | None = None) -> Iterator[Store]:
    """Opens a run's folder for one process, making it where there is none.

    What an interrupted process was about to remove is removed, and log.parquet is there.
    A new folder that an error leaves without a single job is removed again.

    Args:
        root: The folder.
        state_dir: A folder of this machine that the state database is to be in, below a folder of
            its own; None where it is already, which for a new run is `root`.

    Raises:
        RunFolderError: Another process holds the folder, or it is not a run's.
        StorageFullError: The disk is full.
        StorageError: The file system failed.
    """
    run_dir = RunDir(root)
    made = run_dir.missing_folders()
    with run_dir.locked(needs_state=state_dir is None):
        if state_dir is not None:
            run_dir.place_state(state_dir)
            run_dir.require_state_or_nothing()
        run_dir.settle_state()
        state = _open_state(run_dir)
        is_used = True
        try:
            store = Store(
                run_dir=run_dir,
                state=state,
                kept=KeptImages(run_dir.kept_images),
                log=Log(run_dir, state),
            )
            store.remove_stale(state.stale_files())
            if not store.log.is_current():
                store.log.write()
            yield store
            # A process that was killed after its last commit left them, and none may follow.
            store.kept.discard_unneeded(state.needs_kept_images)
        except BaseException:
            is_used = state.has_jobs()
            raise
        finally:
            state.close()
            if not is_used:
                run_dir.remove_unused(made)


def _open_state(run_dir: RunDir) -> State:
    """Opens the state database; refuses one that lost what it knew."""
    state = State(run_dir.state)
    try:
        require_whole(run_dir, state)
    except BaseException:
        state.close()
        raise
    return state


def require_whole(run_dir: RunDir, state: State) -> None:
    """Refuses a state that has lost what the folder shows it knew.

    Raises:
        RunFolderError: It has no job although there are images, or less rows than the log.
    """
    if not state.has_jobs():
        run_dir.require_no_outputs()
    if Log(run_dir, state).is_ahead():
        raise RunFolderError(
            f"{run_dir.state}: has lost rows that log.parquet has; rebuild it with: "
            f"{repair_command(run_dir.root)}"
        )
