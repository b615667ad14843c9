"""One run of a check, in a process of its own: `python -m sensebatch.verify.child SEED KEPT ...`.

Fragments memory first, so that the run's tensors lie where no earlier run had them, among garbage.
If KEPT names a folder, kills the process without warning soon after the run has put its first file
there. What follows on the command line is what is typed after `sensebatch`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOWHERE = "-"
"""Stands for a folder where the process is not to be killed."""
KILL_DELAY_S = 0.02
"""Puts the kill in the middle of what the run does after it has written the file."""


def killed_after_a_file_in(folder: Path, kill: Callable[[], None]) -> Callable[..., None]:
    """Returns an audit hook that kills at a file's move after the first into a folder, or sooner.

    Whatever the machine's speed, that is before the batch whose file it is can be committed.
    """
    prefix = f"{folder.absolute()}{os.sep}"
    placed = threading.Event()

    def wait_and_kill() -> None:
        time.sleep(KILL_DELAY_S)
        kill()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # Python raises this event before os.rename and os.replace.
        if event != "os.rename":
            return
        if placed.is_set():
            kill()
        elif os.path.abspath(os.fsdecode(arguments[1])).startswith(prefix):  # noqa: PTH100
            placed.set()
            threading.Thread(target=wait_and_kill, daemon=True).start()

    return hook


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Runs the command line that the arguments say."""
    seed, kept, *words = sys.argv[1:]
    if kept != NOWHERE:
        sys.addaudithook(killed_after_a_file_in(Path(kept), _kill))
    from sensebatch.engine.device.fragments import fragment

    # Held until the process ends.
    held = fragment(int(seed))
    sys.argv = ["sensebatch", *words]
    runpy.run_module("sensebatch", run_name="__main__", alter_sys=True)
    del held


if __name__ == "__main__":
    main()
