"""A gallery of any size without a run: `python -m tests.gallery.synthetic OUT --items 100000`.

Its items are made up; its pages, columns and data files are written as those of a real one. The
sheets are copies of a few, under as many names as there would be, so that a browser reads and
decodes each.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from sensebatch.gallery.data import Parts, Run, write_data
from sensebatch.gallery.files import SHEETS, DataFiles, write_page
from sensebatch.gallery.items import Item
from sensebatch.gallery.sheets import ACROSS, MARGIN, PER_SHEET, Place, Sheets

COLOURS = ["red", "green", "blue", "yellow", "navy", "pink", "black", "orange"]
THINGS = ["lighthouse", "schooner", "harbour", "cathedral", "violin", "orchard", "tram", "fox"]
LIGHTS = ["at dawn", "in fog", "at noon", "under a storm", "by lamplight", "in snow"]
SIZES = [(1024, 1024), (1536, 864), (864, 1536)]
SIDE = 192
NUM_DRAWN = 24
"""Sheets that are really different."""


def make_items(count: int) -> Iterator[Item]:
    """Yields items with prompts of a sentence or two, three seeds of each."""
    chance = random.Random(7)
    for number in range(count):
        if number % 3 == 0:
            words = f"A {chance.choice(COLOURS)} {chance.choice(THINGS)} {chance.choice(LIGHTS)}"
            extra = " ".join(f"{chance.choice(COLOURS)} {chance.choice(THINGS)}s" for _ in range(6))
            prompt = f"{words}, number {number // 3}, seen across the water with {extra}"
            size = chance.choice(SIZES)
            cfg_scale = chance.choice([1.0, 4.0, 7.5])
        key = hashlib.sha256(str(number).encode()).hexdigest()
        yield Item(
            id=f"item-{number:06d}",
            key=key,
            prompt=prompt,
            values=_values(number, size, cfg_scale, chance),
            matrix={"light": LIGHTS[number // 3 % len(LIGHTS)]},
            metadata={"artist": f"artist {number % 40}"},
            images=() if number % 500 == 499 else ((f"images/item-{number:06d}.png", key),),
            snippet=None,
            details={
                "manifest": "- id: x\n",
                "command": "sensebatch t2i",
                "more": [["batch", key[:16]]],
            },
        )


def _values(
    number: int, size: tuple[int, int], cfg_scale: float, chance: random.Random
) -> dict[str, Any]:
    failed = number % 500 == 499
    return {
        "status": "failed" if failed else "done",
        "error_type": "OutOfMemoryError" if failed else None,
        "task": "t2i",
        "tags": (chance.choice(["night", "day"]), chance.choice(["wide", "close"])),
        "size": f"{size[0]}x{size[1]}",
        "width": size[0],
        "height": size[1],
        "finish_reason": "complete",
        "num_images": 0 if failed else 1,
        "seed": number % 3 + 1,
        "num_steps": 50,
        "cfg_scale": cfg_scale,
        "cfg_norm": "none",
        "timestep_shift": 3.0,
        "think": number % 7 == 0,
        "think_tokens": chance.randrange(400) if number % 7 == 0 else 0,
        "total_s": chance.uniform(20, 60),
        "encode_s": chance.uniform(0.1, 0.4),
        "step_s": chance.uniform(0.4, 1.2),
        "image_tok_per_s": chance.uniform(40, 90),
        "peak_allocated_bytes": chance.randrange(30 * 2**30),
        "model": "SenseNova-U1-8B-MoT",
        "dtype": "bfloat16",
        "attn_backend": "cudnn",
        "batch_size": 8,
        "session": 1,
    }


def make_synthetic(out: Path, count: int) -> Path:
    """Writes a gallery of `count` items; returns its page."""
    (out / SHEETS).mkdir(parents=True)
    files, parts = DataFiles(out), Parts()
    sheets = Sheets(side=SIDE)
    for item in make_items(count):
        parts.add(item, 0, files)
        for _, digest in item.images:
            number = len(sheets.places)
            sheets.places[digest] = Place(number=number, width=SIDE, height=SIDE)
    drawn = [_sheet(number, sheets.cell) for number in range(NUM_DRAWN)]
    for number in range(-(-len(sheets.places) // PER_SHEET)):
        name = f"{number:020d}.webp"
        sheets.names.append(name)
        (out / SHEETS / name).write_bytes(drawn[number % NUM_DRAWN])
    run = Run(root=out / "run", name="synthetic", id="0123456789ab")
    write_data(out, files, runs=[run], parts=parts, sheets=sheets, copies_images=False)
    write_page(out)
    return out / "index.html"


def _sheet(number: int, cell: int) -> bytes:
    """Returns a sheet of soft noise, which takes about as long to decode as photographs."""
    chance = random.Random(number)
    sheet = Image.new("RGB", (ACROSS * cell, ACROSS * cell))
    for place in range(PER_SHEET):
        noise = Image.frombytes("RGB", (24, 24), chance.randbytes(24 * 24 * 3))
        thumb = noise.resize((cell - 2 * MARGIN,) * 2, Image.Resampling.BICUBIC)
        sheet.paste(thumb, (place % ACROSS * cell + MARGIN, place // ACROSS * cell + MARGIN))
    content = io.BytesIO()
    sheet.save(content, "WEBP", quality=80, method=2)
    return content.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=100_000)
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    print(make_synthetic(given.out, given.items))
