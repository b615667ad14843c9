"""Interleaved stories: images that change step by step, each after a line about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from sensebatch.tiny.world.captions import (
    CENTRE,
    article,
    describe_fill,
    finish,
    fixed_scene,
    fixed_thing,
    join,
    name_place,
    name_thing,
)
from sensebatch.tiny.world.examples import Example, Part
from sensebatch.tiny.world.scene import (
    CELLS,
    COLOURS,
    SHAPES,
    SIZES,
    Background,
    Scene,
    Split,
    Thing,
    pick,
    sample_background,
)

NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """The frames of a story, and the prompts that ask for it."""

    frames: tuple[tuple[Thing, ...], ...]
    from_text: str
    """A prompt for all frames."""
    from_image: str
    """A prompt for the frames after the first, which is given."""


def _thing(rng: np.random.Generator) -> Thing:
    row, column = pick(rng, CELLS)
    size = pick(rng, ("small", "medium", "medium", "large"))
    colour, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
    return Thing(shape=shape, colour=colour, size=size, row=row, column=column)


_WAYS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


def _moving(rng: np.random.Generator) -> Story:
    thing = _thing(rng)
    way = pick(rng, tuple(_WAYS))
    rows, columns = _WAYS[way]
    frames = tuple(
        (
            replace(
                thing,
                row=1 + rows * step if rows else thing.row,
                column=1 + columns * step if columns else thing.column,
            ),
        )
        for step in (-1, 0, 1)
    )
    name = article(name_thing(rng, thing))
    start, middle, end = (frame[0].cell for frame in frames)
    to_way = way if rows else f"to the {way}"
    if rng.random() < 0.3:
        text = f"{name} moving from {_spot(rng, start)} to {_spot(rng, end)}"
    elif middle == CENTRE:
        text = f"{name} moving {to_way}"
    else:
        text = f"{name} moving {to_way}, starting {name_place(rng, start)}"
    return Story(frames=frames, from_text=text, from_image=f"Move the {thing.shape} {to_way}")


def _spot(rng: np.random.Generator, cell: tuple[int, int]) -> str:
    """Returns a place without its preposition, such as `the top left`."""
    return name_place(rng, cell).split(" ", 1)[1]


def _resizing(rng: np.random.Generator) -> Story:
    thing = _thing(rng)
    sizes = tuple(SIZES)
    word, verb = "growing", "grow"
    if rng.random() < 0.5:
        sizes, word, verb = sizes[::-1], "shrinking", "shrink"
    frames = tuple((replace(thing, size=size),) for size in sizes)
    text = f"{article(name_thing(rng, thing, size=False))}{_where(rng, thing)} {word}"
    return Story(frames=frames, from_text=text, from_image=f"Let the {thing.shape} {verb}")


def _where(rng: np.random.Generator, thing: Thing) -> str:
    """Returns the place after a space; the centre may be left out."""
    if thing.cell == CENTRE and rng.random() < 0.6:
        return ""
    return f" {name_place(rng, thing.cell)}"


def _recolouring(rng: np.random.Generator) -> Story:
    thing = _thing(rng)
    names = tuple(COLOURS)
    count = int(rng.integers(2, 5))
    colours = [names[int(i)] for i in rng.choice(len(names), count, replace=False)]
    frames = tuple((replace(thing, colour=colour),) for colour in colours)
    bare = replace(thing, colour="")
    name = " ".join(name_thing(rng, bare).split())
    text = (
        f"{article(name)}{_where(rng, thing)} changing color from {colours[0]} "
        f"to {' to '.join(colours[1:])}"
    )
    then = ", then ".join(colours[1:])
    return Story(frames=frames, from_text=text, from_image=f"Make the {thing.shape} {then}")


def _reshaping(rng: np.random.Generator) -> Story:
    thing = _thing(rng)
    count = int(rng.integers(2, 4))
    shapes = [SHAPES[int(i)] for i in rng.choice(len(SHAPES), count, replace=False)]
    frames = tuple((replace(thing, shape=shape),) for shape in shapes)
    name = name_thing(rng, frames[0][0])
    then = ", then ".join(f"a {shape}" for shape in shapes[1:])
    text = f"{article(name)}{_where(rng, thing)} turning into {then}"
    return Story(frames=frames, from_text=text, from_image=f"Turn the {shapes[0]} into {then}")


def _appearing(rng: np.random.Generator) -> Story:
    count = int(rng.integers(2, 4))
    things: list[Thing] = []
    while len(things) < count:
        thing = _thing(rng)
        if all(thing.colour != o.colour and thing.cell != o.cell for o in things):
            things.append(thing)
    phrases = [f"{article(name_thing(rng, t))} {name_place(rng, t.cell)}" for t in things]
    frames = tuple(tuple(things[: i + 1]) for i in range(count))
    return Story(
        frames=frames,
        from_text=f"{join(phrases)} appearing one by one",
        from_image=f"Add {', then '.join(phrases[1:])}",
    )


_STORIES: dict[str, Callable[[np.random.Generator], Story]] = {
    "move": _moving,
    "size": _resizing,
    "colour": _recolouring,
    "shape": _reshaping,
    "appear": _appearing,
}


def _fits(frames: tuple[Scene, ...], split: Split) -> bool:
    if not all(frame.is_valid for frame in frames):
        return False
    held_out = any(thing.is_held_out for frame in frames for thing in frame.things)
    return held_out == (split is Split.HELD_OUT)


def story(
    rng: np.random.Generator, split: Split, resolution: Resolution, *, think: bool
) -> Example:
    """Returns an interleave example; a third of them begin with an input image.

    In held-out examples, at least one thing of one image is a combination never trained on.
    """
    while True:
        name = pick(rng, tuple(_STORIES))
        found = _STORIES[name](rng)
        background = sample_background(rng) if rng.random() < 0.5 else Background()
        scenes = tuple(
            Scene(resolution=resolution, background=background, things=things)
            for things in found.frames
        )
        if _fits(scenes, split):
            break
    given = scenes[:1] if rng.random() < 0.33 else ()
    shown = scenes[len(given) :]
    prompt = found.from_image if given else _ask(rng, found.from_text, len(shown), background)
    if given and rng.random() < 0.4:
        prompt += _in_steps(rng, len(shown))
    return Example(
        task=Task.INTERLEAVE,
        kind=f"story-{name}-image" if given else f"story-{name}",
        prompt=finish(rng, prompt),
        inputs=given,
        think=plan_text(shown) if think else None,
        answer=answer_parts(shown),
    )


def _in_steps(rng: np.random.Generator, count: int) -> str:
    if count == 1:
        return pick(rng, (" in one step", " in one picture"))
    number = NUMBERS[count]
    return pick(rng, (f" in {number} steps", f" in {number} steps", f" in {number} pictures"))


def _ask(rng: np.random.Generator, text: str, count: int, background: Background) -> str:
    opening = pick(rng, ("Show ", "Show ", "Draw ", "Show me ", "Tell a story of ", "Please show "))
    ending = _in_steps(rng, count)
    if background != Background() or rng.random() < 0.3:
        ending += f" on {describe_fill(rng, background)}"
    return f"{opening}{text}{ending}"


def step_text(number: int, scene: Scene) -> str:
    """Returns the line before an image of a story."""
    return f"Step {number}: {join([fixed_thing(thing) for thing in scene.things])}.\n"


def plan_text(scenes: tuple[Scene, ...]) -> str:
    """Returns the think text of a story: how many images it has, and what the last one shows."""
    return f"{len(scenes)} pictures. {fixed_scene(scenes[-1])}"


def answer_parts(scenes: tuple[Scene, ...]) -> tuple[Part, ...]:
    """Returns lines and images in turn, with a line break after each image but the last."""
    parts: list[Part] = []
    for number, scene in enumerate(scenes, start=1):
        text = step_text(number, scene)
        parts += [text if number == 1 else f"\n{text}", scene]
    return tuple(parts)
