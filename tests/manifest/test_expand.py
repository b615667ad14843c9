"""Seeds, repetitions and matrices: which jobs they make and what those are called."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.config import default_config
from sensebatch.jobs import Source
from sensebatch.manifest.expand import expand
from sensebatch.manifest.problems import RowErrors
from sensebatch.manifest.read import job_of
from sensebatch.manifest.resolve import JobResolver, Origin
from sensebatch.tasks import Task
from tests.manifest.conftest import Mistakes, ReadRows


def expanded(fields: dict[str, Any]) -> list[dict[str, Any]]:
    errors = RowErrors()
    found = list(expand(fields, frozenset(fields), default_seed=42, errors=errors))
    assert not len(errors), list(errors)
    return [dict(one.fields) for one in found]


def test_a_plain_row_is_one_job_and_keeps_its_braces() -> None:
    row = {"id": "a", "prompt": "{x}}"}
    assert expanded(row) == [row]


def test_seeds_make_one_job_each() -> None:
    jobs = expanded({"id": "a", "prompt": "{literal}", "seeds": [3, 1]})
    assert [(job["id"], job["seed"], job["prompt"]) for job in jobs] == [
        ("a-seed=3", 3, "{literal}"),
        ("a-seed=1", 1, "{literal}"),
    ]


def test_n_counts_from_the_seed_or_the_default() -> None:
    assert [job["seed"] for job in expanded({"prompt": "x", "n": 3, "seed": 7})] == [7, 8, 9]
    assert [job["seed"] for job in expanded({"prompt": "x", "n": 2})] == [42, 43]


def test_a_matrix_combines_every_value_with_every_other() -> None:
    jobs = expanded(
        {
            "id": "p",
            "prompt": "A {colour} {animal}, {{not this}}",
            "matrix": {"animal": ["cat", "dog"], "colour": ["red"], "resolution": ["16:9", "1:1"]},
        }
    )
    assert [(job["prompt"], job["resolution"]) for job in jobs] == [
        ("A red cat, {not this}", "16:9"),
        ("A red cat, {not this}", "1:1"),
        ("A red dog, {not this}", "16:9"),
        ("A red dog, {not this}", "1:1"),
    ]
    assert jobs[0]["id"] == "p-animal=cat-colour=red-resolution=16x9"


def test_names_in_the_id_template_are_not_repeated() -> None:
    jobs = expanded(
        {"id": "{animal}", "prompt": "{animal}", "matrix": {"animal": ["cat"], "seed": [1]}}
    )
    assert jobs[0]["id"] == "cat-seed=1"


def test_prompts_of_a_matrix_are_templates_too() -> None:
    jobs = expanded({"matrix": {"prompt": ["A {x}", "Two {x}s"], "x": ["cat"]}})
    assert [job["prompt"] for job in jobs] == ["A cat", "Two cats"]


def test_a_matrix_and_seeds_multiply() -> None:
    jobs = expanded({"id": "a-{seed}", "prompt": "{x}", "matrix": {"x": ["p", "q"]}, "n": 2})
    assert [job["id"] for job in jobs] == ["a-42-x=p", "a-43-x=p", "a-42-x=q", "a-43-x=q"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matrix": {"animal": ["cat"]}}, "matrix.animal: expected {animal} in the prompt or the "),
        ({"matrix": {"sede": [1]}}, "matrix.sede: expected {sede} in the prompt or the id, or the"),
        ({"matrix": {}, "prompt": "{x}"}, "prompt: expected"),
        (
            {"matrix": {"animal": ["cat"]}, "prompt": "{animal} {animl}"},
            "prompt: expected one of {animal}, found {animl}; a plain brace is doubled; did you me",
        ),
        (
            {"matrix": {"x": ["cat"]}, "prompt": "{x} {"},
            "prompt: expected {{ for a brace, found a single one",
        ),
        ({"matrix": {"x": []}}, "matrix.x: expected a list of at least 1, found a list of 0"),
        ({"matrix": {"x": "abc"}}, "matrix.x: expected a list, found 'abc'"),
        ({"matrix": {"x": [["a"]]}, "prompt": "{x}"}, "matrix.x[0]: expected text, a number, tr"),
        ({"matrix": {"x": ["a", "a"]}, "prompt": "{x}"}, "matrix.x: expected every value once, f"),
        (
            {"matrix": {"id": ["a"]}},
            "matrix.id: expected a field that a matrix can set, found 'id'",
        ),
        ({"matrix": {"a b": ["a"]}}, "matrix.a b: expected a name of letters, digits and _, found"),
        (
            {"matrix": {"seed": [1]}, "seed": 2},
            "matrix.seed: expected either seed or a matrix of seed, found both",
        ),
        (
            {"matrix": {"seed": [1]}, "n": 2},
            "matrix.seed: expected either n or a matrix of seed, found both",
        ),
        ({"matrix": {"num_steps": [0]}}, "num_steps: expected at least 1, found 0"),
        ({"id": "a-{sed}", "n": 2}, "id: expected one of {seed}, found {sed}"),
    ],
)
def test_a_mistake_in_an_expansion_is_one_message(
    mistakes: Mistakes, fields: dict[str, Any], message: str
) -> None:
    found = mistakes({"prompt": "x", **fields})
    assert len(found) == 1
    assert found[0].startswith(f"line 1: {message}")


def test_the_same_mistake_in_every_combination_is_said_once(mistakes: Mistakes) -> None:
    assert len(mistakes({"prompt": "x", "n": 1000, "width": 33, "height": 32})) == 1


words = st.text(alphabet="abcdé /:-.{}", min_size=1, max_size=8)


@settings(max_examples=60)
@given(
    lists=st.dictionaries(
        st.sampled_from(["animal", "place", "seed", "num_steps"]),
        st.lists(st.integers(1, 99), unique=True, min_size=1, max_size=3),
        min_size=1,
        max_size=2,
    ),
    words=st.lists(words, unique=True, min_size=1, max_size=3),
    extra=st.integers(100, 200),
    shuffle=st.randoms(use_true_random=False),
    has_id=st.booleans(),
)
def test_ids_stay_when_values_are_added_or_moved(
    lists: dict[str, list[Any]],
    words: list[str],
    extra: int,
    shuffle: random.Random,
    has_id: bool,
    read_all: Any,
) -> None:
    names = [name for name in ("animal", "place") if name in lists]
    prompt = "x {word} " + " ".join(f"{{{name}}}" for name in names)
    row: dict[str, Any] = {"prompt": prompt, **({"id": "job"} if has_id else {})}
    matrix = {**lists, "word": words}
    before = read_all({**row, "matrix": matrix})
    wider = {name: [*values, extra if name != "word" else "zzz"] for name, values in matrix.items()}
    moved = [(name, shuffle.sample(values, len(values))) for name, values in wider.items()]
    shuffle.shuffle(moved)
    after = read_all({**row, "matrix": dict(moved)})
    assert len(set(before)) == len(before)
    assert before.items() <= after.items()


@pytest.fixture(scope="module")
def read_all() -> Any:
    """Returns what tells each job of a row apart, by id."""
    resolver = JobResolver(default_config())
    origin = Origin(base=Path(), source=Source(file="f", row="line 1"))

    def read(row: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
        errors = RowErrors()
        jobs = [
            job_of(one, Task.T2I, origin, resolver, errors)
            for one in expand(row, frozenset(row), default_seed=42, errors=errors)
        ]
        assert not len(errors), list(errors)
        return {
            read.job.id: (read.job.prompt, read.job.seed, read.job.sampling.num_steps)
            for read in jobs
            if read is not None
        }

    return read


def test_expanded_jobs_are_all_read(read_rows: ReadRows) -> None:
    jobs = read_rows({"id": "a", "prompt": "{x}", "matrix": {"x": ["p", "q"]}, "seeds": [1, 2]})
    assert [(job.prompt, job.seed) for job in jobs] == [("p", 1), ("p", 2), ("q", 1), ("q", 2)]


def test_jobs_carry_the_values_of_their_matrix(read_rows: ReadRows) -> None:
    jobs = read_rows(
        {"id": "p", "prompt": "A {animal}", "matrix": {"animal": ["cat"], "cfg_scale": [1, 2.5]}},
        {"id": "q", "prompt": "x", "seeds": [1, 2]},
    )
    assert [dict(job.matrix) for job in jobs] == [
        {"animal": "cat", "cfg_scale": 1},
        {"animal": "cat", "cfg_scale": 2.5},
        {},
        {},
    ]
