"""Starts the command line, as `sensebatch` and as `python -m sensebatch`."""

from __future__ import annotations

import sys

from sensebatch.cli import exits


def main() -> None:
    """Runs the process's command line; Ctrl-C ends it quietly while it is still being imported.

    Raises:
        SystemExit: Always, with the exit code.
    """
    try:
        from sensebatch.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
