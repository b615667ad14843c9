"""`sensebatch status`: prints the progress, speed and failures of a run, even while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sensebatch.cli.paths import path

if TYPE_CHECKING:
    from sensebatch.report.workers import WorkerShare
    from sensebatch.store.status import RunStatus

MAX_WORKERS = 16
MAX_FAILURES = 20


def status(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every failed job.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read every image and text of the run and compare its SHA-256 with the log's.",
        ),
    ] = False,
) -> None:
    """Print how many jobs of a run are done, how fast it is, and which jobs failed and why.

    It works during the run. Exit code 1 if --verify finds files that are missing or have
    changed.
    """
    from sensebatch.cli import exits
    from sensebatch.cli.messages import fitted, show
    from sensebatch.store.status import read_status

    found = read_status(folder)
    verified = _verified(folder) if verify else None
    if as_json:
        show(json.dumps({**_values(found), **(verified or {})}))
    else:
        lines = [*_lines(folder, found), *_verified_lines(verified)]
        show("\n".join(line for text in lines for line in fitted(text)))
    if verified is not None and verified["wrong_files"]:
        raise typer.Exit(exits.FAILED)


def _verified(folder: Path) -> dict[str, Any]:
    """Returns how many files were read, and those that are not as they were written."""
    from sensebatch.store.verify import verify

    num_files = 0
    wrong = []
    for file in verify(folder):
        num_files += 1
        if file.found != "whole":
            wrong.append(asdict(file))
    return {"verified_files": num_files, "wrong_files": wrong}


def _verified_lines(verified: dict[str, Any] | None) -> Iterator[str]:
    from sensebatch.units import counted

    if verified is None:
        return
    wrong = verified["wrong_files"]
    num_files = verified["verified_files"]
    whole = num_files - len(wrong)
    yield f"  files  {whole:,} of {counted(num_files, 'file')} are as they were written"
    for file in wrong[:MAX_FAILURES]:
        yield f"  {file['path']}: {file['found']} (job {file['job_id']})"
    if len(wrong) > MAX_FAILURES:
        yield f"  ... and {len(wrong) - MAX_FAILURES:,} more; --json lists all"
    if any(file["found"] == "changed" for file in wrong):
        yield "remove the files that have changed, then run the manifest again with sensebatch run"
    elif wrong:
        yield "run the manifest again with sensebatch run to make the missing files again"


def _values(found: RunStatus) -> dict[str, Any]:
    from sensebatch.cli.eta import pace

    seconds_per_image, left_s = pace(found)
    return {
        "series": [asdict(one) for one in found.acceptance.series],
        "held_jobs": [asdict(one) for one in found.acceptance.held],
        "state": None if found.pointer is None else found.pointer.state,
        "shard": None if found.shard is None else str(found.shard),
        **asdict(found.counts),
        "kept_images": found.kept_images,
        "running": found.running,
        "seconds_per_image": seconds_per_image,
        "seconds_left": left_s,
        "workers": [asdict(share) for share in _shares(found)],
        "failures": [asdict(failure) for failure in found.failures],
    }


def _lines(folder: Path, found: RunStatus) -> Iterator[str]:
    from sensebatch.cli.eta import pace
    from sensebatch.cli.messages import listed, truncated_words
    from sensebatch.report.acceptance import acceptance_lines
    from sensebatch.report.workers import format_share, share_name
    from sensebatch.units import duration

    yield from listed(f"{folder}:", _count_words(found))
    yield from acceptance_lines(found.acceptance)
    if found.pointer is not None:
        yield f"  state  {found.pointer.state} on {found.pointer.host}"
    seconds_per_image, left_s = pace(found)
    if seconds_per_image is not None:
        yield f"  speed  {seconds_per_image:.2f} s an image"
    if left_s and found.running:
        yield f"  left   about {duration(left_s)}"
    elif left_s:
        yield f"  left   about {duration(left_s)} once the run is resumed"
    shares = _shares(found)
    for share in shares[:MAX_WORKERS]:
        yield from listed(f"  {share_name(share)}:", format_share(share).split(", "))
    if len(shares) > MAX_WORKERS:
        yield f"  ... and {len(shares) - MAX_WORKERS:,} more workers; --json lists all"
    if found.counts.truncated:
        yield f"  texts  {truncated_words(found.counts.truncated)}"
    yield from _failure_lines(found)


def _failure_lines(found: RunStatus) -> Iterator[str]:
    from sensebatch.cli.messages import error_text

    if found.failures:
        yield "failed jobs, which run --retry-failed tries again:"
    for failure in found.failures[:MAX_FAILURES]:
        error = error_text(failure.error_type, failure.error_message)
        file = f" ({failure.error_file})" if failure.error_file else ""
        yield f"  {failure.job_id}: {error}{file}"
    if len(found.failures) > MAX_FAILURES:
        yield f"  ... and {len(found.failures) - MAX_FAILURES:,} more; --json lists all"


def _shares(found: RunStatus) -> tuple[WorkerShare, ...]:
    """Returns what each of several workers did lately."""
    from sensebatch.report.workers import Stint, worker_shares

    return worker_shares(
        Stint(
            session=0,
            worker=batch.worker,
            node=batch.node,
            jobs=batch.jobs,
            images=batch.images,
            start_s=batch.started_at.timestamp(),
            busy_s=batch.total_s,
        )
        for batch in found.recent
        if not batch.group.by_function
    )


def _count_words(found: RunStatus) -> Iterator[str]:
    from sensebatch.units import counted

    counts = found.counts
    if found.shard is not None:
        yield found.shard.words
    if counts.removed and not counts.jobs:
        yield f"{counted(counts.removed, 'job')} rebuilt by repair"
        yield "sensebatch run says which of them the manifest has"
        yield "running now" if found.running else "not running"
        return
    yield f"{counts.done:,} of {counted(counts.jobs, 'job')} done"
    yield f"{counts.failed:,} failed"
    if counts.blocked:
        yield f"{counts.blocked:,} blocked by failed jobs"
    if counts.held:
        yield f"{counts.held:,} not needed{' so far' if counts.remaining else ''}"
    yield f"{counts.pending:,} to do"
    yield f"{counts.started:,} {'running' if found.running else 'interrupted'}"
    if found.kept_images:
        yield f"{counted(found.kept_images, 'image')} kept"
    if counts.removed:
        yield f"{counts.removed:,} no longer in the manifest"
    if counts.unread:
        yield f"{counts.unread:,} not read because of --limit"
    if counts.elsewhere:
        yield f"{counts.elsewhere:,} in other shards"
    yield "running now" if found.running else "not running"
