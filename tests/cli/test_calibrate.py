"""`sensebatch calibrate` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Invoke

MANIFEST = """
version: 1
jobs:
  - prompt: A {colour} circle on a white background
    matrix: {colour: [red, blue]}
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.yaml"
    path.write_text(MANIFEST, encoding="utf-8")
    return path


@pytest.mark.slow
def test_calibrate_prints_a_table_and_writes_its_files(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--steps", "3", "--converged-steps", "8", "--output-dir", str(out)]
    result = invoke("calibrate", str(manifest), *options)
    assert result.code == 0, result.err
    assert "t2i, 1 image that the search did not see" in result.out
    assert "found, euler, 3" in result.out
    assert (out / "3-steps.yaml").exists()
    again = invoke("calibrate", str(manifest), *options)
    assert again.code == 0
    assert "loading tiny" in result.err
    assert "loading tiny" not in again.err
    assert "found, euler, 3" in again.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "1"], "--jobs: expected 2 or more, found 1"),
        (["--steps", "65"], "--steps: expected 2 to 64, half of --converged-steps, found 65"),
        (["--steps", "1"], "--steps: expected 2 to 64"),
    ],
)
def test_what_finds_nothing_is_refused(
    invoke: Invoke, manifest: Path, options: list[str], message: str
) -> None:
    result = invoke("calibrate", str(manifest), *options)
    assert result.code == 2
    assert message in result.err
