"""`sensebatch repair`: rebuilds what a run's folder knows, where it was lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.paths import path

if TYPE_CHECKING:
    from sensebatch.store.repair import Repaired

MAX_NAMES = 10


def repair(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every name.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Rebuild state.db even if nothing is damaged.")
    ] = False,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="DIR",
            help="Where state.db is to be, if it was in another folder that is lost.",
        ),
    ] = None,
) -> None:
    """Rebuild a run's state.db, lost or damaged, from the log, the images and their metadata.

    Every file is checked by its SHA-256. If nothing is damaged, nothing is changed. Nothing is
    deleted: the former state.db is kept beside the new one. `sensebatch status` says when this is
    needed.
    """
    from sensebatch.cli.messages import show
    from sensebatch.store.repair import repair as rebuild

    found = rebuild(folder, is_forced=force, state_dir=state_dir)
    show(json.dumps(asdict(found)) if as_json else "\n".join(_lines(folder, found)))


def _lines(folder: Path, found: Repaired) -> Iterator[str]:
    from sensebatch.units import counted

    if not found.is_rebuilt:
        yield f"{folder}: nothing is damaged, and nothing was changed; --force rebuilds state.db"
        return
    yield f"{folder}: rebuilt from {counted(found.rows, 'row')} of the log"
    yield f"  done      {counted(found.done, 'job')}, with the files that the log names"
    if found.restored:
        yield f"  restored  {counted(found.restored, 'job')} from images alone"
    if found.failed:
        yield f"  failed    {counted(found.failed, 'job')}"
    if found.batches:
        yield f"  batches   {found.batches:,} interrupted, to be continued as begun"
    if found.to_run:
        yield f"  to run    {_some(found.to_run)}: files are missing or have changed"
    for problem in found.problems:
        yield f"  not read  {problem}"
    if found.unknown:
        yield f"  unknown   {_some(found.unknown)}: kept, but no job is known for them"
    if found.former is not None:
        yield f"the former state.db is kept as {found.former}"
    if found.to_run or found.batches or found.problems:
        yield "run the manifest again with sensebatch run to run what is missing"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES])
    return f"{shown} and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else shown
