"""Images of a manifest that other jobs of it make."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sensebatch.config import default_config
from sensebatch.errors import ManifestError
from sensebatch.jobs import Job, Source
from sensebatch.manifest.chains import cycle
from sensebatch.manifest.convert import convert_manifest
from sensebatch.manifest.read import read_manifest, read_manifests, read_rows


def read(tmp_path: Path, jobs: str, name: str = "m.yaml") -> dict[str, Job]:
    """Returns the jobs of a manifest by id, in the order they were read."""
    path = tmp_path / name
    path.write_text(f"version: 1\njobs:\n{jobs}", encoding="utf-8")
    return {job.id: job for job in read_manifest(path, default_config())}


def outputs(job: Job) -> list[tuple[str, int] | None]:
    return [image.output for image in job.images]


def test_an_image_of_another_job_has_its_size_and_gives_a_level(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        """
  - {id: a, prompt: a dot, width: 320, height: 192}
  - {id: b, prompt: make it red, image: "@a"}
  - {id: c, prompt: join them, images: ["@b", "@a"]}
""",
    )
    assert [job.level for job in jobs.values()] == [0, 1, 2]
    assert outputs(jobs["c"]) == [("b", 0), ("a", 0)]
    assert (jobs["b"].images[0].width, jobs["b"].images[0].height) == (320, 192)
    assert jobs["b"].resolution == jobs["a"].resolution
    assert jobs["b"].task == "edit"


def test_jobs_may_name_later_ones_and_are_read_after_them(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        """
  - {id: c, prompt: again, image: "@b"}
  - {id: b, prompt: make it red, image: "@a"}
  - {id: a, prompt: a dot}
  - {id: d, prompt: a line}
""",
    )
    assert list(jobs) == ["a", "d", "b", "c"]
    assert jobs["c"].level == 2


def test_an_image_of_several_is_named_by_its_index(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        """
  - {id: story, task: interleave, prompt: a story, max_images: 3}
  - {id: x, prompt: make it red, image: "@story/2"}
""",
    )
    assert outputs(jobs["x"]) == [("story", 2)]
    assert jobs["x"].images[0].place == "@story/2"


def test_matrix_and_seeds_pick_the_sibling(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        """
  - id: "{ship}-{light}"
    prompt: A {ship} at {light}
    seeds: [1, 2]
    matrix: {ship: [tug, steam tug], light: [dawn, noon]}
  - id: "{ship}-{light}-storm"
    prompt: Make it a storm
    image: "@{ship}-{light}"
    seeds: [1, 2]
    matrix: {ship: [tug, steam tug], light: [dawn, noon]}
  - id: "{ship}-at-dawn"
    prompt: "{how} it"
    image: "@{ship}-dawn-seed=1"
    matrix: {ship: [tug], how: [Brighten, Darken]}
""",
    )
    assert len(jobs) == 18
    assert outputs(jobs["steam-tug-noon-storm-seed=2"]) == [("steam-tug-noon-seed=2", 0)]
    assert outputs(jobs["tug-at-dawn-how=Darken"]) == [("tug-dawn-seed=1", 0)]


def test_children_with_seeds_of_their_own_share_a_parent(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        """
  - {id: a, prompt: a dot}
  - {id: b, prompt: make it red, image: "@a", n: 3}
  - {id: c, prompt: again, image: "@b", n: 3}
""",
    )
    assert {str(outputs(job)) for job in jobs.values() if job.level == 1} == {"[('a', 0)]"}
    assert outputs(jobs["c-seed=43"]) == [("b-seed=43", 0)]


def test_a_file_whose_name_begins_with_the_mark_is_still_reached(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "@a.png")
    jobs = read(tmp_path, '  - {id: x, prompt: make it red, image: "./@a.png"}\n')
    assert outputs(jobs["x"]) == [None]


def test_derived_ids_depend_on_the_parent(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        """
  - {id: a, prompt: a dot}
  - {id: b, prompt: a line}
  - {prompt: make it red, image: "@a"}
  - {prompt: make it red, image: "@b"}
""",
    )
    assert len(jobs) == 4


def mistakes(tmp_path: Path, jobs: str) -> list[str]:
    with pytest.raises(ManifestError) as raised:
        read(tmp_path, jobs)
    return [
        f"{problem.row}: {problem.field}: {problem.message}" for problem in raised.value.problems
    ]


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        (
            """  - {id: harbour, prompt: a dot}
  - id: x
    prompt: make it red
    image: "@harbor"
""",
            "line 6: image: expected @ and the id of another job, found '@harbor'; did you mean "
            "'@harbour'?",
        ),
        (
            """  - {id: a, prompt: a dot}
  - {id: x, prompt: make it red, image: "@aa"}
""",
            "line 4: image: expected @ and the id of another job, found '@aa'; did you mean '@a'?",
        ),
        (
            """  - {id: Tale, task: interleave, prompt: tell, max_images: 2}
  - {id: tales-of-men, prompt: a dot}
  - {id: x, prompt: make it red, image: "@tale/1"}
""",
            "line 5: image: expected @ and the id of another job, found '@tale/1'; did you mean "
            "'@Tale/1'?",
        ),
        (
            """  - {id: ships, prompt: a dot}
  - {id: ship, prompt: a dot, seeds: [5, 6]}
  - {id: x, prompt: make it red, image: "@ship"}
""",
            "line 5: image: expected @ and the id of another job, found '@ship'; did you mean "
            "'@ship-seed=5'?",
        ),
        (
            f"""  - {{id: {"a-long-name-" * 8}end, prompt: a dot}}
  - {{id: x, prompt: make it red, image: "@a-long-name-{"a-long-name-" * 7}ending"}}
""",
            "line 4: image: expected @ and the id of another job, found "
            f"'@{('a-long-name-' * 8)[:59]}...'; did you mean '@{'a-long-name-' * 8}end'?",
        ),
        (
            """  - {id: a, prompt: a dot}
  - {id: x, prompt: make it red, image: "@photo.png"}
""",
            "line 4: image: expected @ and the id of another job, found '@photo.png'; a file of "
            "this name is written ./@photo.png",
        ),
        (
            """  - {id: a, prompt: a dot}
  - {id: x, prompt: join, images: ["@a", "@"]}
""",
            "line 4: images[1]: expected @ID, or @ID/N for image N of several, counted from 0, "
            "found '@'",
        ),
        (
            """  - {id: a, prompt: a dot}
  - {id: x, prompt: make it red, image: "@a/1"}
""",
            "line 4: image: expected an image of job a, which makes one, found '@a/1', counted "
            "from 0",
        ),
        (
            """  - {id: q, task: ask, prompt: what is it, image: "@a"}
  - {id: a, prompt: a dot}
  - {id: x, prompt: make it red, image: "@q"}
""",
            "line 5: image: expected an image of job q, which makes none, found '@q'",
        ),
        (
            """  - {id: x, prompt: make it red, image: "@x"}
""",
            "line 3: image: expected no job that starts from itself, found x -> x",
        ),
        (
            """  - {id: "{s}", prompt: a dot, matrix: {s: [a, b]}}
  - {id: "x{s}", prompt: make it red, image: "@{t}", matrix: {s: [a, b]}}
""",
            "line 4: image: expected one of {s}, found {t}; a plain brace is doubled",
        ),
    ],
)
def test_what_is_no_job_is_named_with_file_and_line(
    jobs: str, expected: str, tmp_path: Path
) -> None:
    assert mistakes(tmp_path, jobs) == [expected]


def test_a_cycle_is_reported_for_each_of_its_jobs_and_not_for_those_that_lead_to_it(
    tmp_path: Path,
) -> None:
    found = mistakes(
        tmp_path,
        """  - {id: a, prompt: one, image: "@c"}
  - {id: b, prompt: two, image: "@a"}
  - {id: c, prompt: three, image: "@b"}
  - {id: d, prompt: four, image: "@a"}
""",
    )
    assert found == [
        "line 3: image: expected no job that starts from itself, found a -> c -> b -> a",
        "line 4: image: expected no job that starts from itself, found b -> a -> c -> b",
        "line 5: image: expected no job that starts from itself, found c -> b -> a -> c",
        "line 6: image: expected no job that starts from itself, found a -> c -> b -> a",
    ]


def test_a_parent_with_a_mistake_is_reported_alone(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        """  - {id: a, prompt: a dot, width: 33, height: 64}
  - {id: b, prompt: make it red, image: "@a"}
""",
    )
    assert found == ["line 3: width: expected a positive multiple of 32, found 33"]


def test_a_job_of_another_manifest_may_be_named(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.jsonl"
    one.write_text('version: 1\njobs: [{id: x, prompt: red, image: "@a"}]\n', encoding="utf-8")
    two.write_text('{"id": "a", "prompt": "a dot"}\n', encoding="utf-8")
    jobs = {job.id: job.source for job in read_manifests([one, two], default_config())}
    assert jobs == {
        "a": Source(file=str(two), row="line 1"),
        "x": Source(file=str(one), row="line 2"),
    }
    assert list(jobs) == ["a", "x"]
    assert [job.id for job in read_manifests([one, two], default_config(), limit=1)] == ["a"]


WAITS = '{"id": "x", "prompt": "red", "image": "@a", "seed": 1}'
TRIES = WAITS.replace("}", ', "accept": {"ask": "?", "choices": ["yes", "no"], "is": "yes"}}')


@pytest.mark.parametrize(
    ("first", "second", "file", "other"),
    [
        (WAITS, '{"id": "x", "prompt": "blue"}', "one.jsonl: line 2", "two.jsonl: line 1"),
        (WAITS, WAITS, "two.jsonl: line 1", "one.jsonl: line 2"),
        # Other seeds make other ids, and one series.
        (TRIES, TRIES.replace("1", "100"), "two.jsonl: line 1", "one.jsonl: line 2"),
    ],
)
def test_mistake_about_the_id_of_a_job_that_waits_names_both_files(
    first: str, second: str, file: str, other: str, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text(f'{{"prompt": "a line"}}\n{first}\n', encoding="utf-8")
    two.write_text(f'{second}\n{{"id": "a", "prompt": "a dot"}}\n', encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        list(read_manifests([one, two], default_config()))
    (problem,) = caught.value.problems
    expected = f"{tmp_path}/{file}: id: expected another id than that of {tmp_path}/{other}"
    assert str(problem).startswith(expected)


def test_rows_in_memory_may_name_each_other() -> None:
    rows = [{"id": "x", "prompt": "red", "image": "@a"}, {"id": "a", "prompt": "a dot"}]
    jobs = list(read_rows(rows, default_config(), path=Path("rows")))
    assert [job.id for job in jobs] == ["a", "x"]


@pytest.mark.parametrize(
    ("suffix", "embed"), [("yaml", False), ("jsonl", False), ("parquet", False), ("parquet", True)]
)
def test_a_converted_manifest_has_the_same_chains(suffix: str, embed: bool, tmp_path: Path) -> None:
    before = read(
        tmp_path,
        """
  - {id: story, task: interleave, prompt: a story, max_images: 3}
  - {id: x, prompt: join, images: ["@story", "@story/2"]}
""",
    )
    path = tmp_path / f"new.{suffix}"
    convert_manifest(tmp_path / "m.yaml", path, default_config(), embed_images=embed)
    after = {job.id: job for job in read_manifest(path, default_config())}
    assert outputs(after["x"]) == outputs(before["x"]) == [("story", 0), ("story", 2)]


def test_a_cycle_is_found_from_what_leads_to_it() -> None:
    assert cycle("d", {"d": ["a"], "a": ["b"], "b": ["a"]}) == ["a", "b", "a"]
    assert cycle("d", {"d": ["a"]}) == []
