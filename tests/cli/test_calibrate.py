"""`sensebatch calibrate` on the command line."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sensebatch import session
from sensebatch.calibrate.run import Calibration
from sensebatch.cli.calibrate import STOPPED
from sensebatch.executor.observer import Summary
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
    assert "t2i: 118 evaluations of the network in all" in result.err
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


@pytest.mark.parametrize(("steps", "warns"), [("{}", False), ("{num_steps: 4}", True)])
def test_calibrate_says_that_a_manifest_has_steps_of_its_own(
    invoke: Invoke, manifest: Path, monkeypatch: pytest.MonkeyPatch, steps: str, warns: bool
) -> None:
    text = MANIFEST.replace("jobs:", f"defaults: {steps}\njobs:", 1)
    manifest.write_text(text, encoding="utf-8")
    monkeypatch.setattr(Calibration, "calibrate", lambda *_: None)
    result = invoke("calibrate", str(manifest))
    said = "2 of 2 jobs give num_steps or the like themselves, which wins over --config"
    assert (said in result.err) is warns, result.err


def test_another_manifest_or_model_needs_another_folder(
    invoke: Invoke, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated: list[object] = []
    monkeypatch.setattr(Calibration, "calibrate", lambda *given: calibrated.append(given))
    other = manifest.with_name("other.yaml")
    other.write_text(MANIFEST, encoding="utf-8")
    out = str(tmp_path / "out")
    for _ in range(2):
        invoke("calibrate", str(manifest), "--output-dir", out)
    assert len(calibrated) == 2
    for words in ([str(other)], [str(manifest), "--model", "synthetic:8b"]):
        result = invoke("calibrate", *words, "--output-dir", out)
        assert result.code == 2
        assert f"{out}: holds the calibration of tiny with {manifest}, found " in result.err
        assert "; choose another --output-dir" in result.err
    assert len(calibrated) == 2
    invoke("calibrate", str(other), "--output-dir", str(tmp_path / "else"))
    assert len(calibrated) == 3


@pytest.mark.slow
def test_a_signal_during_the_last_batch_of_the_first_run_begins_no_other(
    invoke: Invoke, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["calibrate", str(manifest), "--steps", "3", "--converged-steps", "8"]
    words += ["--output-dir", str(out)]
    run = session.run_session

    def signalled(*given: Any, **named: Any) -> Summary:
        summary = run(*given, **named)
        os.kill(os.getpid(), signal.SIGINT)
        return summary

    with monkeypatch.context() as patched:
        patched.setattr(session, "run_session", signalled)
        stopped = invoke(*words)
    assert stopped.code == 75
    assert STOPPED in stopped.err
    assert (out / "converged" / "t2i" / "log.parquet").exists()
    assert not (out / "judged").exists()
    assert invoke(*words).code == 0
