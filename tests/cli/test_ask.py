"""`sensebatch ask`: the published command lines of questions as they stand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.cli.conftest import Invoke

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def test_the_answer_is_all_that_is_on_stdout(invoke: Invoke, red: Path) -> None:
    ended = invoke("ask", "--image", red, "--question", "What is it?", "--max_new_tokens", "9")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("What is it? 1 ")
    (file,) = Path("outputs/ask").glob("*.txt")
    assert file.name.startswith("what-is-it-")
    assert file.read_text() + "\n" == ended.out


def test_published_command_line_of_a_long_answer_in_a_file(invoke: Invoke, red: Path) -> None:
    ended = invoke(
        "ask", "--model_path", "tiny", "--image", red, "--question", "Why?", "--output",
        "deep/answer.md", "--max_new_tokens", "8192", "--do_sample", "--temperature", "0.6",
        "--top_p", "0.95", "--top_k", "20", "--repetition_penalty", "1.05", "--think",
    )  # fmt: skip
    assert (ended.code, ended.out) == (0, "")
    assert Path("deep/answer.md").read_text().startswith("Why? 1 ")
    (log,) = Path("deep/.sensebatch").rglob("log.parquet")
    (row,) = pq.read_table(log).to_pylist()
    drawn = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
    assert [row[name] for name in drawn] == [True, 0.6, 0.95, 20, 1.05]
    assert row["text_path"] is not None
    assert (log.parent / row["text_path"]).read_text().startswith("<think>")


def test_upstreams_file_of_questions_gives_upstreams_file_of_answers(
    invoke: Invoke, red: Path
) -> None:
    rows = [
        {"id": "a", "image": red.name, "question": "What?"},
        {"id": 7, "image": red.name, "question": "Where?"},
        {"image": red.name, "question": "Is it?", "choices": ["yes", "no"]},
    ]
    Path("vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = invoke("ask", "--jsonl", "vqa.jsonl", "--output_dir", "out", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["outputs"] == ["out/answers.jsonl"]
    lines = Path("out/answers.jsonl").read_text().splitlines()
    first, second, third = map(json.loads, lines)
    assert first["answer"].startswith("What? 1 ")
    assert {**first, "answer": ""} == {
        "id": "a", "image": red.name, "question": "What?", "answer": "",
    }  # fmt: skip
    assert (second["id"], third["answer"]) == ("7", "yes")
    assert math.fsum(third["choice_probabilities"].values()) == pytest.approx(1)
    log = {row["job_id"]: row for row in pq.read_table("out/log.parquet").to_pylist()}
    assert log["a"]["answer"] == first["answer"]
    assert (log["a"]["choices"], log["a"]["choice_probabilities"]) == ([], [])
    assert "wrote out/answers.jsonl\n" in ended.err
    again = invoke("ask", "--jsonl", "vqa.jsonl", "--output_dir", "out")
    assert "unchanged: out/answers.jsonl, which was there already\n" in again.err
    asked = log[third["id"]]
    assert (asked["task"], asked["choices"]) == ("ask", ["yes", "no"])
    assert asked["choice_log_probabilities"] == [-1.0, -2.0]
    assert asked["choice_probabilities"] == [
        third["choice_probabilities"][c] for c in ("yes", "no")
    ]


def test_run_takes_the_same_file(invoke: Invoke, red: Path) -> None:
    row = {"id": "a", "image": red.name, "question": "What?"}
    Path("vqa.jsonl").write_text(json.dumps(row))
    ended = invoke("run", "vqa.jsonl", "--output-dir", "out", "--json")
    assert (ended.code, ended.json["done"], ended.json["this_run"]["images"]) == (0, 1, 0)
    assert Path("out/text/a.txt").read_text().startswith("What? 1 ")


def test_choices_show_how_probable_they_are(invoke: Invoke) -> None:
    words = ("--choices", "yes", "--choices", "no")
    ended = invoke("ask", "--question", "Is it?", *words)
    assert (ended.code, ended.out) == (0, "yes\n")
    assert "yes 73.1%, no 26.9%\n" in ended.err
    answer = invoke("ask", "--question", "Is it?", *words, "--json").json["answers"]
    assert (answer[0]["answer"], answer[0]["image"]) == ("yes", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected --question or --jsonl, found neither"),
        (["--question", "x", "--prompt", "y"], "--question: cannot be combined with --prompt"),
        (["--question", "x", "--choices", "yes"], "--choices: expected two or more, found 'yes'"),
        (["--question", "x", "--jsonl", "a"], "--question: cannot be combined with --jsonl"),
        (["--question", "x", "--num-steps", "2"], "found --num-steps"),
        (["--question", ""], "--question: expected text, found ''"),
        (["--prompt", ""], "--prompt: expected text, found ''"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    invoke: Invoke, words: list[str], message: str
) -> None:
    ended = invoke("ask", *words)
    assert ended.code == 2
    assert message in ended.err


def test_help_has_no_options_of_images_that_are_drawn(invoke: Invoke) -> None:
    help_ = invoke("ask", "--help").out
    assert "Repeat the option for each." in " ".join(help_.split())
    absent = ("--compare", "--image-format", "--num-steps", "--resolution")
    assert [option for option in absent if option in help_] == []
