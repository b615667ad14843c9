"""Runs of our own as processes of their own, which a signal to the parent stops as well."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from sensebatch.cli.signals import StopSignals

_POLL_S = 0.5


def launch(
    module: str,
    arguments: Sequence[str],
    messages: Path,
    *,
    stop: StopSignals,
    echo: Callable[[str], None],
) -> int:
    """Runs a module as a program and returns its exit code, negative for the signal that ended it.

    Args:
        module: `sensebatch`, or one of its modules that is a program.
        arguments: What is typed after it.
        messages: Takes what the process says.
        stop: Once set, the process is asked to stop, and waited for.
        echo: Receives each line that the process says.
    """
    command = [sys.executable, "-m", module, *arguments]
    quiet = subprocess.DEVNULL
    with (
        messages.open("ab") as file,
        messages.open("rb") as said,
        # A session of its own, or a signal of the terminal would reach the run twice.
        subprocess.Popen(command, stdout=quiet, stderr=file, start_new_session=True) as process,
    ):
        said.seek(0, 2)
        asked = False
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            _echo(said, echo)
            if stop.is_set() and not asked:
                process.terminate()
                asked = True
        _echo(said, echo)
        return process.returncode


def _echo(said: IO[bytes], echo: Callable[[str], None]) -> None:
    """Passes on the lines that were written since it was last called."""
    while line := said.readline():
        if not line.endswith(b"\n"):
            # The rest of the line is still to be written.
            said.seek(-len(line), 1)
            return
        if text := line.decode("utf-8", errors="replace").strip():
            echo(text)
