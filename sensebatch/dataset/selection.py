"""Which jobs of a folder are meant: by their task, tags, values and picks, or by an expression.

The same selection serves every command that lists, shows, exports or draws again.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from sensebatch.dataset.choices import Picked
from sensebatch.dataset.picks import Pick, PickedJob, Picks
from sensebatch.dataset.where import Where
from sensebatch.errors import ConfigError
from sensebatch.tasks import Task

if TYPE_CHECKING:
    from sensebatch.dataset.records import Record

_CHUNK = 1000
"""Jobs that an expression is asked about at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Conditions that jobs meet, all of them; without any, all jobs of the manifests."""

    where: str | None = None
    """An SQL expression, see `where`."""
    tasks: Sequence[Task] = ()
    """One of these."""
    statuses: Sequence[str] = ()
    """One of these: `pending`, `done`, `failed`."""
    finish_reasons: Sequence[str] = ()
    """One of these."""
    tags: Sequence[str] = ()
    """All of these."""
    matrix: Mapping[str, str] = field(default_factory=dict)
    """Values of the matrix, as text."""
    picks: Picks | None = None
    picked: Picked = Picked.KEEP
    """Which of the picks; only with `picks`."""
    removed: bool = False
    """Whether jobs count that are no longer in the manifests."""
    dedupe: int | None = None
    """Leaves out jobs whose images differ in at most so many bits of their hashes from those of an
    earlier one; see `duplicates`."""


class Selector:
    """A selection for one folder.

    Args:
        selection: The conditions.
        run_id: The folder's id.
        columns: Names that an expression may use.
        extra_columns: Returns further ones, with the column that has them; called if needed.

    Raises:
        ConfigError: The expression, the picks or the names do not fit the folder.
    """

    def __init__(
        self,
        selection: Selection,
        run_id: str,
        columns: Sequence[str],
        extra_columns: Callable[[], Mapping[str, str]],
    ) -> None:
        self._selection = selection
        picks = selection.picks
        self._picks = {} if picks is None else picks.of_run(run_id)
        self._where = None
        if selection.where is not None:
            self._where = Where(selection.where, columns, extra_columns)

    def picked(self, job_id: str, key: str) -> PickedJob:
        """Returns what a person said of a job as it is now."""
        found = self._picks.get(job_id)
        return PickedJob() if found is None or found.key not in (None, key) else found

    def chosen(self, records: Iterator[Record]) -> Iterator[Record]:
        """Yields the records that meet all conditions."""
        found = filter(self._is_chosen, records)
        if self._where is None:
            yield from found
            return
        while chunk := list(islice(found, _CHUNK)):
            holds = self._where.holds(chunk)
            yield from (record for record, is_true in zip(chunk, holds, strict=True) if is_true)

    def _is_chosen(self, record: Record) -> bool:
        selection = self._selection
        # What was not asked for is not looked at: a row takes time to be read.
        return (
            (not selection.tasks or record.job.task in selection.tasks)
            and (not selection.statuses or record.status in selection.statuses)
            and (not selection.finish_reasons or record.finish_reason in selection.finish_reasons)
            and (not selection.tags or set(selection.tags) <= set(record.tags))
            and all(text == as_text(record.matrix, name) for name, text in selection.matrix.items())
            and (selection.picks is None or _is_picked(record.pick, selection.picked))
        )


def as_text(matrix: Mapping[str, Any], name: str) -> str | None:
    """Returns a value of a matrix as people write it; None where there is none of that name."""
    if name not in matrix:
        return None
    value = matrix[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def matrix_conditions(words: Iterable[str]) -> dict[str, str]:
    """Returns `NAME=VALUE` words as a mapping.

    Raises:
        ConfigError: A word has another form.
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ConfigError(f"--matrix: expected NAME=VALUE, found {word!r}")
        found[name] = value
    return found


def check_matrix(matrix: Iterable[str], known: Collection[str]) -> None:
    """Refuses names that no job's matrix has.

    Raises:
        ConfigError: There is one.
    """
    for name in matrix:
        if not known:
            raise ConfigError(f"--matrix: expected jobs with a matrix for {name!r}, found none")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            names = ", ".join(known)
            raise ConfigError(f"--matrix: expected one of {names}, found {name!r}{hint}")


def _is_picked(pick: Pick | None, picked: Picked) -> bool:
    return picked is Picked.ANY or picked == (pick or Picked.NONE)
