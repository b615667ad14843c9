"""A sheet shows every image of a run, in order."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sensebatch.report.sheet import MARGIN, SIDE, Tile, contact_sheet
from sensebatch.tiny.sheet import run_tiles

COLOURS = [(20 * index, 0, 0) for index in range(10)]


def test_sheet_shows_every_image_in_order() -> None:
    tiles = [
        Tile(image=Image.new("RGB", (64, 64), colour), caption="a line of text")
        for colour in COLOURS
    ]
    sheet = contact_sheet(tiles, columns=4)
    cell, row = SIDE + MARGIN, sheet.height // 3
    for index, colour in enumerate(COLOURS):
        place = (index % 4 * cell + cell // 2, index // 4 * row + SIDE // 2)
        assert sheet.getpixel(place) == colour


def test_long_captions_stay_below_their_own_image() -> None:
    tile = Tile(image=Image.new("RGB", (96, 32), "blue"), caption="words " * 200)
    sheet = contact_sheet([tile, tile], columns=2)
    assert sheet.width == 2 * (SIDE + MARGIN) + MARGIN
    assert sheet.height < 2 * SIDE


def test_tiles_of_a_run_are_those_of_its_log(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "b.png")
    rows = [
        {"status": "failed", "task": "t2i", "think": False, "prompt": "x", "image_paths": None},
        {"status": "done", "task": "t2i", "think": True, "prompt": "one", "image_paths": ["a.png"]},
        {
            "status": "done",
            "task": "interleave",
            "think": False,
            "prompt": "two",
            "image_paths": ["b.png", "a.png"],
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    tiles = run_tiles(tmp_path)
    assert [tile.caption for tile in tiles] == ["t2i, think: one", "interleave: two", "(2)"]
    assert [tile.image.getpixel((0, 0)) for tile in tiles] == [
        (255, 0, 0),
        (0, 0, 255),
        (255, 0, 0),
    ]
