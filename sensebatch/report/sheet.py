"""Lays images out on a sheet, each with a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE = 176
"""Side of the square that every image is scaled to fit, in pixels."""
MARGIN = 8
COLUMNS = 8
FONT_PIXELS = 10
LINE_CHARACTERS = 34
MAX_LINES = 5
PAPER, INK = (238, 238, 238), (40, 40, 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """An image with its caption."""

    image: Image.Image
    caption: str


def contact_sheet(tiles: Sequence[Tile], columns: int = COLUMNS) -> Image.Image:
    """Lays tiles out in rows, in their order; a row is as tall as its images and captions."""
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    drawn = [_row(row, columns) for row in rows]
    sheet = Image.new("RGB", (drawn[0].width, sum(row.height for row in drawn)), PAPER)
    top = 0
    for row in drawn:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(tiles: Sequence[Tile], columns: int) -> Image.Image:
    images = [_fitted(tile.image) for tile in tiles]
    captions = [_wrapped(tile.caption) for tile in tiles]
    tallest = max(image.height for image in images)
    lines = max(caption.count("\n") + 1 for caption in captions)
    cell = SIDE + MARGIN
    height = tallest + lines * (FONT_PIXELS + 4) + 2 * MARGIN
    row = Image.new("RGB", (columns * cell + MARGIN, height), PAPER)
    pen, font = ImageDraw.Draw(row), ImageFont.load_default(FONT_PIXELS)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = MARGIN + index * cell
        row.paste(image, (left + (SIDE - image.width) // 2, MARGIN + tallest - image.height))
        pen.multiline_text((left, MARGIN + tallest + 4), caption, INK, font, spacing=2)
    return row


def _fitted(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _wrapped(caption: str) -> str:
    lines = textwrap.wrap(caption, LINE_CHARACTERS, max_lines=MAX_LINES, placeholder=" ...")
    return "\n".join(lines)
