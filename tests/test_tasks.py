"""Every task has one row of facts, and everything else asks it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sensebatch import tasks
from sensebatch.cli.job_options import command_of
from sensebatch.config import SYNTHETIC_PREFIX, TINY_MODEL, default_config
from sensebatch.engine.tasks.registry import runner_of
from sensebatch.jobs import Sampling
from sensebatch.manifest.fields import DefaultsFields
from sensebatch.settings import TasksSection
from sensebatch.tasks import TASKS, Inputs, Output, SizeRule, Task
from tests.executor.fakes import make_job

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sensebatch"
MANIFEST_DOCS = (ROOT / "docs/manifest.md").read_text(encoding="utf-8")


def test_every_task_has_exactly_one_row() -> None:
    assert [spec.task for spec in tasks._SPECS] == list(Task)
    assert all(task.spec is TASKS[task] for task in Task)


@pytest.mark.parametrize("task", Task)
def test_a_row_contradicts_itself_nowhere(task: Task) -> None:
    spec = task.spec
    assert (spec.drawing is None) == (spec.output is Output.TEXT)
    assert not spec.resizes_inputs or spec.takes_images
    assert spec.text.limit in Sampling.__slots__
    assert spec.sampling.keys() <= set(Sampling.__slots__)
    if spec.drawing is not None:
        assert spec.drawing.ratio in spec.drawing.buckets
        assert spec.takes_images or not spec.drawing.guidance.by_images
        assert spec.takes_images or spec.drawing.size is SizeRule.OWN


@pytest.mark.parametrize("task", Task)
def test_every_task_has_all_that_a_task_needs(task: Task) -> None:
    assert task.spec.task is task
    assert callable(runner_of(task).run)
    assert callable(command_of(task))
    for model in (TINY_MODEL, SYNTHETIC_PREFIX + "8b"):
        defaults = default_config(model).tasks[task]
        assert (defaults.resolution is None) == (task.spec.drawing is None)
    assert task in TasksSection.model_fields
    assert task in DefaultsFields.model_fields
    row = rf"^\| `{task}` \| {task.spec.inputs} \| {task.spec.output} \| `sensebatch {task}` \|$"
    assert re.search(row, MANIFEST_DOCS, re.MULTILINE)


def test_rows_without_a_task_are_of_tasks_that_fit_them() -> None:
    assert tasks.implied_task(has_images=True).spec.inputs is not Inputs.NONE
    assert tasks.implied_task(has_images=False).spec.inputs is not Inputs.REQUIRED


def test_a_job_makes_as_much_as_its_row_and_its_settings_say() -> None:
    dot, thinking = make_job("a"), make_job("b", think=True)
    story = make_job("c", Task.INTERLEAVE, think=False)
    assert [job.max_images for job in (dot, thinking, story)] == [1, 1, 4]
    limits = (thinking.sampling.max_think_tokens, story.sampling.max_new_tokens)
    assert [job.max_text_tokens for job in (dot, thinking, story)] == [0, *limits]


def _names_a_task(node: ast.expr) -> bool:
    members = {task.name for task in Task}
    return any(
        isinstance(part, ast.Attribute)
        and part.attr in members
        and isinstance(part.value, ast.Name)
        and part.value.id == "Task"
        for part in ast.walk(node)
    )


def _compared(tree: ast.AST) -> Iterator[int]:
    """Yields the line of everything that asks which task something is."""
    for node in ast.walk(tree):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Dict):
            asked = [key for key in node.keys if key is not None]
        if any(_names_a_task(part) for part in asked):
            yield node.lineno  # type: ignore[attr-defined]


def test_no_other_module_asks_for_a_task_by_name() -> None:
    asking = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "tasks.py"
        and (lines := list(_compared(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert asking == {}


@pytest.mark.parametrize(
    "asking",
    [
        "a = job.task is Task.EDIT",
        "a = job.task in (Task.T2I, Task.EDIT)",
        "a = {Task.T2I: 1}[job.task]",
        "match job.task:\n    case Task.EDIT:\n        pass",
    ],
)
def test_asking_by_name_is_noticed(asking: str) -> None:
    assert len(list(_compared(ast.parse(asking)))) == 1
