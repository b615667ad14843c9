"""Puts images and prompts on a sheet: `python -m sensebatch.tiny.sheet SHEET RUN [INPUT ...]`.

Knows a run by its log alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer
from PIL import Image

from sensebatch.report.sheet import Tile, contact_sheet


def run_tiles(folder: Path) -> list[Tile]:
    """Returns every image of a run, in the order in which its jobs were done."""
    columns = ["task", "think", "prompt", "image_paths"]
    tiles = []
    for row in pq.read_table(folder / "log.parquet", columns=columns).to_pylist():
        for number, path in enumerate(row["image_paths"] or (), start=1):
            task = f"{row['task']}, think" if row["think"] else row["task"]
            caption = f"{task}: {row['prompt']}" if number == 1 else f"({number})"
            tiles.append(Tile(image=Image.open(folder / path), caption=caption))
    return tiles


def main(
    sheet: Annotated[
        Path, typer.Argument(help="The image to write; its suffix decides the format.")
    ],
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    inputs: Annotated[list[Path] | None, typer.Argument(help="Images to show first.")] = None,
) -> None:
    """Puts every image of a run on one sheet, with its prompt."""
    tiles = [Tile(image=Image.open(f), caption=f"input: {f.name}") for f in inputs or ()]
    contact_sheet([*tiles, *run_tiles(run)]).save(sheet, quality=85)


if __name__ == "__main__":
    typer.run(main)
