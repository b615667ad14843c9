"""A look at a run's folder from outside, while a process works in it or after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sensebatch.errors import RunFolderError
from sensebatch.store.kept import KeptImages
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import Counts, State


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What a look at a run's folder from outside tells."""

    counts: Counts
    kept_images: int
    """Pictures of jobs that are not done, kept for whoever goes on with them."""
    running: bool
    """Whether a process works in the folder; without one, started jobs are interrupted jobs."""


def read_status(root: Path) -> RunStatus:
    """Returns the counts of a run's folder; works while another process runs.

    Raises:
        RunFolderError: The folder is no run's.
    """
    run_dir = RunDir(root)
    if not run_dir.state.is_file():
        raise RunFolderError(f"{root}: expected a run's folder, found no state.db")
    running = run_dir.in_use()
    state = State(run_dir.state, read_only=True)
    try:
        return RunStatus(
            counts=state.counts(),
            kept_images=KeptImages(run_dir.kept_images).num_images(state.is_to_run),
            running=running,
        )
    finally:
        state.close()
