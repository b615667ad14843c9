"""Parses paths on the command line."""

from __future__ import annotations

from pathlib import Path

import typer


def path(text: str | Path) -> Path:
    """Returns the path that an argument names. Help shows this function's name for such a value.

    Args:
        text: The argument, or the default of an option, which typer parses as well.

    Raises:
        typer.BadParameter: It is empty, for example because a variable is not set; it would mean
            the current folder.
    """
    if not str(text).strip():
        raise typer.BadParameter("expected a path, found an empty text")
    return Path(text)


def path_text(text: str) -> str:
    """Returns a path as it was given, for a setting that keeps its text.

    Raises:
        typer.BadParameter: It is empty.
    """
    path(text)
    return text
