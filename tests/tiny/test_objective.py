"""One pass over packed rows computes what the engine computes job by job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sensebatch.checkpoint.architecture import parse_architecture
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.patchify import image_to_tokens
from sensebatch.engine.preprocess import drawn_to_patches
from sensebatch.engine.prompts import Prompt
from sensebatch.engine.runner import Runner
from sensebatch.resolutions import BUCKETS_TINY
from sensebatch.tiny.export import init_weights, network_config
from sensebatch.tiny.layout import (
    Sequence,
    asked_sequence,
    cond_sequence,
    img_cond_sequence,
    uncond_sequence,
)
from sensebatch.tiny.objective import Kernels, Objective, ObjectiveConfig
from sensebatch.tiny.packing import PackedBatch, PackingConfig, collate
from sensebatch.tiny.vocabulary import WorldTokenizer
from sensebatch.tiny.world.draw import draw, plan_drawing
from sensebatch.tiny.world.edits import edit, join_two
from sensebatch.tiny.world.examples import text_to_image
from sensebatch.tiny.world.questions import ask, ask_together
from sensebatch.tiny.world.scene import Split
from sensebatch.tiny.world.stories import story

pytestmark = pytest.mark.slow

PACKING = PackingConfig(num_rows=2, question_rows=1)


@pytest.fixture(scope="module")
def tokenizer() -> WorldTokenizer:
    return WorldTokenizer()


@pytest.fixture(scope="module")
def network(tokenizer: WorldTokenizer) -> Network:
    config = network_config(tokenizer.vocab_size)
    config["llm_config"] |= {"num_hidden_layers": 2, "intermediate_size": 64}
    network = Network(parse_architecture(config)).eval().requires_grad_(False)
    init_weights(network, 0)
    torch.nn.init.normal_(network.get_parameter("head.conv2.weight"), std=0.02)
    return network


def _rows(tokenizer: WorldTokenizer, size: str) -> list[list[Sequence]]:
    rng = np.random.default_rng(3)
    resolution = BUCKETS_TINY[size]
    examples = [
        text_to_image(rng, Split.TRAIN, resolution, think=True),
        edit(rng, Split.TRAIN, resolution, think=False),
        join_two(rng, Split.TRAIN, resolution),
        story(rng, Split.TRAIN, resolution, think=True),
    ]
    first = [cond_sequence(tokenizer, example) for example in examples[:2]]
    second = [cond_sequence(tokenizer, examples[3])]
    third = [
        cond_sequence(tokenizer, examples[2]),
        img_cond_sequence(tokenizer, examples[1]),
        uncond_sequence(tokenizer, examples[0], rng),
    ]
    judged = (ask(rng, Split.TRAIN, resolution, kinds=("judge",)) for _ in range(1000))
    fourth = [
        cond_sequence(tokenizer, next(one for one in judged if one.faint is not None)),
        cond_sequence(tokenizer, ask(rng, Split.TRAIN, resolution, kinds=("compare",))),
    ]
    return [first, second, third, fourth]


def _by_engine(
    network: Network, tokenizer: WorldTokenizer, sequence: Sequence, noisy: list[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the predicted images and the last token's output, the way jobs are run."""
    runner = Runner(network=network, tokenizer=tokenizer, attention=sdpa)

    def embeds(prefix: int) -> tuple[list[Any], list[torch.Tensor]]:
        kept = [(span, scene) for span, scene in sequence.images if span.end <= prefix]
        drawn = [draw(plan_drawing([scene]))[0] * 2 - 1 for _, scene in kept]
        if sequence.faint is not None:
            other = draw(plan_drawing([sequence.faint]))[0] * 2 - 1
            drawn[0] = torch.lerp(drawn[0], other, ObjectiveConfig().faint[0])
        return [span for span, _ in kept], runner.embed_images(
            [drawn_to_patches(image) for image in drawn]
        )

    predicted = []
    for slot, z_Nx in zip(sequence.slots, noisy, strict=True):
        spans, images = embeds(slot.prefix)
        prompt = Prompt(token_ids=sequence.token_ids[: slot.prefix], images=tuple(spans))
        extension = runner.new_extension(prompt, images)
        runner.extend([extension])
        positions = network.image_positions([extension.cache], slot.scene.resolution)
        scale = 8.0 * (slot.scene.resolution.image_tokens / 64) ** 0.5
        t = torch.full((1,), 0.3)
        caches = [extension.cache]
        condition = network.condition(t, scale)[0]
        predicted.append(network.predict_image(z_Nx[None], condition, caches, positions, sdpa)[0])
    spans, images = embeds(len(sequence.token_ids))
    prompt = Prompt(token_ids=sequence.token_ids, images=tuple(spans))
    return predicted, runner.extend([runner.new_extension(prompt, images)])[0]


@pytest.mark.parametrize("size", ["1:1", "3:1"])
def test_packed_rows_equal_the_engine(
    network: Network, tokenizer: WorldTokenizer, size: str
) -> None:
    rows = _rows(tokenizer, size)
    packing = replace(PACKING, num_rows=len(rows))
    batch = collate(rows, packing)
    objective = Objective(network, packing, ObjectiveConfig(), Kernels())
    count = len(batch.drawn_slot)
    noisy = torch.randn(count, batch.resolution.image_tokens, 3072)
    predicted, hidden = objective.predict(
        batch, objective.draw(batch), noisy, torch.full((count,), 0.3)
    )
    start = 0
    for row, members in enumerate(rows):
        end = row * packing.row_tokens
        for member in members:
            end += len(member.token_ids)
            stop = start + len(member.slots)
            images, last = _by_engine(network, tokenizer, member, list(noisy[start:stop]))
            for found, image in zip(predicted[start:stop], images, strict=True):
                torch.testing.assert_close(found, image, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(hidden[end - 1], last, atol=1e-4, rtol=1e-4)
            start = stop
    assert start == count


@pytest.mark.parametrize("kind", ["there", "compare"])
def test_questions_about_an_image_that_is_read_once_are_as_if_asked_alone(
    network: Network, tokenizer: WorldTokenizer, kind: str
) -> None:
    rng, size = np.random.default_rng(5), BUCKETS_TINY["3:1"]
    asked = next(
        found
        for found in iter(lambda: ask_together(rng, Split.TRAIN, size, 4), None)
        if found[0].kind == f"ask-{kind}" and len(found) == 4
    )
    alone = [cond_sequence(tokenizer, example) for example in asked]
    together = asked_sequence(tokenizer, asked)
    assert len(together.token_ids) < sum(len(one.token_ids) for one in alone) / 1.5
    packing = replace(PACKING, num_rows=1, question_rows=len(alone))
    drawn = cond_sequence(tokenizer, text_to_image(rng, Split.TRAIN, size, think=False))
    rows = [[drawn], [together], *([one] for one in alone[1:])]
    batch = collate(rows, packing)
    objective = Objective(network, packing, ObjectiveConfig(), Kernels())
    noisy = torch.zeros(1, size.image_tokens, 3072)
    _, hidden = objective.predict(batch, objective.draw(batch), noisy, torch.zeros(1))
    by_row = hidden.unflatten(0, (len(rows), packing.row_tokens))
    ends = [*together.forks[1:], len(together.token_ids)]
    for one, end in list(zip(alone, ends, strict=True))[1:]:
        row = 1 + alone.index(one)
        last = by_row[row, len(one.token_ids) - 1]
        torch.testing.assert_close(by_row[1, end - 1], last, atol=1e-5, rtol=1e-5)
    labels = [token for one in alone for token in (one.token_ids[i] for i in one.learned)]
    assert [together.token_ids[index] for index in together.learned] == labels
    assert batch.label[: len(labels)].tolist() == labels
    assert batch.answer_weight.min() > 0


def test_learned_tokens_are_those_the_job_decodes(tokenizer: WorldTokenizer) -> None:
    rng = np.random.default_rng(0)
    example = story(rng, Split.TRAIN, BUCKETS_TINY["1:1"], think=False)
    sequence = cond_sequence(tokenizer, example)
    said = tokenizer.decode([sequence.token_ids[index] for index in sequence.learned])
    assert said == "".join(part for part in example.answer if isinstance(part, str))
    assert sequence.token_ids[sequence.learned[-1]] == tokenizer.eos_id


def test_an_answer_is_learned_after_the_prompt_of_the_engine(tokenizer: WorldTokenizer) -> None:
    rng = np.random.default_rng(0)
    example = ask(rng, Split.TRAIN, BUCKETS_TINY["1:1"], kinds=("there",))
    sequence = cond_sequence(tokenizer, example)
    said = [sequence.token_ids[index] for index in sequence.learned]
    assert tokenizer.decode(said) in ("yes", "no")
    assert len(said) == 2
    assert said[-1] == tokenizer.eos_id
    batch = collate([[sequence]], replace(PACKING, num_rows=1))
    assert batch.answer_weight.tolist() == pytest.approx([2**-0.5] * 2)
    assert batch.label.tolist() == said


def test_batches_depend_on_seed_and_step_alone(tokenizer: WorldTokenizer) -> None:
    from sensebatch.tiny.packing import make_batch

    def tokens(seed: int, step: int) -> PackedBatch:
        return make_batch(seed, step, tokenizer, PACKING)

    assert torch.equal(tokens(1, 5).token_ids, tokens(1, 5).token_ids)
    assert not torch.equal(tokens(1, 5).token_ids, tokens(1, 6).token_ids)
    assert not torch.equal(tokens(1, 5).token_ids, tokens(2, 5).token_ids)


def test_a_clean_image_is_seen_in_the_noisy_one(
    network: Network, tokenizer: WorldTokenizer
) -> None:
    """The losses are finite and their gradient reaches both experts and both embedders."""
    packing = replace(PACKING, num_rows=4)
    batch = collate(_rows(tokenizer, "1:1"), packing)
    network.requires_grad_(True)
    objective = Objective(network, packing, ObjectiveConfig(), Kernels())
    losses = objective.losses(batch, torch.Generator().manual_seed(0))
    losses.total.backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    network.zero_grad(set_to_none=True)
    network.requires_grad_(False)
    assert missing == []
    assert torch.isfinite(losses.total)
    assert image_to_tokens(objective.draw(batch)).shape[1] == 64
