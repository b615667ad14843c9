"""Prints what became of a run, and maps it to an exit code."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from sensebatch.cli import exits
from sensebatch.cli.messages import show_anyway, truncated_words
from sensebatch.cli.voice import Level, Voice
from sensebatch.errors import RunStoppedError
from sensebatch.executor.observer import Summary
from sensebatch.report.acceptance import acceptance_lines
from sensebatch.report.summary import Summary as Report
from sensebatch.report.summary import format_summary, read_log, summarise, summary_json
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import Counts
from sensebatch.store.status import read_acceptance, read_status
from sensebatch.units import counted, duration


def finish(
    root: Path,
    summary: Summary,
    *,
    voice: Voice,
    profile: bool,
    as_json: bool,
    outputs: Mapping[Path, bool] | None = None,
    until: float | None = None,
    answers: Sequence[Mapping[str, object]] | None = None,
) -> None:
    """Prints what became of a run and ends the command.

    Args:
        root: The run's folder.
        summary: What became of the run.
        voice: Prints it.
        profile: Whether to print what the run cost.
        as_json: Whether to print one object on stdout, and nothing else there.
        outputs: Files of a one-job command where they were asked for, and whether each was written
            now or was there.
        until: The run's deadline, in seconds since the epoch.
        answers: What a question was answered with.

    Raises:
        typer.Exit: Always, with the exit code.
    """
    report = _last_session(root) if profile and summary.done else None
    if as_json:
        values = outcome_json(root, summary, report)
        if outputs is not None:
            values["outputs"] = [str(path) for path in outputs]
        if answers is not None:
            values["answers"] = list(answers)
        show_anyway(json.dumps(values))
    elif report is not None:
        show_anyway(format_summary(report))
    code = exit_code(summary)
    first, *others = outcome_lines(root, summary, until)
    # Even --quiet prints this much of a run that failed.
    voice.tell(Level.INFO if code == exits.DONE else Level.ALERT, first)
    for line in others:
        voice.tell(Level.INFO if code == exits.DONE else Level.BRIEF, line)
    for path, is_written in (outputs or {}).items():
        words = f"wrote {path}" if is_written else f"unchanged: {path}, which was there already"
        voice.tell(Level.BRIEF, words)
    raise typer.Exit(code)


@contextmanager
def reporting_stops(root: Path, voice: Voice, *, as_json: bool) -> Iterator[None]:
    """Prints the object of `--json` even if an error stops the run of the block."""
    try:
        yield
    except RunStoppedError as error:
        voice.record(f"stopped: {error}")
        if as_json:
            values = {"output_dir": str(root), "exit_code": exits.RESUMABLE, "stopped": True}
            show_anyway(json.dumps({**values, "error": str(error)}))
        raise


def exit_code(summary: Summary) -> int:
    """Returns 0 if all jobs are done, 1 if some failed, 75 if a signal or a deadline stopped it."""
    if summary.stopped or summary.late:
        return exits.RESUMABLE
    return exits.FAILED if summary.counts.failed or summary.too_many_failures else exits.DONE


def outcome_lines(root: Path, summary: Summary, until: float | None = None) -> list[str]:
    """Returns the last lines about a run: what became of the jobs, and where everything is."""
    folder = RunDir(root)
    places = {"images": root / "images", "log": folder.log, "summary": folder.summary}
    return [
        ", ".join(_words(root, summary)),
        *(f"  {name:<8} {place}" for name, place in places.items() if place.exists()),
        *_next_lines(root, summary, until),
    ]


def _words(root: Path, summary: Summary) -> Iterator[str]:
    """Yields how many jobs are in which state, and what this run made."""
    counts = summary.counts
    yield f"{counts.done:,} of {counted(counts.jobs, 'job')} done"
    if counts.failed:
        yield f"{counts.failed:,} failed"
    if counts.blocked:
        yield f"{counts.blocked:,} blocked"
    if counts.held and not counts.remaining:
        yield f"{counts.held:,} not needed"
    if counts.remaining:
        yield f"{counts.pending:,} to do"
    if counts.started:
        yield f"{counts.started:,} interrupted"
        kept = read_status(root).kept_images
        if kept:
            yield f"{counted(kept, 'image')} kept"
    if summary.done or summary.failed:
        made = f"{counted(summary.images, 'image')} made in" if summary.images else "took"
        yield f"{made} {duration(summary.seconds)}"
    elif not counts.remaining:
        yield "nothing was left to run"
    if summary.dropped:
        yield f"{counted(summary.dropped, 'rejected image')} removed"


def _next_lines(root: Path, summary: Summary, until: float | None) -> Iterator[str]:
    """Yields why the run ended before all jobs were done, and what can be done."""
    if summary.stopped:
        yield "stopped; the same command resumes the run"
    elif summary.late and until is not None:
        yield _late_line(summary, until)
    elif summary.too_many_failures:
        yield "stopped after too many failures; the same command resumes the run"
    yield from acceptance_lines(read_acceptance(root))
    yield from _advice(root, summary.counts)


def _advice(root: Path, counts: Counts) -> Iterator[str]:
    """Yields what may be done about jobs that did not end well."""
    if counts.truncated:
        reasons = " ".join(f"--finish-reason {reason}" for reason in counts.truncated)
        yield (
            f"{truncated_words(counts.truncated)}; --fail-truncated fails such jobs, and "
            f"sensebatch jobs {shlex.quote(str(root))} {reasons} lists them"
        )
    if counts.failed:
        yield f"tracebacks are in {root / 'errors'}; --retry-failed tries those jobs again"
    if counts.blocked:
        yield "blocked jobs start from images of failed jobs, and run once those are there"


def _late_line(summary: Summary, until: float) -> str:
    """Returns why a deadline ended a run, and what would have been next."""
    end = datetime.fromtimestamp(until)
    words = [f"stopped to end by {end:%H:%M} ({end:%Y-%m-%d})"]
    if summary.next_s is not None:
        words.append(f"the next batch takes about {duration(summary.next_s)}")
    return "; ".join([*words, "the same command resumes the run"])


def outcome_json(root: Path, summary: Summary, report: Report | None) -> dict[str, Any]:
    """Returns the object that `--json` prints."""
    counts = summary.counts
    values = {
        "output_dir": str(root),
        "exit_code": exit_code(summary),
        "jobs": counts.jobs,
        "done": counts.done,
        "failed": counts.failed,
        "blocked": counts.blocked,
        "remaining": counts.remaining,
        "interrupted": counts.started,
        "truncated": dict(counts.truncated),
        "stopped": summary.stopped or summary.late,
        "deadline": summary.late,
        "this_run": {
            "done": summary.done,
            "failed": summary.failed,
            "images": summary.images,
            "dropped": summary.dropped,
            "seconds": summary.seconds,
        },
        "images": str(root / "images"),
        "log": str(RunDir(root).log),
        "summary": str(RunDir(root).summary),
    }
    return values if report is None else {**values, "profile": summary_json(report)}


def _last_session(root: Path) -> Report:
    log = read_log(RunDir(root).log)
    return summarise(log, session=max(log["session"].to_pylist()))
