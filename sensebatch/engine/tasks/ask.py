"""Answers questions about images: text from prompts alone, without anything drawn.

All prompts of a batch are read together. Then every job writes its answer, or the choices that it
is given are scored: what the network gives the first token of each, or, where choices begin with
the same token, all of theirs. A job that thinks writes its thoughts first in either case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sensebatch.checkpoint.tokenizer import IM_END, THINK_END, THINK_START
from sensebatch.contract import Channel, Kept
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.prompts import Prompt
from sensebatch.engine.runner import Extension, Runner
from sensebatch.engine.sampling.draws import Drawer, chooses_greedily, log_probabilities
from sensebatch.engine.sampling.guidance import COND
from sensebatch.engine.sampling.text import Script, Writing
from sensebatch.engine.tasks.registry import TaskRunner, WritesTogether
from sensebatch.engine.tasks.state import PreparedJob, RunningJob, start_jobs
from sensebatch.engine.writing import Text
from sensebatch.errors import JobError
from sensebatch.jobs import Failure, FinishReason, JobResult


@dataclass(slots=True, kw_only=True, eq=False)
class Question:
    """One job while it is answered."""

    prepared: PreparedJob
    drawer: Drawer
    paths: Sequence[Sequence[int]]
    """The tokens that each choice is scored with; empty for a job that writes its answer."""
    scores: list[float] = field(default_factory=list)
    """Log-probability of each of these paths, as far as it is known."""
    state: RunningJob | None = None
    written: list[int] = field(default_factory=list)
    is_cut: bool = False
    """Whether `max_new_tokens` ended what was written."""
    failure: Failure | None = None

    @property
    def writes(self) -> bool:
        """Whether the job decodes text: its thoughts, its answer or both."""
        return self.failure is None and (self.prepared.job.think or not self.paths)

    @property
    def cache(self) -> KVCache:
        """The cache of the prompt and what was written after it."""
        assert self.state is not None
        return self.state.caches[COND]

    def begin(self, logits_V: Tensor) -> int:
        """Takes the logits after the prompt: scores the choices, or chooses the first token."""
        if not bool(torch.isfinite(logits_V).all()):
            found = JobError("expected finite logits after the prompt, found some that are not")
            self.failure = Failure.of(found)
            return 0
        if self.writes:
            return self.drawer.choose(logits_V)
        self.score(logits_V)
        return 0

    def score(self, logits_V: Tensor) -> None:
        """Scores the first token of every choice by the logits before it."""
        self.scores = log_probabilities(logits_V, [path[0] for path in self.paths])


def run_ask(
    runner: Runner,
    jobs: Sequence[PreparedJob],
    *,
    kept: Kept,  # noqa: ARG001
    channel: Channel,  # noqa: ARG001
    script: Script | None = None,
) -> list[JobResult | Failure]:
    """Runs ask jobs of one group.

    Args:
        runner: The network.
        jobs: The jobs of a batch.
        kept: Nothing: text is not kept.
        channel: Keeps nothing.
        script: What they write, for synthetic weights.

    Returns:
        A result for each job; a failure for one whose logits are not finite.

    Raises:
        BatchStoppedError: A stop was heeded, while prompts were read or answers written.
    """
    (answers,) = answer_together(runner, [jobs], script)
    return answers


def answer_together(
    runner: Runner, batches: Sequence[Sequence[PreparedJob]], script: Script | None = None
) -> list[list[JobResult | Failure]]:
    """Returns the results of each batch of one group; their texts are written together."""
    started = [_start(runner, jobs) for jobs in batches]
    free = [[q for q in questions if q.writes and not q.paths] for questions in started]
    thinking = [[q for q in questions if q.writes and q.paths] for questions in started]
    _write(runner, free, script)
    _write(runner, thinking, script, stop_after=frozenset({runner.tokenizer.token_id(THINK_END)}))
    results = []
    for questions, thought in zip(started, thinking, strict=True):
        _score_after_thoughts(runner, thought)
        _score_rest(runner, [q for q in questions if q.paths and q.failure is None])
        results.append([_result(runner, question) for question in questions])
        # What is left waits on the device or the host until then.
        for question in questions:
            question.state = None
    return results


def _start(runner: Runner, jobs: Sequence[PreparedJob]) -> list[Question]:
    """Returns the questions of a batch, their prompts read."""
    questions = [
        Question(
            prepared=prepared,
            drawer=Drawer(sampling=prepared.job.sampling, generator=prepared.generator),
            paths=choice_paths(
                [runner.tokenizer.encode(choice) for choice in prepared.job.sampling.choices],
                runner.tokenizer.eos_id,
            ),
        )
        for prepared in jobs
    ]

    def begin(logits_SV: Tensor, _: Sequence[int]) -> list[int]:
        return [question.begin(row) for question, row in zip(questions, logits_SV, strict=True)]

    running = start_jobs(runner, jobs, decodes=True, choose=begin)
    for question, state in zip(questions, running, strict=True):
        question.state = state
    return questions


def choice_paths(choices: Sequence[Sequence[int]], end: int) -> list[Sequence[int]]:
    """Returns the tokens that each choice is scored with.

    They are the fewest kinds of events that exclude one another: the answer begins with a token
    that no other choice begins with, or with all tokens of the choice, and ends there if another
    choice continues.

    Args:
        choices: The tokens of each.
        end: The token that ends a turn.

    Raises:
        JobError: Two choices have the same tokens.
    """
    paths: list[Sequence[int]] = []
    for number, choice in enumerate(choices):
        others = [other for index, other in enumerate(choices) if index != number]
        if list(choice) in map(list, others):
            raise JobError("choices: expected different tokens, found two choices with the same")
        if all(other[0] != choice[0] for other in others):
            paths.append(choice[:1])
        elif any(list(other[: len(choice)]) == list(choice) for other in others):
            paths.append([*choice, end])
        else:
            paths.append(choice)
    return paths


def _write(
    runner: Runner,
    batches: Sequence[Sequence[Question]],
    script: Script | None,
    *,
    stop_after: frozenset[int] = frozenset(),
) -> None:
    """Decodes the text of questions together."""
    writing = [questions for questions in batches if questions]
    if not writing:
        return
    texts = [_text(runner, questions, script, stop_after) for questions in writing]
    runner.write(texts)
    for questions, text in zip(writing, texts, strict=True):
        for place, question in enumerate(questions):
            said = text.writing.decoded[place]
            question.written = said.tokens
            question.is_cut = said.stopped_by is None and said.tokens[-1] not in stop_after


def _text(
    runner: Runner,
    questions: Sequence[Question],
    script: Script | None,
    stop_after: frozenset[int],
) -> Text:
    """Returns what the questions of a batch are to write."""
    first, limits, scripts = {}, {}, {}
    for place, question in enumerate(questions):
        assert question.state is not None
        assert question.state.choice is not None
        sampling = question.prepared.job.sampling
        first[place], limits[place] = question.state.choice, sampling.max_new_tokens
        if script is not None:
            scripts[place] = script.answer(sampling)
    drawers = [question.drawer for question in questions]
    greedy = all(chooses_greedily(drawer.sampling) for drawer in drawers)

    def choose(logits_SV: Tensor, sequences: Sequence[int]) -> list[int]:
        return [drawers[i].choose(row) for i, row in zip(sequences, logits_SV, strict=True)]

    return Text(
        caches=[question.cache for question in questions],
        writing=Writing(
            first,
            limits,
            stop_before=frozenset({runner.tokenizer.eos_id}),
            stop_after=stop_after,
            scripts=scripts,
        ),
        choose=None if greedy else choose,
        is_last=not stop_after,
    )


def _score_after_thoughts(runner: Runner, questions: Sequence[Question]) -> None:
    """Scores the first tokens of choices after thoughts, however these ended."""
    if not questions:
        return
    caches = [question.cache for question in questions]
    with runner.prefilling(decodes=True):
        runner.bring(caches)
        leading = runner.tokenizer.encode("\n\n")
        logits_SV = runner.network.logits(runner.append_tokens([(c, leading) for c in caches]))
        for question, logits_V in zip(questions, logits_SV, strict=True):
            question.score(logits_V)


def _score_rest(runner: Runner, questions: Sequence[Question]) -> None:
    """Scores the other tokens of choices that have some; one choice of every job in a pass."""
    rounds = max((len(question.paths) for question in questions), default=0)
    if any(len(path) > 1 for question in questions for path in question.paths):
        runner.bring(question.cache for question in questions)
    for number in range(rounds):
        scored = [q for q in questions if number < len(q.paths) and len(q.paths[number]) > 1]
        if not scored:
            continue
        lengths = [(question.cache.length, question.cache.next_t) for question in scored]
        with runner.prefilling(decodes=True):
            hidden = runner.extend_whole(
                [
                    Extension(
                        cache=question.cache,
                        prompt=Prompt(token_ids=tuple(question.paths[number][:-1])),
                    )
                    for question in scored
                ]
            )
            logits = iter(runner.network.logits(torch.cat(list(hidden))))
            for question, (length, next_t) in zip(scored, lengths, strict=True):
                rest = question.paths[number][1:]
                found = [log_probabilities(next(logits), [token])[0] for token in rest]
                question.scores[number] += math.fsum(found)
                question.cache.cut(length, next_t)


def _result(runner: Runner, question: Question) -> JobResult | Failure:
    if question.failure is not None:
        return question.failure
    job, written = question.prepared.job, question.written
    said = runner.tokenizer.decode(written).partition(IM_END)[0]
    thoughts, num_think, is_whole = "", 0, not question.is_cut
    reason = FinishReason.COMPLETE if is_whole else FinishReason.TOKEN_LIMIT
    if job.think:
        thoughts, mark, said = said.partition(THINK_END)
        thoughts = f"{THINK_START}\n{thoughts.strip()}\n{mark}".strip() + "\n\n"
        end = runner.tokenizer.token_id(THINK_END)
        num_think = written.index(end) + 1 if end in written else len(written)
        if is_whole and end not in written:
            reason = FinishReason.UNFINISHED_THOUGHT
    choices = job.sampling.choices
    best = question.scores.index(max(question.scores)) if choices else None
    answer = said.strip() if best is None else choices[best]
    return JobResult(
        text=f"{thoughts}{answer}".strip(),
        answer=answer,
        choice_log_probabilities=tuple(question.scores),
        think_tokens=num_think,
        text_tokens=len(written) - num_think,
        finish_reason=reason,
    )


RUNNER = TaskRunner(
    run=run_ask,
    draws_once=lambda _batch, _limits: False,
    together=WritesTogether(
        write=answer_together, finish=lambda _runner, answers, _kept, _channel: answers
    ),
)
