"""Prints: the result of a command on stdout, and messages for people on stderr."""

from __future__ import annotations

import errno
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from sensebatch.errors import Problem
from sensebatch.units import counted

FILE_WIDTH = 80
"""The width of what is not printed to a terminal."""
_STDOUT, _STDERR = 1, 2
"""Their descriptors."""


class OutputError(Exception):
    """Standard output cannot be written."""


def show(text: str) -> None:
    """Prints the result of a command, or a line of it, on stdout.

    Raises:
        OutputError: It cannot be written; what follows is dropped.
    """
    try:
        print(text, file=Output(sys.stdout), flush=True)
    except OutputError:
        drop_output()
        raise


def error_text(kind: str, message: str | None) -> str:
    """Returns an exception's type and the first line of its message, if it has any."""
    first = (message or "").partition("\n")[0]
    return f"{kind}: {first}" if first else kind


def listed(head: str, parts: Iterable[str]) -> Iterator[str]:
    """Yields lines of a list that fit the terminal, or 80 columns where there is none.

    They are broken between two parts alone, so that paths and figures stay whole.
    """
    width = output_width()
    line = head
    indent = " " * (len(head) - len(head.lstrip()) + 2)
    for number, part in enumerate(parts):
        comma = "," if number else ""
        if number and len(f"{line}{comma} {part},") > width:
            yield f"{line}{comma}"
            line = f"{indent}{part}"
        else:
            line = f"{line}{comma} {part}"
    yield line


def fitted(text: str, width: int | None = None) -> Iterator[str]:
    """Yields the lines of a text, broken between words where they are too wide.

    Words, such as paths, stay whole.

    Args:
        text: One line or several.
        width: In columns; None for the terminal's, or 80 where there is none.
    """
    width = output_width() if width is None else width
    for line in text.split("\n"):
        if " " not in line.strip():
            yield line
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        broken = textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        yield from broken


def _terminal_width(stream: TextIO) -> int:
    """Returns the columns of a terminal; `COLUMNS` wins, as it does for rich."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return int(said)
    try:
        return os.get_terminal_size(stream.fileno()).columns or FILE_WIDTH
    except (OSError, ValueError):
        return FILE_WIDTH


def output_width() -> int:
    """Returns the columns of standard output, or of a file."""
    return _terminal_width(sys.stdout) if sys.stdout.isatty() else FILE_WIDTH


class Output:
    """Standard output that fails with an OutputError, even if a library prints."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text and returns its length."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _output_error(error) from None

    def flush(self) -> None:
        """Writes what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            raise _output_error(error) from None


class ClosedOutput(io.StringIO):
    """Stands for a standard output that was closed before the program began."""

    def write(self, text: str) -> int:
        """Fails, as to write to any other output that is closed."""
        raise OSError(errno.EBADF, "it is closed", text)


@contextmanager
def output_apart() -> Iterator[None]:
    """Has stderr take what is written to stdout during the block.

    That is also what native code writes, and what processes do that are started meanwhile.
    """
    with ExitStack() as stack:
        # Where one of the two was closed, another file may have its descriptor.
        if sys.__stdout__ is not None and sys.__stderr__ is not None:
            kept = os.dup(_STDOUT)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, _STDOUT)
            os.dup2(_STDERR, _STDOUT)
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _output_error(error: OSError) -> OutputError:
    is_reader_done = isinstance(error, BrokenPipeError)
    return OutputError("" if is_reader_done else f"stdout: {error.strerror}")


def drop_output() -> None:
    """Drops what standard output holds, and what follows."""
    # Otherwise the interpreter would try to write the rest when it exits.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_anyway(text: str) -> None:
    """Prints on stdout; a failure is only a warning, because the exit code is about the jobs."""
    try:
        show(text)
    except OutputError as error:
        if str(error):
            warn(str(error))


def say(text: str) -> None:
    """Prints a line for people; if nobody reads it, the work continues."""
    # Without standard error, print would use standard output.
    if sys.stderr is not None:
        with suppress(OSError):
            if sys.stderr.isatty():
                # A terminal breaks inside words.
                text = "\n".join(fitted(text, _terminal_width(sys.stderr)))
            print(text, file=sys.stderr, flush=True)


def asking() -> Callable[[str], bool] | None:
    """Returns what asks a question on the terminal; None where there is nobody to answer."""
    if sys.stdin is None or sys.stderr is None:
        return None
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None

    def ask(words: str) -> bool:
        """Prints a question and returns whether the answer is yes; anything else is no."""
        print(f"{words}. Draw them again? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    return ask


def truncated_words(truncated: Mapping[str, int]) -> str:
    """Returns how many texts are truncated, and how: `3 texts truncated (3 token_limit)`."""
    total = sum(truncated.values())
    parts = ", ".join(f"{count:,} {reason}" for reason, count in truncated.items())
    return f"{counted(total, 'text')} truncated ({parts})"


def warn(text: str) -> None:
    """Prints a warning."""
    say(f"warning: {text}")


def warn_of(problem: Problem) -> None:
    """Prints a warning about a manifest."""
    warn(str(problem))
