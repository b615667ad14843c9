"""Columns that items are filtered by, found in the values of items."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sensebatch.gallery.columns import MAX_EXACT, MAX_WORD, Columns


def _columns(*items: dict[str, Any], matrix: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    columns = Columns()
    for number, item in enumerate(items):
        own = matrix[number] if matrix else {}
        columns.add(item, matrix=own)
    found = columns.finished()
    return {column.name: {**column.declaration(), **column.encoded()} for column in found}


def test_words_numbers_and_sets_are_told_apart() -> None:
    found = _columns(
        {"status": "done", "seed": 1, "tags": ("a", "b"), "think": True},
        {"status": "failed", "seed": 2, "tags": (), "think": False},
    )
    assert found["status"]["words"] == ["done", "failed"]
    assert found["status"]["codes"] == [0, 1]
    assert found["seed"]["numbers"] == [1, 2]
    assert (found["tags"]["words"], found["tags"]["sets"]) == (["a", "b"], [(0, 1)])
    assert found["tags"]["codes"] == [0, -1]
    assert found["think"]["words"] == ["yes", "no"]


def test_a_value_that_all_items_have_is_written_once() -> None:
    found = _columns({"model": "tiny", "num_steps": 8}, {"model": "tiny", "num_steps": 8})
    assert found["model"]["codes"] == 0
    assert found["num_steps"]["numbers"] == 8


def test_items_without_a_value_have_none() -> None:
    found = _columns({"seed": 1}, {"task": "edit"}, {"seed": 3})
    assert found["seed"]["numbers"] == [1, None, 3]
    assert found["task"]["codes"] == [-1, 0, -1]


def test_seeds_that_a_browser_would_round_stay_exact() -> None:
    found = _columns({"seed": MAX_EXACT + 2}, {"seed": 7})
    assert found["seed"]["kind"] == "word"
    assert found["seed"]["words"] == [str(MAX_EXACT + 2), "7"]


def test_names_of_a_matrix_and_of_metadata_stay_apart_from_columns() -> None:
    columns = Columns()
    columns.add(
        {"seed": 1, "task": "t2i"},
        matrix={"colour": "red", "seed": 1},
        metadata={
            "task": "mine",
            "pick": 3,
            "colour": "deep",
            "a b": 2,
            "nested": {"x": 1},
            "list": [1, "x"],
        },
    )
    found = {column.name: column for column in columns.finished()}
    # A matrix that varies a setting is that setting.
    assert found.keys() == {
        "seed",
        "task",
        "colour",
        "metadata.task",
        "metadata.pick",
        "metadata.colour",
        "metadata.a b",
        "list",
    }
    assert (found["colour"].group, found["metadata.colour"].group) == ("Matrix", "Metadata")
    assert found["list"].encoded()["words"] == ["1", "x"]


def test_long_texts_are_no_words_to_filter_by() -> None:
    assert "caption" not in _columns({"caption": "x" * (MAX_WORD + 1)})


def test_figures_have_their_unit_and_are_rounded() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    found = _columns({"total_s": 1.23456789, "peak_rss_bytes": 5, "finished_at": at})
    assert (found["total_s"]["title"], found["total_s"]["unit"]) == ("Total", "s")
    assert found["total_s"]["numbers"] == 1.23457
    assert found["peak_rss_bytes"]["unit"] == "bytes"
    assert (found["finished_at"]["unit"], found["finished_at"]["numbers"]) == ("time", 1767225600)


def test_a_number_and_a_word_of_one_name_are_words() -> None:
    found = _columns({}, {}, matrix=({"lens": 3}, {"lens": "wide"}))
    assert found["lens"]["words"] == ["3", "wide"]
