"""Runs command lines in processes of their own that need not import everything each time.

Reads a JSON list of arguments a line on stdin; says the process's id as it starts and how it
ended, each on a line of stdout. Nothing is computed before a process is made. A process may be
killed from outside as often as a test likes, which says nothing of the batch it was at. With the
argument `alone`, vram_mode `low` draws even small images one by one.
"""

from __future__ import annotations

import json
import os
import sys

import pyarrow.parquet  # noqa: F401
import transformers

import sensebatch.engine.engine  # noqa: F401
from sensebatch.cli.main import main
from sensebatch.executor import recovery
from sensebatch.plan import passes


def _serve() -> None:
    # Lazily imported until it is used.
    assert transformers.PreTrainedTokenizerFast
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                main(json.loads(line))
            except SystemExit as ended:
                os._exit(ended.code if isinstance(ended.code, int) else 1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    recovery.MAX_DEATHS = 1000
    if "alone" in sys.argv:
        passes.LOW_TOKENS_PER_PASS = 1
    _serve()
