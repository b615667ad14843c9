"""`sensebatch status`: how far a run is; works beside the process that runs it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sensebatch.cli.paths import path


def status(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a line.")
    ] = False,
) -> None:
    """Print how many jobs of a run are done, failed and still to do."""
    from sensebatch.cli.messages import counted, show
    from sensebatch.store.status import read_status

    found = read_status(folder)
    if as_json:
        more = {"kept_images": found.kept_images, "running": found.running}
        show(json.dumps({**asdict(found.counts), **more}))
        return
    counts = found.counts
    parts = [f"{counts.done} of {counted(counts.jobs, 'job')} done", f"{counts.failed} failed"]
    word = "running" if found.running else "interrupted"
    parts += [f"{counts.pending} to do", f"{counts.started} {word}"]
    if found.kept_images:
        parts.append(f"{counted(found.kept_images, 'image')} kept")
    if counts.removed:
        parts.append(f"{counts.removed} no longer in the manifest")
    if counts.unread:
        parts.append(f"{counts.unread} not read because of --limit")
    state = "running now" if found.running else "not running"
    show(f"{folder}: {', '.join(parts)} ({state})")
