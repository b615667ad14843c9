"""Composes images for people: inputs, a line, outputs, and the prompt below them. Pillow only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

MAX_HEIGHT = 1024
"""In pixels; taller outputs are scaled down."""
GAP = 16
BACKGROUND = "white"
INK = "black"
LINE = "#bbbbbb"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def compose(
    inputs: Sequence[Image.Image], outputs: Sequence[Image.Image], prompt: str
) -> Image.Image:
    """Returns one image of a job: all images at one height, with the prompt wrapped below them.

    Args:
        inputs: The images that the job started from; may be empty.
        outputs: The images that it made; at least one.
        prompt: Drawn in Pillow's own font, which has only Latin letters.
    """
    height = min(MAX_HEIGHT, max(image.height for image in outputs))
    left = [_at_height(image, height) for image in inputs]
    right = [_at_height(image, height) for image in outputs]
    widths = [image.width for image in (*left, *right)]
    width = sum(widths) + GAP * (len(widths) + 1) + (2 * GAP if left else 0)
    size = max(14, height // 32)
    font = ImageFont.load_default(size)
    lines = list(wrap(prompt, font, width - 2 * GAP))
    line_height = round(size * 1.4)
    sheet = Image.new("RGB", (width, height + 3 * GAP + line_height * len(lines)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    x = _paste(sheet, left, GAP)
    if left:
        x += GAP
        draw.line([(x - GAP // 2, GAP), (x - GAP // 2, GAP + height)], fill=LINE, width=2)
        x += GAP
    _paste(sheet, right, x)
    for number, line in enumerate(lines):
        draw.text((GAP, height + 2 * GAP + number * line_height), line, fill=INK, font=font)
    return sheet


def wrap(text: str, font: Font, width: float) -> Iterator[str]:
    """Yields the lines of a text, at most `width` pixels wide; longer words are broken."""
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            *pieces, line = _pieces(word, font, width)
            yield from pieces
        yield line


def _pieces(word: str, font: Font, width: float) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _at_height(image: Image.Image, height: int) -> Image.Image:
    image = image.convert("RGB")
    if image.height == height:
        return image
    width = max(1, round(image.width * height / image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _paste(sheet: Image.Image, images: Sequence[Image.Image], x: int) -> int:
    """Pastes images side by side, and returns where the next one would go."""
    for image in images:
        sheet.paste(image, (x, GAP))
        x += image.width + GAP
    return x
