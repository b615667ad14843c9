"""Puts scenes into English: varied prompts, as users write them, and a fixed form to read back.

Prompts may leave out what has a default: things are medium, a single thing is in the centre, and
the background is plain white.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sensebatch.tiny.world.scene import (
    COLOURS,
    SHAPES,
    SIZES,
    Background,
    Pattern,
    Scene,
    Thing,
    pick,
)

SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("", "", "", "medium"),
    "large": ("large", "big"),
}
PLACES = {
    (0, 0): ("at the top left", "in the top left corner", "in the upper left corner"),
    (0, 1): ("at the top", "at the top", "at the top center"),
    (0, 2): ("at the top right", "in the top right corner", "in the upper right corner"),
    (1, 0): ("on the left", "at the left", "on the left side"),
    (1, 1): ("in the center", "in the middle", "at the center"),
    (1, 2): ("on the right", "at the right", "on the right side"),
    (2, 0): ("at the bottom left", "in the bottom left corner", "in the lower left corner"),
    (2, 1): ("at the bottom", "at the bottom", "at the bottom center"),
    (2, 2): ("at the bottom right", "in the bottom right corner", "in the lower right corner"),
}
"""Phrases for each (row, column); the first is the fixed form."""
CENTRE = (1, 1)
OPENINGS = (
    "",
    "",
    "",
    "",
    "Draw ",
    "Please draw ",
    "Paint ",
    "Show ",
    "Make ",
    "Create ",
    "Show me ",
    "A picture of ",
    "A picture with ",
    "An image of ",
    "An image with ",
    "Draw a picture of ",
    "Make an image of ",
    "I want ",
    "I would like ",
    "Can you draw ",
)


def article(words: str) -> str:
    """Returns the words after `a` or `an`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def join(parts: Sequence[str]) -> str:
    """Returns `x`, `x and y` or `x, y and z`."""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def fixed_place(cell: tuple[int, int]) -> str:
    """Returns the fixed phrase for a (row, column)."""
    return PLACES[cell][0]


def fixed_thing(thing: Thing) -> str:
    """Returns `a small red circle at the top left`, always in this form."""
    return f"a {thing.size} {thing.colour} {thing.shape} {fixed_place(thing.cell)}"


def fixed_scene(scene: Scene) -> str:
    """Returns a sentence that names every thing of a scene in the fixed form, in reading order."""
    ordered = sorted(scene.things, key=lambda thing: thing.cell)
    text = join([fixed_thing(thing) for thing in ordered]) if ordered else "nothing"
    return f"{text[0].upper()}{text[1:]}."


_FIXED_THING = re.compile(
    rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) "
    rf"({'|'.join(sorted((p[0] for p in PLACES.values()), key=len, reverse=True))})\b",
    re.IGNORECASE,
)


def read_things(text: str) -> tuple[Thing, ...]:
    """Returns the things that a text names in the fixed form, in the text's order."""
    cells = {phrases[0]: cell for cell, phrases in PLACES.items()}
    return tuple(
        Thing(
            shape=match[3].lower(),
            colour=match[2].lower(),
            size=match[1].lower(),
            row=cells[match[4].lower()][0],
            column=cells[match[4].lower()][1],
        )
        for match in _FIXED_THING.finditer(text)
    )


def name_thing(rng: np.random.Generator, thing: Thing, *, size: bool = True) -> str:
    """Returns `small red circle` or the like, mostly without a medium size."""
    word = pick(rng, SIZE_WORDS[thing.size]) if size else ""
    return f"{word} {thing.colour} {thing.shape}".strip()


def name_place(rng: np.random.Generator, cell: tuple[int, int]) -> str:
    """Returns a phrase for a (row, column)."""
    return pick(rng, PLACES[cell])


def describe_fill(rng: np.random.Generator, background: Background) -> str:
    """Returns `a plain mint background` or the like, to follow `on` or `to`."""
    bare = bare_fill(background)
    if background.pattern is Pattern.PLAIN:
        return f"a {pick(rng, ('', 'plain '))}{bare} background"
    if background.pattern in (Pattern.ROWS, Pattern.COLUMNS):
        return pick(rng, (bare, f"a background of {bare}"))
    return pick(rng, (f"a gradient {bare}", f"a background fading {bare}"))


def bare_fill(background: Background) -> str:
    """Returns `mint`, `vertical mint and sky stripes` or the like, always in this form."""
    first, last = background.colours[0], background.colours[-1]
    match background.pattern:
        case Pattern.PLAIN:
            return first
        case Pattern.ROWS:
            return f"horizontal {first} and {last} stripes"
        case Pattern.COLUMNS:
            return f"vertical {first} and {last} stripes"
        case Pattern.DOWN:
            return f"from {first} at the top to {last} at the bottom"
        case Pattern.ACROSS:
            return f"from {first} on the left to {last} on the right"


def _background_ending(rng: np.random.Generator, background: Background) -> str:
    if background == Background() and rng.random() < 0.7:
        return ""
    if rng.random() < 0.15:
        fades = background.pattern in (Pattern.DOWN, Pattern.ACROSS)
        verb = "fades" if fades else "is"
        return f". The background {verb} {bare_fill(background)}"
    return f" on {describe_fill(rng, background)}"


def _relation(rng: np.random.Generator, scene: Scene) -> str | None:
    """Returns things described relative to one another, if their layout allows it."""
    things = {thing.cell: thing for thing in scene.things}

    def name(cell: tuple[int, int]) -> str:
        return article(name_thing(rng, things[cell]))

    across, down = ((1, 0), (1, 2)), ((0, 1), (2, 1))
    if set(things) == set(across):
        left, right = name(across[0]), name(across[1])
        return pick(
            rng,
            (f"{left} to the left of {right}", f"{right} to the right of {left}",
             f"{left} left of {right}"),
        )  # fmt: skip
    if set(things) == set(down):
        top, bottom = name(down[0]), name(down[1])
        return pick(rng, (f"{top} above {bottom}", f"{bottom} below {top}", f"{top} over {bottom}"))
    if set(things) == {*across, CENTRE}:
        left, middle, right = name(across[0]), name(CENTRE), name(across[1])
        return pick(
            rng,
            (f"a row of {left}, {middle} and {right}",
             f"{middle} between {left} on the left and {right} on the right"),
        )  # fmt: skip
    if set(things) == {*down, CENTRE}:
        top, middle, bottom = name(down[0]), name(CENTRE), name(down[1])
        return pick(
            rng,
            (f"a column of {top}, {middle} and {bottom}",
             f"{middle} between {top} at the top and {bottom} at the bottom"),
        )  # fmt: skip
    return None


def describe_things(rng: np.random.Generator, scene: Scene) -> str:
    """Returns the things of a scene with their places, such that only one layout fits."""
    related = _relation(rng, scene) if rng.random() < 0.6 else None
    if related is not None:
        return related
    if len(scene.things) == 1 and scene.things[0].cell == CENTRE and rng.random() < 0.5:
        return article(name_thing(rng, scene.things[0]))
    order = rng.permutation(len(scene.things))
    things = [scene.things[int(index)] for index in order]
    return join([f"{article(name_thing(rng, t))} {name_place(rng, t.cell)}" for t in things])


def describe_scene(rng: np.random.Generator, scene: Scene) -> str:
    """Returns a prompt for a scene, as a user might write it."""
    things = describe_things(rng, scene)
    ending = _background_ending(rng, scene.background)
    return finish(rng, f"{pick(rng, OPENINGS)}{things}{ending}")


def finish(rng: np.random.Generator, text: str) -> str:
    """Returns the sentence, mostly with a capital and sometimes with a full stop."""
    if rng.random() < 0.7 or ". " in text:
        text = text[0].upper() + text[1:]
    return f"{text}." if rng.random() < 0.5 else text
