"""Comparisons: all images side by side, nothing lost, nothing outside."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from sensebatch.cli.compare import GAP, MAX_HEIGHT, compose, wrap

FONT = ImageFont.load_default(14)


@given(st.text(st.characters(codec="utf-8"), max_size=200), st.integers(40, 300))
def test_wrapped_lines_fit_and_keep_every_letter(text: str, width: int) -> None:
    lines = list(wrap(text, FONT, width))
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(FONT.getlength(line) <= width or len(line) == 1 for line in lines)


def test_inputs_are_left_of_outputs_at_the_same_height() -> None:
    red, blue = Image.new("RGB", (32, 16), "red"), Image.new("RGBA", (64, 64), "blue")
    sheet = compose([red], [blue], "make it blue")
    assert sheet.getpixel((GAP + 10, GAP + 32)) == (255, 0, 0)
    assert sheet.getpixel((sheet.width - GAP - 10, GAP + 32)) == (0, 0, 255)
    assert sheet.height > 64 + 3 * GAP


def test_long_prompts_make_the_sheet_taller_and_large_outputs_are_shown_smaller() -> None:
    large = Image.new("RGB", (2048, 2048), "blue")
    short, long = compose([], [large], "a dot"), compose([], [large], "a dot " * 200)
    assert short.width == long.width == MAX_HEIGHT + 2 * GAP
    assert long.height > short.height
