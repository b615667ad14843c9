"""Expressions about a job: what they may use, and what is said of those that cannot be."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sensebatch.dataset.where import Where, listing
from sensebatch.errors import ConfigError

COLUMNS = ("id", "status", "seed", "think", "tags", "matrix", "metadata", "at", "text")


class Row:
    """A job that counts which columns were asked for."""

    def __init__(self, **values: Any) -> None:
        self.values: dict[str, Any] = {"matrix": "{}", "metadata": "{}", **values}
        self.asked: list[str] = []

    def value(self, name: str) -> Any:
        self.asked.append(name)
        return self.values.get(name)


ROW = {
    "id": "storm",
    "status": "done",
    "seed": 3,
    "think": True,
    "tags": ["sky", "sea"],
    "matrix": '{"light": "dawn", "seed": 3, "scale": 1.5}',
    "metadata": '{"artist": "Ann", "number": 7}',
    "at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
}
EXTRA = {"light": "matrix", "scale": "matrix", "artist": "metadata", "number": "metadata"}


def holds(text: str, **changes: Any) -> bool:
    (found,) = Where(text, COLUMNS, lambda: EXTRA).holds([Row(**{**ROW, **changes})])
    return found


@pytest.mark.parametrize(
    "text",
    [
        "status = 'done'",
        "status IN ('failed', 'done') AND seed BETWEEN 1 AND 3",
        "think",
        "think = true",
        "has(tags, 'sea')",
        "NOT has(tags, 'se')",
        "id LIKE 'st%'",
        "light = 'dawn' AND scale > 1",
        "matrix ->> 'seed' = 3",
        "artist = 'Ann'",
        "number = 7",
        "at > '2026-01-02'",
        "text IS NULL",
        "status = 'done' -- as it should be",
        "lower(upper(id)) = 'storm'",
        "id REGEXP '^st[aeiou]rm$'",
        "seed REGEXP '[0-9]'",
    ],
)
def test_expression_holds(text: str) -> None:
    assert holds(text)
    assert not holds(f"NOT ({text}\n)")


def test_null_is_not_true() -> None:
    assert not holds("text = 'x'")
    assert not holds("text <> 'x'")


def test_only_the_columns_of_the_expression_are_read() -> None:
    row = Row(**ROW)
    assert Where("seed > 1 AND light = 'dawn'", COLUMNS, lambda: EXTRA).holds([row]) == [True]
    assert sorted(row.asked) == ["matrix", "seed"]


def test_names_of_matrix_and_metadata_are_looked_up_only_if_needed() -> None:
    def unneeded() -> dict[str, str]:
        raise AssertionError

    assert Where("seed = 3", COLUMNS, unneeded).holds([Row(**ROW)]) == [True]


def test_rows_are_told_apart() -> None:
    where = Where("seed > 1", COLUMNS, lambda: {})
    assert where.holds([Row(seed=seed) for seed in (0, 5, 1, 2)]) == [False, True, False, True]
    assert where.holds([Row(seed=9)]) == [True]
    assert where.holds([]) == []


def test_a_list_of_columns_has_narrow_lines() -> None:
    names = [f"column_{number:02}" for number in range(40)]
    lines = listing(reversed(names)).split("\n")
    assert lines[0].startswith("columns: column_00, column_01,")
    assert max(map(len, lines)) <= 78
    assert [line.startswith("  column_") for line in lines[1:]] == [True] * (len(lines) - 1)
    assert " ".join(map(str.strip, lines)) == f"columns: {', '.join(names)}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("statu = 'done'", "found 'statu'; did you mean 'status'"),
        ("lihgt = 'dawn'", "found 'lihgt'; did you mean 'light'"),
        ("colour = 'red'", r"columns: artist, at, id, light, [\w,\s]*, think\b"),
        ("", "expected an SQL expression"),
        ("seed >", "expected an SQL expression"),
        ("unheard(seed)", "no such function: unheard"),
        ("seed > 'x", """unrecognized token: "'x"$"""),
        ("seed > 'x\n)\"", r"""unrecognized token: "'x\n\)""$"""),
        ("count(*) > 1", "misuse of aggregate"),
        ("seed = 1; DROP TABLE jobs", "without SELECT|syntax error"),
        ("1) UNION SELECT (1", "without SELECT"),
        ("seed IN (SELECT 1)", "without SELECT"),
        ("load_extension('x')", "without SELECT"),
        ("length(zeroblob(1000000000)) > 1", "too big"),
        ("abs(-9223372036854775808) > 1", "overflow"),
        ("seed = '\0'", "--where"),
        ("id REGEXP '['", r"expected a regular expression, found '\[': unterminated character set"),
    ],
)
def test_what_cannot_be_computed_is_a_mistake_of_the_expression(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        holds(text)
    assert str(caught.value).startswith("--where ")


def test_names_that_sqlite_takes_for_one_are_one_column() -> None:
    extra = {"Seed": "metadata", "Light": "metadata", "light": "matrix", "a b": "metadata"}
    row = Row(**{**ROW, "metadata": '{"Light": "noon"}'})
    assert Where("LIGHT = 'noon'", COLUMNS, lambda: extra).holds([row]) == [True]


def test_expression_cannot_write_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    for text in (f"1); ATTACH '{path}' AS x; --", f"1); VACUUM INTO '{path}'; --"):
        with pytest.raises(ConfigError):
            holds(text)
    assert not path.exists()
