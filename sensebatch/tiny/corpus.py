"""The sentences that the embedded tokenizer is trained on: the same list every time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

PROMPTS_FILE = Path(__file__).parents[1] / "checkpoint" / "prompts.json"
"""The built-in system prompts, so that they are short in tokens."""


def _items(text: str, separator: str = " ") -> list[str]:
    return text.split(separator)


COLOURS = _items(
    "red orange yellow green blue purple pink brown black white grey golden silver turquoise dark "
    "light bright pale"
)
THINGS = _items(
    "circle square triangle star cross ring heart diamond house tree flower sun moon cloud "
    "mountain river lake bridge boat car train bicycle cat dog bird fish horse cow hen lion fox "
    "owl cup bottle bowl vase chair table lamp book clock apple pear lemon cherry banana "
    "strawberry cake bread teapot umbrella hat shoe bag camera guitar"
)
SIZES = _items("small large tiny huge tall short wide narrow round flat")
PLACES = _items(
    "left right above below behind before beside inside between under over near far centre corner "
    "edge top bottom middle background foreground"
)
MATERIALS = _items(
    "wooden glass metal paper leather cotton woollen ceramic stone marble plastic striped dotted "
    "checked shiny rough smooth old modern vintage"
)
NUMBERS = _items("one two three four five six seven eight nine ten eleven twelve dozen")
SCENES = _items(
    "a photograph of, a drawing of, a painting of, a picture of, a poster of, a catalogue shot of, "
    "a close view of, an illustration of, a pattern of, a sketch of",
    separator=", ",
)
SETTINGS = _items(
    "on a plain background, in the rain, at night, in the morning light, under soft light, in the "
    "snow, on a wooden table, by the sea, in a garden, in a studio, in front of a window, "
    "with long shadows, in warm colours, in the style of a print, seen from above",
    separator=", ",
)
EDITS = _items(
    "make it, turn it into, replace it with, add, remove, paint, move, put, keep everything else "
    "and add, change the colour to, change the background to",
    separator=", ",
)
STORY = _items(
    "Here is a picture of the first step. Then it shows what happens next. First, we draw the "
    "outline. After that, we fill in the colours. Finally, the scene is complete. Let me think "
    "about the composition, the light, the subject and the style. The user wants to see how it "
    "looks. The image should show every part clearly. Once upon a time there was a little one who "
    "went to the forest and found something new. The next picture continues the story. This is "
    "the result, and here is the answer.",
    separator=". ",
)


def sentences() -> Iterator[str]:
    """Yields every sentence, in a fixed order."""
    yield from json.loads(PROMPTS_FILE.read_text(encoding="utf-8")).values()
    yield from STORY
    things = itertools.cycle(THINGS)
    colours = itertools.cycle(COLOURS)
    for scene, setting in itertools.product(SCENES, SETTINGS):
        yield f"{scene} a {next(colours)} {next(things)} {setting}"
    for size, place in itertools.product(SIZES, PLACES):
        yield f"A {size} {next(colours)} {next(things)} {place} the {next(things)}."
    for number, material in itertools.product(NUMBERS, MATERIALS):
        yield f"There are {number} {material} {next(things)}s and {next(things)}s."
    for edit, colour in itertools.product(EDITS, COLOURS):
        yield f"{edit} a {colour} {next(things)}, please"
    for first, second in itertools.product(range(0, 100, 7), (16, 32, 256, 2048)):
        yield f"{first} and {second}: {first}x{second}"
