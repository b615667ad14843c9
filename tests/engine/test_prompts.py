"""Prompts against every golden query, its ids, positions and mask."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.engine.prompts import (
    Grid,
    ImageSpan,
    Prompt,
    after_think,
    branch_prompts,
    cond_prompt,
    positions,
    segments,
)
from sensebatch.errors import JobError
from sensebatch.jobs import IMAGE_MARK
from sensebatch.tasks import Branch, Task
from tests.golden_data import GOLDEN, ByteTokenizer, Case, case_ids, load_case

TOKENIZER = ByteTokenizer()
TASKS = {
    "t2i": Task.T2I,
    "think": Task.T2I,
    "edit": Task.EDIT,
    "edit_think": Task.EDIT,
    "interleave": Task.INTERLEAVE,
}
GOLDEN_BRANCHES = {Branch.IMG_COND: "text_uncond", Branch.UNCOND: "img_uncond"}
GENERATION = json.loads((GOLDEN.parents[1] / "sensebatch/checkpoint/prompts.json").read_text())[
    "generation"
]


def golden_name(case: Case, branch: Branch) -> str:
    return GOLDEN_BRANCHES.get(branch, branch) if case.kind == "interleave" else branch


def golden_prompts(case: Case) -> dict[Branch, Prompt]:
    """Builds every branch that the case records."""
    branches = [
        branch
        for branch in (Branch.COND, Branch.IMG_COND, Branch.UNCOND)
        if f"query_{golden_name(case, branch)}" in case.strings
    ]
    grids = case.tensor("grid_hw").tolist() if "grid_hw" in case else []
    return branch_prompts(
        TOKENIZER,
        branches,
        task=TASKS[case.kind],
        system=case.params.get("system_message", GENERATION),
        prompt=case.params["prompt"],
        grids=[Grid(height // 2, width // 2) for height, width in grids],
        think=case.params.get("think_mode", False),
    )


def allow_mask(prompt: Prompt) -> np.ndarray:
    num_tokens = len(prompt.token_ids)
    mask = np.tril(np.ones((num_tokens, num_tokens), dtype=bool))
    for start, end, is_image in segments(prompt):
        if is_image:
            mask[start:end, start:end] = True
    return mask


@pytest.mark.parametrize(("config", "name"), case_ids(*TASKS))
def test_every_branch_equals_the_golden_query(config: str, name: str) -> None:
    case = load_case(config, name)
    prompts = golden_prompts(case)
    recorded = {key.removeprefix("query_") for key in case.strings if key.startswith("query_")}
    assert {golden_name(case, branch) for branch in prompts} == recorded
    for branch, prompt in prompts.items():
        upstream = golden_name(case, branch)
        assert TOKENIZER.join(prompt.token_ids) == case.strings[f"query_{upstream}"]
        assert list(prompt.token_ids) == case.tensor(f"input_ids_{upstream}").tolist()
        if f"indexes_{upstream}" in case:
            assert positions(prompt).tolist() == case.tensor(f"indexes_{upstream}").tolist()
        else:
            assert positions(prompt)[0].tolist() == list(range(len(prompt.token_ids)))


@pytest.mark.parametrize(("config", "name"), case_ids("t2i", "edit"))
def test_next_position_is_the_golden_one_of_the_drawn_image(config: str, name: str) -> None:
    case = load_case(config, name)
    for branch, prompt in golden_prompts(case).items():
        assert positions(prompt)[0].max() + 1 == case.outputs[f"image_t_index_{branch}"]


@pytest.mark.parametrize(("config", "name"), case_ids("prefix_image"))
def test_positions_and_mask_of_two_images_equal_the_golden_ones(config: str, name: str) -> None:
    case = load_case(config, name)
    ids = TOKENIZER.encode_special(case.strings["query"])
    starts = [i + 1 for i, token in enumerate(ids) if token == TOKENIZER.token_id("<img>")]
    grids = [Grid(h // 2, w // 2) for h, w in case.tensor("grid_hw").tolist()]
    spans = [ImageSpan(start, grid) for start, grid in zip(starts, grids, strict=True)]
    prompt = Prompt(token_ids=tuple(ids), images=tuple(spans))
    assert ids == case.tensor("input_ids").tolist()
    assert positions(prompt).tolist() == case.tensor("indexes").tolist()
    assert allow_mask(prompt).tolist() == case.tensor("allow_mask").tolist()


@pytest.mark.parametrize(("config", "name"), case_ids("think", "edit_think"))
def test_think_ends_as_the_golden_one(config: str, name: str) -> None:
    appended = load_case(config, name).outputs["appended_after_think"]
    assert list(after_think(TOKENIZER)) == TOKENIZER.encode_special(appended)


def build(task: Task, prompt: str, grids: Sequence[Grid], system: str = "") -> str:
    built = cond_prompt(
        TOKENIZER, task=task, system=system, prompt=prompt, grids=grids, think=False
    )
    return TOKENIZER.join(built.token_ids)


def test_edit_numbers_several_images_without_marks_and_interleave_does_not() -> None:
    grids = [Grid(1, 1), Grid(1, 2)]
    edit = build(Task.EDIT, "join", grids)
    one, two = "<img><IMG_CONTEXT></img>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    assert f"user\nImage-1:{one}\nImage-2:{two}\njoin<|im_end|>" in edit
    assert f"user\n{one}\n{two}\njoin<|im_end|>" in build(Task.INTERLEAVE, "join", grids)


@pytest.mark.parametrize("task", [Task.EDIT, Task.INTERLEAVE])
def test_more_marks_than_images_is_the_jobs_error(task: Task) -> None:
    with pytest.raises(JobError, match="one <image> mark per image, found 2 for 1"):
        build(task, "<image> and <image>", [Grid(1, 1)])


def test_special_tokens_in_the_users_words_stay_text() -> None:
    prompt = "a sign saying <img></think><|im_end|><IMG_CONTEXT>"
    ids = cond_prompt(
        TOKENIZER, task=Task.T2I, system="", prompt=prompt, grids=[], think=True
    ).token_ids
    special = [i for i in ids if i >= 256]
    layout = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>"]
    assert special == [TOKENIZER.token_id(token) for token in layout]


def test_think_tags_of_a_system_prompt_are_tokens_and_nothing_else_is() -> None:
    ids = cond_prompt(
        TOKENIZER, task=Task.T2I, system="<think></think><img>", prompt="", grids=[], think=True
    ).token_ids
    assert ids.count(TOKENIZER.token_id("<think>")) == 2
    assert ids.count(TOKENIZER.token_id("</think>")) == 1
    assert TOKENIZER.token_id("<img>") not in ids


def test_text_between_special_tokens_is_encoded_in_one_run() -> None:
    runs: list[str] = []

    class Recorder(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            runs.append(text)
            return super().encode(text)

    cond_prompt(Recorder(), task=Task.EDIT, system="", prompt="go", grids=[Grid(1, 1)], think=True)
    assert runs == ["user\n", "\ngo", "\n", "assistant\n", "\n"]


@given(
    # Without halves of surrogate pairs, which no prompt can hold, and without marks of images.
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
        lambda text: IMAGE_MARK not in text
    ),
    st.lists(st.builds(Grid, st.integers(1, 4), st.integers(1, 4)), max_size=4),
    st.sampled_from([Task.EDIT, Task.INTERLEAVE]),
)
def test_segments_cover_every_token_once_and_spans_are_context(
    text: str, grids: list[Grid], task: Task
) -> None:
    prompt = cond_prompt(TOKENIZER, task=task, system="s", prompt=text, grids=grids, think=False)
    runs = segments(prompt)
    assert [i for run in runs for i in range(run.start, run.end)] == list(
        range(len(prompt.token_ids))
    )
    context = TOKENIZER.token_id("<IMG_CONTEXT>")
    inside = [i for span in prompt.images for i in range(span.start, span.end)]
    assert [i for i, token in enumerate(prompt.token_ids) if token == context] == inside
    assert [span.grid for span in prompt.images] == grids


def ids_of(text: str) -> list[int]:
    """Returns the ids of a text in which special tokens stand for themselves."""
    ids: list[int] = []
    for part in re.split(r"(<\|im_start\|>|<\|im_end\|>|</?img>|<IMG_CONTEXT>)", text):
        is_special = part.startswith("<") and part.endswith(">")
        ids += [TOKENIZER.token_id(part)] if is_special else TOKENIZER.encode(part) if part else []
    return ids


def conversation(*history: tuple[str, str], question: str, grids: int) -> Prompt:
    return branch_prompts(
        TOKENIZER,
        [Branch.COND],
        task=Task.ASK,
        system="",
        prompt=question,
        grids=[Grid(1, 1 + number) for number in range(grids)],
        think=False,
        history=history,
    )[Branch.COND]


def test_a_conversation_is_turn_after_turn_with_images_at_their_marks() -> None:
    found = conversation(
        ("<image>What is <image>?", "A dot."), ("Red?", ""), question="Sure of <image>?", grids=3
    )
    images = ["<img>" + "<IMG_CONTEXT>" * (1 + number) + "</img>" for number in range(3)]
    assert list(found.token_ids) == ids_of(
        f"<|im_start|>user\n{images[0]}What is {images[1]}?<|im_end|>\n"
        "<|im_start|>assistant\nA dot.<|im_end|>\n"
        "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        f"<|im_start|>user\nSure of {images[2]}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [image.grid.width for image in found.images] == [1, 2, 3]


def test_no_mark_is_added_to_a_conversation() -> None:
    with pytest.raises(JobError, match="expected an <image> mark for each image of a conversation"):
        conversation(("What?", "A dot."), question="Sure?", grids=1)
    # Without one before it, a question has its images in front.
    assert conversation(question="Sure?", grids=1) == conversation(
        question="<image>\nSure?", grids=1
    )
