"""Scores of answers that are right, and of answers that are wrong in one way."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sensebatch.config import default_config
from sensebatch.manifest.read import read_manifest
from sensebatch.tiny.evaluate import KINDS, held_out_examples
from sensebatch.tiny.manifests import encode_inputs, write_manifest
from sensebatch.tiny.scores import Answer, score
from sensebatch.tiny.world.draw import draw_uint8
from sensebatch.tiny.world.examples import Example

pytestmark = pytest.mark.slow


def _right(example: Example) -> Answer:
    said = "".join(part if isinstance(part, str) else "<image>" for part in example.answer)
    return Answer(
        images=tuple(draw_uint8(scene) for scene in example.images),
        text=example.think if example.think is not None else said,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_score_in_full(kind: str) -> None:
    examples = held_out_examples(kind, 12)
    scores = score(kind, examples, [_right(example) for example in examples])
    assert {name: scores.rate(name) for name in scores.asked} == dict.fromkeys(scores.asked, 1.0)


@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        ("t2i", "exact"),
        ("think", "text_right"),
        ("edit", "made"),
        ("interleave", "content"),
        ("caption", "things"),
    ],
)
def test_answers_to_other_examples_score_nothing(kind: str, zero: str) -> None:
    examples = held_out_examples(kind, 13, square=True)
    answers = [_right(example) for example in examples[1:]]
    assert score(kind, examples[:-1], answers).rate(zero) < 0.2


def test_an_unchanged_image_is_kept_but_not_made() -> None:
    examples = [e for e in held_out_examples("edit", 40) if e.kind == "edit-colour"]
    answers = [Answer(images=(draw_uint8(e.inputs[0]),), text=None) for e in examples]
    scores = score("edit", examples, answers)
    assert (scores.rate("made"), scores.rate("kept")) == (0.0, 1.0)


def test_a_story_with_an_image_too_few_has_the_wrong_count() -> None:
    examples = held_out_examples("interleave", 8)
    answers = [Answer(images=_right(e).images[:-1], text="") for e in examples]
    scores = score("interleave", examples, answers)
    assert (scores.rate("count"), scores.rate("content")) == (0.0, 0.0)


def test_held_out_examples_do_not_depend_on_their_number() -> None:
    for kind in KINDS:
        assert held_out_examples(kind, 9)[:4] == held_out_examples(kind, 4)


def test_held_out_examples_can_begin_anywhere() -> None:
    assert held_out_examples("t2i", 3, first=5) == held_out_examples("t2i", 8)[5:]


def test_a_faint_image_is_scored_as_it_is_learned() -> None:
    judged = held_out_examples("ask", 300)
    example = next(one for one in judged if one.faint is not None)
    (encoded,) = encode_inputs(example)
    seen = np.asarray(Image.open(io.BytesIO(encoded))).astype(int)
    assert example.faint is not None
    of_two = [draw_uint8(scene).astype(int) for scene in (example.inputs[0], example.faint)]
    assert np.abs(seen - sum(of_two) / 2).max() <= 1
    assert min(np.abs(seen - one).max() for one in of_two) > 10


def test_held_out_prompts_ask_for_held_out_combinations_alone() -> None:
    examples = held_out_examples("t2i", 20)
    assert all(thing.is_held_out for e in examples for thing in e.images[0].things)


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_of_examples_are_valid(tmp_path: Path, kind: str) -> None:
    examples = held_out_examples(kind, 6)
    write_manifest(examples, tmp_path)
    jobs = list(read_manifest(tmp_path / "manifest.jsonl", default_config()))
    for job, example in zip(jobs, examples, strict=True):
        assert (job.task, job.prompt) == (example.task, example.prompt)
        assert job.resolution == (example.resolution if example.images else None)
        assert job.think == (example.think is not None)
        assert len(job.images) == len(example.inputs)
