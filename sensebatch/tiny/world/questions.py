"""Questions about scenes with their right answers: short ones, yes or no, and captions.

Answers are in lower case and without a full stop, so that they can be given as choices; captions
are in the fixed form, which can be read back.
"""

from __future__ import annotations

import itertools
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from sensebatch.tiny.world.captions import (
    article,
    bare_fill,
    describe_scene,
    fixed_place,
    fixed_scene,
    name_place,
)
from sensebatch.tiny.world.examples import Example
from sensebatch.tiny.world.scene import (
    CELLS,
    COLOURS,
    SHAPES,
    SIZES,
    Pattern,
    Scene,
    Split,
    T,
    Thing,
    pick,
    sample_background,
    sample_scene,
    sample_thing,
)

YES_NO = ("yes", "no")
COUNTS = ("none", "one", "two", "three")
WHICH = ("the first", "the second", "both", "neither")
FADING = (Pattern.DOWN, Pattern.ACROSS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question and its answer."""

    question: str
    answer: str
    scenes: tuple[Scene, ...]
    """The images that it is about."""
    faint: Scene | None = None
    """Another scene that the first image is blended with, as a drawing is that came out as neither
    of two; the answer is then no."""
    named: tuple[Thing, ...] = ()
    """Things that it names and that need not be there."""


def _is(true: bool) -> str:
    return YES_NO[0] if true else YES_NO[1]


def _colour_words(rng: np.random.Generator) -> str:
    return pick(rng, ("colour", "color"))


def _only(scene: Scene, thing: Thing) -> bool:
    """Returns whether a thing is the only one of its shape."""
    return sum(other.shape == thing.shape for other in scene.things) == 1


def _spot(rng: np.random.Generator, thing: Thing) -> str:
    """Returns `the thing at the top left` or the like, without naming colour or shape."""
    return f"the {pick(rng, ('thing', 'shape'))} {name_place(rng, thing.cell)}"


def _named(rng: np.random.Generator, scene: Scene, thing: Thing) -> str:
    """Returns `the red circle`, `the circle`, or `the red thing`."""
    named = [f"the {thing.colour} {thing.shape}", f"the {thing.colour} {thing.shape}"]
    named += [f"the {thing.shape}"] if _only(scene, thing) else []
    named += [f"the {thing.colour} {pick(rng, ('thing', 'shape'))}"]
    return pick(rng, named)


def _colour(rng: np.random.Generator, scene: Scene) -> Asked:
    thing = pick(rng, scene.things)
    word = _colour_words(rng)
    by_shape = _only(scene, thing) and rng.random() < 0.6
    it = f"the {thing.shape}" if by_shape else _spot(rng, thing)
    question = pick(
        rng, (f"What {word} is {it}?", f"Which {word} is {it}?", f"What {word} has {it}?")
    )
    return Asked(question=question, answer=thing.colour, scenes=(scene,))


def _shape(rng: np.random.Generator, scene: Scene) -> Asked:
    thing = pick(rng, scene.things)
    it = (
        f"the {thing.colour} thing"
        if rng.random() < 0.5
        else f"the thing {name_place(rng, thing.cell)}"
    )
    question = pick(
        rng,
        (f"What shape is {it}?", f"Which shape is {it}?",
         f"What is {name_place(rng, thing.cell)}?", f"Which shape is {thing.colour}?"),
    )  # fmt: skip
    return Asked(question=question, answer=thing.shape, scenes=(scene,))


def _size(rng: np.random.Generator, scene: Scene) -> Asked:
    thing = pick(rng, scene.things)
    it = _named(rng, scene, thing)
    question = pick(rng, (f"What size is {it}?", f"How large is {it}?", f"How big is {it}?"))
    return Asked(question=question, answer=thing.size, scenes=(scene,))


def _where(rng: np.random.Generator, scene: Scene) -> Asked:
    thing = pick(rng, scene.things)
    it = _named(rng, scene, thing)
    question = pick(rng, (f"Where is {it}?", f"Where is {it}?", f"Where in the image is {it}?"))
    return Asked(question=question, answer=fixed_place(thing.cell), scenes=(scene,))


def _count(rng: np.random.Generator, scene: Scene) -> Asked:
    if rng.random() < 0.1:
        scene = replace(scene, things=())
    what, number = pick(rng, ("things", "shapes", "shapes")), len(scene.things)
    draw = rng.random()
    if draw < 0.35:
        shape = pick(
            rng,
            SHAPES if rng.random() < 0.5 or not scene.things else [t.shape for t in scene.things],
        )
        what, number = f"{shape}s", sum(thing.shape == shape for thing in scene.things)
    elif draw < 0.5:
        size = pick(rng, tuple(SIZES))
        what, number = f"{size} shapes", sum(thing.size == size for thing in scene.things)
    question = pick(
        rng,
        (f"How many {what} are there?", f"How many {what} are in the image?",
         f"How many {what} does the image show?", f"How many {what} do you see?"),
    )  # fmt: skip
    return Asked(question=question, answer=COUNTS[number], scenes=(scene,))


def _background(rng: np.random.Generator, scene: Scene) -> Asked:
    plain = scene.background.pattern is Pattern.PLAIN
    if plain and rng.random() < 0.6:
        question = f"What {_colour_words(rng)} is the background?"
    else:
        question = pick(
            rng,
            ("What is the background?", "What is the background like?", "Describe the background."),
        )
    return Asked(question=question, answer=bare_fill(scene.background), scenes=(scene,))


def _mostly(rng: np.random.Generator, thing: Thing) -> Thing:
    """Returns a thing, or one that differs from it in one respect."""
    if rng.random() < 0.5:
        return thing
    return other_thing(rng, thing)


def other_thing(rng: np.random.Generator, thing: Thing) -> Thing:
    """Returns a thing that differs from one in its colour, shape, size or place."""
    match pick(rng, ("colour", "shape", "shape", "size", "place")):
        case "colour":
            return replace(thing, colour=pick(rng, [c for c in COLOURS if c != thing.colour]))
        case "shape":
            return replace(thing, shape=pick(rng, [s for s in SHAPES if s != thing.shape]))
        case "size":
            return replace(thing, size=pick(rng, [s for s in SIZES if s != thing.size]))
        case _:
            row, column = pick(rng, [cell for cell in CELLS if cell != thing.cell])
            return replace(thing, row=row, column=column)


def _has(scene: Scene, **wanted: object) -> bool:
    return any(
        all(getattr(thing, name) == value for name, value in wanted.items())
        for thing in scene.things
    )


def _is_there(rng: np.random.Generator, scene: Scene) -> Asked:
    thing = _mostly(rng, pick(rng, scene.things))
    known: dict[str, object] = {}
    draw = rng.random()
    if draw < 0.25:
        known, text = {"shape": thing.shape}, thing.shape
    elif draw < 0.4:
        known, text = {"colour": thing.colour}, f"{thing.colour} {pick(rng, ('thing', 'shape'))}"
    elif draw < 0.7:
        known, text = (
            {"colour": thing.colour, "shape": thing.shape},
            f"{thing.colour} {thing.shape}",
        )
    else:
        known = {"size": thing.size, "colour": thing.colour, "shape": thing.shape}
        text = f"{thing.size} {thing.colour} {thing.shape}"
    place = ""
    if rng.random() < 0.4:
        known |= {"row": thing.row, "column": thing.column}
        place = f" {name_place(rng, thing.cell)}"
    text = f"{article(text)}{place}"
    question = pick(
        rng,
        (f"Is there {text}?", f"Is there {text}?", f"Does the image show {text}?",
         f"Do you see {text}?"),
    )  # fmt: skip
    return Asked(
        question=question, answer=_is(_has(scene, **known)), scenes=(scene,), named=(thing,)
    )


def _other(rng: np.random.Generator, value: T, values: Iterable[T]) -> T:
    """Returns a value half of the time, else another one."""
    return value if rng.random() < 0.5 else pick(rng, [one for one in values if one != value])


def _property(rng: np.random.Generator, scene: Scene) -> Asked:
    thing = pick(rng, scene.things)
    it = f"the {thing.shape}" if _only(scene, thing) else _spot(rng, thing)
    named = thing
    match pick(rng, ("colour", "size", "shape", "place", "background")):
        case "colour":
            said = _other(rng, thing.colour, COLOURS)
            true, named = said == thing.colour, replace(thing, colour=said)
        case "size":
            it, said = _named(rng, scene, thing), _other(rng, thing.size, SIZES)
            true = said == thing.size
        case "shape":
            it = pick(rng, (f"the {thing.colour} thing", _spot(rng, thing)))
            shape = _other(rng, thing.shape, SHAPES)
            said, true = article(shape), shape == thing.shape
            named = replace(thing, shape=shape)
        case "place":
            cell = _other(rng, thing.cell, CELLS)
            it, said = _named(rng, scene, thing), name_place(rng, cell)
            true, named = cell == thing.cell, replace(thing, row=cell[0], column=cell[1])
        case _:
            background = scene.background if rng.random() < 0.5 else sample_background(rng)
            it, said, true = "the background", bare_fill(background), background == scene.background
    return Asked(question=f"Is {it} {said}?", answer=_is(true), scenes=(scene,), named=(named,))


_SIDES: dict[str, Callable[[Thing, Thing], bool]] = {
    "to the left of": lambda a, b: a.column < b.column,
    "to the right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


def _relation(rng: np.random.Generator, scene: Scene) -> Asked:
    if len(scene.things) < 2:
        return _property(rng, scene)
    order = rng.permutation(len(scene.things))
    first, second = (scene.things[int(index)] for index in order[:2])
    side = pick(rng, tuple(_SIDES))
    names = _named(rng, scene, first), _named(rng, scene, second)
    if rng.random() < 0.3:
        larger = tuple(SIZES).index(first.size) - tuple(SIZES).index(second.size)
        word = pick(rng, ("larger", "bigger", "smaller"))
        true = larger < 0 if word == "smaller" else larger > 0
        return Asked(
            question=f"Is {names[0]} {word} than {names[1]}?", answer=_is(true), scenes=(scene,)
        )
    question = f"Is {names[0]} {side} {names[1]}?"
    return Asked(question=question, answer=_is(_SIDES[side](first, second)), scenes=(scene,))


def spoil(rng: np.random.Generator, scene: Scene) -> Scene:
    """Returns a valid scene that differs from one in a thing or in its background."""
    while True:
        things = list(scene.things)
        background = scene.background
        index = int(rng.integers(len(things)))
        match pick(rng, ("other", "other", "other", "missing", "added", "background", "swapped")):
            case "other":
                things[index] = other_thing(rng, things[index])
            case "missing" if len(things) > 1:
                del things[index]
            case "added":
                things.append(sample_thing(rng, pick(rng, tuple(Split))))
            case "background":
                background = sample_background(rng)
            case _ if len(things) > 1:
                a, b = things[index], things[index - 1]
                name = pick(rng, ("colour", "shape"))
                things[index] = replace(a, **{name: getattr(b, name)})
                things[index - 1] = replace(b, **{name: getattr(a, name)})
        found = replace(scene, things=tuple(things), background=background)
        if found.is_valid and found != scene and _differs(found, scene):
            return found


def _differs(a: Scene, b: Scene) -> bool:
    return set(a.things) != set(b.things) or a.background != b.background


JUDGEMENTS = (
    "Does the image match this prompt: {}",
    "Does the image match this prompt: {}",
    "Does this image match the prompt: {}",
)
"""Unlike questions about what there is, these are about all of the image: what a prompt does not
name is not to be there, and what it leaves open has its default."""


def _judge(rng: np.random.Generator, scene: Scene) -> Asked:
    draw = rng.random()
    question = pick(rng, JUDGEMENTS).format(describe_scene(rng, scene))
    if draw < 0.45:
        return Asked(question=question, answer="yes", scenes=(scene,))
    other = spoil(rng, scene)
    if draw < 0.85:
        return Asked(question=question, answer="no", scenes=(other,))
    return Asked(question=question, answer="no", scenes=(scene,), faint=other)


def _judge_by_other(rng: np.random.Generator, scene: Scene, faint: Scene | None) -> Asked:
    """Returns a question about an image that stays, by a prompt of its own or of a near miss."""
    asked = scene if rng.random() < 0.5 else faint or spoil(rng, scene)
    question = pick(rng, JUDGEMENTS).format(describe_scene(rng, asked))
    true = asked == scene and faint is None
    return Asked(
        question=question, answer=_is(true), scenes=(scene,), faint=faint, named=asked.things
    )


CAPTIONS = (
    "Describe the image.",
    "Describe this image.",
    "What is in the image?",
    "What does the image show?",
    "Write a caption for the image.",
    "Caption the image.",
)


def caption(scene: Scene) -> str:
    """Returns the caption of a scene: every thing in the fixed form, then the background."""
    verb = "fades" if scene.background.pattern in FADING else "is"
    return f"{fixed_scene(scene)} The background {verb} {bare_fill(scene.background)}."


def _caption(rng: np.random.Generator, scene: Scene) -> Asked:
    return Asked(question=pick(rng, CAPTIONS), answer=caption(scene), scenes=(scene,))


def _pair(rng: np.random.Generator, scene: Scene, split: Split) -> tuple[Scene, Scene]:
    """Returns the scene and another one, which may have some of the same."""
    other = sample_scene(rng, split, scene.resolution)
    if rng.random() < 0.4:
        other = spoil(rng, scene)
        if split is Split.HELD_OUT or any(thing.is_held_out for thing in other.things):
            other = sample_scene(rng, split, scene.resolution)
    if rng.random() < 0.3:
        other = replace(other, background=scene.background)
    if rng.random() < 0.2:
        other = replace(other, things=scene.things)
    return scene, other


def _compare(rng: np.random.Generator, scenes: tuple[Scene, Scene]) -> Asked:
    """Returns a question about two images."""
    scene, other = scenes
    match pick(rng, ("which", "which", "more", "background", "number", "same")):
        case "which":
            thing = _mostly(rng, pick(rng, (scene if rng.random() < 0.5 else other).things))
            named, known = article(thing.shape), {"shape": thing.shape}
            if rng.random() < 0.6:
                named = article(f"{thing.colour} {thing.shape}")
                known = {"colour": thing.colour, "shape": thing.shape}
            found = [_has(one, **known) for one in scenes]
            question = pick(
                rng, (f"Which image shows {named}?", f"In which image is there {named}?")
            )
            answer = {(True, False): 0, (False, True): 1, (True, True): 2, (False, False): 3}
            return Asked(
                question=question,
                answer=WHICH[answer[found[0], found[1]]],
                scenes=scenes,
                named=(thing,),
            )
        case "more":
            counts = [len(one.things) for one in scenes]
            index = 3 if counts[0] == counts[1] else int(counts[1] > counts[0])
            question = pick(rng, ("Which image shows more shapes?", "Which image has more shapes?"))
            return Asked(question=question, answer=WHICH[index], scenes=scenes)
        case "background":
            question = pick(
                rng,
                ("Do both images have the same background?",
                 "Is the background of both images the same?"),
            )  # fmt: skip
            true = scene.background == other.background
        case "number":
            question = "Do both images show the same number of shapes?"
            true = len(scene.things) == len(other.things)
        case _:
            question = pick(
                rng,
                ("Do both images show the same shapes?", "Do both images show the same things?"),
            )
            true = set(scene.things) == set(other.things)
    return Asked(question=question, answer=_is(true), scenes=scenes)


KINDS: dict[str, tuple[float, Callable[[np.random.Generator, Scene], Asked]]] = {
    "colour": (1.0, _colour),
    "shape": (1.2, _shape),
    "size": (0.9, _size),
    "where": (1.2, _where),
    "count": (1.5, _count),
    "background": (0.6, _background),
    "there": (1.4, _is_there),
    "property": (2.0, _property),
    "relation": (2.0, _relation),
    "judge": (3.0, _judge),
    "caption": (0.8, _caption),
}
"""How often each kind of question about one image is asked, and what asks it."""
COMPARE = 4.0
"""The same of questions about two images."""
SHORT = tuple(kind for kind in (*KINDS, "compare") if kind != "caption")
"""The kinds with short answers."""


def _example(kind: str, found: Asked) -> Example:
    return Example(
        task=Task.ASK,
        kind=f"ask-{kind}",
        prompt=found.question,
        inputs=found.scenes,
        faint=found.faint,
        answer=(found.answer,),
    )


def ask(
    rng: np.random.Generator, split: Split, resolution: Resolution, *, kinds: Sequence[str] = ()
) -> Example:
    """Returns a question about one image or two, with its answer.

    Args:
        rng: Draws it.
        split: Which combinations of shape, colour and place the images show.
        resolution: The size of every image.
        kinds: The kinds to choose from, all equally likely; every kind as often as in training if
            there are none.
    """
    kind = pick(rng, kinds) if kinds else _kind(rng, compare=COMPARE)
    while True:
        scene = sample_scene(rng, split, resolution)
        if kind == "compare":
            found = _compare(rng, _pair(rng, scene, split))
        else:
            found = KINDS[kind][1](rng, scene)
        if _belongs(found, split):
            return _example(kind, found)


def ask_together(
    rng: np.random.Generator, split: Split, resolution: Resolution, count: int
) -> list[Example]:
    """Returns up to `count` different questions about the same image or the same two."""
    first = ask(rng, split, resolution)
    found = {first.prompt: first}
    # Some images have few questions.
    for _ in range(2 * count):
        kind, asked = _ask_again(rng, first)
        told = any(one.kind == "ask-caption" for one in found.values())
        if len(found) < count and _belongs(asked, split) and not (told and kind == "caption"):
            found.setdefault(asked.question, _example(kind, asked))
    return list(found.values())


def _ask_again(rng: np.random.Generator, first: Example) -> tuple[str, Asked]:
    """Returns another question about an example's images, and its kind."""
    if len(first.inputs) == 2:
        return "compare", _compare(rng, (first.inputs[0], first.inputs[1]))
    (scene,) = first.inputs
    while True:
        kind = "judge" if first.faint else _kind(rng, compare=0) if scene.things else "count"
        asked = (
            _judge_by_other(rng, scene, first.faint)
            if kind == "judge"
            else KINDS[kind][1](rng, scene)
        )
        if asked.scenes == first.inputs:
            return kind, asked


def _kind(rng: np.random.Generator, compare: float) -> str:
    """Returns a kind of question, as often as in training."""
    sums = list(itertools.accumulate(weight for weight, _ in KINDS.values()))
    found = bisect(sums, rng.random() * (sums[-1] + compare))
    return "compare" if found == len(sums) else tuple(KINDS)[found]


def _belongs(asked: Asked, split: Split) -> bool:
    """Returns whether a question may be asked of a split.

    A near miss may be a combination that training is not to show. Nor may a question name one: what
    is never shown is never there, so the answer would always be no.
    """
    told = [thing for scene in asked.scenes for thing in scene.things] + list(asked.named)
    told += asked.faint.things if asked.faint is not None else ()
    return split is Split.HELD_OUT or not any(thing.is_held_out for thing in told)
