"""A run learns, resumes as if it had never stopped, and leaves a checkpoint that loads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sensebatch.checkpoint.files import check_tensors, open_checkpoint
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.engine.model.tokenizer import HFTokenizer
from sensebatch.tasks import Task
from sensebatch.tiny import train
from sensebatch.tiny.export import network_config
from sensebatch.tiny.objective import ObjectiveConfig
from sensebatch.tiny.packing import PackedBatch, PackingConfig
from sensebatch.tiny.train import TrainConfig, Trainer, ahead
from sensebatch.tiny.vocabulary import GENERATION_PROMPT, INTERLEAVE_PROMPT, WorldTokenizer

pytestmark = pytest.mark.slow

CONFIG = TrainConfig(
    steps=6,
    warmup_steps=2,
    num_workers=0,
    compiled=False,
    packing=PackingConfig(num_rows=1, question_rows=1),
    objective=ObjectiveConfig(),
)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(vocab_size: int) -> dict[str, Any]:
        full = network_config(vocab_size)
        full["llm_config"] |= {"num_hidden_layers": 1, "intermediate_size": 32}
        return full

    monkeypatch.setattr(train, "network_config", config)


def _train(trainer: Trainer, steps: int) -> list[float]:
    batches = trainer.batches()
    return [trainer.train_step(next(batches)).image.item() for _ in range(steps)]


def test_every_weight_is_trained() -> None:
    network = Trainer(CONFIG, torch.device("cpu")).network
    assert [name for name, one in network.named_parameters() if not one.requires_grad] == []


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Trainer(CONFIG, torch.device("cpu"))
    _train(whole, 4)
    first = Trainer(CONFIG, torch.device("cpu"))
    _train(first, 2)
    first.save(tmp_path)
    second = Trainer(CONFIG, torch.device("cpu"))
    assert second.resume(tmp_path)
    _train(second, 2)
    assert second.step == whole.step
    for a, b in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_made_ahead_come_in_order_and_end() -> None:
    trainer = Trainer(replace(CONFIG, steps=3), torch.device("cpu"))
    expected = [batch.token_ids for batch in trainer.batches()]
    found = [batch.token_ids for batch in ahead(trainer.batches(), 2)]
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_error_while_batches_are_made_ahead_ends_the_training() -> None:
    def broken() -> Iterator[PackedBatch]:
        yield next(Trainer(CONFIG, torch.device("cpu")).batches())
        raise ValueError("no batch")

    batches = ahead(broken(), 1)
    next(batches)
    with pytest.raises(ValueError, match="no batch"):
        next(batches)


def test_a_training_that_ends_early_leaves_no_thread() -> None:
    batches = ahead(Trainer(CONFIG, torch.device("cpu")).batches(), 1)
    next(batches)
    assert [thread.name for thread in threading.enumerate()].count("batches") == 1
    batches.close()
    assert "batches" not in [thread.name for thread in threading.enumerate()]


def test_a_state_of_another_seed_is_refused(tmp_path: Path) -> None:
    Trainer(CONFIG, torch.device("cpu")).save(tmp_path)
    with pytest.raises(ValueError, match="seed 7, found 0"):
        Trainer(replace(CONFIG, seed=7), torch.device("cpu")).resume(tmp_path)


def test_images_are_learned() -> None:
    losses = _train(Trainer(CONFIG, torch.device("cpu")), 6)
    assert losses[-1] < 0.8 * losses[0]


def test_the_exported_checkpoint_loads_with_its_own_system_prompts(tmp_path: Path) -> None:
    Trainer(CONFIG, torch.device("cpu")).export(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    check_tensors(checkpoint)
    prompts = resolve_system_prompts(checkpoint)
    assert prompts.of_task(Task.T2I).text == prompts.of_task(Task.EDIT).text == GENERATION_PROMPT
    assert prompts.of_task(Task.INTERLEAVE).text == INTERLEAVE_PROMPT


@pytest.mark.parametrize(
    "text",
    ["Draw a red circle at the top left.", "Image-1:\n", "\n\n", "Grün, 猫!", "draw\nA  b\t c"],
)
def test_the_exported_tokenizer_encodes_as_training_did(tmp_path: Path, text: str) -> None:
    Trainer(CONFIG, torch.device("cpu")).export(tmp_path)
    exported, trained = HFTokenizer(tmp_path), WorldTokenizer()
    assert exported.encode(text) == trained.encode(text)
    assert exported.decode(exported.encode(text)) == text
    assert exported.eos_id == trained.eos_id


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = WorldTokenizer()
    text = "Draw a large red circle at the top left and a tiny navy ring on a mint background"
    assert len(tokenizer.encode(text)) == len(text.split())


def test_the_rate_warms_up_and_falls() -> None:
    trainer = Trainer(replace(CONFIG, steps=100, warmup_steps=10), torch.device("cpu"))
    rates = []
    for trainer.step in range(100):
        rates.append(trainer.learning_rate())
    assert rates[0] < rates[5] < max(rates)
    assert rates[-1] < 0.05 * max(rates)
