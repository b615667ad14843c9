"""Prints what a run would do with each job, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from sensebatch import session
from sensebatch.bounded import escaped
from sensebatch.cli.messages import fitted, show
from sensebatch.cli.voice import Voice
from sensebatch.session import Request, RunObserver
from sensebatch.store.dry_run import Decided, DryRun, Verdict
from sensebatch.units import counted

MAX_NAMES = 10


class _Warnings(RunObserver):
    """Passes warnings to a voice."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice

    def warning(self, text: str) -> None:
        """Prints it."""
        self._voice.warn(text)


def print_dry_run(request: Request, voice: Voice, *, as_json: bool) -> None:
    """Prints what a run would do.

    Args:
        request: What to run.
        voice: Prints warnings.
        as_json: Whether to print one object with every job.

    Raises:
        SensebatchError: As `session.dry_run_session` raises it.
    """
    found = session.dry_run_session(request, observer=_Warnings(voice))
    if as_json:
        redraw = found.changes.redraw
        values = {
            "output_dir": str(request.root),
            "removed": found.changes.removed,
            "needs_redraw": None if redraw is None else asdict(redraw),
            "jobs": [asdict(job) for job in found.jobs],
        }
        show(json.dumps(values))
    else:
        show("\n".join(line for text in _lines(request.root, found) for line in fitted(text)))


def _lines(root: Path, found: DryRun) -> Iterator[str]:
    yield f"{root}: {counted(len(found.jobs), 'job')}; this is a dry run, so nothing is done"
    for verdict in Verdict:
        by_reason: dict[str, list[Decided]] = {}
        for job in found.jobs:
            if job.verdict is verdict:
                by_reason.setdefault(job.reason, []).append(job)
        for reason, jobs in by_reason.items():
            yield f"  {verdict:<11}  {counted(len(jobs), 'job')}: {reason}"
            if verdict is not Verdict.KEPT:
                yield f"               {_names(jobs)}"
    for name, count, words in (
        ("removed", found.changes.removed, "no longer in the manifest; files stay"),
        ("not read", found.changes.unread, "beyond --limit; they stay as they are"),
    ):
        if count:
            yield f"  {name:<11}  {counted(count, 'job')}: {words}"
    if found.changes.redraw is not None:
        yield "jobs that only the model changed are drawn again with --redraw, or once a run asked"


def _names(jobs: Sequence[Decided]) -> str:
    names = ", ".join(escaped(job.id) for job in jobs[:MAX_NAMES])
    return f"{names} and {len(jobs) - MAX_NAMES:,} more" if len(jobs) > MAX_NAMES else names
