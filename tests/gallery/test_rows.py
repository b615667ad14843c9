"""A job written as a row of a manifest and as a command line is the same job when it is read."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensebatch.cli import one_job
from sensebatch.cli.main import main
from sensebatch.config import default_config
from sensebatch.gallery.rows import command_line, manifest_row
from sensebatch.jobs import Job, Source, job_key
from sensebatch.manifest.one import job_from_fields
from sensebatch.manifest.read import read_manifests
from sensebatch.settings import resolve_settings
from sensebatch.tasks import Task
from tests.executor.fakes import IDENTITY, make_job
from tests.gallery.runs import HOSTILE, HOSTILE_ID, make_input_file

CONFIG = default_config()


def _read(folder: Path, row: str) -> Job:
    """Returns the job that a manifest with the row has."""
    path = folder / "manifest.yaml"
    lines = "".join(f"  {line}\n" for line in row.splitlines())
    path.write_text(f"version: 1\njobs:\n{lines}", encoding="utf-8")
    (job,) = read_manifests([path], CONFIG)
    return job


def _job(**fields: Any) -> Job:
    return job_from_fields(fields, CONFIG, source=Source(file="jobs.yaml", row="line 1"))


def _jobs(folder: Path) -> list[Job]:
    """Returns jobs with settings that are not the defaults."""
    image = make_input_file(folder / "in put's.png").path
    size = {"width": 512, "height": 256}
    guided = {"cfg_scale": 3.5, "cfg_norm": "cfg_zero_star", "cfg_interval": [0.25, 0.75]}
    edit = {"task": "edit", "prompt": "make it night", **size}
    return [
        _job(id="plain", prompt="a dot", seed=2**62, num_steps=7, **size, **guided),
        _job(id=HOSTILE_ID, prompt=HOSTILE, tags=["a: b", "- c"], timestep_shift=1.5),
        _job(id="steps", prompt="a dot", timesteps=[0.25, 0.5], solver="ab2"),
        _job(id="dash", prompt="-- not an option", system_prompt="-x\ny", think=True),
        _job(id="edit", images=[image], input_max_pixels=300_000, img_cfg_scale=1.25, **edit),
        _job(id="as-is", images=[image, image], input_max_pixels="none", **edit),
        _job(
            id="story",
            task="interleave",
            prompt="two dots",
            max_images=3,
            max_new_tokens=99,
            think=False,
            metadata={"note": {"deep": [1, None]}},
        ),
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_manifest_row_gives_the_same_job(tmp_path: Path, number: int) -> None:
    job = _jobs(tmp_path)[number]
    row = manifest_row(job)
    assert row is not None
    read = _read(tmp_path, row)
    assert job_key(read, IDENTITY) == job_key(job, IDENTITY)
    assert read.id == job.id
    assert dict(read.metadata) == dict(job.metadata)


@pytest.mark.parametrize("number", range(7))
def test_a_command_line_gives_the_same_job(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _jobs(tmp_path)[number]
    line = command_line(job, "tiny", tmp_path)
    assert line is not None
    given: list[Any] = []
    monkeypatch.setattr(one_job, "run_command", given.append)
    program, *words = shlex.split(line)
    assert program == "sensebatch"
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    (command,) = given
    flags = {place: value for place, value in command.flags.items() if value is not None}
    fields = {
        **command.fields,
        "prompt": command.job.prompt,
        "system_prompt": command.job.system_prompt,
        "task": str(command.task),
    }
    config = resolve_settings(flags=flags)
    read = job_from_fields(fields, config, source=job.source)
    assert job_key(read, IDENTITY) == job_key(job, IDENTITY)


@given(prompt=st.text(min_size=1).filter(str.strip))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompt_survives_a_manifest_row(tmp_path: Path, prompt: str) -> None:
    if re.search("[\ud800-\udfff\0]", prompt):
        return
    row = manifest_row(replace(_job(id="any", prompt="a dot"), prompt=prompt))
    assert row is not None
    assert _read(tmp_path, row).prompt == prompt


def test_images_inside_a_parquet_file_have_no_row_of_their_own(tmp_path: Path) -> None:
    image = replace(make_input_file(tmp_path / "a.png"), member=(0, "image", 0))
    job = make_job("inside", Task.EDIT, images=(image,))
    assert manifest_row(job) is None
    assert command_line(job, None, tmp_path) is None


def test_an_image_of_another_job_is_named_by_it(tmp_path: Path) -> None:
    image = replace(make_input_file(tmp_path / "a.png"), path="images/a.png", output=("a", 0))
    several = replace(image, path="images/tale/002.png", output=("tale", 2))
    job = make_job("child", Task.EDIT, images=(image, several))
    row = manifest_row(job)
    assert row is not None
    assert 'images: ["@a", "@tale/2"]' in row
    line = command_line(job, None, tmp_path / "run")
    assert line is not None
    assert f"--image {tmp_path}/run/images/a.png" in line
    assert f"--image {tmp_path}/run/images/tale/002.png" in line
