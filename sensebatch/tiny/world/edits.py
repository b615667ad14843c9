"""Edits: one change of a scene that leaves everything else as it was, or joining two images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from sensebatch.tiny.world.captions import (
    article,
    describe_fill,
    finish,
    fixed_scene,
    name_place,
    name_thing,
)
from sensebatch.tiny.world.examples import Example
from sensebatch.tiny.world.scene import (
    CELLS,
    COLOURS,
    MAX_THINGS,
    SHAPES,
    SIZES,
    Scene,
    Split,
    Thing,
    pick,
    sample_background,
    sample_scene,
    sample_thing,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A change of a scene."""

    prompt: str
    target: Scene
    before: Thing | None = None
    after: Thing | None = None


def refer(rng: np.random.Generator, scene: Scene, thing: Thing) -> str:
    """Returns `the red circle`, or `the circle` if there is only one."""
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    if alone and rng.random() < 0.3:
        return f"the {thing.shape}"
    return f"the {name_thing(rng, thing, size=False)}"


def _swap(scene: Scene, before: Thing, after: Thing) -> Scene:
    things = tuple(after if thing == before else thing for thing in scene.things)
    return replace(scene, things=things)


def _recolour(rng: np.random.Generator, scene: Scene) -> Edit:
    before = pick(rng, scene.things)
    used = {thing.colour for thing in scene.things}
    colour = pick(rng, [name for name in COLOURS if name not in used])
    after = replace(before, colour=colour)
    it = refer(rng, scene, before)
    prompt = pick(
        rng,
        (f"Make {it} {colour}", f"Paint {it} {colour}", f"Turn {it} {colour}",
         f"Change the color of {it} to {colour}", f"Change the colour of {it} to {colour}"),
    )  # fmt: skip
    return Edit(prompt=prompt, target=_swap(scene, before, after), before=before, after=after)


def _reshape(rng: np.random.Generator, scene: Scene) -> Edit:
    before = pick(rng, scene.things)
    shape = pick(rng, [name for name in SHAPES if name != before.shape])
    after = replace(before, shape=shape)
    it = refer(rng, scene, before)
    prompt = pick(
        rng,
        (f"Turn {it} into a {shape}", f"Change {it} into a {shape}",
         f"Replace {it} with a {before.colour} {shape}", f"Make {it} a {shape}"),
    )  # fmt: skip
    return Edit(prompt=prompt, target=_swap(scene, before, after), before=before, after=after)


def _resize(rng: np.random.Generator, scene: Scene) -> Edit:
    before = pick(rng, scene.things)
    names = tuple(SIZES)
    size = pick(rng, [name for name in names if name != before.size])
    after = replace(before, size=size)
    it = refer(rng, scene, before)
    choices = [f"Make {it} {size}", f"Change the size of {it} to {size}"]
    if names.index(size) - names.index(before.size) == 1:
        choices += [f"Make {it} bigger", f"Make {it} larger"]
    if names.index(size) - names.index(before.size) == -1:
        choices += [f"Make {it} smaller"] * 2
    target = _swap(scene, before, after)
    return Edit(prompt=pick(rng, choices), target=target, before=before, after=after)


def _move(rng: np.random.Generator, scene: Scene) -> Edit:
    before = pick(rng, scene.things)
    taken = {thing.cell for thing in scene.things}
    row, column = pick(rng, [cell for cell in CELLS if cell not in taken])
    after = replace(before, row=row, column=column)
    it, place = refer(rng, scene, before), name_place(rng, (row, column))
    to_place = place.replace("at the", "to the", 1).replace("in the", "to the", 1)
    to_place = to_place.replace("on the", "to the", 1)
    prompt = pick(rng, (f"Move {it} {to_place}", f"Move {it} {to_place}", f"Put {it} {place}"))
    return Edit(prompt=prompt, target=_swap(scene, before, after), before=before, after=after)


def _add(rng: np.random.Generator, scene: Scene) -> Edit:
    taken = {thing.cell for thing in scene.things}
    after = sample_thing(
        rng,
        pick(rng, tuple(Split)),
        cells=[cell for cell in CELLS if cell not in taken],
        without=[thing.colour for thing in scene.things],
    )
    phrase = f"{article(name_thing(rng, after))} {name_place(rng, after.cell)}"
    prompt = pick(rng, (f"Add {phrase}", f"Draw {phrase}", f"Put {phrase}"))
    return Edit(prompt=prompt, target=replace(scene, things=(*scene.things, after)), after=after)


def _remove(rng: np.random.Generator, scene: Scene) -> Edit:
    before = pick(rng, scene.things)
    things = tuple(thing for thing in scene.things if thing != before)
    it = refer(rng, scene, before)
    prompt = pick(rng, (f"Remove {it}", f"Delete {it}", f"Erase {it}", f"Take away {it}"))
    return Edit(prompt=prompt, target=replace(scene, things=things), before=before)


def _refill(rng: np.random.Generator, scene: Scene) -> Edit:
    background = scene.background
    while background == scene.background:
        background = sample_background(rng)
    fill = describe_fill(rng, background)
    prompt = pick(
        rng,
        (f"Change the background to {fill}", f"Put everything on {fill}",
         f"Replace the background with {fill}"),
    )  # fmt: skip
    if len(background.colours) == 1 and rng.random() < 0.4:
        prompt = f"Make the background {background.colours[0]}"
    return Edit(prompt=prompt, target=replace(scene, background=background))


@dataclass(frozen=True, slots=True)
class _Kind:
    change: Callable[[np.random.Generator, Scene], Edit]
    new_combination: bool
    """Whether the changed thing becomes another combination of shape, colour and place."""
    max_things: int = MAX_THINGS


_KINDS = {
    "colour": _Kind(_recolour, True),
    "shape": _Kind(_reshape, True),
    "size": _Kind(_resize, False),
    "move": _Kind(_move, True),
    "add": _Kind(_add, True, MAX_THINGS - 1),
    "remove": _Kind(_remove, False),
    "background": _Kind(_refill, False),
}


def edit(rng: np.random.Generator, split: Split, resolution: Resolution, *, think: bool) -> Example:
    """Returns an edit example of a random kind; an eighth of them join two images.

    In held-out examples, the changed thing becomes a combination that is never trained on, or, if
    no thing changes its combination, every thing is one.
    """
    if rng.random() < 0.125:
        return join_two(rng, split, resolution)
    name = pick(rng, tuple(_KINDS))
    kind = _KINDS[name]
    while True:
        source_split = Split.TRAIN if kind.new_combination else split
        source = sample_scene(rng, source_split, resolution, max_things=kind.max_things)
        found = kind.change(rng, source)
        fits = not kind.new_combination or (
            found.after is not None and found.after.is_held_out == (split is Split.HELD_OUT)
        )
        if fits and found.target.is_valid:
            break
    return Example(
        task=Task.EDIT,
        kind=f"edit-{name}",
        prompt=finish(rng, found.prompt),
        inputs=(source,),
        think=fixed_scene(found.target) if think else None,
        answer=(found.target,),
        changed=tuple(thing for thing in (found.before, found.after) if thing is not None),
    )


def join_two(rng: np.random.Generator, split: Split, resolution: Resolution) -> Example:
    """Returns an edit that puts the things of image 1 on the background of image 2."""
    first = sample_scene(rng, split, resolution, max_things=2)
    second = sample_scene(rng, split, resolution, max_things=1)
    if rng.random() < 0.4:
        second = replace(second, things=())
    noun = "shape" if len(first.things) == 1 else "shapes"
    if len(first.things) == 1 and rng.random() < 0.5:
        noun = pick(rng, (name_thing(rng, first.things[0], size=False), first.things[0].shape))
    prompt = pick(
        rng,
        (f"Put the {noun} of image 1 on the background of image 2",
         f"Put the {noun} from image 1 on the background from image 2",
         f"Use the background of image 2 for the {noun} of image 1",
         f"Place the {noun} of image 1 on the background of image 2"),
    )  # fmt: skip
    return Example(
        task=Task.EDIT,
        kind="edit-join",
        prompt=finish(rng, prompt),
        inputs=(first, second),
        answer=(replace(first, background=second.background),),
    )
