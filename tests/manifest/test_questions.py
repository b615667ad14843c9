"""Questions in manifests: which task they are, what they are called, and what they may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import RunConfig, default_config
from sensebatch.manifest.convert import convert_manifest
from sensebatch.manifest.read import read_manifest
from sensebatch.settings import resolve_settings
from sensebatch.tasks import Task
from tests.manifest.conftest import Mistakes, ReadRows


def test_upstreams_row_is_a_question(read_rows: ReadRows, draw_input: Any) -> None:
    row = {"id": 3, "image": draw_input(), "question": "What is it?"}
    (job,) = read_rows(row)
    assert (job.id, job.task, job.prompt) == ("3", Task.ASK, "What is it?")
    assert (job.resolution, job.input_max_pixels, job.think) == (None, None, False)
    (again,) = read_rows({"id": 3, "task": "ask", "image": "in.png", "prompt": "What is it?"})
    assert again == job
    for task in (Task.EDIT, Task.ASK):
        assert read_rows({"image": "in.png", "prompt": "x"}, task=task)[0].task is task


def test_questions_and_answers_are_written_as_yaml_has_words(
    write_yaml: Callable[[str], Path], config: RunConfig
) -> None:
    text = """\
version: 1
defaults:
  ask: {choices: [yes, no]}
jobs:
  - id: "{colour}"
    task: ask
    question: Is it {colour}?
    matrix: {colour: [red, blue]}
  - {id: dot, prompt: a dot}
"""
    red, blue, dot = read_manifest(write_yaml(text), config)
    assert (red.id, red.prompt, blue.prompt) == ("red", "Is it red?", "Is it blue?")
    assert red.sampling.choices == blue.sampling.choices == ("yes", "no")
    assert dot.sampling.choices == ()


def test_settings_of_drawing_tokens_have_them_drawn(read_rows: ReadRows, tmp_path: Path) -> None:
    def sampled(**fields: Any) -> bool:
        (job,) = read_rows({"question": "x", **fields})
        return job.sampling.do_sample

    assert not sampled()
    assert not sampled(repetition_penalty=1.05)
    for name, value in (("temperature", 0.6), ("top_p", 0.5), ("top_k", 3), ("do_sample", True)):
        assert sampled(**{name: value})
    assert not sampled(temperature=0.6, do_sample=False)
    flags = {"tasks.ask.temperature": 0.6}
    path = tmp_path / "settings.yaml"
    for text, expected in (("tasks: {ask: {do_sample: false}}", False), ("tasks: {}", True)):
        path.write_text(text)
        found = resolve_settings(config_file=path, flags=flags).tasks[Task.ASK].sampling
        assert (found.do_sample, found.temperature) == (expected, 0.6)


@pytest.mark.parametrize("suffix", ["yaml", "jsonl", "parquet"])
def test_questions_survive_conversion(read_rows: ReadRows, tmp_path: Path, suffix: str) -> None:
    row = {"question": "x", "choices": ["yes", "no"], "top_k": 5, "cfg_interval": None}
    (job,) = read_rows(row, {"id": "drawn", "prompt": "x", "cfg_interval": [0, 0.5]})[:1]
    target = tmp_path / f"converted.{suffix}"
    convert_manifest(tmp_path / "jobs.jsonl", target, default_config())
    again, drawn = read_manifest(target, default_config())
    assert (again.id, again.prompt, again.sampling) == (job.id, "x", job.sampling)
    assert (again.task, drawn.sampling.cfg_interval) == (Task.ASK, (0.0, 0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "y"}, "question: expected either prompt or question, found both"),
        ({"question": " "}, "question: expected text, found ' '"),
        ({"choices": ["yes"]}, "choices: expected two or more, found 'yes' alone"),
        ({"choices": ["a", "b", "a"]}, "choices: expected every choice once, found 'a' again"),
        (
            {"choices": ["a", " b"]},
            "choices: expected short texts without space around them, found ' b'",
        ),
        ({"choices": "yes"}, "choices: expected a list, found 'yes'"),
        ({"choices": [1, 2]}, "choices[0]: expected text, found 1"),
        ({"temperature": 0}, "temperature: expected more than 0.0, found 0"),
        ({"question": "<image>?"}, "question: expected at most one <image> mark per image"),
        ({"resolution": "1:1"}, "resolution: expected a field of ask jobs"),
        ({"task": "t2i", "prompt": "y"}, "question: expected a field of t2i jobs"),
    ],
)
def test_a_mistake_in_a_question_is_named(
    mistakes: Mistakes, fields: dict[str, Any], message: str
) -> None:
    found = mistakes({"question": "x", **fields})
    assert any(one.startswith(f"line 1: {message}") for one in found), found


HISTORY = [
    {"question": "<image>What is <image>?", "answer": "A dot."},
    {"question": "Is it red?", "answer": ""},
]


def test_a_conversation_is_a_question_with_those_before_it(
    read_rows: ReadRows, draw_input: Any
) -> None:
    image = draw_input()
    row = {"id": "q", "task": "ask", "images": [image, image], "question": "Sure?"}
    (job,) = read_rows(row | {"history": HISTORY})
    assert job.history == (("<image>What is <image>?", "A dot."), ("Is it red?", ""))
    turns = [
        *(
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": HISTORY[0]["question"]},
        ),
        *({"from": "gpt", "value": "A dot."}, {"from": "user", "value": "Is it red?"}),
        *({"from": "gpt", "value": ""}, {"from": "human", "value": "Sure?"}),
    ]
    del row["question"]
    (said,) = read_rows(row | {"conversations": turns})
    assert (said.prompt, said.history, said.system_prompt) == ("Sure?", job.history, "Be brief.")
    # What follows the last question is an answer to it, which is not read.
    (answered,) = read_rows(row | {"conversations": [*turns, {"from": "gpt", "value": "Yes."}]})
    assert answered.history == job.history
    # A system turn is no question.
    (told,) = read_rows(row | {"conversations": turns[:1], "question": "<image><image>"})
    assert (told.prompt, told.system_prompt) == ("<image><image>", "Be brief.")
    # A prompt of its own wins, as ever.
    (own,) = read_rows(row | {"conversations": turns, "prompt": "<image><image>"})
    assert own.history == ()


def test_turns_are_given_in_one_form(mistakes: Mistakes) -> None:
    turns = [
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "A dot."},
        {"from": "human", "value": "Sure?"},
    ]
    history = [{"question": "What?", "answer": "A dot."}]
    (found,) = mistakes({"task": "ask", "conversations": turns, "history": history})
    words = "expected either history or the turns of conversations, found both"
    assert found == f"line 1: history: {words}"


def test_mistakes_in_conversations_are_named(mistakes: Mistakes, draw_input: Any) -> None:
    image = draw_input()
    two = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    row = {"task": "ask", "question": "Sure?"}
    exchange = {"question": "What?", "answer": "A dot."}
    found = mistakes(
        {"task": "ask", "conversations": two},
        {"task": "t2i", "conversations": two},
        row | {"image": image, "history": [exchange]},
        row | {"history": [exchange | {"question": "<image>?"}]},
        row | {"history": [{"question": "What?"}]},
        {"task": "t2i", "prompt": "a", "history": [exchange]},
        {"task": "t2i", "prompt": "a", "history": [], "choices": []},
        row | {"history": [{"question": "", "answer": ""}]},
        row | {"history": [exchange | {"questoin": "What?"}]},
        row | {"conversations": two},
    )
    assert found == [
        "line 1: conversations: expected one answer after each question but the last, found human, "
        "human",
        "line 2: conversations: expected one turn from 'human' or 'user', found 2; ask jobs alone "
        "take earlier turns",
        "line 3: history: expected an <image> mark for each image of a conversation, found 0 "
        "marks and 1 image",
        "line 4: question: expected at most one <image> mark per image, found 1 mark and 0 images",
        "line 5: history[0].answer: expected a value, found nothing",
        "line 6: history: expected a field of t2i jobs, found one of other tasks",
        "line 7: choices: expected a field of t2i jobs, found one of other tasks",
        "line 7: history: expected a field of t2i jobs, found one of other tasks",
        "line 8: history[0].question: expected text, found ''",
        "line 9: history[0].questoin: expected a known field, found 'questoin'; did you mean "
        "'question'?",
        "line 10: conversations: expected either question or conversations, found both",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "yaml"])
def test_a_conversation_is_converted(
    write_yaml: Callable[[str], Path], config: RunConfig, tmp_path: Path, suffix: str
) -> None:
    text = """version: 1
jobs:
  - {id: a, task: ask, question: Sure?, history: [{question: What?, answer: A dot.}]}
  - id: b
    task: ask
    conversations:
      [{from: human, value: What?}, {from: gpt, value: A dot.}, {from: human, value: Sure?}]
"""
    before = list(read_manifest(write_yaml(text), config))
    convert_manifest(tmp_path / "jobs.yaml", tmp_path / f"new.{suffix}", config)
    after = list(read_manifest(tmp_path / f"new.{suffix}", config))
    assert [one.history for one in after] == [one.history for one in before]
    assert after[0].history == after[1].history == (("What?", "A dot."),)
