"""Every mistake in a row gets one message with its field, what was expected and what was found."""

from __future__ import annotations

from typing import Any

import pytest

from sensebatch.manifest.fields import FOREIGN_FIELDS, JobFields, manifest_schema
from sensebatch.tasks import Task
from tests.manifest.conftest import Mistakes, ReadRows

RATIOS = "1:1, 16:9, 9:16, 3:2, 2:3, 4:3, 3:4, 2:1, 1:2, 3:1, 1:3"

T2I_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"num_step": 3}, "num_step: expected a known field, found 'num_step'; did you mean 'num_s"),
    ({"a\x1b[2J": 3}, "'a\\x1b[2J': expected a known field, found 'a\\x1b[2J'"),
    ({"xyzzy": 3}, "xyzzy: expected a known field, found 'xyzzy'"),
    ({"prompt": None}, "prompt: expected text, found nothing"),
    ({"prompt": 3}, "prompt: expected text, found 3"),
    ({"prompt": " \n"}, "prompt: expected text, found ' \\n'"),
    ({"think": "yes"}, "think: expected true or false, found 'yes'"),
    ({"think": 1}, "think: expected true or false, found 1"),
    ({"num_steps": 0}, "num_steps: expected at least 1, found 0"),
    ({"num_steps": 1.5}, "num_steps: expected a whole number, found 1.5"),
    ({"num_steps": 2**31}, f"num_steps: expected at most {2**31 - 1}, found {2**31}"),
    ({"num_steps": "8"}, "num_steps: expected a whole number, found '8'"),
    ({"num_steps": True}, "num_steps: expected a whole number, found true"),
    ({"seed": -1}, "seed: expected at least 0, found -1"),
    ({"seed": 2**63}, f"seed: expected at most {2**63 - 1}, found {2**63}"),
    ({"cfg_scale": "4"}, "cfg_scale: expected a number, found '4'"),
    ({"cfg_scale": -1}, "cfg_scale: expected at least 0.0, found -1"),
    ({"timestep_shift": 0}, "timestep_shift: expected more than 0.0, found 0"),
    ({"cfg_norm": "globl"}, "cfg_norm: expected 'none', 'global', 'channel' or 'cfg_zero_star', f"),
    ({"cfg_interval": [0]}, "cfg_interval: expected a list of at least 2, found a list of 1"),
    ({"cfg_interval": [0, 2]}, "cfg_interval[1]: expected at most 1.0, found 2"),
    ({"cfg_interval": [0.5, 0.25]}, "cfg_interval: expected the lower end first, found 0.5 before"),
    ({"width": 64}, "height: expected a number of pixels beside width, found nothing"),
    ({"height": 64}, "width: expected a number of pixels beside height, found nothing"),
    ({"width": 33, "height": 64}, "width: expected a positive multiple of 32, found 33"),
    ({"width": 16416, "height": 16384}, "width: expected at most 16384, found 16416"),
    ({"width": 64, "height": 2**31}, f"height: expected at most 16384, found {2**31}"),
    ({"resolution": "640x99968"}, "resolution: expected height as at most 16384, found 99968"),
    (
        {"width": 32, "height": 6432},
        "width: expected an aspect ratio of at most 200, found 32x6432",
    ),
    ({"resolution": "16;9"}, f"resolution: expected one of {RATIOS} or WIDTHxHEIGHT, found '16;9'"),
    ({"resolution": "33x64"}, "resolution: expected width as a positive multiple of 32, found 33"),
    (
        {"resolution": "1:1", "width": 64, "height": 64},
        "resolution: expected either resolution or width and height, found both",
    ),
    ({"image": "a.png"}, "image: expected a field of t2i jobs, found one of other tasks"),
    ({"max_images": 2}, "max_images: expected a field of t2i jobs, found one of other tasks"),
    ({"img_cfg_scale": 2}, "img_cfg_scale: expected a field of t2i jobs, found one of other tasks"),
    (
        {"prompt": "<image> x"},
        "prompt: expected at most one <image> mark per image, found 1 mark and",
    ),
    ({"tags": "a"}, "tags: expected a list, found 'a'"),
    ({"metadata": "a"}, "metadata: expected a mapping, found 'a'"),
    ({"tags": ["a"], "metadata": {"tags": 1}}, "metadata.tags: expected tags once, found it as a"),
    ({"task": "t2j"}, "task: expected 't2i', 'edit', 'interleave' or 'ask', found 't2j'"),
    ({"seeds": []}, "seeds: expected a list of at least 1, found a list of 0"),
    ({"seeds": [1, 1]}, "seeds: expected every value once, found 1 again"),
    ({"seeds": [1], "n": 2}, "seeds: expected either seeds or n, found both"),
    ({"seeds": [1], "seed": 2}, "seeds: expected either seeds or seed, found both"),
    ({"n": 0}, "n: expected at least 1, found 0"),
    ({"n": 2**31}, f"n: expected at most {2**31 - 1}, found {2**31}"),
    ({"n": 2, "seed": 2**63 - 1}, f"n: expected seeds up to {2**63 - 1}, found 2 from"),
    ({"think": True, "think_mode": False}, "think_mode: expected the same as think, found the op"),
]


@pytest.mark.parametrize(("fields", "message"), T2I_MISTAKES)
def test_a_mistake_is_one_message(mistakes: Mistakes, fields: dict[str, Any], message: str) -> None:
    found = mistakes({"prompt": "A cat", "task": "t2i", **fields})
    assert len(found) == 1
    assert found[0].startswith(f"line 1: {message}")


EDIT_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "image: expected at least one input image, found none"),
    ({"image": []}, "image: expected at least one input image, found none"),
    ({"image": 3}, "image: expected a path, a mapping of bytes and path, or a list of these, fou"),
    (
        {"image": ["in.png", 3]},
        "image[1]: expected a path, or a mapping of bytes and path, found 3",
    ),
    ({"image": {"pth": "a"}}, "image.pth: expected a known field, found 'pth'"),
    ({"image": {}}, "image: expected a path, or bytes in a Parquet manifest, found neither"),
    ({"image": ""}, "image: expected a path, found ''"),
    ({"images": ["in.png"]}, "images: expected either image or images, found both"),
    ({"image": ["in.png", "no.png"]}, "image[1]: expected an image file, found nothing at "),
    ({"image": "."}, "image: expected a file, found a folder: "),
    ({"image": "jobs.jsonl"}, "image: expected an image, found something else: "),
    ({"prompt": "<image><image>"}, "prompt: expected at most one <image> mark per image, found 2"),
    ({"cfg_norm": "cfg_zero_star"}, "cfg_norm: expected 'none', 'global' or 'channel' for edit, f"),
    ({"input_max_pixels": "all"}, "input_max_pixels: expected a number of pixels, 'auto' or 'non"),
    ({"input_max_pixels": 3}, "input_max_pixels: expected at least 16384 pixels, found 3"),
    ({"input_max_pixels": "3"}, "input_max_pixels: expected at least 16384 pixels, found 3"),
    ({"input_max_pixels": "9" * 11}, "input_max_pixels: expected a number of pixels, 'auto'"),
    (
        {"target_pixels": 16384**2 + 1},
        f"target_pixels: expected at most {16384**2}, found {16384**2 + 1}",
    ),
    ({"input_max_pixels": 0}, "input_max_pixels: expected at least 1, found 0"),
    ({"max_new_tokens": 3}, "max_new_tokens: expected a field of edit jobs, found one of other"),
]


@pytest.mark.parametrize(("fields", "message"), EDIT_MISTAKES)
def test_a_mistake_about_images_is_one_message(
    mistakes: Mistakes, draw_input: Any, fields: dict[str, Any], message: str
) -> None:
    found = mistakes({"prompt": "Redder", "task": "edit", "image": draw_input(), **fields})
    assert len(found) == 1
    assert found[0].startswith(f"line 1: {message}")


def test_an_image_that_is_too_long_is_refused(mistakes: Mistakes, draw_input: Any) -> None:
    found = mistakes({"prompt": "x", "image": draw_input("long.png", size=(1, 201))})
    assert found == ["line 1: image: expected an aspect ratio of at most 200, found 201.0 (1x201)"]


def test_all_mistakes_of_all_rows_are_reported(mistakes: Mistakes) -> None:
    found = mistakes({"prompt": "", "num_steps": 0, "sed": 1}, {"prompt": "fine"}, {"width": 32})
    assert [message.split(": exp")[0] for message in found] == [
        "line 1: num_steps",
        "line 1: sed",
        "line 1: prompt",
        "line 3: prompt",
        "line 3: height",
    ]


def test_at_most_a_hundred_mistakes_are_kept_and_all_are_counted(
    mistakes: Mistakes, read_rows: ReadRows
) -> None:
    rows = [{"prompt": "x", "seed": -1}] * 250
    assert len(mistakes(*rows)) == 100
    with pytest.raises(Exception, match="and 150 more"):
        read_rows(*rows)


def test_whole_numbers_do_for_real_ones_and_mean_the_same(read_rows: ReadRows) -> None:
    whole, real = read_rows(
        {"id": "a", "prompt": "x", "cfg_scale": 3, "cfg_interval": [0, 1]},
        {"id": "b", "prompt": "x", "cfg_scale": 3.0, "cfg_interval": [0.0, 1.0]},
    )
    assert repr(whole.sampling) == repr(real.sampling)


def test_special_tokens_in_a_prompt_are_text(read_rows: ReadRows) -> None:
    prompt = "<|im_start|>user <img> {not a placeholder}"
    assert read_rows({"prompt": prompt})[0].prompt == prompt


def test_every_field_belongs_to_some_task_and_is_described() -> None:
    assert frozenset.intersection(*FOREIGN_FIELDS.values()) == frozenset()
    assert all(field.description for field in JobFields.model_fields.values())


def test_the_schema_names_every_field_and_refuses_others() -> None:
    schema = manifest_schema()
    job = schema["$defs"]["JobFields"]
    assert set(job["properties"]) == set(JobFields.model_fields)
    assert job["additionalProperties"] is False
    assert schema["required"] == ["version", "jobs"]
    assert set(schema["properties"]["defaults"]["anyOf"][0]) == {"$ref"}


@pytest.mark.parametrize("task", list(Task))
def test_fields_of_other_tasks_are_named(mistakes: Mistakes, draw_input: Any, task: Task) -> None:
    values = {"target_pixels": 65536, "input_max_pixels": "auto", "max_images": 1}
    values |= {"max_new_tokens": 1, "img_cfg_scale": 1, "max_think_tokens": 1, "raw_inputs": True}
    values |= {"num_steps": 1, "cfg_scale": 1, "cfg_norm": "none", "cfg_interval": [0, 1]}
    values |= {"timestep_shift": 1, "width": 32, "height": 32}
    values |= {"choices": ["a", "b"], "do_sample": True, "temperature": 1, "top_p": 1, "top_k": 1}
    values |= {"repetition_penalty": 1, "solver": "euler", "guidance_stride": 1, "layer_stride": 1}
    row = {"prompt": "x", "task": task} | ({} if task is Task.T2I else {"image": draw_input()})
    found = mistakes({**row, **values})
    named = {message.split(": ")[1] for message in found}
    assert named == FOREIGN_FIELDS[task] - {
        "image", "images", "question", "history", "resolution", "quality", "timesteps",
        "accept", "keep", "tries",
    }  # fmt: skip
