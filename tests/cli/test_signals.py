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

from sensebatch.cli.signals import StopSignals
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

KILLED_TWICE = """
import os, signal, sys
from sensebatch import loading
from sensebatch.cli.main import main
from tests.backends import FakeBackend
from tests.executor.fakes import FakeEngine

def twice():
    os.kill(os.getpid(), {number})
    os.kill(os.getpid(), {number})

loading.TorchBackend = FakeBackend(engine=FakeEngine(on_step=twice))
main(["run", sys.argv[1], "--output-dir", sys.argv[2]])
"""


def _once(number: signal.Signals) -> Callable[[], None]:
    sent: list[signal.Signals] = []

    def send() -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return send


SIGNALLED_EARLY = """
import os, signal, sys

# A shell that starts the tests in the background has the signal ignored, as nohup does.
handler = signal.default_int_handler if {number} == signal.SIGINT else signal.SIG_DFL
signal.signal({number}, handler)
from sensebatch.__main__ import main

class Signalled:
    def find_spec(self, name, *_):
        if name == "sensebatch.cli.main":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Signalled())
main()
"""

BUSY = """
import hashlib, os, signal, threading, time
from sensebatch.cli.signals import StopSignals

def send_two(stop):
    os.kill(os.getpid(), {number})
    # The system counts two signals as one as long as nobody has heeded the first.
    while not stop.is_set():
        time.sleep(0.01)
    os.kill(os.getpid(), {number})

with StopSignals().installed() as stop:
    threading.Thread(target=send_two, args=(stop,), daemon=True).start()
    # One call, in which Python runs no handler.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)
    print("over")
"""

ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


def _python(script: str, *args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_while_the_program_is_imported_ends_it_quietly(
    number: signal.Signals, code: int
) -> None:
    ended = _python(SIGNALLED_EARLY.format(number=int(number)))
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


@pytest.mark.parametrize("closed", [False, True])
def test_a_signal_stops_a_run_that_cannot_print(
    monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    written: list[bytes] = []

    def to_a_broken_pipe(_: int, text: bytes) -> int:
        written.append(text)
        raise BrokenPipeError

    with monkeypatch.context() as patch, StopSignals().installed() as stop:
        patch.setattr(os, "write", to_a_broken_pipe)
        if closed:
            patch.setattr(sys, "stderr", None)
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()
    assert len(written) == (0 if closed else 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_commits_a_batch_of_one_pass_and_the_same_command_resumes(
    invoke: Invoke, manifest: Path, backend: FakeBackend, number: signal.Signals
) -> None:
    backend.engine.on_step = _once(number)
    ended = invoke("run", manifest)
    assert ended.code == 75
    assert "stopping after the current images; again to stop at once" in ended.err
    assert "2 of 5 jobs done, 3 to do" in ended.err
    assert "the same command resumes the run" in ended.err
    resumed = invoke("run", manifest, "--json").json
    assert (resumed["exit_code"], resumed["this_run"]["done"]) == (0, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_ends_a_run_between_two_passes_and_the_same_command_resumes(
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
    assert "the same command resumes the run" in ended.err
    assert backend.engine.drawn == [("a",)]
    counts = invoke("status", "outputs/small", "--json").json
    assert (counts["started"], counts["pending"], counts["failed"]) == (2, 3, 0)
    assert counts["kept_images"] == 1
    printed = invoke("status", "outputs/small").out
    assert "0 of 5 jobs done, 0 failed, 3 to do, 2 interrupted, 1 image kept" in printed
    resumed = invoke("run", manifest, "--json").json
    assert (resumed["exit_code"], resumed["this_run"]["done"]) == (0, 5)
    assert backend.engine.drawn[:2] == [("a",), ("b",)]


EXECUTED = """
import os
from sensebatch import session
from sensebatch.cli.main import main

def run(*_, **__):
    exec("os.kill(os.getpid(), {number})")

session.run_session = run
main(["run", "manifests/catalog.yaml", "--output-dir", "{root}"])
"""


def test_signal_in_code_that_is_executed_as_text_has_the_documented_code(tmp_path: Path) -> None:
    script = EXECUTED.format(root=tmp_path / "o", number=int(signal.SIGTERM))
    (tmp_path / "started.py").write_text(script, encoding="utf-8")
    # As a module, as `python -m sensebatch` is one.
    ended = subprocess.run(
        [sys.executable, "-m", "started"],
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert ended.returncode == 75


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_two_signals_during_one_long_call_are_two(number: signal.Signals, code: int) -> None:
    ended = _python(BUSY.format(number=int(number)))
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.endswith("\nstopped at once; the same command resumes the run\n")


def test_hangup_is_ignored_where_it_was() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().installed() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_in_the_last_batch_is_a_finished_run(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    invoke("run", manifest, "--limit", "2")
    backend.engine.on_step = _once(signal.SIGINT)
    assert invoke("run", manifest, "--limit", "3").code == 0


@pytest.mark.parametrize(("number", "code"), ENDS)
@pytest.mark.usefixtures("backend")
def test_second_signal_ends_at_once_and_the_run_can_be_resumed(
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
    assert ended.stderr.endswith("\nstopped at once; the same command resumes the run\n")
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
    assert "stopped before anything ran" in ended.err
    assert backend.loaded == []


def test_signal_while_weights_are_loaded_leaves_nothing_started(
    invoke: Invoke, manifest: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the load continued")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "load_engine", interrupted)
        ended = invoke("run", manifest)
    assert ended.code == 75
    assert "stopped before anything ran; the same command starts the run" in ended.err
    assert invoke("status", "outputs/small", "--json").json["pending"] == 5
    assert invoke("run", manifest, "--json").json["this_run"]["done"] == 5


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals().installed():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


FORKS = """
import multiprocessing, os, signal, threading, time
from sensebatch.cli.signals import StopSignals

fork = multiprocessing.get_context("fork")
stop, codes, ready = StopSignals(), [], fork.Event()

def begun(*before):
    target = lambda: (*(call() for call in before), time.sleep(60))
    process = fork.Process(target=target, daemon=True)
    process.start()
    return process

def judge():
    for process in [begun() for _ in range(5)]:
        process.terminate()
        process.join()
        codes.append(process.exitcode)

with stop.installed():
    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    left = begun(lambda: os.kill(os.getpid(), signal.SIGINT), ready.set)
    ready.wait()
print({*codes}, stop.is_set(), left.is_alive())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_processes_that_functions_fork_neither_stop_a_run_nor_keep_it() -> None:
    ended = _python(FORKS, timeout=30)
    assert ended.stdout == "{-15} False True\n"
    assert (ended.returncode, ended.stderr) == (0, "")
