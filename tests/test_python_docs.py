"""The examples of docs/python.md run as they stand, and print what the document says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sensebatch

DOCUMENT = Path(__file__).parents[1] / "docs" / "python.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def _blocks() -> list[tuple[str, str]]:
    """Returns (language, text) of each code block; output has no language."""
    return BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_examples_run_in_order_and_print_what_the_document_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks, names = _blocks(), {"__name__": "example"}
    shown = 0
    for number, (language, text) in enumerate(blocks):
        if language != "python":
            continue
        # Errors name the document's own lines.
        exec(compile(text, f"{DOCUMENT.name}, block {number}", "exec"), names)
        out, err = capfd.readouterr()
        assert err == ""
        if blocks[number + 1 :] and blocks[number + 1][0] == "":
            shown += 1
            assert out == blocks[number + 1][1]
    assert shown >= 5


def test_every_public_function_has_an_example() -> None:
    code = "".join(text for language, text in _blocks() if language == "python")
    functions = {name for name in sensebatch.__all__ if name.islower()}
    assert {name for name in functions if f"sensebatch.{name}(" not in code} == set()
