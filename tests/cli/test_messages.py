"""Lines for people on a terminal."""

from __future__ import annotations

import os
import pty
import sys
import termios

import pytest

from sensebatch.cli.messages import error_text, fitted, say, show


def test_lines_are_broken_between_words_and_paths_stay_whole() -> None:
    path = "/".join(["folder"] * 12)
    text = f"  images   {path}\nshort\n\n  one two-three four"
    assert list(fitted(text, 12)) == [
        "  images",
        f"    {path}",
        "short",
        "",
        "  one",
        "    two-three",
        "    four",
    ]
    assert list(fitted(f"  {path}", 12)) == [f"  {path}"]


def test_an_error_is_one_line_with_its_message_if_it_has_one() -> None:
    assert error_text("KeyboardInterrupt", "") == error_text("KeyboardInterrupt", None)
    assert error_text("KeyboardInterrupt", "") == "KeyboardInterrupt"
    assert error_text("ValueError", "one\ntwo") == "ValueError: one"


NARROW = [
    "tracebacks are in outputs/night/errors; --retry-failed tries",
    "  those jobs again",
    "",
]
NARROWER = [
    "tracebacks are in outputs/night/errors;",
    "  --retry-failed tries those jobs again",
    "",
]


@pytest.mark.parametrize(
    ("columns", "expected"), [(None, NARROW), ("0", NARROW), ("wide", NARROW), ("40", NARROWER)]
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_narrow_terminal_gets_lines_that_fit_it(
    monkeypatch: pytest.MonkeyPatch, stream: str, columns: str | None, expected: list[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    text = "tracebacks are in outputs/night/errors; --retry-failed tries those jobs again"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 60))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, stream, terminal)
        if stream == "stderr":
            say(text)
        else:
            show("\n".join(fitted(text)))
        # A terminal passes on what it has, and that may be less than was written.
        read = b""
        while not read.endswith(b"again\r\n"):
            read += os.read(ours, 1000)
    os.close(ours)
    assert read.decode().split("\r\n") == expected
