"""Paths on the command line."""

from __future__ import annotations

from pathlib import Path

import typer


def path(text: str) -> Path:
    """Returns the path that an argument names; its name is what help calls such a value.

    Raises:
        typer.BadParameter: It is empty, as of a variable that is not set; it would mean the
            current folder.
    """
    if not text.strip():
        raise typer.BadParameter("expected a path, found an empty text")
    return Path(text)
