"""Series of tries, of which as many are drawn as it takes until enough are accepted.

The tries of a series differ in their seeds alone, and come in a fixed order. Only so many are open
at a time as may still be needed, so which are drawn depends on nothing but the verdicts on those
before. A try that is not needed is held, and so is what starts from it. All inside a transaction.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sensebatch.jobs import Job, folded_id
from sensebatch.store import tables
from sensebatch.store.attempts import DONE, FAILED, HELD, PENDING, row_from_json
from sensebatch.store.tables import WHOLE, Span

_UNDECIDED = (PENDING, HELD)
_ROUNDING = 1e-9
"""What a share of probabilities may lack that were kept as logarithms."""


class Verdict(StrEnum):
    """What became of a try that was drawn."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    SPARE = "spare"
    """It would have been accepted, and enough others were before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question about a try, which the model or a function answered or failed to answer."""

    question: str
    """The question, or the function's name."""
    answer: str
    """What speaks for the try."""
    share: float | None
    """The probability of that answer; None if there is no answer since the question failed."""
    at_least: float
    """What it has to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What is known of a try that was judged."""

    verdict: Verdict | None
    """None until all verdicts on it are there."""
    asked: tuple[Asked, ...]
    """The questions that were answered or failed."""

    @property
    def score(self) -> float | None:
        """The least probability that an answer gave to what speaks for it; None without any."""
        return min((one.share for one in self.asked if one.share is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldJob:
    """A job that does not run because of what became of a try."""

    job: str
    starts_from: str
    """The try; or another job that is held likewise."""
    is_dropped: bool
    """Whether the try was drawn and rejected, and its image was removed; else it is not needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The tries at one prompt."""

    name: str
    keep: int
    """How many are to be accepted."""
    tries: int
    """The most that are drawn."""
    judged: int
    """How many were accepted or rejected."""
    passed: int
    """How many of them passed every check; those beyond `keep` are spare."""
    accepted: int
    """Those that are taken: at most `keep`."""

    @property
    def is_short(self) -> bool:
        """Whether all tries are used, and too few were accepted."""
        return self.judged == self.tries and self.accepted < self.keep


@dataclass(slots=True)
class _Try:
    number: int
    folded: str
    job_id: str
    status: str
    has_files: bool
    passed: bool | None
    """None until all verdicts on it are there."""
    judged: Sequence[_Judged]
    """The questions about it; none unless it is done."""

    @property
    def is_dropped(self) -> bool:
        """Whether it was drawn and rejected, and its files were removed."""
        return self.status == DONE and not self.has_files


def has_any(db: sqlite3.Connection) -> bool:
    """Returns whether the folder has a series."""
    return db.execute("SELECT 1 FROM tries LIMIT 1").fetchone() is not None


def link(db: sqlite3.Connection, job: Job) -> None:
    """Records of which series a job is a try, and what it is a verdict on."""
    folded = folded_id(job.id)
    db.execute("DELETE FROM tries WHERE job = ?", (folded,))
    db.execute("DELETE FROM verdicts WHERE judge = ?", (folded,))
    if (one := job.attempt_at) is not None:
        values = (folded, one.series, one.number, one.keep)
        db.execute("INSERT INTO tries VALUES (?, ?, ?, ?)", values)
    if (verdict := job.verdict) is not None:
        db.execute(
            "INSERT INTO verdicts VALUES (?, ?, ?, ?)",
            (folded, folded_id(verdict.job), verdict.answer, verdict.at_least),
        )


def hold(db: sqlite3.Connection) -> None:
    """Holds tries that are to be run and may never be needed."""
    for _, keep, tries in _series(db):
        needed = _needed(keep, tries)
        _set_status(db, HELD, [one for one in tries if one.status == PENDING], besides=needed)


def release(db: sqlite3.Connection, span: Span = WHOLE) -> int:
    """Lets tries run that are needed now; returns how many.

    It is for a time at which nothing else of these jobs is to be run: were some verdicts still to
    come, what runs together would depend on when a run was interrupted. Which tries run in the end
    does not depend on it: a try is needed if fewer than are wanted of those before it pass.

    Args:
        db: Inside a transaction.
        span: The jobs; whole series.
    """
    number = 0
    for _, keep, tries in _series(db, span):
        needed = _needed(keep, tries)
        held = [one for one in tries if one.status == HELD and one.number in needed]
        _set_status(db, PENDING, held)
        number += len(held)
    return number


def drop(db: sqlite3.Connection, span: Span = WHOLE) -> list[list[str]]:
    """Forgets the files of rejected tries, whose verdicts are on record; returns those of each.

    Those stay that a verdict is still asked about, that one may be asked about again since it
    failed, and that another job starts from.

    Args:
        db: Inside a transaction.
        span: The jobs; whole series.
    """
    rejected = [
        one.folded
        for _, _, tries in _series(db, span)
        for one in tries
        if one.status == DONE and one.has_files and one.passed is False
        if _is_settled(db, one.folded) and not _has_children(db, one.folded)
    ]
    dropped: list[list[str]] = []
    for folded in rejected:
        query = "SELECT outputs, current FROM jobs WHERE folded = ?"
        outputs, current = db.execute(query, (folded,)).fetchone()
        dropped.append(json.loads(outputs))
        db.execute("UPDATE jobs SET outputs = '[]' WHERE folded = ?", (folded,))
        query = "UPDATE attempts SET row = json_set(row, '$.dropped', json('true')) WHERE seq = ?"
        db.execute(query, (current,))
    if dropped:
        tables.add_stale(db, itertools.chain(*dropped))
        tables.forget_log(db, parts=True)
    return dropped


def draw_dropped(db: sqlite3.Connection) -> list[int]:
    """Has tries run again whose files were removed and are wanted now; returns their numbers.

    They may be accepted after all, since others are asked or less is asked of them, or another job
    starts from them.
    """
    wanted = [
        one.folded
        for _, _, tries in _series(db)
        for one in tries
        if one.is_dropped and (one.passed is not False or _has_children(db, one.folded))
    ]
    query = (
        "UPDATE jobs SET status = ?, tries = 0, current = NULL WHERE folded = ? RETURNING number"
    )
    return [db.execute(query, (PENDING, folded)).fetchone()[0] for folded in wanted]


def _is_settled(db: sqlite3.Connection, folded: str) -> bool:
    """Returns whether a verdict on a try speaks against it, and none is being asked for."""
    judged = _judged(db, folded)
    is_asked = any(one.state == PENDING for one in judged)
    return not is_asked and any(one.is_against for one in judged)


def _has_children(db: sqlite3.Connection, folded: str) -> bool:
    """Returns whether a job starts from a try, besides the questions that decide about it."""
    query = (
        "SELECT 1 FROM parents JOIN jobs ON jobs.folded = child WHERE parent = ? AND wanted = 1"
        " AND child NOT IN (SELECT judge FROM verdicts WHERE job = ?)"
    )
    return db.execute(query, (folded, folded)).fetchone() is not None


def series(db: sqlite3.Connection) -> Iterator[Series]:
    """Yields the series of the manifests, by their names."""
    for name, keep, tries in _series(db):
        decided = [one.passed for one in tries if one.passed is not None]
        yield Series(
            name=name,
            keep=keep,
            tries=len(tries),
            judged=len(decided),
            passed=sum(decided),
            accepted=min(sum(decided), keep),
        )


def judgements(db: sqlite3.Connection) -> dict[str, Judgement]:
    """Returns what is known of each try that was drawn and asked about, by the job's id."""
    found = {}
    for _, keep, tries in _series(db):
        accepted = 0
        for one in tries:
            asked = tuple(question.asked() for question in one.judged if question.is_over)
            if one.status != DONE or (one.passed is None and not asked):
                continue
            verdict = None if one.passed is None else Verdict.REJECTED
            if one.passed:
                verdict = Verdict.ACCEPTED if accepted < keep else Verdict.SPARE
                accepted += 1
            found[one.job_id] = Judgement(verdict=verdict, asked=asked)
    return found


def held_jobs(db: sqlite3.Connection) -> Iterator[HeldJob]:
    """Yields the jobs that wait for tries, and are not questions about them.

    They may be tries themselves, of a series that starts from a try of another.
    """
    rows = db.execute(
        "SELECT jobs.id, own.id, own.status FROM jobs JOIN parents ON child = jobs.folded"
        " JOIN jobs AS own ON own.folded = parent"
        " WHERE jobs.wanted = 1 AND jobs.seen = ? AND jobs.status = ?"
        " AND (own.status = ? OR own.status = ? AND own.outputs = '[]')"
        " AND NOT EXISTS (SELECT 1 FROM verdicts WHERE judge = jobs.folded)"
        " ORDER BY jobs.position, own.position",
        (tables.latest_reading(db), HELD, HELD, DONE),
    )
    for job, starts_from, status in rows:
        yield HeldJob(job=job, starts_from=starts_from, is_dropped=status == DONE)


def _needed(keep: int, tries: Sequence[_Try]) -> set[int]:
    """Returns the numbers of the tries that are accepted, or open and may have to be."""
    needed: set[int] = set()
    for one in tries:
        if len(needed) == keep:
            break
        if one.passed is not False:
            needed.add(one.number)
    return needed


def _series(db: sqlite3.Connection, span: Span = WHOLE) -> Iterator[tuple[str, int, list[_Try]]]:
    """Yields (name, keep, tries in order) of each series of the latest reading."""
    rows = db.execute(
        "SELECT series, keep, tries.number, folded, id, status, outputs <> '[]' FROM tries"
        " JOIN jobs ON folded = job WHERE wanted = 1 AND seen = ? AND position BETWEEN ? AND ?"
        " ORDER BY series, tries.number",
        (tables.latest_reading(db), *span),
    ).fetchall()
    name, keep, tries = "", 0, list[_Try]()
    for own, own_keep, number, folded, job_id, status, has_files in rows:
        if own != name and tries:
            yield name, keep, tries
            tries = []
        name, keep = own, own_keep
        judged = _judged(db, folded) if status == DONE else []
        tries.append(
            _Try(
                number=number,
                folded=folded,
                job_id=job_id,
                status=status,
                has_files=bool(has_files),
                passed=_passed(db, folded, status, judged),
                judged=judged,
            )
        )
    if tries:
        yield name, keep, tries


def _passed(
    db: sqlite3.Connection, folded: str, status: str, judged: Sequence[_Judged]
) -> bool | None:
    """Returns whether a try is accepted; None until it is known."""
    if status == FAILED:
        return False
    if status != DONE:
        return None
    if any(one.is_against for one in judged):
        return False
    # A reading with a limit may have ended between a try and its questions.
    query = "SELECT json_extract(definition, '$.try.checks') FROM jobs WHERE folded = ?"
    (num_checks,) = db.execute(query, (folded,)).fetchone()
    if len(judged) < (num_checks or 1) or any(one.state in _UNDECIDED for one in judged):
        return None
    return all(one.state == DONE for one in judged)


@dataclass(slots=True)
class _Judged:
    """A question about a try."""

    state: str
    answer: str
    share: float
    """The probability of the answer that speaks for it; 0 until it is answered."""
    at_least: float
    question: str

    def asked(self) -> Asked:
        """Returns what is known of it once it is over."""
        share = self.share if self.state == DONE else None
        return Asked(
            question=self.question, answer=self.answer, share=share, at_least=self.at_least
        )

    @property
    def is_over(self) -> bool:
        """Whether it was answered or has failed."""
        return self.state in (DONE, FAILED)

    @property
    def is_against(self) -> bool:
        """Whether its answer speaks against the try."""
        return self.state == DONE and self.share < self.at_least - _ROUNDING


QUESTIONS = (
    "SELECT answer, at_least, status, row FROM verdicts CROSS JOIN jobs ON folded = judge"
    " LEFT JOIN attempts ON attempts.seq = current WHERE verdicts.job = ? AND wanted = 1"
    " ORDER BY position"
)
"""The questions about a try. CROSS JOIN: in another order, every wanted job is looked at."""


def _judged(db: sqlite3.Connection, folded: str) -> list[_Judged]:
    """Returns the questions about a try."""
    found = []
    for answer, at_least, state, text in db.execute(QUESTIONS, (folded,)):
        row = row_from_json(text) if text else {}
        share = _probability(row, answer) if state == DONE else 0.0
        found.append(_Judged(state, answer, share, at_least, row.get("prompt", "")))
    return found


def _probability(row: Mapping[str, Any], answer: str) -> float:
    choices, probabilities = row["choices"], row["choice_probabilities"]
    return dict(zip(choices, probabilities, strict=True)).get(answer, 0.0)


def _set_status(
    db: sqlite3.Connection,
    status: str,
    tries: Sequence[_Try],
    *,
    besides: set[int] | frozenset[int] = frozenset(),
) -> None:
    db.executemany(
        "UPDATE jobs SET status = ? WHERE folded = ?",
        ((status, one.folded) for one in tries if one.number not in besides),
    )
