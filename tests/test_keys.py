"""The keys that earlier versions gave to jobs: with another key, a finished job is drawn again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.config import default_config
from sensebatch.jobs import CfgNorm, Job, ModelIdentity, Precision, job_key
from sensebatch.manifest.read import read_manifest
from sensebatch.tasks import SystemPromptKind, Task
from tests.executor.fakes import IDENTITY, make_input, make_job

HERE = Path(__file__).parent
CATALOG = HERE.parent / "manifests" / "catalog.yaml"
CATALOG_KEYS = HERE / "catalog_keys.json"
"""By id, as version 0.1.0 logged them for its embedded checkpoint in float32."""
FIRST_CHECKPOINT = "b20301767b0a478d7524b3a820da5a336068f66c937405b703c4d6f7784fae23"
"""Fingerprint of that checkpoint, which another one has taken the place of."""
PROMPT = "a picture of a"
"""Part of the pinned keys, so its words stay what they are."""
X, Y = make_input("x"), make_input("y")

OF_TASKS: list[tuple[Task, dict[str, Any], str]] = [
    (Task.T2I, {}, "951c11d52aa88ee43ffba8613c5220b51bbd4b0a4519d07d8be67c209de6cacf"),
    (
        Task.T2I,
        {"think": True, "system_prompt": "Draw."},
        "34ff26a37fb29938ddc5e79aa9034289109c5cae504dbaa79599c98bd63523db",
    ),
    (
        Task.EDIT,
        {"images": (X,), "input_max_pixels": 16384},
        "d952dc2bb98077d929a3ed41bdf6dd94f608ad83b49f2acc6a3d4623fd7e91eb",
    ),
    (
        Task.EDIT,
        {"images": (X, Y), "think": True},
        "2c671786a275a036a33ed9798b4f4ae1de0ec1bb4abc3e1383b8107f42dc65d0",
    ),
    (Task.INTERLEAVE, {}, "210d483ceb451fd202df24e44b3539e16d6767d627b77f7a3027a8d9e8205fac"),
    (
        Task.INTERLEAVE,
        {"images": (X,), "think": False, "seed": 2**63 - 1},
        "ad1daf19f694b175374ff0b9e6bb43f0b8c929eb6911ce3db1dceac2ba13eb81",
    ),
    (Task.ASK, {}, "b5a7dc4f2fb580c0cf6fbb5cc631960bdeb39d5b179efc26f3810352d9130c72"),
    (
        Task.ASK,
        {"images": (X,), "think": True},
        "f028c711dc7c15949a1c3e3f479a2d2cede71ed627c813dbc8606a35195ad0ed",
    ),
]
"""The keys of `make_job` with `PROMPT` and some fields changed, for `IDENTITY`."""


def test_jobs_of_the_catalog_have_the_keys_they_always_had() -> None:
    prompts = resolve_system_prompts(open_checkpoint("tiny")).by_kind
    identity = ModelIdentity(
        checkpoint=FIRST_CHECKPOINT,
        lora=None,
        dtype="float32",
        generation_prompt=prompts[SystemPromptKind.GENERATION].text,
        interleave_prompt=prompts[SystemPromptKind.INTERLEAVE].text,
    )
    jobs = read_manifest(CATALOG, default_config("tiny"))
    pinned = json.loads(CATALOG_KEYS.read_text(encoding="utf-8"))
    keys = {job.id: job_key(job, identity) for job in jobs if job.id in pinned}
    assert keys == pinned


@pytest.mark.parametrize(("task", "changes", "expected"), OF_TASKS)
def test_jobs_of_every_task_have_the_keys_they_always_had(
    task: Task, changes: dict[str, Any], expected: str
) -> None:
    assert job_key(make_job("a", task, prompt=PROMPT, **changes), IDENTITY) == expected


def test_no_task_is_without_a_pinned_key() -> None:
    assert {task for task, _, _ in OF_TASKS} == set(Task)


def test_another_model_and_other_settings_give_the_keys_they_always_gave() -> None:
    job = make_job("a", prompt=PROMPT)
    identity = replace(IDENTITY, lora="l" * 64, dtype="bfloat16", precision=Precision.FP8)
    assert job_key(job, identity) == (
        "d415b18dc46e2e6c1deeedbbc7882ef3c8d7ee35fc7c9458410b7d09012f8849"
    )
    assert job_key(_unlike_the_defaults(job), IDENTITY) == (
        "1daf80e8b16300549db29244c09557d4b7ecef87a3629b0a39edb8607d929884"
    )


def _unlike_the_defaults(job: Job) -> Job:
    sampling = replace(
        job.sampling,
        num_steps=50,
        cfg_scale=4.0,
        img_cfg_scale=1.5,
        cfg_norm=CfgNorm.CFG_ZERO_STAR,
        cfg_interval=(0.25, 0.75),
        timestep_shift=1.0,
    )
    return replace(job, sampling=sampling)
