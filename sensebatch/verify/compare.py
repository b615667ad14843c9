"""How far the files of two runs of the same jobs are apart, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sensebatch.store.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The files of a group of jobs in two runs."""

    num_files: int
    num_equal: int
    """Files with the same bytes in both runs."""
    levels: int = 0
    """Largest difference of a pixel, of 255; images of different sizes count as 255."""
    share: float = 0.0
    """Largest share of an image's values that differ."""

    @property
    def equal(self) -> bool:
        """Whether every file is the same."""
        return self.num_equal == self.num_files


def compare(first: Path, second: Path) -> dict[str, Outcome]:
    """Returns the outcome of each group of jobs, by what their ids have before the last dash.

    Args:
        first: A run's folder.
        second: The other's.
    """
    files = sorted({*_files(first), *_files(second)})
    groups: dict[str, list[str]] = {}
    for name in files:
        groups.setdefault(_group(name), []).append(name)
    return {group: _outcome(first, second, names) for group, names in groups.items()}


def _files(root: Path) -> list[str]:
    run = RunDir(root)
    return [
        path.relative_to(root).as_posix()
        for folder in (run.images, run.text)
        for path in folder.rglob("*")
        if path.is_file()
    ]


def _group(name: str) -> str:
    """Returns the group of `images/edit-1.png` or `images/interleave-1/000.png`."""
    job = name.split("/")[1].removesuffix(".png").removesuffix(".txt")
    return job.rpartition("-")[0]


def _outcome(first: Path, second: Path, names: list[str]) -> Outcome:
    num_equal, levels, share = 0, 0, 0.0
    for name in names:
        pair = first / name, second / name
        if all(path.exists() for path in pair):
            if pair[0].read_bytes() == pair[1].read_bytes():
                num_equal += 1
            elif name.endswith(".png"):
                found = _difference(*pair)
                levels, share = max(levels, found[0]), max(share, found[1])
    return Outcome(num_files=len(names), num_equal=num_equal, levels=levels, share=share)


def _difference(first: Path, second: Path) -> tuple[int, float]:
    """Returns the largest difference of two images, and the share of values that differ."""
    pixels = []
    for path in (first, second):
        with Image.open(path) as image:
            pixels.append(np.asarray(image, np.int16))
    if pixels[0].shape != pixels[1].shape:
        return 255, 1.0
    off = np.abs(pixels[0] - pixels[1])
    return int(off.max()), float((off > 0).mean())


def worst(outcomes: Mapping[str, Outcome]) -> tuple[int, float]:
    """Returns the largest difference over all groups, and the largest share."""
    return (
        max((outcome.levels for outcome in outcomes.values()), default=0),
        max((outcome.share for outcome in outcomes.values()), default=0.0),
    )
