"""Jobs and groups as JSON, so that they are read back as they were. Knows only the nouns."""

from __future__ import annotations

import json
from typing import Any

from sensebatch.jobs import CfgNorm, GroupKey, InputImage, Job, Sampling, Source, Task
from sensebatch.resolutions import Resolution


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def job_to_json(job: Job) -> str:
    """Returns a job as canonical JSON.

    Raises:
        TypeError: The metadata holds something that JSON has no word for.
    """
    sampling = job.sampling
    return _dumps(
        {
            "id": job.id,
            "task": job.task,
            "prompt": job.prompt,
            "images": [_image_values(image) for image in job.images],
            "size": [job.resolution.height, job.resolution.width],
            "seed": job.seed,
            "think": job.think,
            "system_prompt": job.system_prompt,
            "input_max_pixels": job.input_max_pixels,
            "sampling": {name: getattr(sampling, name) for name in Sampling.__slots__},
            "metadata": dict(job.metadata),
            "source": [job.source.file, job.source.row],
        }
    )


def _image_values(image: InputImage) -> list[Any]:
    values = [image.path, image.member, image.sha256, image.height, image.width]
    return [*values, image.corrections] if image.corrections else values


def _image(values: list[Any]) -> InputImage:
    path, member, sha256, height, width, *corrections = values
    return InputImage(
        path=path,
        member=None if member is None else (member[0], member[1], member[2]),
        sha256=sha256,
        height=height,
        width=width,
        corrections=corrections[0] if corrections else "",
    )


def job_from_json(text: str) -> Job:
    """Returns the job that `job_to_json` wrote; sequences in its metadata come back as lists."""
    values = json.loads(text)
    sampling = values["sampling"]
    sampling["cfg_norm"] = CfgNorm(sampling["cfg_norm"])
    sampling["cfg_interval"] = tuple(sampling["cfg_interval"])
    return Job(
        id=values["id"],
        task=Task(values["task"]),
        prompt=values["prompt"],
        images=tuple(_image(image) for image in values["images"]),
        resolution=Resolution(height=values["size"][0], width=values["size"][1]),
        seed=values["seed"],
        think=values["think"],
        system_prompt=values["system_prompt"],
        input_max_pixels=values["input_max_pixels"],
        sampling=Sampling(**sampling),
        metadata=values["metadata"],
        source=Source(file=values["source"][0], row=values["source"][1]),
    )


def group_to_json(group: GroupKey) -> str:
    """Returns a group as canonical JSON: equal groups give equal text."""
    values = {name: getattr(group, name) for name in GroupKey.__slots__}
    values["resolution"] = [group.resolution.height, group.resolution.width]
    return _dumps(values)


def group_from_json(text: str) -> GroupKey:
    """Returns the group that `group_to_json` wrote."""
    values = json.loads(text)
    height, width = values["resolution"]
    values["task"] = Task(values["task"])
    values["resolution"] = Resolution(height=height, width=width)
    values["branches"] = tuple(values["branches"])
    return GroupKey(**values)
