"""A new task is a row, a runner and a command: added to a copy of the package, it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from sensebatch.tasks import Task
from tests.patched import patched_package, run_patched

pytestmark = pytest.mark.slow

LAST_MEMBER = """
    EDIT = "edit"
    INTERLEAVE = "interleave"
"""
MEMBER = """\
    REPLY = "reply"
"""
LAST_ROW = """
        thinks=True,
        runner="interleave",
    ),
"""
ROW = """\
    TaskSpec(
        task=Task.REPLY,
        inputs=Inputs.OPTIONAL,
        resizes_inputs=False,
        output=Output.TEXT,
        prompt=PromptRule(
            system=None, numbered=False, empty_thought=False, opens_thought=False,
            opens_image=False,
        ),
        text=TextRule(limit="max_new_tokens", always=True),
        drawing=None,
        thinks=None,
        sampling={"max_new_tokens": 8},
        runner="reply",
    ),
"""
RUNNER = '''
"""Answers with the prompt and the number of tokens that were read."""

from sensebatch.engine.tasks.registry import TaskRunner
from sensebatch.engine.tasks.state import start_jobs
from sensebatch.jobs import JobResult
from sensebatch.tasks import Branch


def run(runner, jobs, *, kept, channel, script=None):
    assert all(job.noise is None for job in jobs)
    running = start_jobs(runner, jobs, decodes=True)
    return [
        JobResult(
            text=f"{state.job.prompt}: {state.caches[Branch.COND].length} tokens",
            text_tokens=1,
        )
        for state in running
    ]


RUNNER = TaskRunner(run=run, draws_once=lambda batch, limits: True)
'''
COMMAND = """
from sensebatch.cli.job_options import one_job_command
from sensebatch.tasks import Task

COMMAND = one_job_command(Task.REPLY, "Reply to a prompt.")
"""
MANIFEST = """
version: 1
name: replies
defaults:
  reply: {max_new_tokens: 4}
jobs:
  - {id: short, task: reply, prompt: a red circle}
  - {id: long, task: reply, prompt: a red circle above a blue square}
  - {id: seen, task: reply, prompt: a star, image: star.png}
  - {id: drawn, prompt: a red circle, num_steps: 1, resolution: "3:1"}
"""
SESSION = """
import io, json, sys
from contextlib import redirect_stdout
from sensebatch.cli.main import main

for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            main(words)
    except SystemExit as ended:
        print(json.dumps([ended.code or 0, said.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a task that only reads and writes text."""
    folder = patched_package(
        tmp_path_factory.mktemp("task"),
        inserted={("tasks.py", LAST_MEMBER): MEMBER, ("tasks.py", LAST_ROW): ROW},
        added={"engine/tasks/reply.py": RUNNER, "cli/reply.py": COMMAND},
    )
    (folder / "replies.yaml").write_text(MANIFEST, encoding="utf-8")
    (folder / "session.py").write_text(SESSION, encoding="utf-8")
    Image.new("RGB", (64, 64), "yellow").save(folder / "star.png")
    return folder


def session(root: Path, *commands: str) -> list[str]:
    """Returns what commands print; each must end well."""
    words = json.dumps([command.split() for command in commands])
    ended = [json.loads(line) for line in run_patched(root, "session.py", words).splitlines()]
    assert [code for code, _ in ended] == [0] * len(commands)
    return [said for _, said in ended]


def test_manifests_and_plans_know_the_task(root: Path) -> None:
    counts, schema, plan, table, bounded = session(
        root,
        "manifest validate replies.yaml --json",
        "manifest schema",
        "plan replies.yaml --json",
        "plan replies.yaml",
        "plan replies.yaml --json --vram-budget 2GiB",
    )
    tasks = {**dict.fromkeys(map(str, Task), 0), "t2i": 1, "reply": 3}
    assert json.loads(counts) == {"jobs": 4, "by_task": tasks}
    assert "reply" in json.loads(schema)["$defs"]["DefaultsFields"]["properties"]
    replies, drawn = json.loads(plan)["groups"]
    assert (replies["task"], replies["jobs"], replies["images"]) == ("reply", 3, 0)
    assert (replies["width"], replies["num_steps"], replies["image_tokens"]) == (None, None, 0)
    assert (drawn["task"], drawn["images"]) == ("t2i", 1)
    assert "reply" in table
    assert "None" not in table
    (placed,) = json.loads(bounded)["memory"]
    assert min(group["device_bytes"] for group in placed["groups"]) > 0


def test_jobs_of_the_task_run_to_the_log(root: Path) -> None:
    run = "run replies.yaml --output-dir out --json --device cpu"
    said, _, report, text = session(root, run, run, "report out --json", "report out")
    assert json.loads(said)["done"] == 4
    log = pq.read_table(root / "out/log.parquet").to_pylist()
    assert len(log) == 4, "the second run had nothing left"
    rows = {row["job_id"]: row for row in log}
    assert {row["status"] for row in rows.values()} == {"done"}
    for name, prompt in (("short", "a red circle"), ("seen", "a star")):
        row = rows[name]
        assert (row["task"], row["num_images"], row["width"]) == ("reply", 0, None)
        assert row["text_tokens"] == 1
        assert (root / "out" / row["text_path"]).read_text().startswith(f"{prompt}: ")
    assert (rows["drawn"]["num_images"], rows["drawn"]["width"]) == (1, 384)
    groups = json.loads(report)["by_group"]
    assert (groups["reply"]["jobs"], groups["reply"]["images"]) == (3, 0)
    assert "None" not in text


def test_the_command_of_the_task_has_its_options_and_writes_its_file(root: Path) -> None:
    help_, _ = session(
        root,
        "reply --help",
        "reply --prompt hello --image star.png --max-new-tokens 3 --output-dir one --stem a",
    )
    assert "--max-new-tokens" in help_
    assert "--image" in help_
    absent = ("--num-steps", "--resolution", "--think", "--image-format")
    assert [option for option in absent if option in help_] == []
    assert (root / "one/a.txt").read_text().startswith("hello: ")


def test_fields_of_other_tasks_are_refused(root: Path) -> None:
    others: dict[str, Any] = {"num_steps": 2, "resolution": "1:1", "think": True}
    row = {"task": "reply", "prompt": "a", **others}
    (root / "bad.jsonl").write_text(json.dumps(row), encoding="utf-8")
    words = json.dumps([["manifest", "validate", "bad.jsonl", "--json"]])
    ended = run_patched(root, "session.py", words)
    code, said = json.loads(ended)
    assert code == 2
    fields = [problem["field"] for problem in json.loads(said)["problems"]]
    assert fields == sorted(others)
