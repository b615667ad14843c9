"""The kill of a run comes after a first kept file, whatever the machine's speed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sensebatch.verify import child
from sensebatch.verify.child import killed_after_a_file_in

pytestmark = pytest.mark.slow


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the kill comes; nothing but a second move brings it."""
    event = threading.Event()
    monkeypatch.setattr(time, "sleep", lambda _: threading.Event().wait())
    return event


def test_the_move_after_a_first_kept_file_kills(killed: threading.Event, tmp_path: Path) -> None:
    hook = killed_after_a_file_in(tmp_path / "checkpoints", killed.set)
    hook("os.rename", ("x", tmp_path / "images" / "a.png", -1, -1))
    hook("os.rename", ("x", tmp_path / "checkpoints-of-another" / "a", -1, -1))
    hook("open", (tmp_path / "checkpoints" / "1" / "a", "w", 0))
    assert not killed.is_set()
    hook("os.rename", (b"x", str(tmp_path / "checkpoints" / "1" / "a"), -1, -1))
    assert not killed.is_set()
    hook("os.rename", ("x", tmp_path / "images" / "a.png", -1, -1))
    assert killed.is_set()


def test_a_kill_does_not_wait_for_a_second_move(tmp_path: Path) -> None:
    killed = threading.Event()
    hook = killed_after_a_file_in(tmp_path, killed.set)
    hook("os.rename", ("x", tmp_path / "a", -1, -1))
    assert killed.wait(60)


KEEPS_A_FILE = """
import os, pathlib, runpy, sys
def module(*_, **__):
    kept = pathlib.Path(sys.argv[1])
    kept.mkdir()
    for name in ("first", "second"):
        (kept / "new").write_text(name)
        os.replace(kept / "new", kept / name)
    print("finished")
runpy.run_module = module
from sensebatch.verify import child
child.main()
"""


@pytest.mark.parametrize("kept", ["checkpoints", child.NOWHERE])
def test_a_child_is_killed_only_where_that_is_asked_for(tmp_path: Path, kept: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KEEPS_A_FILE, "3", kept, "checkpoints"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=False,
        text=True,
    )
    expected = (0, "finished\n") if kept == child.NOWHERE else (-signal.SIGKILL, "")
    assert (ended.returncode, ended.stdout) == expected, ended.stderr
