"""`sensebatch hash`: adds the perceptual hashes that the log of an earlier version lacks."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sensebatch.cli.paths import path

_INTERVAL_S = 10.0
_MAX_NAMES = 10


def hash_images(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Add the perceptual hashes that --dedupe compares to rows of the log that have none.

    Runs of this version compute them as they write images. Exit code 1 if images are missing or
    have changed.
    """
    from sensebatch.cli import exits
    from sensebatch.cli.messages import say, show
    from sensebatch.store.hashing import add_hashes
    from sensebatch.units import counted

    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if not as_json and time.monotonic() - said > _INTERVAL_S:
            said = time.monotonic()
            say(f"{done:,} of {counted(total, 'job')}")

    found = add_hashes(folder, progress)
    if as_json:
        show(json.dumps(asdict(found)))
    else:
        show(f"{folder}: hashed the images of {counted(found.jobs, 'job')}")
        for job_id in found.wrong[:_MAX_NAMES]:
            show(f"  {job_id}: an image is missing or has changed")
        if len(found.wrong) > _MAX_NAMES:
            show(f"  ... and {len(found.wrong) - _MAX_NAMES:,} more; --json lists all")
    if found.wrong:
        raise typer.Exit(exits.FAILED)
