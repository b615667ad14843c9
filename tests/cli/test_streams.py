"""Standard streams that are closed, full or nobody's, and the object that `--json` prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")

FAKED = """
import sys
from sensebatch import loading
from sensebatch.__main__ import main
from tests.backends import FakeBackend

loading.TorchBackend = FakeBackend()
main()
"""


def _shell(line: str, *args: str | Path, script: str = FAKED) -> subprocess.CompletedProcess[str]:
    """Runs a shell line in which `"$@"` is the command line of a process with a fake engine."""
    return subprocess.run(
        ["/bin/bash", "-c", line, "bash", sys.executable, "-c", script, *map(str, args)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


@needs_full
@pytest.mark.parametrize("more", [["--json"], ["--profile"]])
def test_run_whose_output_cannot_be_written_is_still_done(
    manifest: Path, tmp_path: Path, more: list[str]
) -> None:
    ended = _shell('"$@" >/dev/full', "run", manifest, "--output-dir", tmp_path / "o", *more)
    assert ended.returncode == 0
    assert "warning: stdout: No space left on device" in ended.stderr
    assert "5 of 5 jobs done" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("args", [["manifest", "schema"], ["model", "inspect", "tiny"], ["--help"]])
def test_command_whose_output_is_closed_ends_as_one_that_cannot_write(args: list[str]) -> None:
    ended = _shell('"$@" >&-', *args)
    assert (ended.returncode, ended.stderr) == (74, "sensebatch: stdout: it is closed\n")


def test_run_whose_output_is_closed_is_still_done(manifest: Path, tmp_path: Path) -> None:
    ended = _shell('"$@" >&-', "run", manifest, "--output-dir", tmp_path / "o", "--json")
    assert ended.returncode == 0
    assert "warning: stdout: it is closed" in ended.stderr


def test_run_whose_reader_has_ended_is_still_done(manifest: Path, tmp_path: Path) -> None:
    # The pipe is closed before the run begins.
    line = '{ sleep 0.2; "$@"; echo "code $?" >&2; } | true'
    ended = _shell(line, "run", manifest, "--output-dir", tmp_path / "o", "--json")
    assert ended.stderr.endswith("\ncode 0\n")
    assert "stdout" not in ended.stderr
    assert "Error" not in ended.stderr


@needs_full
@pytest.mark.parametrize(
    "args",
    [
        ["manifest", "schema"],
        ["model", "inspect", "tiny"],
        ["--help"],
        ["run", "--help"],
        ["--show-completion", "bash"],
    ],
)
def test_command_that_cannot_print_its_result_fails(args: list[str]) -> None:
    ended = _shell('"$@" >/dev/full', *args)
    assert ended.returncode == 74
    assert ended.stderr == "sensebatch: stdout: No space left on device\n"


@pytest.mark.parametrize("args", [["manifest", "schema"], ["run", "--help"]])
def test_reader_that_has_enough_is_not_an_error(args: list[str]) -> None:
    ended = _shell('{ sleep 0.2; "$@"; echo "code $?" >&2; } | true', *args)
    assert ended.stderr == "code 0\n"


def test_messages_for_people_never_go_to_standard_output(manifest: Path, tmp_path: Path) -> None:
    root = tmp_path / "o"
    ended = _shell('"$@" 2>&-', "run", manifest, "--output-dir", root, "--json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["done"] == 5
    assert ended.stderr == ""


WRITES_TO_2 = """
import os, sys
from pathlib import Path
from sensebatch.__main__ import main

def open_and_write(_):
    with open(sys.argv[1], "wb") as file:
        file.write(b"mine")
        file.flush()
        os.write(2, b"a library's warning")

sys.modules["sensebatch.cli.main"] = type(sys)("main")
sys.modules["sensebatch.cli.main"].main = lambda: open_and_write(None)
main()
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_error_is_not_a_file_of_the_run(tmp_path: Path, closed: str) -> None:
    _shell(f'"$@" {closed}', tmp_path / "file", script=WRITES_TO_2)
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["run", "none.yaml"], "none.yaml: manifest: expected a file, found none"),
        (["run", "MANIFEST", "--model", "nowhere/at/all"], "sensebatch: nowhere/at/all: "),
        (["run", "MANIFEST", "--batch", "1"], "sensebatch: expected an option of sensebatch run"),
        (["run"], "sensebatch: Missing argument 'MANIFEST...'"),
        (["run", "MANIFEST", "--limit", "0"], "sensebatch: --limit: expected a number of at least"),
        (
            ["run", "MANIFEST", "--limit", "x"],
            "sensebatch: --limit: expected a whole number, found",
        ),
        (
            ["run", "MANIFEST", "--lora-path", ""],
            "sensebatch: --lora-path: expected a path",
        ),
        (
            ["run", "MANIFEST", "--system-prompt-file", ""],
            "sensebatch: --system-prompt-file: expected a path",
        ),
        (["run", "MANIFEST", "--device", "tpu"], "sensebatch: --device: expected auto, cuda"),
        (["t2i", "--prompt", "a", "--num-steps", "0"], "sensebatch: --num-steps: "),
        (["manifest", "validate", "none.yaml"], "none.yaml: manifest: "),
        (["plan", "none.yaml"], "none.yaml: manifest: "),
        (["status", "none"], "sensebatch: none: expected a run's folder"),
        (["report", "none"], "sensebatch: none: expected a run's folder"),
        (["model", "inspect", "./none"], "sensebatch: ./none: expected"),
    ],
)
@pytest.mark.usefixtures("backend")
def test_json_is_one_object_also_where_nothing_was_started(
    invoke: Invoke, manifest: Path, args: list[str], error: str
) -> None:
    ended = invoke(*(str(manifest) if arg == "MANIFEST" else arg for arg in args), "--json")
    assert ended.code == 2
    assert ended.json["exit_code"] == 2
    assert ended.json["error"].startswith(error)
    assert ended.json["error"] in ended.err


def test_json_of_a_bad_manifest_has_its_problems_one_by_one(invoke: Invoke, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace("prompt: a", "promt: a"))
    values = invoke("run", manifest, "--json").json
    assert values["num_problems"] == len(values["problems"]) == 4
    assert {problem["field"] for problem in values["problems"]} == {"promt"}
    assert values["problems"][0]["file"] == str(manifest)


@pytest.mark.usefixtures("backend")
def test_json_is_one_object_also_where_a_signal_came_first(
    invoke: Invoke, manifest: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(backend, "resolve_runtime", interrupted)
    ended = invoke("run", manifest, "--json")
    assert (ended.code, ended.json["exit_code"], ended.json["stopped"]) == (75, 75, True)


@pytest.mark.parametrize("size", ["²", "9" * 5000])
def test_a_terminal_whose_size_is_no_number_is_as_one_that_says_none(
    manifest: Path, size: str
) -> None:
    command = ("plan", manifest, "--device", "cpu")
    ended = _shell('unset COLUMNS LINES; "$@"', *command)
    assert ended.returncode == 0
    for name in ("COLUMNS", "LINES"):
        other = _shell(f'unset COLUMNS LINES; {name}={size} "$@"', *command)
        assert (other.returncode, other.stdout, other.stderr) == (0, ended.stdout, ended.stderr)
