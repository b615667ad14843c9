"""The exit codes that others script against."""

from __future__ import annotations

DONE = 0
"""All jobs are done, or the command printed what it was asked for."""
FAILED = 1
"""Some jobs failed."""
USAGE = 2
"""A mistake in the command line, a manifest, a configuration or a checkpoint; nothing was run."""
UNWRITTEN = 74
"""What a command had to print could not be written. Commands that run jobs do not use it."""
RESUMABLE = 75
"""Stopped by a signal, a full disk or a failed device; the same command resumes the run."""
INTERRUPTED = 130
"""Ended at once by SIGINT: the second, or the first before there was a run to stop. SIGTERM ends
with 143, SIGHUP with 129."""
