"""Ids name files: which are refused, when two are the same, and how they are derived."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.manifest.ids import (
    MAX_ID_BYTES,
    IdRegistry,
    derived_id,
    id_error,
    slug,
    with_suffixes,
)
from sensebatch.tasks import Task
from tests.manifest.conftest import Mistakes, ReadRows


@pytest.mark.parametrize(
    "job_id",
    ["a", "Cat 1", "köttbullar", "猫", "a.b", "_a", "a=1~b", "x" * MAX_ID_BYTES, "console", "a-"],
)
def test_ordinary_ids_are_allowed(job_id: str) -> None:
    assert id_error(job_id) is None


@pytest.mark.parametrize(
    ("job_id", "reason"),
    [
        ("", "not empty"),
        ("a/b", "without '/'"),
        ("a\\b", "without"),
        ("a:b", "without ':'"),
        ('a"b', "without"),
        ("a*", "without '*'"),
        ("a\nb", "control"),
        ("a\x7f", "control"),
        ("a\u2028b", "control"),
        (".a", "start with '.'"),
        ("..", "start with '.'"),
        ("-a", "start with '-'"),
        (" a", "start with ' '"),
        ("a.", "end with '.'"),
        ("a ", "end with ' '"),
        ("a.PNG", "suffix"),
        ("a.txt", "suffix"),
        ("nul", "reserved"),
        ("Com1.x", "reserved"),
        ("LPT¹", "reserved"),
        ("é" * 76, "at most 150 bytes, found 152"),
        ("x" * 151, "at most 150 bytes, found 151"),
    ],
)
def test_an_id_that_cannot_name_a_file_is_refused(job_id: str, reason: str) -> None:
    error = id_error(job_id)
    assert error is not None
    assert reason in error


@given(st.text(max_size=40))
def test_an_allowed_id_is_one_path_component(job_id: str) -> None:
    if id_error(job_id) is None:
        assert "/" not in job_id
        assert "\0" not in job_id
        assert job_id not in (".", "..")


def test_the_registry_names_the_first_row() -> None:
    registry = IdRegistry()
    registry.start_file("a.yaml", "line")
    assert registry.add("Cat", "a.yaml", 7) is None
    assert registry.add("cat", "a.yaml", 9) == "line 7"
    registry.start_file("b.parquet", "row")
    assert registry.add("CAT", "b.parquet", 0) == "a.yaml: line 7"
    assert registry.add("dog", "b.parquet", 5) is None
    assert registry.add("DOG", "b.parquet", 6) == "row 5"
    # A job that has waited comes after those of other files.
    assert registry.add("dog", "a.yaml", 8) == "b.parquet: row 5"
    assert registry.add("fox", "a.yaml", 3) is None
    assert registry.add("fox", "b.parquet", 7) == "a.yaml: line 3"


def test_colliding_ids_are_one_mistake_that_names_the_other_row(mistakes: Mistakes) -> None:
    found = mistakes({"id": "Cat", "prompt": "x"}, {"id": "cat", "prompt": "y"})
    assert found == [
        "line 2: id: expected another id than that of line 1, even if upper and lower case are "
        "the same, found 'cat'"
    ]


def test_an_id_that_is_given_twice_says_nothing_of_case(mistakes: Mistakes) -> None:
    rows = [{"id": job_id, "prompt": "x"} for job_id in ("one", "Cat", "one", "cat", "Cat")]
    alike, differing, alike_again = mistakes(*rows)
    assert alike == "line 3: id: expected another id than that of line 1, found 'one'"
    assert differing.endswith("line 2, even if upper and lower case are the same, found 'cat'")
    assert alike_again == "line 5: id: expected another id than that of line 2, found 'Cat'"


def test_identical_rows_without_an_id_must_differ(mistakes: Mistakes) -> None:
    found = mistakes({"prompt": "x"}, {"prompt": "x"})
    assert len(found) == 1
    assert found[0].endswith("found the same; give one of the two an id or another seed")


def test_ids_are_composed_unicode(read_rows: ReadRows) -> None:
    assert read_rows({"id": "e\u0301", "prompt": "x"})[0].id == "é"


def test_a_derived_id_depends_on_content_and_not_on_place_or_passengers(
    read_rows: ReadRows,
) -> None:
    row = {"prompt": "x", "seed": 1}
    first = read_rows(row)[0].id
    moved = read_rows({"prompt": "y"}, {"tags": ["t"], "metadata": {"a": 1}, **row})[1].id
    assert moved == first
    assert first.startswith("t2i-")
    assert read_rows({**row, "num_steps": 3})[0].id != first


def test_a_derived_id_depends_on_the_bytes_of_images_and_not_on_their_paths(
    read_rows: ReadRows, draw_input: Any, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    red, blue = draw_input("red.png"), draw_input("sub/blue.png", colour="blue")
    row = {"task": "edit", "prompt": "x"}

    def id_of(**images: Any) -> str:
        return read_rows({**row, **images})[0].id

    first = id_of(image=red)
    shutil.copyfile(tmp_path / "red.png", tmp_path / "sub/same.png")
    assert id_of(image="sub/same.png") == first
    assert id_of(image=f"./sub/../{red}") == first
    assert id_of(images=[str(tmp_path / "red.png")]) == first
    assert id_of(image=blue) != first
    assert id_of(images=[red, blue]) != id_of(images=[blue, red])
    shutil.copyfile(tmp_path / "sub/blue.png", tmp_path / "red.png")
    assert id_of(image=red) == id_of(image=blue)


def test_derived_ids_of_rows_without_images_are_those_of_earlier_versions(
    read_rows: ReadRows,
) -> None:
    rows = [{"prompt": "x"}, {"prompt": "x", "images": [], "seed": 3, "width": 64, "height": 32}]
    assert [job.id for job in read_rows(*rows)] == [
        "t2i-9e63c87c67c4d4d8",
        "t2i-b4a3368f45aca138",
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_derived_id_ignores_the_order_of_names_and_is_allowed(content: dict[str, Any]) -> None:
    backwards = dict(reversed(content.items()))
    job_id = derived_id(Task.EDIT, content)
    assert job_id == derived_id(Task.EDIT, backwards)
    assert id_error(job_id) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cat", "cat"),
        ("red panda", "red-panda"),
        ("16:9", "16x9"),
        (7, "7"),
        (0.5, "0.5"),
        (True, "true"),
        ("cat.png", "cat-png~b94f5ce0"),
        ("end.", "end~2e18562d"),
        ("a/b", "a-b~c14cddc0"),
        ("", "e3b0c442"),
        ("!!!", "e84c538e"),
    ],
)
def test_a_value_in_an_id_is_readable(value: object, expected: str) -> None:
    assert slug(value) == expected


@given(st.text() | st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False))
def test_any_value_can_stand_in_an_id(value: object) -> None:
    assert id_error(with_suffixes("job", [("name", value)])) is None


def test_suffixes_come_in_the_order_of_names() -> None:
    assert with_suffixes("a", [("z", 1), ("b", 2)]) == "a-b=2-z=1"


@pytest.mark.parametrize("bad", [0, 1])
def test_colliding_ids_are_reported_for_jobs_with_other_errors_too(
    mistakes: Mistakes, bad: int
) -> None:
    rows = [{"id": "cat", "prompt": "x"}, {"id": "cat", "prompt": "y"}]
    rows[bad]["promt"] = "z"
    fields = [mistake.split(": ")[1] for mistake in mistakes(*rows)]
    assert sorted(fields) == ["id", "promt"]
