"""Lays out help: options by subject, names never cut, for any width from 60 columns on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
import typer.core

NAMES_WIDTH = 28
"""Columns for names beside their descriptions; a longer name has a line of its own."""
_ARGUMENTS, _OPTIONS, _COMMANDS = "Arguments", "Options", "Commands"


class HelpCommand(typer.core.TyperCommand):
    """A command whose help lists its options by subject."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the words of the usage line after the command's name."""
        arguments = (p for p in self.get_params(ctx) if p.param_type_name == "argument")
        return ["[OPTIONS]", *(str(argument.metavar) for argument in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes a section for each subject, in the order in which they first appear."""
        _write_sections(formatter, _rows_by_subject(self, ctx))


class HelpGroup(typer.core.TyperGroup):
    """A group of commands whose help lists them by subject."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands, then the options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            subject = getattr(command, "rich_help_panel", None)
            words = command.get_short_help_str(limit=200)
            sections.setdefault(_text(subject) or _COMMANDS, []).append((name, words))
        _write_sections(formatter, {**sections, **_rows_by_subject(self, ctx)})


def new_app(**options: Any) -> typer.Typer:
    """Returns an app with the help of this module; accepts the options of `typer.Typer`."""
    return typer.Typer(cls=HelpGroup, rich_markup_mode=None, no_args_is_help=True, **options)


def _rows_by_subject(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    sections: dict[str, list[tuple[str, str]]] = {}
    for subject, row in _rows(command, ctx):
        sections.setdefault(subject, []).append(row)
    # A command's own options come before those that many commands share.
    own = sections.pop(_OPTIONS, [])
    arguments = sections.pop(_ARGUMENTS, [])
    return {_ARGUMENTS: arguments, _OPTIONS: own, **sections}


def _rows(command: Any, ctx: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    for parameter in command.get_params(ctx):
        if parameter.param_type_name == "argument":
            yield _ARGUMENTS, (str(parameter.metavar), parameter.help or "")
            continue
        row = parameter.get_help_record(ctx)
        if row is not None:
            names, words = row
            subject = _text(getattr(parameter, "rich_help_panel", None))
            yield subject or _OPTIONS, (names, _with_bounds(words))


def _with_bounds(words: str) -> str:
    """Returns help with the bounds of a number in words; a lower one alone says nothing new."""
    words = re.sub(r"\s*\[x>=\d+\]|; *x>=\d+", "", words)
    return re.sub(r"(\d+)<=x<=(\d+)", r"from \1 to \2", words)


def _text(subject: object) -> str:
    """Returns a subject; typer has a placeholder instead of one that was not given."""
    return subject if isinstance(subject, str) else ""


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    for subject, rows in sections.items():
        if rows:
            with formatter.section(subject):
                formatter.write_dl(rows, col_max=NAMES_WIDTH)
