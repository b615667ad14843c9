"""Two lanes of jobs that have nothing to do with each other, so that neither waits for the other.

Where images are judged, verdicts decide what is drawn next. In one lane nothing is drawn until they
are there; of two lanes, one is drawn meanwhile. A lane is a span of the manifests, and depends on
them alone, since the jobs of two lanes never share a batch. Inside a transaction.
"""

from __future__ import annotations

import sqlite3
from array import array
from itertools import accumulate

from sensebatch.store import acceptance, tables
from sensebatch.store.tables import WHOLE, Span


def lanes(db: sqlite3.Connection, least: int) -> list[Span]:
    """Returns the spans of the lanes, which no series and no chain of jobs crosses.

    Args:
        db: Inside a transaction.
        least: Tries that must be open from the beginning in each of two lanes.
    """
    if not acceptance.has_any(db):
        return [WHOLE]
    opened = accumulate(_opened(db))
    reach = accumulate(_reach(db), max)
    # At a cut, nothing before it reaches beyond it.
    cuts = [
        (before, place)
        for place, (before, farthest) in enumerate(zip(opened, reach, strict=True))
        if farthest <= place and before >= least
    ]
    if not cuts:
        return [WHOLE]
    total = cuts[-1][0]
    before, place = min(cuts, key=lambda cut: abs(2 * cut[0] - total))
    if total - before < least:
        return [WHOLE]
    return [(WHOLE[0], place), (place + 1, WHOLE[1])]


def _opened(db: sqlite3.Connection) -> array[int]:
    """Returns, for each place, whether a try is there that is open from the beginning."""
    found = _zeros(db)
    rows = db.execute(
        "SELECT position FROM tries JOIN jobs ON folded = job"
        " WHERE wanted = 1 AND seen = ? AND tries.number < keep",
        (tables.latest_reading(db),),
    )
    for (place,) in rows:
        found[place] = 1
    return found


def _reach(db: sqlite3.Connection) -> array[int]:
    """Returns, for each place, the last place that has to do with the job there."""
    found = _zeros(db)
    reading = tables.latest_reading(db)
    rows = db.execute(
        "SELECT min(position), max(position) FROM tries JOIN jobs ON folded = job"
        " WHERE wanted = 1 AND seen = ? GROUP BY series UNION ALL"
        " SELECT min(child.position, own.position), max(child.position, own.position)"
        " FROM parents JOIN jobs AS child ON child.folded = parents.child"
        " JOIN jobs AS own ON own.folded = parents.parent"
        " WHERE child.wanted = 1 AND child.seen = ? AND own.seen = ?",
        (reading, reading, reading),
    )
    for first, last in rows:
        found[first] = max(found[first], last)
    return found


def _zeros(db: sqlite3.Connection) -> array[int]:
    query = "SELECT coalesce(max(position), -1) + 1 FROM jobs WHERE wanted = 1 AND seen = ?"
    (length,) = db.execute(query, (tables.latest_reading(db),)).fetchone()
    return array("q", bytes(8 * length))
