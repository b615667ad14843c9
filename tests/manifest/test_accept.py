"""Rows of which only accepted images are taken, as they are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import default_config
from sensebatch.errors import ManifestError
from sensebatch.jobs import Job, Source
from sensebatch.manifest.convert import convert_manifest
from sensebatch.manifest.read import read_manifest

NO_FUNCTION = (
    "expected a mapping of ask, choices, is and at_least, or a list of these; a function "
    "(module:function) is named in the configuration file, under accept, and never in a manifest"
)
CHECK = "{ask: is it red, choices: [yes, no], is: yes, at_least: 0.8}"


def read(tmp_path: Path, text: str) -> list[Job]:
    path = tmp_path / "m.yaml"
    path.write_text(f"version: 1\n{text}", encoding="utf-8")
    return list(read_manifest(path, default_config()))


def test_each_combination_of_a_matrix_is_a_series(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        f"""jobs:
  - id: "{{c}}"
    prompt: A {{c}} dot
    matrix: {{c: [red, blue]}}
    accept: {CHECK}
    keep: 2
    tries: 3
""",
    )
    tries = [job.attempt_at for job in jobs if job.attempt_at]
    assert [(one.series, one.number, one.keep) for one in tries] == [
        (name, number, 2) for name in ("red", "blue") for number in range(3)
    ]
    assert [job.id for job in jobs if job.verdict][:2] == ["red-seed=42-check", "red-seed=43-check"]


def test_a_question_names_the_prompt_and_values_of_the_matrix(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        """defaults:
  accept: {ask: "{{Is}} {c} in: {prompt}?", choices: [yes, no], is: yes}
  tries: 1
jobs:
  - {id: "{c}", prompt: "A {c} dot", matrix: {c: [red]}}
""",
    )
    assert [job.prompt for job in jobs if job.verdict] == ["{Is} red in: A red dot?"]


def test_a_series_has_one_name_whatever_digits_its_ids_have(tmp_path: Path) -> None:
    rows = f"""defaults: {{accept: {CHECK}}}
jobs:
  - {{id: "a-{{seed}}-{{size}}", prompt: a dot, seed: 5, matrix: {{size: [55, 6]}}}}
  - {{id: b-seed=7, prompt: a dot}}
"""
    jobs = read(tmp_path, rows)
    tries = [job for job in jobs if job.attempt_at]
    assert {job.attempt_at.series for job in tries if job.attempt_at} == {
        "a-*-55",
        "a-*-6",
        "b-seed=7",
    }
    convert_manifest(tmp_path / "m.yaml", tmp_path / "out.jsonl", default_config())
    found = read_manifest(tmp_path / "out.jsonl", default_config())
    assert {job.id: job.attempt_at for job in found} == {job.id: job.attempt_at for job in jobs}


def test_two_rows_are_never_one_series(tmp_path: Path) -> None:
    rows = "".join(
        f"  - {{id: a, prompt: a {colour} dot, seed: {seed}, accept: {CHECK}}}\n"
        for colour, seed in (("red", 1), ("blue", 10))
    )
    with pytest.raises(ManifestError) as raised:
        read(tmp_path, f"jobs:\n{rows}")
    (problem,) = raised.value.problems
    assert (problem.field, problem.message) == (
        "id",
        "expected another id than that of line 3, found 'a'; each row with accept needs one, "
        "whatever its seeds are",
    )


def test_a_seed_in_the_id_names_no_series(tmp_path: Path) -> None:
    jobs = read(
        tmp_path, f'jobs: [{{id: "x{{seed}}y", prompt: a dot, seed: 5, accept: {CHECK}}}]\n'
    )
    assert {job.attempt_at.series for job in jobs if job.attempt_at} == {"x*y"}
    assert len(jobs) == 6


def test_defaults_are_for_jobs_that_make_one_image(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        f"""defaults: {{accept: {CHECK}, tries: 2}}
jobs:
  - {{id: a, prompt: a dot}}
  - {{id: b, task: interleave, prompt: a story}}
  - {{id: c, task: ask, prompt: what is it, image: "@a-seed=42"}}
""",
    )
    assert [job.id for job in jobs] == [
        "a-seed=42", "a-seed=42-check", "a-seed=43", "a-seed=43-check", "b", "c",
    ]  # fmt: skip
    assert [job.attempt_at is None for job in jobs] == [False, True, False, True, True, True]


def test_numbers_in_the_defaults_are_for_the_rows_with_accept_alone(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        f"""defaults: {{keep: 1, tries: 2}}
jobs:
  - {{id: a, prompt: a dot}}
  - {{id: b, prompt: a dot, accept: {CHECK}}}
""",
    )
    assert [job.id for job in jobs if job.verdict is None] == ["a", "b-seed=42", "b-seed=43"]


def test_a_try_may_start_from_another_jobs_image(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        f"""jobs:
  - {{id: b, prompt: make it red, image: "@a", accept: {CHECK}}}
  - {{id: a, prompt: a dot}}
""",
    )
    assert [(job.id, job.level) for job in jobs][:3] == [
        ("a", 0),
        ("b-seed=42", 1),
        ("b-seed=42-check", 2),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (f"{{prompt: a, accept: {CHECK}}}", "id: expected an id for a job with accept, found none"),
        (
            "{id: a, prompt: a, accept: {ask: q, choices: [yes, no], is: maybe}}",
            "accept: expected one of the choices (yes, no) for is, found 'maybe'",
        ),
        (
            '{id: a, prompt: a, accept: {ask: "{c}?", choices: [yes, no], is: yes}}',
            "accept: expected one of {prompt}, found {c}; a plain brace is doubled",
        ),
        (
            f"{{id: a, prompt: a, accept: {CHECK}, n: 3}}",
            "n: expected none beside accept; tries says how many seeds there are",
        ),
        (
            f"{{id: a, prompt: a, accept: {CHECK}, keep: 4, tries: 3}}",
            "keep: expected at most as many as tries, 3, found 4",
        ),
        (
            '{id: a, prompt: a, accept: "checks:sharp"}',
            f"accept: {NO_FUNCTION}, found 'checks:sharp'",
        ),
        (
            '{id: a, prompt: a, accept: ["checks:sharp"]}',
            f"accept[0]: {NO_FUNCTION}, found 'checks:sharp'",
        ),
        (
            "{id: a, prompt: a, accept: {ask: q, choices: [yes, no], is: yes, function: 'm:f'}}",
            f"accept.function: {NO_FUNCTION}, found 'function'",
        ),
        (
            "{id: a, prompt: a, keep: 2}",
            "keep: expected accept beside it, which says what is kept, or a function that the "
            "configuration file names (accept), found neither",
        ),
        (
            "{id: a, prompt: a, timesteps: [0.5, 1]}",
            "timesteps[1]: expected less than 1.0, found 1",
        ),
        (
            "{id: a, prompt: a, timesteps: []}",
            "timesteps: expected a list of at least 1, found a list of 0",
        ),
        (
            f"{{id: a, task: interleave, prompt: a, accept: {CHECK}}}",
            "accept: expected a field of interleave jobs, found one of other tasks",
        ),
    ],
)
def test_mistakes_are_named(row: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as raised:
        read(tmp_path, f"jobs:\n  - {row}\n")
    assert [f"{one.field}: {one.message}" for one in raised.value.problems] == [expected]


def test_a_mistake_in_the_defaults_is_reported_once(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(
        """version: 1
defaults:
  accept: [{ask: q, choices: [yes, no], is: maybe}, {ask: q, choices: [a, b], is: a}]
jobs:
  - {id: a, prompt: a}
  - {id: b, prompt: b, keep: 2}
"""
    )
    with pytest.raises(ManifestError) as raised:
        list(read_manifest(path, default_config()))
    (problem,) = raised.value.problems
    assert (problem.row, problem.field) == ("line 3", "defaults.accept")
    assert problem.message == "expected one of the choices (yes, no) for is, found 'maybe'"


def test_such_rows_are_the_same_in_every_format(tmp_path: Path) -> None:
    text = f"""
defaults: {{tags: [one]}}
jobs:
  - id: "{{c}}-{{d}}"
    prompt: A {{c}} dot {{{{really}}}}
    matrix: {{c: [red, blue], d: [1, 2]}}
    accept:
      - {{ask: "{{{{Is}}}} it {{c}}, as in: {{prompt}}", choices: [yes, no], is: yes}}
      - {{ask: "Is it {{d}}?", choices: [ja, nein], is: ja}}
    keep: 2
    tries: 3
  - {{id: "x{{seed}}y", prompt: a dot, seed: 5, accept: {CHECK}, metadata: {{a: 1}}}}
  - {{id: seeds, prompt: a dot, seeds: [5, 6, 7]}}
  - {{id: sibling, prompt: make it red, image: "@seeds", seed: 5, accept: {CHECK}}}
  - {{id: fixed, prompt: make it red, images: ["@seeds-seed=6", "@red-1-seed=42"], accept: {CHECK}}}
  - {{id: more, prompt: a line, tries: 2, accept: {CHECK}, matrix: {{zoo: [1], size: [2]}}}}
"""
    text = text.replace("a line,", '"a line {zoo} {size}",')
    jobs = read(tmp_path, text)
    assert len([job for job in jobs if job.attempt_at]) == 4 * 3 + 3 + 3 + 3 + 2
    expected = {job.id: plain(job) for job in jobs}
    before = tmp_path / "m.yaml"
    for name in ("a.jsonl", "b.parquet", "c.yaml"):
        after = tmp_path / name
        assert convert_manifest(before, after, default_config()) == 4 + 1 + 3 + 1 + 1 + 1
        found = {job.id: plain(job) for job in read_manifest(after, default_config())}
        assert found == expected
        before = after
    assert read_rows_of(tmp_path / "a.jsonl")[0]["accept"][0]["ask"] == (
        "{{Is}} it red, as in: A red dot {{really}}"
    )


def plain(job: Job) -> Job:
    """Returns a job without what conversion leaves out: its place, and the matrix it came from."""
    return replace(job, source=Source(file="", row=""), matrix={})


def read_rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
