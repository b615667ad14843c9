"""`sensebatch status`: prints the progress, speed and failures of a run, even while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.paths import path

if TYPE_CHECKING:
    from sensebatch.store.status import RunStatus

MAX_FAILURES = 20


def status(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every failed job.")
    ] = False,
) -> None:
    """Print how many jobs of a run are done, how fast it is, and which jobs failed and why.

    It works while the run is going on.
    """
    from sensebatch.cli.eta import pace
    from sensebatch.cli.messages import show
    from sensebatch.store.status import read_status

    found = read_status(folder)
    if not as_json:
        show("\n".join(_lines(folder, found)))
        return
    seconds_per_image, left_s = pace(found)
    values = {
        **asdict(found.counts),
        "kept_images": found.kept_images,
        "running": found.running,
        "seconds_per_image": seconds_per_image,
        "seconds_left": left_s,
        "failures": [asdict(failure) for failure in found.failures],
    }
    show(json.dumps(values))


def _lines(folder: Path, found: RunStatus) -> Iterator[str]:
    from sensebatch.cli.eta import pace
    from sensebatch.units import duration

    yield f"{folder}: {', '.join(_count_words(found))}"
    seconds_per_image, left_s = pace(found)
    if seconds_per_image is not None:
        yield f"  speed  {seconds_per_image:.2f} s an image"
    if left_s and found.running:
        yield f"  left   about {duration(left_s)}"
    elif left_s:
        yield f"  left   about {duration(left_s)} once the run is resumed"
    if found.failures:
        yield "failed jobs, which run --retry-failed tries again:"
    for failure in found.failures[:MAX_FAILURES]:
        first = failure.error_message.partition("\n")[0]
        yield f"  {failure.job_id}: {failure.error_type}: {first} ({failure.error_file})"
    if len(found.failures) > MAX_FAILURES:
        yield f"  ... and {len(found.failures) - MAX_FAILURES:,} more; --json lists all"


def _count_words(found: RunStatus) -> Iterator[str]:
    from sensebatch.cli.messages import counted

    counts = found.counts
    yield f"{counts.done:,} of {counted(counts.jobs, 'job')} done"
    yield f"{counts.failed:,} failed"
    yield f"{counts.pending:,} to do"
    yield f"{counts.started:,} {'running' if found.running else 'interrupted'}"
    if found.kept_images:
        yield f"{counted(found.kept_images, 'image')} kept"
    if counts.removed:
        yield f"{counts.removed:,} no longer in the manifest"
    if counts.unread:
        yield f"{counts.unread:,} not read because of --limit"
    yield "running now" if found.running else "not running"
