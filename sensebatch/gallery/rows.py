"""A job as someone would write it: a row of a manifest, or a command line. Pure."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sensebatch.config import TaskDefaults
from sensebatch.declarations import declared, item_of_any_number, plain, stated
from sensebatch.jobs import InputImage, Job, Sampling, history_fields

_SETTINGS = {**declared(TaskDefaults), **declared(Sampling)}
_NOT_IN_YAML = re.compile(r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""What JSON leaves as it is and YAML does not take in a text."""


def manifest_row(job: Job) -> str | None:
    """Returns the job as a row of a YAML manifest; None where none can say it.

    Every setting is stated, so that no default of another manifest or version decides it.
    """
    fields = _fields(job)
    if fields is None:
        return None
    metadata = dict(job.metadata)
    tags = metadata.pop("tags", None)
    fields = {"id": job.id, **fields}
    if tags:
        fields["tags"] = list(tags)
    if metadata:
        fields["metadata"] = metadata
    lines = [f"{name}: {_yaml(value)}" for name, value in fields.items()]
    return "- " + "\n  ".join(lines) + "\n"


def command_line(job: Job, model: str | None, root: Path) -> str | None:
    """Returns the command that makes the job on its own; None where none can.

    Args:
        job: The job.
        model: The checkpoint, as the user named it.
        root: The run's folder, which has the images that other jobs have made.
    """
    fields = _fields(job)
    if fields is None:
        return None
    if fields.pop("history", None) is not None:
        return None
    fields.pop("images", None)
    words = ["sensebatch", fields.pop("task")]
    for image in job.images:
        words += _option("image", image.path if image.output is None else str(root / image.path))
    for name, value in fields.items():
        words += _option(name, value)
    if model:
        words += _option("model", model)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    """Returns a field as words of a command line."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list):
        setting = _SETTINGS[name]
        if item_of_any_number(setting.plain_type) is None:
            return [flag, *map(str, value)]
        return [word for one in value for word in (flag, str(one))]
    # A value that begins with a dash would be taken for an option.
    return [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]


def _fields(job: Job) -> dict[str, Any] | None:
    """Returns the job's fields by name, without its id; None if no manifest can say them.

    None can of an image that is inside a file, or of what a function answers.
    """
    if job.judged_by is not None or any(image.member is not None for image in job.images):
        return None
    spec = job.task.spec
    fields: dict[str, Any] = {"task": job.task.value, "prompt": job.prompt}
    if job.history:
        fields["history"] = history_fields(job)
    if job.images:
        fields["images"] = [_image_name(image) for image in job.images]
    if job.resolution is not None:
        fields |= {"width": job.resolution.width, "height": job.resolution.height}
    pixels = "none" if job.input_max_pixels is None else job.input_max_pixels
    values: Mapping[str, Any] = {
        "seed": job.seed,
        "think": job.think,
        "input_max_pixels": pixels,
        # Those at their neutral value are what a job without them has.
        **stated(job.sampling),
    }
    said_by_timesteps = ("num_steps", "timestep_shift") if job.sampling.timesteps else ()
    for name, setting in _SETTINGS.items():
        if name in values and name not in said_by_timesteps and setting.setting.of(spec):
            fields[name] = plain(values[name])
    if job.system_prompt is not None:
        fields["system_prompt"] = job.system_prompt
    return fields


def _image_name(image: InputImage) -> str:
    """Returns what a manifest calls an input image: its path, or the job that makes it."""
    if image.output is None:
        return image.path
    parent, index = image.output
    is_one_of_several = image.path == f"images/{parent}/{PurePosixPath(image.path).name}"
    return f"@{parent}/{index}" if is_one_of_several else f"@{parent}"


def _yaml(value: Any) -> str:
    """Returns a value as JSON that YAML reads as well."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
