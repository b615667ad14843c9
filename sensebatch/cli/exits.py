"""The exit codes, which scripts rely on."""

from __future__ import annotations

DONE = 0
"""All jobs are done, or the command printed what it was asked for."""
FAILED = 1
"""Some jobs failed."""
USAGE = 2
"""A mistake in the command line, a manifest, a configuration or a checkpoint; nothing ran."""
UNWRITTEN = 74
"""The output could not be written. Commands that run jobs never end with this code."""
RESUMABLE = 75
"""Stopped by a signal, a deadline, a full disk or a failed device; the same command resumes the
run."""
INTERRUPTED = 130
"""Ended at once by SIGINT: by the second one, or by one that arrived before a run had begun. The
code for SIGTERM is 143, for SIGHUP 129."""
