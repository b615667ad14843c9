"""The first signal finishes a pass, the second ends at once; both leave a resumable folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensebatch.__main__ import main as start
from sensebatch.cli.signals import StopSignals
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

ROOT = Path(__file__).parents[2]

KILLED_TWICE = """
import os, signal, sys
from sensebatch import session
from sensebatch.cli.main import main
from tests.backends import FakeBackend
from tests.executor.fakes import FakeEngine

def twice():
    os.kill(os.getpid(), {number})
    os.kill(os.getpid(), {number})

session.TorchBackend = FakeBackend(engine=FakeEngine(on_step=twice))
main(["run", sys.argv[1], "--output-dir", sys.argv[2]])
"""


def _once(number: signal.Signals) -> Callable[[], None]:
    sent: list[signal.Signals] = []

    def send() -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return send


class Interrupted:
    """Finds the program as slowly as to be interrupted."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "sensebatch.cli.main":
            raise KeyboardInterrupt


def test_ctrl_c_before_the_program_is_there_ends_it_quietly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "sensebatch.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 130


@pytest.mark.parametrize("closed", [False, True])
def test_a_signal_stops_a_run_that_can_tell_nobody(
    monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    written: list[bytes] = []

    def to_a_broken_pipe(_: int, text: bytes) -> int:
        written.append(text)
        raise BrokenPipeError

    with StopSignals().installed() as stop, monkeypatch.context() as patch:
        patch.setattr(os, "write", to_a_broken_pipe)
        if closed:
            patch.setattr(sys, "stderr", None)
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()
    assert len(written) == (0 if closed else 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_commits_a_batch_of_one_pass_and_the_same_command_goes_on(
    invoke: Invoke, manifest: Path, backend: FakeBackend, number: signal.Signals
) -> None:
    backend.engine.on_step = _once(number)
    ended = invoke("run", manifest)
    assert ended.code == 75
    assert "stopping once the work in hand is finished; again to stop at once" in ended.err
    assert "2 of 5 jobs done, 3 to do" in ended.err
    assert "the same command goes on from here" in ended.err
    resumed = invoke("run", manifest, "--json").json
    assert (resumed["exit_code"], resumed["this_run"]["done"]) == (0, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_ends_a_run_between_two_passes_and_the_same_command_goes_on(
    invoke: Invoke, manifest: Path, backend: FakeBackend, number: signal.Signals
) -> None:
    backend.engine.a_pass, backend.engine.on_step = 1, _once(number)
    ended = invoke("run", manifest, "--json")
    assert ended.code == 75
    assert (ended.json["stopped"], ended.json["done"], ended.json["remaining"]) == (True, 0, 5)
    assert "0 of 5 jobs done, 3 to do, 2 interrupted, 1 image kept\n" in ended.err
    assert ended.json["interrupted"] == 2
    # None was written yet.
    assert "  images " not in ended.err
    assert "  log      outputs/small/log.parquet\n" in ended.err
    assert "the same command goes on from here" in ended.err
    assert backend.engine.drawn == [("a",)]
    counts = invoke("status", "outputs/small", "--json").json
    assert (counts["started"], counts["pending"], counts["failed"]) == (2, 3, 0)
    assert counts["kept_images"] == 1
    told = invoke("status", "outputs/small").out
    assert "0 of 5 jobs done, 0 failed, 3 to do, 2 interrupted, 1 image kept" in told
    resumed = invoke("run", manifest, "--json").json
    assert (resumed["exit_code"], resumed["this_run"]["done"]) == (0, 5)
    assert backend.engine.drawn[:2] == [("a",), ("b",)]


def test_signal_in_the_last_batch_is_a_finished_run(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    invoke("run", manifest, "--limit", "2")
    backend.engine.on_step = _once(signal.SIGINT)
    assert invoke("run", manifest, "--limit", "3").code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("backend")
def test_second_signal_ends_at_once_and_the_run_can_go_on(
    invoke: Invoke, manifest: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    script = KILLED_TWICE.format(number=int(number))
    ended = subprocess.run(
        [sys.executable, "-c", script, manifest, tmp_path / "out"],
        cwd=ROOT,
        check=False,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ended.returncode == code
    assert ended.stderr.endswith("\nstopped at once; the same command goes on from here\n")
    assert invoke("status", "out", "--json").json["started"] == 2
    assert invoke("run", manifest, "--output-dir", "out", "--json").json["done"] == 5


def test_signal_while_the_manifest_is_read_leaves_nothing_started(
    invoke: Invoke, manifest: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = backend.resolve_runtime

    def interrupted(model: object) -> tuple[str, str]:
        os.kill(os.getpid(), signal.SIGINT)
        return resolve(model)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "resolve_runtime", interrupted)
    ended = invoke("run", manifest)
    assert ended.code == 75
    assert "stopped before anything was run" in ended.err
    assert backend.loaded == []


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals().installed():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
