"""A copy of the package with a few lines added, run in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sensebatch"


def patched_package(
    folder: Path,
    *,
    inserted: Mapping[tuple[str, str], str],
    added: Mapping[str, str] | None = None,
) -> Path:
    """Copies the package into a folder, with changes, and returns the folder.

    Args:
        folder: Where the copy goes.
        inserted: Lines by (file, the line that they follow), which must be there once.
        added: New files by name.
    """
    copy = folder / "sensebatch"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for (name, before), lines in inserted.items():
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name}: {before}"
        (copy / name).write_text(text.replace(before, before + lines), encoding="utf-8")
    for name, text in (added or {}).items():
        assert not (copy / name).exists()
        (copy / name).write_text(text, encoding="utf-8")
    return folder


def run_patched(folder: Path, *args: str) -> str:
    """Returns what Python prints that is run in the folder of a patched package.

    Args:
        folder: Of `patched_package`; also the working directory.
        args: As Python's.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "120"}
    ended = subprocess.run(
        [sys.executable, *args],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
