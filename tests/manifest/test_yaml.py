"""YAML manifests: what words mean, where errors are, and how defaults apply to jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.config import RunConfig
from sensebatch.errors import ManifestError
from sensebatch.jobs import Job
from sensebatch.manifest.read import manifest_name, read_manifest
from sensebatch.yaml_values import YamlTextError, dump_yaml, load_yaml
from sensebatch.yaml_values import read_yaml as read_yaml_file

ALIASES = "x0: &x0 1\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
"""Each line ten times the one before, some billions of values in all."""

Write = Callable[[str], Path]
HEAD = "version: 1\n"


@pytest.fixture
def read_yaml(write_yaml: Write, config: RunConfig) -> Callable[[str], list[Job]]:
    def read(text: str) -> list[Job]:
        return list(read_manifest(write_yaml(text), config))

    return read


@pytest.fixture
def yaml_mistakes(read_yaml: Callable[[str], list[Job]]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        with pytest.raises(ManifestError) as caught:
            read_yaml(text)
        return [f"{p.row}: {p.field}: {p.message}" for p in caught.value.problems]

    return read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16:9", "16:9"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1e6", 1e6),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("2026-01-01", "2026-01-01"),
        ("~", None),
        ("[]", []),
        ("", None),
        ("'1'", "1"),
        ("=", "="),
        (".inf", float("inf")),
    ],
)
def test_plain_words_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    loaded = load_yaml(f"a: {text}").value["a"]
    assert loaded == value
    assert type(loaded) is type(value)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        [
            "1e6",
            "16:9",
            "yes",
            "0o7",
            "null",
            "",
            "~",
            "<<",
            "=",
            "- a",
            "#",
            "1_0",
            "0\x85",
            "a\u2028\n b",
        ]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_like)
def test_what_is_written_is_read_again(value: object) -> None:
    text = dump_yaml({"a": value})
    assert load_yaml(text).value == {"a": value}
    # So it is to whoever reads it by the older rules.
    assert yaml.safe_load(text) == {"a": value}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: [1,", 3, "expected a value or a closing bracket, found the end"),
        ("a: [1\nb: 2", 2, r"expected ',' or '\]' for the '\[' on line 1, found : 2"),
        ("a: 1\nb: 2\na: 3", 3, "expected every key once, found 'a' again"),
        ("x:\n  - {b: 1, b: 2}", 2, "expected every key once, found 'b' again"),
        ("a: 1\n2: x", 2, "expected text as a key, found '2'"),
        ("a: &a\n  - *a", 1, "contains itself"),
        ("a: !!python/name:os.system x", 1, "found the tag '!!python/name:os.system'"),
        ("a: 1\nb: !!timestamp foo", 2, "found the tag '!!timestamp'"),
        ("a: 1\nb: !!bool maybe", 2, "expected a value of type bool, found 'maybe'"),
        ("a: 1\nb: !!int x", 2, "expected a value of type int, found 'x'"),
        ("a: !!set {b, c}", 1, "found the tag '!!set'"),
        ("a: 0x" + "f" * 5000, 1, "at most 100 digits, found a number of 5,002 characters"),
        ("a: -" + "9" * 5000, 1, "at most 100 digits, found a number of 5,001 characters"),
        ("- " * 100_000 + "a", 1, "expected values nested at most 100 deep, found more"),
        ("\n".join(" " * i + "a:" for i in range(5000)), 101, "nested at most 100 deep"),
        ("a: 1\n---\nb: 2", 2, "expected one document, found '---' and another one"),
        ("a:\n\tb: 1", 2, "expected spaces, which indent YAML, found a tab"),
        ("a: @b", 1, "expected quotes around text that begins so, found @b"),
        ("a: [b]\nc: *d", 2, r"expected quotes around text that begins so, found \*d"),
        ("a: b: c", 1, "expected one 'name: value' on a line, or quotes .*, found : c"),
        ("a: 'b\nc: d", 1, "expected a closing quote, found none"),
        ('a: "C:\\photos"', 1, r"two backslashes for one in double quotes, found \\photos"),
        ("a:\n  - b: 1\n   c: 2", 3, "or '- item', as far in as on line 2, found c: 2"),
        ("a: |\n  b\nc", 3, "expected 'name: value', found c"),
        (ALIASES, 9, "expected at most 20,000,000 values, found 111,111,111 with aliases"),
        ("a: é\nb: x\x07", 2, "found character #x0007: control characters are not allowed"),
        ("a: 1\n[b, c]: 2", 2, "expected text as a key, found a sequence"),
        ("a: " + "[" * 2000 + "]" * 2000, 1, "expected values nested at most 100 deep"),
    ],
)
def test_text_that_is_not_a_manifest_is_refused_with_its_line(
    text: str, line: int, message: str
) -> None:
    with pytest.raises(YamlTextError, match=message) as caught:
        load_yaml(text)
    assert caught.value.line == line


def test_bytes_that_are_no_utf_8_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"version: 1\njobs:\n  - prompt: caf\xe9\n")
    with pytest.raises(YamlTextError, match="expected UTF-8 text, found byte 0xe9") as caught:
        read_yaml_file(path)
    assert caught.value.line == 3


def test_a_mistake_has_the_line_of_its_field(
    yaml_mistakes: Callable[[str], list[str]],
) -> None:
    text = HEAD + (
        "nmae: x\n"
        "defaults:\n"
        "  num_steps: 0\n"
        "  edit:\n"
        "    max_images: 2\n"
        "    seeed: 2\n"
        "jobs:\n"
        "  - prompt: fine\n"
        "    cfg_interval:\n"
        "      - 0\n"
        "      - 2\n"
        "  - 3\n"
        "  - think: yes\n"
    )
    assert yaml_mistakes(text) == [
        "line 2: nmae: expected a known field, found 'nmae'; did you mean 'name'?",
        "line 4: defaults.num_steps: expected at least 1, found 0",
        "line 6: defaults.edit.max_images: expected a field of edit jobs, found 'max_images'",
        "line 7: defaults.edit.seeed: expected a known field, found 'seeed'; did you mean 'seed'?",
        "line 12: cfg_interval[1]: expected at most 1.0, found 2",
        "line 13: : expected a mapping, found 3",
        "line 14: think: expected true or false, found 'yes'",
        "line 14: prompt: expected text, found nothing",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- prompt: x", "line 1: : expected a mapping with version and jobs, found a list of 1"),
        ("jobs: [{prompt: x}]", "line 1: version: expected 1, found nothing"),
        ("version: 2\njobs: [{prompt: x}]", "line 1: version: expected 1, found 2"),
        ("version: true\njobs: [{prompt: x}]", "line 1: version: expected 1, found true"),
        (HEAD, "line 1: jobs: expected a list of jobs, found nothing"),
        (HEAD + "jobs: {}", "line 2: jobs: expected a list of jobs, found a mapping"),
        (HEAD + "jobs: []", "manifest: : expected at least one job, found none"),
        (HEAD + "name: a/b\njobs: [{prompt: x}]", "line 2: name: expected a name without '/'"),
        (
            HEAD + "defaults: 3\njobs: [{prompt: x}]",
            "line 2: defaults: expected a mapping, found 3",
        ),
    ],
)
def test_a_wrong_header_is_one_mistake(
    yaml_mistakes: Callable[[str], list[str]], text: str, message: str
) -> None:
    (found,) = yaml_mistakes(text)
    assert found.startswith(message)


def test_a_job_lies_over_its_tasks_defaults_over_the_common_ones(
    read_yaml: Callable[[str], list[Job]],
) -> None:
    text = HEAD + (
        "defaults:\n"
        "  num_steps: 5\n"
        "  max_images: 3\n"
        "  resolution: 16:9\n"
        "  metadata: {set: a, split: train}\n"
        "  interleave: {num_steps: 6, width: 64, height: 96}\n"
        "jobs:\n"
        "  - prompt: one\n"
        "  - {prompt: two, task: interleave}\n"
        "  - {prompt: three, num_steps: 7, width: 128, height: 64, metadata: {set: b}}\n"
    )
    one, two, three = read_yaml(text)
    assert [job.sampling.num_steps for job in (one, two, three)] == [5, 6, 7]
    assert [str(job.resolution) for job in (one, two, three)] == ["320x192", "64x96", "128x64"]
    assert two.sampling.max_images == 3
    assert three.metadata == {"set": "b", "split": "train"}


@pytest.mark.parametrize(
    ("defaults", "job", "seeds"),
    [
        ("{seeds: [1, 2]}", "", [1, 2]),
        ("{seeds: [1, 2]}", "seed: 5", [5]),
        ("{seeds: [1, 2]}", "n: 2", [42, 43]),
        ("{seed: 9}", "n: 2", [9, 10]),
        ("{n: 2}", "seed: 5", [5, 6]),
        ("{n: 2}", "seeds: [7]", [7]),
        ("{seed: 9, n: 2}", "matrix: {seed: [3]}", [3]),
    ],
)
def test_a_jobs_seeds_replace_those_of_the_defaults(
    read_yaml: Callable[[str], list[Job]], defaults: str, job: str, seeds: list[int]
) -> None:
    jobs = read_yaml(HEAD + f"defaults: {defaults}\njobs:\n  - prompt: x\n    {job}\n")
    assert [job.seed for job in jobs] == seeds


def test_a_derived_id_does_not_depend_on_the_defaults(
    read_yaml: Callable[[str], list[Job]],
) -> None:
    (plain,) = read_yaml(HEAD + "jobs: [{prompt: x}]")
    (changed,) = read_yaml(HEAD + "defaults: {num_steps: 3}\njobs: [{prompt: x}]")
    assert plain.id == changed.id


def test_anchors_and_merges_are_worked_out(read_yaml: Callable[[str], list[Job]]) -> None:
    text = HEAD + "jobs:\n  - &a {prompt: x, num_steps: 3}\n  - {<<: *a, prompt: y}\n"
    first, second = read_yaml(text)
    assert (first.sampling, second.prompt) == (second.sampling, "y")


def test_jobs_know_their_lines(read_yaml: Callable[[str], list[Job]]) -> None:
    jobs = read_yaml(HEAD + "jobs:\n  - prompt: x\n\n  - prompt: y\n    n: 2\n")
    assert [job.source.row for job in jobs] == ["line 3", "line 5", "line 5"]


def test_the_name_of_the_manifest_names_the_run(write_yaml: Write) -> None:
    assert manifest_name([write_yaml(HEAD + "name: night\njobs: []")]) == "night"
    assert manifest_name([write_yaml(HEAD + "jobs: []")]) == "jobs"
