"""`sensebatch profile` and `sensebatch doctor`, without a model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sensebatch.cli import profile
from sensebatch.profile import suites
from sensebatch.profile.rows import read_rows, write_rows
from tests.cli.conftest import Invoke
from tests.profile.results import result

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = ("--model", "synthetic:tiny", "--steps", "1", "--jobs", "1", "--size", "64x32")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The command lines of cases; none is run, each fails."""
    lines: list[Sequence[str]] = []

    def launch(_program: str, arguments: Sequence[str], *_: object, **__: object) -> int:
        lines.append(arguments)
        return 2

    monkeypatch.setattr(profile, "launch", launch)
    return lines


def test_failed_cases_are_reported_and_decide_the_exit_code(
    invoke: Invoke, launched: list[Sequence[str]]
) -> None:
    ended = invoke("profile", "--suite", "modes", "--only", "low", *SMALL)
    assert ended.code == 1
    assert [line[:2] for line in launched] == [["run", "outputs/profile-modes/manifests/low.yaml"]]
    assert "- low: exit code 2" in ended.out
    assert Path("outputs/profile-modes/profile.md").read_text() == ended.out


def test_synthetic_weights_have_every_case(invoke: Invoke, launched: list[Sequence[str]]) -> None:
    invoke("profile", "--suite", "tasks", *SMALL)
    cases = suites.suite_cases(suites.Suite.TASKS, suites.Scale(model="some/checkpoint"))
    assert [Path(line[1]).stem for line in launched] == [case.name for case in cases]


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("has_gpu", [True, False])
def test_without_a_gpu_full_size_is_warned_of_with_the_small_form(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr("sensebatch.engine.device.choice.cuda_is_available", lambda: has_gpu)
    monkeypatch.setattr("sensebatch.process.free_memory_bytes", lambda: 2**40)
    full = invoke("profile", "--suite", "modes", "--only", "low")
    small = "--suite modes --model synthetic:tiny --steps 2 --jobs 2 --size 64x64"
    assert ("warning: found no GPU" in full.err) == (small in full.err) == (not has_gpu)
    assert ("sensebatch doctor measures" in full.err) == has_gpu
    assert "found no GPU" not in invoke("profile", *small.split(), "--only", "low").err


def test_without_a_gpu_weights_that_do_not_fit_are_refused_before_any_case(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, launched: list[Sequence[str]]
) -> None:
    monkeypatch.setattr("sensebatch.engine.device.choice.cuda_is_available", lambda: False)
    monkeypatch.setattr("sensebatch.process.free_memory_bytes", lambda: 60 * 2**30)
    ended = invoke("profile", "--suite", "few")
    assert (ended.code, launched, list(Path().iterdir())) == (2, [], [])
    (line,) = ended.err.splitlines()
    expected = "--model synthetic:8b: expected a GPU that torch can use, or 65.4 GiB of free memory"
    assert line.startswith(f"sensebatch: {expected} for the weights on the CPU, found no GPU and")
    assert line.endswith("--suite few --model synthetic:tiny --steps 2 --jobs 2 --size 64x64")


@pytest.mark.usefixtures("backend")
def test_a_case_with_a_failed_job_is_failed_and_keeps_its_figures(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(_program: str, arguments: Sequence[str], *_: object, **__: object) -> int:
        return invoke(*arguments).code

    monkeypatch.setattr(profile, "launch", launch)
    monkeypatch.setattr(suites, "PROMPTS", ("a dot", "a line that fails"))
    small = (*SMALL[:4], "--jobs", "4", *SMALL[6:])
    ended = invoke("profile", "--suite", "modes", "--only", "full", *small)
    assert ended.code == 1
    row = read_rows(Path("outputs/profile-modes"))[0]
    assert (row.status, row.num_jobs, row.jobs_done, row.images) == ("failed", 4, 2, 2)
    assert (row.error or "").startswith("full-2: ValueError: ")


def test_report_writes_the_document_again(invoke: Invoke, tmp_path: Path) -> None:
    write_rows(tmp_path / "results", [result("full"), result("low")])
    ended = invoke("profile", "--report", "results")
    assert ended.code == 0
    assert ended.out.startswith("# Profile: modes\n")
    assert Path("results/profile.md").read_text() == ended.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--suite: expected tasks, budgets, modes, speed, night, ask, quality or few"),
        (["--suite", "modes", "--report", "x"], "--report: expected no other option"),
        (["--report", "x"], "expected the results of a profile, found no file"),
        (["--suite", "modes", "--size", "big"], "--size: expected WIDTHxHEIGHT, found 'big'"),
        (["--suite", "modes", "--size", "33x32"], "--size: expected width as a positive multiple"),
        (["--suite", "modes", "--size", "99968x64"], "--size: expected width as at most 16384, f"),
        (["--suite", "modes", "--only", "lean"], "--only: expected one of full"),
        (["--suite", "modes", "--model", "./none"], "./none: expected"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    invoke: Invoke, launched: list[Sequence[str]], args: list[str], message: str
) -> None:
    ended = invoke("profile", *args)
    assert ended.code == 2
    assert message in ended.err
    assert launched == []


CHILD = "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(200)\n"
STUBBORN = (
    "import os, signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "for _ in range(2):\n"
    "    os.kill(os.getppid(), signal.SIGTERM)\n"
    "    time.sleep(1)\n"
)
"""Programs that stand in for a case, and stop the suite they belong to."""


def stopped_suite(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Runs two cases of a suite, each of which is a program, and returns how it ended."""
    (folder / "case.py").write_text(program)
    code = (
        "import sys\n"
        "from sensebatch.cli import profile\n"
        "from sensebatch.cli.main import main\n"
        'profile.PROGRAM = "case"\n'
        f"main(['profile', '--suite', 'modes', '--only', 'full', '--only', 'low', *{SMALL}])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        capture_output=True,
        check=False,
        text=True,
    )


def test_a_signal_ends_the_suite_and_what_is_missing_is_reported(tmp_path: Path) -> None:
    write_rows(tmp_path / "outputs" / "profile-modes", [result("fast")])
    ended = stopped_suite(tmp_path, CHILD)
    assert ended.returncode == 75
    assert "| fast |" in ended.stdout
    assert "stopped before these were done: full, low." in ended.stdout
    assert "add --only full --only low to the same command" in ended.stderr
    assert [row.case for row in read_rows(tmp_path / "outputs" / "profile-modes")] == ["fast"]


def test_a_signal_before_the_first_case_is_measured_leaves_nothing_to_print(tmp_path: Path) -> None:
    ended = stopped_suite(tmp_path, CHILD)
    assert (ended.returncode, ended.stdout) == (75, "")
    assert "stopped before any case was measured" in ended.stderr


def test_a_second_signal_promises_nothing_of_a_suite(tmp_path: Path) -> None:
    ended = stopped_suite(tmp_path, STUBBORN)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr.endswith("\nstopped at once\n")


def test_doctor_describes_the_machine(invoke: Invoke) -> None:
    machine = invoke("doctor", "--json").json
    assert 0 < machine["host_free_bytes"] <= machine["host_total_bytes"]
    ended = invoke("doctor")
    assert ended.code == 0
    assert machine["torch"] in ended.out
    said = "no speed is measured" if machine["gpu"] is None else "GiB/s"
    assert re.search(rf"^(device|copy).*{said}", ended.out, re.MULTILINE)


def test_every_suite_can_be_asked_for(invoke: Invoke) -> None:
    for suite in suites.Suite:
        asked = invoke("profile", "--suite", suite.value, "--only", "no-such-case")
        assert asked.code == 2
        assert "--only: expected one of" in asked.err
