"""The exit codes that others script against."""

from __future__ import annotations

DONE = 0
"""All jobs are done, or the command printed what it was asked for."""
FAILED = 1
"""Some jobs failed."""
USAGE = 2
"""A mistake in the command line, a manifest, a configuration or a checkpoint; nothing was run."""
RESUMABLE = 75
"""Stopped by a signal, a full disk or a failed device; the same command goes on."""
INTERRUPTED = 130
"""Ended at once by a second SIGINT; 143 by a second SIGTERM."""
