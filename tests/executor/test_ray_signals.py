"""Signals while Ray is started, in processes of their own, which have no other threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import signal, threading
from sensebatch.executor.ray_signals import leave_to_main_thread, own_sigterm

signal.signal(signal.SIGTERM, lambda *_: print("own", flush=True))

def of_ray():
    leave_to_main_thread()
    {of_ray}

{before}
with own_sigterm() as take_back:
    thread = threading.Thread(target=of_ray)
    thread.start()
    thread.join()
    {inside}
print(any(signal.getitimer(signal.ITIMER_REAL)), flush=True)
{after}
"""
ABORT = """
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    while signal.SIGALRM not in signal.sigpending():
        pass
    signal.alarm(1000)
"""
HANDLER = "import ctypes; ctypes.CDLL(None).signal(signal.SIGTERM, 0)"
"""What Ray does to the handler of Python, which does not know of it."""
RAISE = "signal.raise_signal(signal.SIGTERM)"


def ends(of_ray: str = "pass", before: str = "", inside: str = "pass", after: str = "") -> str:
    """Returns what a process prints that starts something like Ray; it must end in order."""
    script = SCRIPT.format(of_ray=of_ray, before=before, inside=inside, after=after)
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, (ended.returncode, ended.stderr)
    return ended.stdout


def test_an_abort_that_is_due_or_planned_is_called_off() -> None:
    assert ends(ABORT) == "False\n"


def test_a_timer_of_the_program_s_own_stays() -> None:
    assert ends(before="signal.setitimer(signal.ITIMER_REAL, 1000)") == "True\n"


@pytest.mark.parametrize(
    ("inside", "after", "said"),
    [(f"take_back(); {RAISE}", "", "own\nFalse\n"), ("pass", RAISE, "False\nown\n")],
)
def test_sigterm_is_taken_back_from_ray(inside: str, after: str, said: str) -> None:
    assert ends(HANDLER, inside=inside, after=after) == said
