"""What `plan` says of memory, without a GPU and without loading weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Invoke

MODEL = ("--model", "synthetic:8b")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.yaml"
    path.write_text(
        "version: 1\njobs:\n"
        "  - {id: a, prompt: a dot, width: 2048, height: 2048, seeds: [1, 2, 3, 4]}\n"
        "  - {id: b, prompt: a dot, width: 1024, height: 1024}\n",
        encoding="utf-8",
    )
    return path


def test_plan_says_what_each_mode_needs(invoke: Invoke, large: Path) -> None:
    memory = invoke("plan", large, *MODEL, "--json").json["memory"]
    assert [mode["vram_mode"] for mode in memory] == ["full", "fast", "balanced", "low"]
    peaks = [mode["device_bytes"] for mode in memory]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 32 * 2**30
    assert [mode["host_bytes"] > 0 for mode in memory] == [False, True, True, True]
    assert [mode["jobs_per_pass"] for mode in memory] == [[2, 1]] * 3 + [[1, 1]]


def test_plan_with_a_budget_says_what_would_be_taken(invoke: Invoke, large: Path) -> None:
    (mode,) = invoke("plan", large, *MODEL, "--max-memory", "0=12GiB", "--json").json["memory"]
    assert mode["vram_mode"] in ("balanced", "low")
    assert 11 * 2**30 < mode["device_bytes"] <= 12 * 2**30


def test_budget_that_is_too_small_is_told_by_the_plan(invoke: Invoke, large: Path) -> None:
    ended = invoke("plan", large, *MODEL, "--max-memory", "0=1GiB")
    assert ended.code == 2
    assert "expected at least" in ended.err


def test_plan_for_people_has_a_line_for_each_mode(invoke: Invoke, large: Path) -> None:
    printed = invoke("plan", large, *MODEL).out
    assert all(f"\n {mode} " in printed for mode in ("full", "fast", "balanced", "low"))


def test_model_that_would_be_fetched_is_left_alone(invoke: Invoke, large: Path) -> None:
    assert invoke("plan", large, "--model", "owner/name", "--json").json["memory"] is None
