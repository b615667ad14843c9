"""Reads an image of the world: which things are where, on which background.

Goes by colours and outlines, and tolerates what a generator does to them: slight blur, noise and
shifted colours. A region that is not a thing of the world is counted, and not guessed at.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter

from sensebatch.tiny.world.draw import background_weight, shape_distances
from sensebatch.tiny.world.scene import (
    COLOURS,
    SHAPES,
    SIZES,
    SOFT_COLOURS,
    Background,
    Pattern,
    Scene,
    Thing,
)

BRIGHT = 0.52
"""A pixel whose darkest channel is brighter than this, between the two sets of colours, is
background."""
SPECK = 0.25
"""Regions smaller than this fraction of the smallest thing are ignored."""
MIN_OVERLAP = 0.6
"""Smallest intersection over union of a region and the shape that it is taken for."""
MIN_PURITY = 0.6
"""Smallest share of a region's pixels that must have its colour."""
MIN_CONTRAST = 20 / 255
"""Smallest distance of a background's two colours; below it, the background is plain."""

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The content of an image."""

    background: Background
    things: tuple[Thing, ...]
    unclear: int
    """Regions that are neither background nor a thing of the world."""

    def shows(self, scene: Scene) -> bool:
        """Whether the image shows exactly the scene's things: colours, shapes, sizes and places."""
        return self.unclear == 0 and Counter(self.things) == Counter(scene.things)


def read_image(image: npt.NDArray[np.uint8]) -> Reading:
    """Returns the content of an 8-bit RGB image `[height, width, 3]`."""
    smooth = Image.fromarray(image).filter(ImageFilter.MedianFilter(3))
    pixels: Pixels = np.asarray(smooth, dtype=np.float32) / np.float32(255)
    dark = pixels.min(axis=-1) < BRIGHT
    short_side = min(image.shape[:2])
    smallest = min(SIZES.values()) * short_side
    regions = [r for r in _regions(dark) if r[0].size >= SPECK * 1.5 * smallest**2]
    found = [_read_thing(pixels, region) for region in regions]
    things = tuple(thing for thing in found if thing is not None)
    return Reading(
        background=_read_background(pixels, dark),
        things=tuple(sorted(things, key=lambda thing: thing.cell)),
        unclear=len(found) - len(things),
    )


def _regions(mask: Mask) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """Returns (rows, columns) of the pixels in each connected region of a mask.

    Runs of pixels in a row are joined with the runs that they touch in the row above (union-find).
    """
    parent: list[int] = []

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    runs: list[tuple[int, int, int]] = []
    above: list[int] = []
    for y in range(mask.shape[0]):
        edges = np.flatnonzero(np.diff(mask[y].astype(np.int8), prepend=0, append=0))
        current = []
        for start, end in edges.reshape(-1, 2).tolist():
            index = len(runs)
            runs.append((y, start, end))
            parent.append(index)
            current.append(index)
            for other in above:
                if runs[other][1] <= end and start <= runs[other][2]:
                    parent[root(other)] = root(index)
        above = current
    members: dict[int, list[tuple[int, int, int]]] = {}
    for index, run in enumerate(runs):
        members.setdefault(root(index), []).append(run)
    return [
        (
            np.concatenate([np.full(end - start, y) for y, start, end in group]),
            np.concatenate([np.arange(start, end) for _, start, end in group]),
        )
        for group in members.values()
    ]


def _read_thing(
    pixels: Pixels, region: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
) -> Thing | None:
    """Returns the thing that a region shows, or None."""
    height, width = pixels.shape[:2]
    rows, columns = region
    colour = _read_colour(pixels[rows, columns])
    top, left = int(rows.min()), int(columns.min())
    box = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), dtype=np.bool_)
    box[rows - top, columns - left] = True
    shape, radius, overlap = _read_shape(box)
    if colour is None or overlap < MIN_OVERLAP:
        return None
    short_side = min(height, width)
    size = min(SIZES, key=lambda name: abs(math.log(radius / (SIZES[name] * short_side))))
    row = int(3 * (top + box.shape[0] / 2) / height)
    column = int(3 * (left + box.shape[1] / 2) / width)
    return Thing(shape=shape, colour=colour, size=size, row=row, column=column)


def _read_colour(pixels: Pixels) -> str | None:
    """Returns the colour of a region's pixels `[pixels, 3]`, or None if it has several.

    Only the darker half counts, because a blurred edge makes every colour brighter.
    """
    palette = np.array(list(COLOURS.values()), dtype=np.float32) / 255
    pixels = pixels[np.argsort(pixels.min(axis=-1))[: max(1, len(pixels) // 2)]]
    nearest = np.linalg.norm(pixels[:, None] - palette, axis=-1).argmin(axis=-1)
    counts = np.bincount(nearest, minlength=len(palette))
    best = int(counts.argmax())
    return list(COLOURS)[best] if counts[best] >= MIN_PURITY * len(pixels) else None


@lru_cache(maxsize=1)
def _unit_areas() -> tuple[float, ...]:
    """Returns the area of each shape with radius 1."""
    side = torch.linspace(-1.5, 1.5, 601)
    y, x = torch.meshgrid(side, side, indexing="ij")
    cell = (3 / 600) ** 2
    return tuple(
        float((distance < 0).sum()) * cell for distance in shape_distances(y, x, torch.tensor(1.0))
    )


def _read_shape(box: Mask) -> tuple[str, float, float]:
    """Returns the shape that fits a region's mask best, with its radius in pixels and overlap.

    Each shape is drawn in the middle of the region's box, with the region's area, and compared.
    """
    height, width = box.shape
    down = torch.arange(height, dtype=torch.float32) + 0.5 - height / 2
    across = torch.arange(width, dtype=torch.float32) + 0.5 - width / 2
    y, x = torch.meshgrid(down, across, indexing="ij")
    area = float(box.sum())
    best = ("", 1.0, 0.0)
    for index, (shape, unit) in enumerate(zip(SHAPES, _unit_areas(), strict=True)):
        radius = math.sqrt(area / unit)
        drawn = shape_distances(y, x, torch.tensor(radius))[index].numpy() < 0
        # Parts of the drawn shape outside the region's box are missing from the region.
        outside = max(0.0, area - float(drawn.sum()))
        union = float((drawn | box).sum()) + outside
        overlap = float((drawn & box).sum()) / union
        if overlap > best[2]:
            best = (shape, radius, overlap)
    return best


def _read_background(pixels: Pixels, dark: Mask) -> Background:
    """Returns the background that best fits the pixels away from things, by least squares."""
    clear = ~_grow(dark, 3)
    if not clear.any():
        return Background()
    values = pixels[clear].astype(np.float64)
    height, width = dark.shape
    plain = values.mean(axis=0)
    best, best_error = Background(colours=(_soft(plain),)), float(((values - plain) ** 2).sum())
    for pattern in Pattern:
        if pattern is Pattern.PLAIN:
            continue
        second = background_weight(pattern, height, width).numpy()[clear].astype(np.float64)
        design = np.stack([1 - second, second], axis=1)
        gram = design.T @ design
        if np.linalg.cond(gram) > 1e6:
            continue
        colours = np.linalg.solve(gram, design.T @ values)
        error = float(((values - design @ colours) ** 2).sum())
        contrast = float(np.linalg.norm(colours[0] - colours[1]))
        if error < best_error and contrast > MIN_CONTRAST:
            names = (_soft(colours[0]), _soft(colours[1]))
            best, best_error = Background(pattern=pattern, colours=names), error
    return best


def _soft(colour: npt.NDArray[np.float64]) -> str:
    return min(
        SOFT_COLOURS, key=lambda name: float(np.linalg.norm(colour * 255 - SOFT_COLOURS[name]))
    )


def _grow(mask: Mask, reach: int) -> Mask:
    """Returns a mask grown by a square of `reach` pixels in every direction."""
    size = 2 * reach + 1
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.filter(ImageFilter.MaxFilter(size))) > 0


def unchanged_psnr(
    image: npt.NDArray[np.uint8],
    source: npt.NDArray[np.uint8],
    scene: Scene,
    changed: tuple[Thing, ...],
) -> float:
    """Returns the PSNR in dB of an image against its source, outside the boxes of changed things.

    Args:
        image: 8-bit RGB of the source's size.
        source: The image that was edited.
        scene: The source's scene, which gives the boxes their scale.
        changed: Things before and after the change.
    """
    keep = np.ones(image.shape[:2], dtype=np.bool_)
    for thing in changed:
        top, left, bottom, right = scene.box(thing, margin=2)
        keep[top:bottom, left:right] = False
    return _psnr(image[keep], source[keep])


def things_psnr(image: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8], scene: Scene) -> float:
    """Returns the PSNR in dB of an image against its source, inside the scene's things.

    This is for edits of the background, which leave nothing else unchanged.
    """
    y, x = np.indices(image.shape[:2], dtype=np.float32) + 0.5
    keep = np.zeros(image.shape[:2], dtype=np.bool_)
    for thing in scene.things:
        centre_y, centre_x = scene.centre(thing)
        distances = shape_distances(
            torch.from_numpy(y - np.float32(centre_y)),
            torch.from_numpy(x - np.float32(centre_x)),
            torch.tensor(scene.radius(thing)),
        )
        keep |= distances[SHAPES.index(thing.shape)].numpy() < -2
    return _psnr(image[keep], source[keep])


def _psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    error = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return 10 * math.log10(255**2 / max(error, 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThingScore:
    """How one thing that was asked for came out."""

    colour: bool
    shape: bool
    place: bool
    size: bool


def score_things(reading: Reading, scene: Scene) -> tuple[ThingScore, ...]:
    """Returns a score for each thing of the scene, from the matching that gets most right.

    Things are few, so every matching is tried. A thing that is left without a match has no score.
    """
    wanted = scene.things
    candidates = [*reading.things[:6], *[None] * len(wanted)]
    best: tuple[ThingScore, ...] = ()
    best_total = -1
    for chosen in itertools.permutations(candidates, len(wanted)):
        scores = tuple(_score(seen, thing) for seen, thing in zip(chosen, wanted, strict=True))
        total = sum(4 * s.colour + 3 * s.place + 2 * s.shape + s.size for s in scores)
        if total > best_total:
            best, best_total = scores, total
    return best


def _score(seen: Thing | None, wanted: Thing) -> ThingScore:
    if seen is None:
        return ThingScore(colour=False, shape=False, place=False, size=False)
    return ThingScore(
        colour=seen.colour == wanted.colour,
        shape=seen.shape == wanted.shape,
        place=seen.cell == wanted.cell,
        size=seen.size == wanted.size,
    )
