"""Scenes of the small world: flat shapes on a soft background. Knows no pixels.

A scene has one to three things of different colours in different cells of a 3 by 3 layout. Things
and backgrounds have separate sets of colours, so that an image can be read by colour alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np

from sensebatch.resolutions import BUCKETS_TINY, Resolution

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = {
    "red": (220, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (245, 215, 30),
    "lime": (140, 215, 40),
    "green": (20, 125, 55),
    "cyan": (20, 185, 200),
    "blue": (30, 85, 225),
    "navy": (20, 30, 120),
    "purple": (125, 45, 170),
    "pink": (245, 75, 170),
    "brown": (125, 70, 25),
    "black": (20, 20, 20),
}
"""Colours of things in 8-bit RGB, each with at least one dark channel."""
SOFT_COLOURS = {
    "white": (252, 252, 252),
    "cream": (250, 240, 195),
    "mint": (195, 238, 212),
    "sky": (195, 222, 250),
    "lavender": (222, 205, 246),
    "rose": (252, 200, 208),
    "silver": (208, 208, 210),
}
"""Colours of backgrounds in 8-bit RGB; every channel is bright."""
SIZES = {"small": 0.08, "medium": 0.115, "large": 0.15}
"""Radius as a fraction of the image's shorter side."""
EXTENT = 1.1
"""Half the side of the box around any shape, in radii."""
GAP = 0.03
"""Smallest distance between the boxes of two things, as a fraction of the shorter side."""
CELLS = tuple(itertools.product(range(3), range(3)))
"""(row, column) of each place of the layout."""
MAX_THINGS = 3


class Pattern(StrEnum):
    """How a background is filled. The first colour is at the top or at the left."""

    PLAIN = "plain"
    ROWS = "rows"
    """Horizontal stripes."""
    COLUMNS = "columns"
    """Vertical stripes."""
    DOWN = "down"
    """A gradient from top to bottom."""
    ACROSS = "across"
    """A gradient from left to right."""


class Split(StrEnum):
    """Which combinations of shape, colour and place examples may show."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One flat shape."""

    shape: str
    colour: str
    size: str
    row: int
    column: int

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) in the 3 by 3 layout."""
        return self.row, self.column

    @property
    def is_held_out(self) -> bool:
        """Whether shape, colour and place are one of the tenth of combinations never trained on."""
        shape = SHAPES.index(self.shape)
        colour = list(COLOURS).index(self.colour)
        return (3 * shape + 5 * colour + 7 * (3 * self.row + self.column)) % 10 == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """The background of a scene; `PLAIN` has one colour, the other patterns have two."""

    pattern: Pattern = Pattern.PLAIN
    colours: tuple[str, ...] = ("white",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The description of an image."""

    resolution: Resolution
    background: Background
    things: tuple[Thing, ...]

    @property
    def short_side(self) -> int:
        """The shorter side in pixels, the unit of sizes."""
        return min(self.resolution.height, self.resolution.width)

    def radius(self, thing: Thing) -> float:
        """Returns a thing's radius in pixels."""
        return SIZES[thing.size] * self.short_side

    def centre(self, thing: Thing) -> tuple[float, float]:
        """Returns (y, x) of a thing's centre in pixels."""
        size = self.resolution
        return (thing.row + 0.5) / 3 * size.height, (thing.column + 0.5) / 3 * size.width

    def box(self, thing: Thing, margin: float = 0.0) -> tuple[int, int, int, int]:
        """Returns the box (top, left, bottom, right) around a thing, clipped to the image."""
        (y, x), reach = self.centre(thing), EXTENT * self.radius(thing) + margin
        size = self.resolution
        return (
            max(0, math.floor(y - reach)),
            max(0, math.floor(x - reach)),
            min(size.height, math.ceil(y + reach)),
            min(size.width, math.ceil(x + reach)),
        )

    @property
    def is_valid(self) -> bool:
        """Whether colours and places differ and no two things are too close."""
        things = self.things
        if len({t.colour for t in things}) < len(things) or len(things) > MAX_THINGS:
            return False
        for a, b in itertools.combinations(things, 2):
            (ay, ax), (by, bx) = self.centre(a), self.centre(b)
            reach = EXTENT * (self.radius(a) + self.radius(b)) + GAP * self.short_side
            if max(abs(ay - by), abs(ax - bx)) < reach:
                return False
        return True


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """Returns one of the choices, all equally likely."""
    return choices[int(rng.integers(len(choices)))]


def sample_resolution(rng: np.random.Generator) -> Resolution:
    """Returns a random size of the tiny checkpoint; half of them are square."""
    if rng.random() < 0.5:
        return BUCKETS_TINY["1:1"]
    return pick(rng, [size for name, size in BUCKETS_TINY.items() if name != "1:1"])


def sample_background(rng: np.random.Generator) -> Background:
    """Returns a random background; half of them are plain."""
    names = tuple(SOFT_COLOURS)
    first = pick(rng, names)
    if rng.random() < 0.5:
        return Background(colours=(first,))
    second = pick(rng, [name for name in names if name != first])
    pattern = pick(rng, [p for p in Pattern if p is not Pattern.PLAIN])
    return Background(pattern=pattern, colours=(first, second))


def sample_thing(
    rng: np.random.Generator,
    split: Split,
    *,
    cells: Sequence[tuple[int, int]] = CELLS,
    without: Sequence[str] = (),
) -> Thing:
    """Returns a thing of the split in one of the cells, in a colour that is not in `without`."""
    while True:
        row, column = pick(rng, cells)
        thing = Thing(
            shape=pick(rng, SHAPES),
            colour=pick(rng, tuple(COLOURS)),
            size=pick(rng, ("small", "medium", "medium", "large")),
            row=row,
            column=column,
        )
        if thing.colour not in without and thing.is_held_out == (split is Split.HELD_OUT):
            return thing


LAYOUTS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((1, 0), (1, 2)),
    ((0, 1), (2, 1)),
    ((1, 0), (1, 1), (1, 2)),
    ((0, 1), (1, 1), (2, 1)),
)
"""Places of things that are described relative to one another, such as left of or in a row."""


def sample_scene(
    rng: np.random.Generator,
    split: Split,
    resolution: Resolution,
    *,
    max_things: int = MAX_THINGS,
) -> Scene:
    """Returns a valid scene whose things all belong to the split."""
    while True:
        layout = pick(rng, LAYOUTS)
        if rng.random() < 0.25 and len(layout) <= max_things:
            places: list[Sequence[tuple[int, int]]] = [(cell,) for cell in layout]
        elif rng.random() < 0.1:
            places = [((1, 1),)]
        else:
            count = int(rng.choice(MAX_THINGS, p=(0.4, 0.35, 0.25))) + 1
            places = [CELLS] * min(count, max_things)
        things: list[Thing] = []
        for cells in places:
            colours = [thing.colour for thing in things]
            things.append(sample_thing(rng, split, cells=cells, without=colours))
        scene = Scene(
            resolution=resolution, background=sample_background(rng), things=tuple(things)
        )
        if scene.is_valid:
            return scene
