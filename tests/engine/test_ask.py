"""Questions: the reference's answers, scored choices, drawn tokens, and batches of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from sensebatch.config import default_config
from sensebatch.contract import Channel
from sensebatch.engine.prompts import Prompt, positions
from sensebatch.engine.runner import Extension, Runner
from sensebatch.engine.sampling.draws import Drawer
from sensebatch.engine.tasks.ask import choice_paths, run_ask
from sensebatch.engine.tasks.state import PreparedJob, job_generator, prepare_job
from sensebatch.errors import BatchStoppedError, JobError
from sensebatch.jobs import FinishReason, JobResult, Sampling
from sensebatch.tasks import Branch, Task
from tests.engine.golden_model import build_job, build_runner, infer, succeeded, watch_logits
from tests.engine.test_batches import fresh
from tests.engine.test_engine import generate, load, make_config, make_job
from tests.golden_data import TOLERANCE, ByteTokenizer, case_ids, load_case, relative_error

pytestmark = pytest.mark.slow

END = ByteTokenizer().eos_id


def answer(runner: Runner, *jobs: PreparedJob) -> list[JobResult]:
    with infer():
        return succeeded(run_ask(runner, fresh(list(jobs)), kept=(), channel=Channel()))


@pytest.mark.parametrize(("config", "name"), case_ids("ask"))
def test_answers_match_the_reference(
    config: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case(config, name)
    runner, job = build_runner(case), build_job(case, "")
    prompt = job.prompts[Branch.COND]
    assert list(prompt.token_ids) == case.tensor("input_ids").tolist()
    assert positions(prompt).tolist() == case.tensor("indexes").tolist()
    seen = watch_logits(runner, monkeypatch)
    (result,) = answer(runner, job)
    assert result.text == result.answer == case.outputs["answer_text"]
    assert result.text_tokens == len(case.outputs["answer_token_ids"])
    ended = {"eos": FinishReason.COMPLETE, "max_new_tokens": FinishReason.TOKEN_LIMIT}
    assert result.finish_reason is ended[case.outputs["stop"]]
    expected = case.tensor("step_logits")
    # An answer that its limit ends is not asked what follows, but the pass has computed it.
    found = torch.cat(seen)[: len(expected)]
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found[0], case.tensor("choice_logits")) < TOLERANCE
    assert found.argmax(-1).tolist() == case.outputs["argmax_decisions"]


def changed(
    runner: Runner,
    job: PreparedJob,
    *,
    prompt: str | None = None,
    think: bool = False,
    seed: int = 42,
    **sampling: Any,
) -> PreparedJob:
    """Returns another question about the same images."""
    return prepare_job(
        runner.network.arch,
        runner.tokenizer,
        replace(
            job.job,
            prompt=job.job.prompt if prompt is None else prompt,
            think=think,
            seed=seed,
            sampling=replace(job.job.sampling, **sampling),
        ),
        system_prompt="",
        images=job.images,
    )


@pytest.mark.parametrize("config", ["dense_fm", "moe"])
@pytest.mark.parametrize("think", [False, True])
def test_a_batch_of_different_questions_equals_the_same_questions_alone(
    config: str, think: bool
) -> None:
    case = load_case(config, "ask_1img")
    runner, first = build_runner(case), build_job(case, "")
    none = build_job(load_case(config, "ask_noimg"), "")
    two = build_job(load_case(config, "ask_2img"), "")
    jobs = [
        changed(runner, first, think=think),
        changed(runner, none, think=think, do_sample=True, temperature=2.0, max_new_tokens=5),
        changed(runner, two, think=think, repetition_penalty=5.0, max_new_tokens=7),
        changed(runner, first, think=think, choices=("yes", "no"), max_new_tokens=3),
        changed(runner, two, think=think, choices=("red", "read", "rose", "a"), max_new_tokens=2),
        changed(runner, none, think=think, prompt="Why?", do_sample=True, seed=5),
    ]
    together = answer(runner, *jobs)
    assert len({result.text for result in together}) > 3
    for job, result in zip(jobs, together, strict=True):
        (alone,) = answer(runner, job)
        assert (alone.text, alone.think_tokens) == (result.text, result.think_tokens)
        assert result.choice_log_probabilities == pytest.approx(
            alone.choice_log_probabilities, abs=1e-4
        )


def test_choices_are_scored_by_their_first_token_and_nothing_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = load_case("dense_fm", "ask_1img")
    runner = build_runner(case)
    job = changed(runner, build_job(case, ""), choices=("yes", "no", "maybe"))
    seen = watch_logits(runner, monkeypatch)
    (result,) = answer(runner, job)
    assert [len(logits) for logits in seen] == [1], "one prefill"
    expected = case.tensor("choice_logits").log_softmax(0)[list(b"ynm")]
    assert result.choice_log_probabilities == pytest.approx(expected.tolist(), abs=1e-4)
    assert result.answer == ("yes", "no", "maybe")[int(expected.argmax())]
    assert (result.text, result.text_tokens) == (result.answer, 0)


def path_score(runner: Runner, job: PreparedJob, path: Sequence[int]) -> float:
    """Returns the log-probability of tokens after a prompt, each from a prefill of its own."""
    prompt, total = job.prompts[Branch.COND], 0.0
    with infer():
        embeds = runner.embed_images(job.images)
        for number, token in enumerate(path):
            ids = (*prompt.token_ids, *path[:number])
            longer = Prompt(token_ids=ids, images=prompt.images)
            hidden = runner.extend([runner.new_extension(longer, embeds)])
            total += float(runner.network.logits(hidden)[0].log_softmax(0)[token])
    return total


@pytest.mark.parametrize("config", ["dense_fm", "dense_pixel", "moe"])
def test_choices_that_begin_alike_are_scored_whole(config: str) -> None:
    case = load_case(config, "ask_2img")
    runner = build_runner(case)
    choices = ("red", "red ring", "rose", "blue")
    job = changed(runner, build_job(case, ""), choices=choices)
    (result,) = answer(runner, job)
    paths = [[*b"red", END], [*b"red ring"], [*b"rose"], [ord("b")]]
    expected = [path_score(runner, job, path) for path in paths]
    assert result.choice_log_probabilities == pytest.approx(expected, abs=1e-4)
    assert result.answer == choices[expected.index(max(expected))]
    assert math.fsum(map(math.exp, expected)) <= 1, "the choices exclude one another"


def test_two_choices_of_the_same_tokens_are_a_mistake() -> None:
    assert choice_paths([[1, 2], [3]], 9) == [[1], [3]]
    assert choice_paths([[1], [1, 2], [1, 3]], 9) == [[1, 9], [1, 2], [1, 3]]
    with pytest.raises(JobError, match="choices: expected different tokens"):
        choice_paths([[1], [2], [1]], 9)


def test_choices_after_thoughts_are_scored_after_two_newlines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = load_case("dense_fm", "ask_1img")
    runner = build_runner(case)
    job = changed(runner, build_job(case, ""), think=True, choices=("yes", "no"), max_new_tokens=4)
    (result,) = answer(runner, job)
    with monkeypatch.context() as patch:
        seen = watch_logits(runner, patch)
        (thoughts,) = answer(runner, changed(runner, job, think=True, choices=(), max_new_tokens=4))
    written = torch.cat(seen)[:4].argmax(-1).tolist()
    assert (result.think_tokens, result.text_tokens) == (4, 0)
    prompt = job.prompts[Branch.COND]
    assert prompt.token_ids[-2:] == (ByteTokenizer().token_id("<think>"), 10)
    assert result.text == f"{thoughts.text}\n\n{result.answer}"
    assert thoughts.answer == "", "no end of thoughts, no answer"
    assert thoughts.finish_reason is FinishReason.TOKEN_LIMIT
    thought = Prompt(token_ids=(*prompt.token_ids, *written, *b"\n\n"), images=prompt.images)
    after = replace(job, prompts={Branch.COND: thought})
    expected = [path_score(runner, after, [choice]) for choice in b"yn"]
    assert result.choice_log_probabilities == pytest.approx(expected, abs=1e-4)


def test_an_answer_is_what_follows_the_thoughts() -> None:
    case = load_case("dense_fm", "ask_1img_mark")
    runner = build_runner(case)
    job = build_job(case, "")
    thinking = replace(job, job=replace(job.job, think=True))
    (result,) = answer(runner, thinking)
    ids = case.outputs["answer_token_ids"]
    end = ids.index(ByteTokenizer().token_id("</think>")) + 1
    assert (result.think_tokens, result.text_tokens) == (end, len(ids) - end)
    assert result.answer == ByteTokenizer().decode(ids[end:]).strip()
    assert result.finish_reason is FinishReason.COMPLETE
    none = replace(build_job(load_case("dense_fm", "ask_noimg"), "").job, think=True)
    (never,) = answer(
        build_runner(load_case("dense_fm", "ask_noimg")),
        replace(build_job(load_case("dense_fm", "ask_noimg"), ""), job=none),
    )
    assert never.finish_reason is FinishReason.UNFINISHED_THOUGHT
    assert result.text is not None
    assert result.text.startswith("<think>\n")
    assert result.text.endswith(f"</think>\n\n{result.answer}")


def test_logits_that_are_not_finite_fail_their_job_alone() -> None:
    case = load_case("dense_fm", "ask_1img")
    runner, job = build_runner(case), build_job(case, "")
    broken = replace(job, images=[replace(i, rows_PD=i.rows_PD * math.inf) for i in job.images])
    with infer():
        failed, whole = run_ask(runner, fresh([broken, job]), kept=(), channel=Channel())
    assert "finite" in failed.message  # type: ignore[union-attr]
    assert whole.answer == case.outputs["answer_text"]  # type: ignore[union-attr]


def sampling(**changes: Any) -> Sampling:
    return replace(default_config().tasks[Task.ASK].sampling, **changes)


def test_tokens_are_drawn_as_transformers_would() -> None:
    """After its own processors of logits, in the order of its `generate`."""
    from transformers.generation import logits_process as hf

    logits = torch.randn(64, generator=torch.Generator().manual_seed(3)) * 3
    said = [5, 9, 9, 30]
    settings = {"repetition_penalty": 1.4, "temperature": 1.7, "top_k": 12, "top_p": 0.8}
    scores = logits[None]
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(1.4),
        hf.TemperatureLogitsWarper(1.7),
        hf.TopKLogitsWarper(12),
        hf.TopPLogitsWarper(0.8),
    ):
        scores = processor(torch.tensor([said]), scores)
    expected = scores[0].softmax(0)
    generator = job_generator(1)
    counts = torch.zeros(64)
    for _ in range(4000):
        drawer = Drawer(
            sampling=sampling(do_sample=True, **settings), generator=generator, said=list(said)
        )
        counts[drawer.choose(logits)] += 1
    assert set(counts.nonzero()[:, 0].tolist()) == set(expected.nonzero()[:, 0].tolist())
    assert float((counts / 4000 - expected).abs().max()) < 0.03


def test_the_penalty_is_about_the_answer_and_holds_without_chance() -> None:
    drawer = Drawer(sampling=sampling(repetition_penalty=2.0), generator=job_generator(0))
    logits = torch.tensor([3.0, 2.0, -0.5, -0.6])
    assert [drawer.choose(logits) for _ in range(3)] == [0, 1, 0]
    negative = Drawer(sampling=drawer.sampling, generator=job_generator(0), said=[2])
    assert negative.choose(torch.tensor([-5.0, -4.0, -0.5, -0.6])) == 3


def test_seeds_decide_what_is_drawn() -> None:
    case = load_case("dense_fm", "ask_noimg")
    runner, job = build_runner(case), build_job(case, "")
    texts = [
        answer(runner, changed(runner, job, do_sample=True, temperature=3.0, seed=seed))[0].text
        for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.slow
def test_every_memory_mode_gives_the_same_answers() -> None:
    settings = default_config().tasks[Task.ASK].sampling
    jobs = [
        make_job(
            name,
            task=Task.ASK,
            resolution=None,
            prompt=f"How {name}?",
            sampling=replace(settings, max_new_tokens=4, choices=choices),
        )
        for name, choices in (("far", ()), ("red", ("red", "redder", "blue")), ("so", ("a", "b")))
    ]
    found = []
    for mode in ("full", "fast", "balanced", "low"):
        engine = load(make_config(vram_mode=mode), "synthetic:tiny")
        results = succeeded(generate(engine, *jobs).results)
        found.append([(r.text, r.choice_log_probabilities) for r in results])
    assert found[1:] == found[:1] * 3
    stops = iter([False] * 12)
    with pytest.raises(BatchStoppedError):
        generate(engine, *jobs, stop=lambda: next(stops, True))


def test_tokens_after_a_cut_replace_those_before_it() -> None:
    case = load_case("dense_fm", "ask_noimg")
    runner = build_runner(case)

    def extend(*parts: Sequence[int], cut: bool) -> torch.Tensor:
        cache = runner.network.new_cache()
        for number, ids in enumerate(parts):
            place = (cache.length, cache.next_t)
            hidden = runner.extend([Extension(cache=cache, prompt=Prompt(token_ids=tuple(ids)))])
            if cut and number == 1:
                cache.cut(*place)
        return hidden

    with infer():
        assert torch.equal(
            extend([1, 2, 3], [7, 8, 9, 10], [4, 5], cut=True), extend([1, 2, 3], [4, 5], cut=False)
        )
