"""`sensebatch prune`: removes the files of jobs that are no longer in the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.paths import path

if TYPE_CHECKING:
    from sensebatch.store.prune import Prunable

MAX_FILES = 20


def prune(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove the files, not only list them.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every file.")
    ] = False,
) -> None:
    """List, or with --yes remove, the images and texts of jobs that are no longer in the manifest.

    Everything else stays: files of other jobs and those that other jobs start from, files that were
    changed since the job made them, rows of the log, and what belongs to a manifest that still
    exists and that the latest run did not read.
    """
    from sensebatch.cli.messages import show
    from sensebatch.store.prune import prunable
    from sensebatch.store.prune import prune as remove

    found = remove(folder) if yes else prunable(folder)
    if as_json:
        values = asdict(found)
        del values["numbers"]
        show(json.dumps({"jobs": len(found.numbers), "removed": yes, **values}))
    else:
        show("\n".join(_lines(folder, found, is_removed=yes)))


def _lines(folder: Path, found: Prunable, *, is_removed: bool) -> Iterator[str]:
    from sensebatch.bounded import escaped
    from sensebatch.units import MIB, counted

    megabytes = f"{sum(file.nbytes for file in found.files) / MIB:,.1f} MiB"
    files = counted(len(found.files), "file")
    jobs = counted(len({file.job_id for file in found.files}), "job")
    if not found.files:
        yield f"{folder}: no file of a removed job"
    elif is_removed:
        yield f"{folder}: removed {files} of {jobs}, {megabytes}"
    else:
        where = "no longer in the manifest"
        yield f"{folder}: {files} of {jobs} {where}, {megabytes}; --yes removes them"
    for file in found.files[:MAX_FILES]:
        yield f"  {escaped(file.path)}"
    if len(found.files) > MAX_FILES:
        yield f"  ... and {len(found.files) - MAX_FILES:,} more; --json lists all"
    for name in found.changed:
        yield f"  {escaped(name)}: kept, because it has changed since the job made it"
    for name in found.inputs:
        yield f"  {escaped(name)}: kept, because a job of the manifest starts from it"
    for name in found.unread:
        yield (
            f"kept what the jobs of {escaped(name)} made, because the latest run did not read that "
            "manifest; to remove that too, run it again or delete it"
        )
