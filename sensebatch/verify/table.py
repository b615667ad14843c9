"""Verdicts as a table in Markdown, and what is missing. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sensebatch.verify.check import Verdict
from sensebatch.verify.compare import Outcome, worst
from sensebatch.verify.jobs import GROUPS
from sensebatch.verify.promises import Trial

NOTHING = "-"


def format_verdicts(verdicts: Sequence[Verdict], trials: Sequence[Trial]) -> str:
    """Returns a table of what was compared, and lines about what was not.

    Args:
        verdicts: Those of the trials that were run or skipped.
        trials: All that were asked for.
    """
    head = ("run", "compared with", *GROUPS, "largest difference")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    names = {trial.name: trial.what for trial in trials}
    lines += [_line(verdict, names) for verdict in verdicts if verdict.holds is not None]
    parts = ["\n".join(lines)]
    skipped = [f"- {v.trial.name}: {v.skipped}" for v in verdicts if v.skipped is not None]
    if skipped:
        parts.append("Not compared on this machine:\n\n" + "\n".join(skipped))
    seen = {verdict.trial.name for verdict in verdicts}
    missing = [trial.name for trial in trials if trial.name not in seen]
    if missing:
        parts.append(f"Stopped before these were run: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _line(verdict: Verdict, names: Mapping[str, str]) -> str:
    trial = verdict.trial
    cells = [trial.what, NOTHING if trial.like is None else names[trial.like]]
    if verdict.error is not None:
        cells += [NOTHING] * len(GROUPS) + [f"failed: {verdict.error}"]
    else:
        cells += [_cell(verdict.outcomes.get(group)) for group in GROUPS]
        levels, share = worst(verdict.outcomes)
        cells.append(f"{levels} of 255, {share:.1%} of the values" if levels else NOTHING)
    return f"| {' | '.join(cells)} |"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return NOTHING
    if outcome.equal:
        return "equal"
    return f"{outcome.num_files - outcome.num_equal} of {outcome.num_files} files differ"
