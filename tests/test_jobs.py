"""What makes a job another job, and when two ids are one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.jobs import (
    AttemptAt,
    CfgNorm,
    Job,
    JudgedBy,
    ModelIdentity,
    Sampling,
    Solver,
    Source,
    VerdictOn,
    folded_id,
    job_key,
)
from sensebatch.resolutions import Resolution
from sensebatch.tasks import SystemPromptKind, Task
from tests.executor.fakes import IDENTITY, make_input, make_job

DECIDING: dict[str, Any] = {
    "task": Task.EDIT,
    "prompt": "another",
    "images": (make_input("x"),),
    "resolution": Resolution(height=64, width=64),
    "seed": 8,
    "think": True,
    "system_prompt": "own",
    "input_max_pixels": 1024,
    "history": (("What is it?", "A fox."),),
    "judged_by": JudgedBy(function="checks:sharp", source_sha256="0" * 64),
    "sampling": None,
}
"""Another value of each field that a key depends on; those of `sampling` are below."""
IDLE: dict[str, Any] = {
    "id": "b",
    "metadata": {"tag": 1},
    "matrix": {"ship": "schooner"},
    "level": 2,
    "attempt_at": AttemptAt(series="b", number=1, keep=2),
    "verdict": VerdictOn(job="a", answer="yes", at_least=0.5),
    "source": Source(file="other.yaml", row="line 9"),
}
SAMPLING: dict[str, Any] = {
    "cfg_norm": CfgNorm.GLOBAL,
    "cfg_interval": (0.25, 0.75),
    **dict.fromkeys(("timestep_shift", "cfg_scale", "img_cfg_scale"), 9.5),
    **dict.fromkeys(("num_steps", "max_think_tokens", "max_images", "max_new_tokens"), 99),
    "solver": Solver.AB2,
    "timesteps": (0.5,),
    "guidance_stride": 2,
    "layer_stride": 2,
    "choices": ("yes", "no"),
    "do_sample": True,
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), 0.5),
    "top_k": 3,
}


def key(job: Job, **identity: Any) -> str:
    return job_key(job, replace(IDENTITY, **identity))


def test_every_field_of_a_job_is_known_to_decide_or_not() -> None:
    assert DECIDING.keys() | IDLE.keys() == {field.name for field in fields(Job)}
    assert SAMPLING.keys() == {field.name for field in fields(Sampling)}


@pytest.mark.parametrize("name", [name for name in DECIDING if name != "sampling"])
def test_what_decides_pixels_is_in_the_key(name: str) -> None:
    job = make_job("a")
    assert key(replace(job, **{name: DECIDING[name]})) != key(job)


@pytest.mark.parametrize("name", SAMPLING)
def test_every_sampling_setting_is_in_the_key(name: str) -> None:
    job = make_job("a")
    assert key(replace(job, sampling=replace(job.sampling, **{name: SAMPLING[name]}))) != key(job)


@pytest.mark.parametrize("name", IDLE)
def test_what_decides_nothing_is_not_in_the_key(name: str) -> None:
    job = make_job("a")
    assert key(replace(job, **{name: IDLE[name]})) == key(job)


def test_inputs_count_by_their_bytes_and_not_by_their_place() -> None:
    here, there = make_input("x"), replace(make_input("x"), path="y", member=(1, "image", 0))
    other = make_input("y")
    keys = [key(make_job("a", Task.EDIT, images=(image,))) for image in (here, there, other)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("field", fields(ModelIdentity), ids=lambda field: field.name)
def test_everything_of_the_model_is_in_the_key_of_the_tasks_it_serves(field: Any) -> None:
    for task in Task:
        kind = task.spec.prompt.system
        others = {f"{other}_prompt" for other in SystemPromptKind if other is not kind}
        job = make_job("a", task)
        assert (key(job, **{field.name: "another"}) == key(job)) == (field.name in others)


@given(st.text(max_size=20))
def test_ids_that_differ_in_case_or_accents_encoding_collide(text: str) -> None:
    assert folded_id(text) == folded_id(text.casefold())


def test_composed_and_decomposed_letters_collide() -> None:
    assert folded_id("e\u0301") == folded_id("É")
