"""Jobs that start from images of other jobs, on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Invoke

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def chained(tmp_path: Path) -> Path:
    path = tmp_path / "chained.yaml"
    path.write_text(
        """
version: 1
defaults: {width: 64, height: 32, num_steps: 2}
jobs:
  - {id: a, prompt: a dot}
  - {id: b, prompt: make it red, image: "@a"}
  - {id: c, prompt: again, image: "@b"}
  - {id: d, prompt: a line}
""",
        encoding="utf-8",
    )
    return path


def test_a_plan_lists_levels_apart(invoke: Invoke, chained: Path) -> None:
    values = invoke("plan", chained, "--json").json
    assert [(group["level"], group["jobs"]) for group in values["groups"]] == [
        (0, 2),
        (1, 1),
        (2, 1),
    ]
    assert "level" in invoke("plan", chained).out


def test_a_blocked_job_is_counted_apart_and_runs_with_its_parent(
    invoke: Invoke, chained: Path
) -> None:
    text = chained.read_text()
    chained.write_text(text.replace("a dot", "a dot that fails"))
    ended = invoke("run", chained)
    assert ended.code == 1
    assert "1 of 4 jobs done, 1 failed, 2 blocked" in ended.err
    assert "blocked jobs start from images of failed jobs" in ended.err
    values = invoke("status", "outputs/chained", "--json").json
    assert (values["failed"], values["blocked"], values["pending"]) == (1, 2, 0)
    assert "2 blocked by failed jobs" in invoke("status", "outputs/chained").out
    assert invoke("run", chained, "--json").json["blocked"] == 2
    chained.write_text(text)
    assert invoke("run", chained).code == 0
    assert invoke("status", "outputs/chained", "--json").json["done"] == 4


def test_a_job_that_is_drawn_again_brings_its_children(invoke: Invoke, chained: Path) -> None:
    invoke("run", chained)
    Path("outputs/chained/images/a.png").unlink()
    ended = invoke("run", chained)
    assert "2 jobs that start from images of jobs which will be run again" in ended.err
    assert "3 images made" in ended.err


def test_mistakes_are_found_before_anything_runs(invoke: Invoke, chained: Path) -> None:
    chained.write_text(chained.read_text().replace("@a", "@aa"))
    ended = invoke("manifest", "validate", chained)
    assert ended.code == 2
    assert "chained.yaml: line 6: image: expected @ and the id of another job" in ended.err


def test_jobs_that_start_from_tries_are_named(invoke: Invoke, tmp_path: Path) -> None:
    manifest = tmp_path / "tries.yaml"
    manifest.write_text(
        """
version: 1
defaults: {width: 64, height: 32, num_steps: 2}
jobs:
  - {id: a, prompt: a dot, tries: 3, accept: {ask: is it, choices: [yes, no], is: yes}}
  - {id: b, prompt: make it red, image: "@a-seed=42"}
  - {id: c, prompt: make it red, image: "@a-seed=44"}
""",
        encoding="utf-8",
    )
    assert "2 jobs start from tries, and only if those are drawn: b (@a-seed=42), c" in (
        invoke("plan", manifest).out
    )
    assert (
        "1 job: starts from a try that may not be needed"
        in invoke("run", manifest, "--dry-run").out
    )
    held = "  held     1 job starts from tries that were not needed: c (@a-seed=44)\n"
    ended = invoke("run", manifest)
    assert "3 of 8 jobs to run in outputs/tries" not in ended.err
    assert "; 5 more only if they are needed" in ended.err
    assert "3 of 3 jobs done, 5 not needed, 2 images made" in ended.err
    assert held in ended.err
    assert held in invoke("status", "outputs/tries").out
    assert invoke("status", "outputs/tries", "--json").json["held_jobs"] == [
        {"job": "c", "starts_from": "a-seed=44", "is_dropped": False}
    ]
    for text in (
        Path("outputs/tries/summary.txt").read_text(),
        invoke("report", "outputs/tries").out,
    ):
        assert "  a                  1/1       1       100%\n" in text
    assert invoke("report", "outputs/tries", "--json").json["acceptance"][0]["judged"] == 1


def test_tries_that_start_from_tries_are_named(invoke: Invoke, tmp_path: Path) -> None:
    manifest = tmp_path / "tries.yaml"
    check = "accept: {ask: is it, choices: [yes, no], is: yes}"
    manifest.write_text(
        f"""
version: 1
defaults: {{width: 64, height: 32, num_steps: 2}}
jobs:
  - {{id: a, prompt: a dot, tries: 3, {check}}}
  - {{id: b, prompt: make it red, image: "@a-seed=44", tries: 2, {check}}}
  - {{id: c, prompt: make it red, image: "@a-seed=42", tries: 2, {check}}}
""",
        encoding="utf-8",
    )
    names = "b-seed=42 (@a-seed=44), b-seed=43 (@a-seed=44)\n"
    held = f"  held     2 jobs start from tries that were not needed: {names}"
    ended = invoke("run", manifest)
    # What was not needed of the series that runs waits for verdicts alone, and not for a parent.
    assert held in ended.err
    status = invoke("status", "outputs/tries").out
    assert " ".join(held.split()) in " ".join(status.split())
