"""Functions of the user's that judge images: how they are found, and what they may say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensebatch.errors import ConfigError, JobError
from sensebatch.functions import AcceptFunction, load_functions, score
from sensebatch.settings import dump_settings, resolve_settings


@pytest.fixture(autouse=True)
def own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves neither modules nor places of modules to the next test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(name: str, folder: Path) -> Any:
    return load_functions([AcceptFunction(function=name, folder=str(folder))])[name]


def test_a_module_beside_the_configuration_comes_before_others(tmp_path: Path) -> None:
    beside = tmp_path / "conf"
    (beside / "judges_of_test").mkdir(parents=True)
    (beside / "judges_of_test/__init__.py").write_text("def own(image, job): return 0.25")
    (tmp_path / "judges_of_test.py").write_text("def own(image, job): return 0.75")
    assert load("judges_of_test:own", beside)(None, {}) == 0.25


def test_modules_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    functions = []
    for number, name in enumerate(("first", "second", "third")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "json.py").write_text(f"def {name}(image, job): return {number / 2}")
        functions.append(AcceptFunction(function=f"json:{name}", folder=str(folder)))
    loaded = load_functions([*functions, functions[0]])
    assert [judge(None, {}) for judge in loaded.values()] == [0.0, 0.5, 1.0]
    # What others import by that name stays what it is.
    assert sys.modules["json"] is json
    with pytest.raises(ConfigError, match=r"expected a function first in .*second.json\.py, found"):
        load("json:first", tmp_path / "second")
    (tmp_path / "first/json.py").write_text("1 / 0")
    sys.modules.pop(loaded["json:first"].__module__)
    with pytest.raises(ConfigError, match="for json:first, found ZeroDivisionError"):
        load("json:first", tmp_path / "first")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "found none named 'judges_of_test' in .* or on Python's path"),
        ("", r"expected a function own in .*judges_of_test.py, found none"),
        ("own = 7", "expected a function own in .*judges_of_test.py, found 7"),
        (
            "async def own(image, job): return 1",
            "in .*judges_of_test.py that returns its score when it is called, found an async one",
        ),
        ("def own(image, job): yield 1", "found a generator"),
        ("async def own(image, job): yield 1", "found an async generator"),
        (
            "class Own:\n async def __call__(self, image, job): return 1\nown = Own()",
            "found an async one",
        ),
        (
            "import functools\nasync def two(a, image, job): ...\nown = functools.partial(two, 1)",
            "found an async one",
        ),
        (
            "def own(image): return 1",
            r"in .*judges_of_test.py that takes an image and a job, found own\(image\)",
        ),
        ("def own(image, job, more): return 1", r"found own\(image, job, more\)"),
        ("import missing_of_test", "found ModuleNotFoundError: No module named 'missing_of_test'"),
        # Its name begins like that of the module itself.
        ("import judges", "found ModuleNotFoundError: No module named 'judges'"),
        ("own = 1 / 0", "for judges_of_test:own, found ZeroDivisionError"),
        ("raise SystemExit(3)", "found SystemExit: 3"),
        ("raise ValueError('a' * 10**6)", r"found ValueError: a{1000} \.\.\. .* \.\.\. a{1000}$"),
    ],
)
def test_what_cannot_be_called_is_an_error_at_the_start(
    content: str | None, expected: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "judges_of_test.py").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load("judges_of_test:own", tmp_path)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (True, 1.0),
        (False, 0.0),
        (1, 1.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array(0.75), 0.75),
    ],
)
def test_a_score_is_a_number_or_a_truth(said: object, expected: float) -> None:
    assert score("m:f", lambda _image, _job: said, None, {}) == expected


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (None, "None"),
        (1.5, "1.5"),
        (-1, "-1"),
        (float("nan"), "NaN"),
        ("yes", "'yes'"),
        ([0.5], "list"),
        (np.array([0.5]), "ndarray"),
    ],
)
def test_anything_else_is_no_score(said: object, found: str) -> None:
    with pytest.raises(JobError) as raised:
        score("m:f", lambda _image, _job: said, None, {})
    assert str(raised.value) == f"m:f: expected True, False or a number from 0 to 1, found {found}"


@pytest.mark.parametrize(
    "content",
    [
        "def own(image, *rest, more=1): return 1",
        "class Own:\n def __call__(self, image, job): return 1\nown = Own()",
        "own = max",
        "from functools import partial\nown = partial(lambda a, image, job: a, 1)",
        "import functools\n@functools.wraps(lambda image: 1)\ndef own(image, job): return 1",
    ],
)
def test_whatever_takes_an_image_and_a_job_can_judge(content: str, tmp_path: Path) -> None:
    (tmp_path / "judges_of_test.py").write_text(content)
    assert callable(load("judges_of_test:own", tmp_path))


def test_another_file_is_another_function(tmp_path: Path) -> None:
    function = AcceptFunction(function="judges_of_test:own", folder=str(tmp_path))
    assert function.source_sha256 == ""
    (tmp_path / "judges_of_test.py").write_text("raise SystemExit")
    first = function.source_sha256
    (tmp_path / "judges_of_test.py").write_text("raise SystemExit  # at once")
    assert len({"", first, function.source_sha256}) == 3


def test_a_configuration_names_one_function_or_several(tmp_path: Path) -> None:
    file = tmp_path / "conf.yaml"
    file.write_text("accept: judges:own")
    config = resolve_settings(config_file=file)
    assert config.accept == (AcceptFunction(function="judges:own", folder=str(tmp_path)),)
    (tmp_path / "mine").mkdir()
    file.write_text("accept: [a.b:c, {function: d:e, at_least: 0.7, folder: mine}]")
    config = resolve_settings(config_file=file)
    assert config.accept == (
        AcceptFunction(function="a.b:c", folder=str(tmp_path)),
        AcceptFunction(function="d:e", at_least=0.7, folder=str(tmp_path / "mine")),
    )
    assert resolve_settings(flags={"accept": dump_settings(config)["accept"]}) == config
    assert resolve_settings().accept == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("judges", "accept: expected module:function, found 'judges'"),
        ("judges.py:own()", "accept: expected module:function, found 'judges.py:own()'"),
        ("[a:b, a:b]", "accept: expected every function once, found a:b again"),
        ("{function: a:b, at_least: 2}", "accept.at_least: expected a number of at most 1, found"),
        ("[a:b, {function: c:d, at_least: 2}]", "accept[1].at_least: expected a number of at most"),
        ("[a:b, {function: c:d, at_least: x}]", "accept[1].at_least: expected a number, found 'x'"),
        ("[a:b, c]", "accept[1]: expected module:function, found 'c'"),
        ("[{function: 3}]", "accept[0].function: expected module:function, found 3"),
        ("[{functions: a:b}]", "accept[0].functions: unknown setting; did you mean function?"),
        ("[{function: a:b, at: 1}]", "accept[0].at: unknown setting"),
        ("{at_least: 1}", "accept: expected function beside the others, found none"),
        (
            "[a:b, {function: c:d, folder: missing}]",
            "accept[1].folder: expected the folder of the module of c:d, found none at /",
        ),
        ("[a:b, null]", "accept[1]: expected module:function, or a mapping of function, at_least"),
        (
            "{ask: Is it?, choices: [yes, no], is: yes}",
            "accept: expected module:function, or a mapping of function, at_least and folder, "
            "found a question; a manifest asks questions, under accept",
        ),
        ("7", "accept: expected module:function, or a mapping of function, at_least and folder,"),
    ],
)
def test_mistakes_in_a_configuration_are_named(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "conf.yaml"
    file.write_text(f"accept: {text}")
    with pytest.raises(ConfigError) as raised:
        resolve_settings(config_file=file)
    assert str(raised.value).startswith(f"{file}: line 1: {expected}")
    assert "\n" not in str(raised.value)


def test_a_mistake_in_a_list_is_named_with_its_own_line(tmp_path: Path) -> None:
    file = tmp_path / "conf.yaml"
    file.write_text("accept:\n- a:b\n- function: c\n  at_least: 0\n")
    with pytest.raises(ConfigError) as raised:
        resolve_settings(config_file=file)
    assert str(raised.value).splitlines() == [
        f"{file}: line 3: accept[1].function: expected module:function, found 'c'",
        f"{file}: line 4: accept[1].at_least: expected a number greater than 0, found 0",
    ]


def test_the_file_that_counts_is_the_one_that_is_imported(tmp_path: Path) -> None:
    (tmp_path / "both_of_test").mkdir()
    package = tmp_path / "both_of_test/__init__.py"
    package.write_text("def own(image, job): return 0.25")
    (tmp_path / "both_of_test.py").write_text("def own(image, job): return 0.75")
    function = AcceptFunction(function="both_of_test:own", folder=str(tmp_path))
    assert load("both_of_test:own", tmp_path)(None, {}) == 0.25
    first = function.source_sha256
    package.write_text("def own(image, job): return 1")
    assert function.source_sha256 != first
