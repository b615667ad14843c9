"""Why the text of a job ended, as the engine says it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sensebatch.checkpoint.tokenizer import IMG_START, THINK_END
from sensebatch.contract import Channel
from sensebatch.engine.sampling.text import Writing
from sensebatch.engine.tasks import interleave, single_image
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.single_image import run_single_image
from sensebatch.jobs import FinishReason
from tests.engine.golden_model import infer, succeeded
from tests.engine.test_script import runner_and_job
from tests.golden_data import ByteTokenizer

TOKENIZER = ByteTokenizer()
END, IMAGE, THOUGHT = (
    TOKENIZER.eos_id,
    TOKENIZER.token_id(IMG_START),
    TOKENIZER.token_id(THINK_END),
)
WORD = TOKENIZER.encode("a")[0]


def writes(monkeypatch: pytest.MonkeyPatch, module: Any, *choices: int) -> None:
    """Replaces what jobs choose by these tokens, one after the other, over all their texts."""
    texts: list[Writing] = []

    def scripted(first: Any, limits: Any, **options: Any) -> Writing:
        # A choice that was not cached is taken, too.
        said = [text.decoded[0] for text in texts]
        taken = sum(len(one.tokens) + (one.stopped_by is not None) for one in said)
        options["scripts"] = {0: choices[taken:]}
        texts.append(Writing(first, limits, **options))
        return texts[-1]

    monkeypatch.setattr(module, "Writing", scripted)


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ((WORD, THOUGHT, WORD), FinishReason.COMPLETE),
        ((WORD, WORD, THOUGHT, WORD), FinishReason.COMPLETE),
        ((WORD, WORD, WORD, WORD), FinishReason.TOKEN_LIMIT),
        ((WORD, END, WORD, WORD), FinishReason.UNFINISHED_THOUGHT),
        ((END, WORD, WORD, WORD), FinishReason.UNFINISHED_THOUGHT),
    ],
)
def test_thought_that_is_cut_short_is_told_from_a_complete_one(
    monkeypatch: pytest.MonkeyPatch, choices: tuple[int, ...], reason: FinishReason
) -> None:
    runner, job = runner_and_job("t2i_think_max", max_think_tokens=3)
    writes(monkeypatch, single_image, *choices)
    with infer():
        (result,) = succeeded(run_single_image(runner, [job], kept=(), channel=Channel()))
    assert result.finish_reason is reason
    assert len(result.images) == 1


def test_job_without_text_is_complete() -> None:
    runner, job = runner_and_job("t2i_think_max")
    job = replace(job, job=replace(job.job, think=False))
    with infer():
        (result,) = succeeded(run_single_image(runner, [job], kept=(), channel=Channel()))
    assert (result.finish_reason, result.text) == (FinishReason.COMPLETE, None)


@pytest.mark.parametrize(
    ("choices", "num_images", "reason"),
    [
        ((WORD, IMAGE, END), 1, FinishReason.COMPLETE),
        ((WORD, IMAGE, IMAGE, WORD), 2, FinishReason.MAX_IMAGES),
        ((WORD, IMAGE, WORD, WORD, WORD, WORD), 1, FinishReason.TOKEN_LIMIT),
        ((WORD, WORD, WORD, WORD, IMAGE), 0, FinishReason.TOKEN_LIMIT),
        ((WORD, END), 0, FinishReason.STOPPED_EMPTY),
        ((END,), 0, FinishReason.STOPPED_EMPTY),
    ],
)
def test_story_says_why_it_ended(
    monkeypatch: pytest.MonkeyPatch,
    choices: tuple[int, ...],
    num_images: int,
    reason: FinishReason,
) -> None:
    runner, job = runner_and_job("il_text_nothink", max_new_tokens=4, max_images=2)
    writes(monkeypatch, interleave, *choices)
    with infer():
        (result,) = succeeded(run_interleave(runner, [job], kept=(), channel=Channel()))
    assert (len(result.images), result.finish_reason) == (num_images, reason)


def test_reasons_that_leave_something_out() -> None:
    assert [reason.value for reason in FinishReason if reason.is_truncated] == [
        "token_limit",
        "stopped_empty",
        "unfinished_thought",
    ]
