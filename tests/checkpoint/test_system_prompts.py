"""System prompts: the order in which they are looked for, and that nothing is executed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sensebatch.checkpoint.files import Checkpoint, open_checkpoint, read_folder
from sensebatch.checkpoint.system_prompts import BUILT_IN, resolve_system_prompts
from sensebatch.errors import CheckpointError
from sensebatch.tasks import Task
from tests.checkpoint.folders import write_folder

MODULE = """
import not_installed_anywhere
raise SystemExit("executed")
SYSTEM_MESSAGE_FOR_GEN = '''
from {0} ''' + "gen"
DEFAULT_SYSTEM_MESSAGE: str = " from {0} default ".strip()
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return read_folder(write_folder(tmp_path / "checkpoint"))


def install_package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes an importable sensenova_u1 that must not be imported."""
    package = folder / "site" / "sensenova_u1"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('executed')")
    (package / "utils" / "constants.py").write_text(MODULE.format("package"))
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])


def test_built_in_prompts_are_used_if_nothing_else_is_found(checkpoint: Checkpoint) -> None:
    prompts = resolve_system_prompts(checkpoint)
    assert prompts.warn_built_in
    assert {prompt.source for prompt in prompts.by_kind.values()} == {BUILT_IN}
    assert prompts.of_task(Task.T2I).text.startswith("You draw and edit pictures.")
    assert prompts.of_task(Task.EDIT) == prompts.of_task(Task.T2I)
    assert prompts.of_task(Task.INTERLEAVE).text.startswith("You answer with words and pictures.")


def test_package_is_read_and_not_executed(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_package(monkeypatch, tmp_path)
    prompts = resolve_system_prompts(checkpoint)
    assert prompts.of_task(Task.EDIT).text == "\nfrom package gen"
    assert prompts.of_task(Task.INTERLEAVE).text == "from package default"
    assert prompts.of_task(Task.INTERLEAVE).source.endswith("constants.py: DEFAULT_SYSTEM_MESSAGE")
    assert not prompts.warn_built_in


def test_a_named_file_wins_over_the_checkpoint_and_that_over_the_package(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_package(monkeypatch, tmp_path)
    (checkpoint.path / "conversation.py").write_text(MODULE.format("folder"))
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"interleave": "named"}))
    prompts = resolve_system_prompts(checkpoint, file)
    assert prompts.of_task(Task.T2I).text == "\nfrom folder gen"
    assert prompts.of_task(Task.INTERLEAVE).text == "named"
    assert prompts.of_task(Task.INTERLEAVE).source == str(file)


def test_broken_or_computed_python_is_passed_over(checkpoint: Checkpoint) -> None:
    (checkpoint.path / "a.py").write_text("SYSTEM_MESSAGE_FOR_GEN = (")
    (checkpoint.path / "b.py").write_text("SYSTEM_MESSAGE_FOR_GEN = open('x').read()")
    (checkpoint.path / "c.py").write_text("SYSTEM_MESSAGE_FOR_GEN = ''")
    prompts = resolve_system_prompts(checkpoint)
    assert prompts.of_task(Task.T2I).text == ""
    assert "c.py" in prompts.of_task(Task.T2I).source
    assert prompts.warn_built_in


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "expected a JSON object with generation and interleave"),
        ('{"generatoin": "x"}', "generatoin: expected only generation and interleave"),
        ('{"generation": 1}', "generation: expected a string, found 1"),
    ],
)
def test_unusable_named_file_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, content: str, complaint: str
) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=complaint) as raised:
        resolve_system_prompts(checkpoint, file)
    assert str(file) in str(raised.value)


def test_embedded_checkpoint_uses_built_in_prompts_without_a_warning() -> None:
    assert not resolve_system_prompts(open_checkpoint("tiny")).warn_built_in
