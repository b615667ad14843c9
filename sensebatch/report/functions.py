"""What functions of the user's said of images, from the rows of a log that they made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sensebatch.units import counted

COLUMNS = ["function", "status", "choice_probabilities"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """What one function said."""

    function: str
    images: int
    """Images with a score; one that was judged again counts again."""
    mean_score: float | None
    failed: int
    """Calls that raised something, or returned no score."""


def opinions(log: pa.Table) -> tuple[Opinion, ...]:
    """Returns what each function of a log said, by their names."""
    log = log.filter(pc.is_valid(log["function"]))
    return tuple(
        _opinion(name, log.filter(pc.equal(log["function"], name)))
        for name in sorted(pc.unique(log["function"]).to_pylist())
    )


def opinion_lines(found: Sequence[Opinion]) -> Iterator[str]:
    """Yields a line for each function."""
    for one in found:
        words = [f"{counted(one.images, 'image')} judged"]
        words += [] if one.mean_score is None else [f"mean score {one.mean_score:.3f}"]
        words += [f"{one.failed:,} failed"] if one.failed else []
        yield f"function {one.function}: {', '.join(words)}"


def _opinion(name: str, rows: pa.Table) -> Opinion:
    done = rows.filter(pc.equal(rows["status"], "done"))
    # The probability of yes, which is the first choice.
    scores = pc.list_element(done["choice_probabilities"], 0)
    return Opinion(
        function=name,
        images=done.num_rows,
        mean_score=pc.mean(scores).as_py(),
        failed=rows.num_rows - done.num_rows,
    )
