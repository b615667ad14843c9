"""Jobs and groups as JSON, so that they are read back as they were. Knows only the nouns."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sensebatch.declarations import restored, stated
from sensebatch.jobs import (
    AttemptAt,
    Drawing,
    GroupKey,
    InputImage,
    Job,
    JudgedBy,
    Sampling,
    Solver,
    Source,
    VerdictOn,
)
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Task


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def job_to_json(job: Job) -> str:
    """Returns a job as canonical JSON.

    Raises:
        TypeError: The metadata or the matrix holds something that JSON has no word for.
    """
    # A later field, which is there only if it is used.
    matrix = {"matrix": dict(job.matrix)} if job.matrix else {}
    level: dict[str, Any] = {"level": job.level} if job.level else {}
    if job.history:
        level["history"] = job.history
    if job.attempt_at is not None:
        level["try"] = asdict(job.attempt_at)
    if job.verdict is not None:
        level["verdict"] = asdict(job.verdict)
    if job.judged_by is not None:
        level["function"] = asdict(job.judged_by)
    return _dumps(
        {
            "id": job.id,
            "task": job.task,
            "prompt": job.prompt,
            "images": [_image_values(image) for image in job.images],
            "size": _size(job.resolution),
            "seed": job.seed,
            "think": job.think,
            "system_prompt": job.system_prompt,
            "input_max_pixels": job.input_max_pixels,
            "sampling": stated(job.sampling),
            "metadata": dict(job.metadata),
            **matrix,
            **level,
            "source": [job.source.file, job.source.row],
        }
    )


def _image_values(image: InputImage) -> list[Any]:
    values = [image.path, image.member, image.sha256, image.height, image.width]
    if image.output is not None:
        return [*values, image.corrections, image.output]
    return [*values, image.corrections] if image.corrections else values


def _size(resolution: Resolution | None) -> list[int] | None:
    return None if resolution is None else [resolution.height, resolution.width]


def _resolution(size: list[int] | None) -> Resolution | None:
    return None if size is None else Resolution(height=size[0], width=size[1])


def _image(values: list[Any]) -> InputImage:
    path, member, sha256, height, width, *later = values
    # Later values, which are there only if they are used.
    corrections = later[0] if later else ""
    output = later[1] if len(later) > 1 else None
    return InputImage(
        path=path,
        member=None if member is None else (member[0], member[1], member[2]),
        sha256=sha256,
        height=height,
        width=width,
        corrections=corrections,
        output=None if output is None else (output[0], output[1]),
    )


def job_from_json(text: str) -> Job:
    """Returns the job that `job_to_json` wrote; sequences in its metadata come back as lists."""
    values = json.loads(text)
    return Job(
        id=values["id"],
        task=Task(values["task"]),
        prompt=values["prompt"],
        history=tuple((asked, said) for asked, said in values.get("history", ())),
        images=tuple(_image(image) for image in values["images"]),
        resolution=_resolution(values["size"]),
        seed=values["seed"],
        think=values["think"],
        system_prompt=values["system_prompt"],
        input_max_pixels=values["input_max_pixels"],
        sampling=restored(Sampling, values["sampling"]),
        metadata=values["metadata"],
        matrix=values.get("matrix", {}),
        level=values.get("level", 0),
        attempt_at=AttemptAt(**values["try"]) if "try" in values else None,
        verdict=VerdictOn(**values["verdict"]) if "verdict" in values else None,
        judged_by=JudgedBy(**values["function"]) if "function" in values else None,
        source=Source(file=values["source"][0], row=values["source"][1]),
    )


def group_to_json(group: GroupKey) -> str:
    """Returns a group as canonical JSON: equal groups give equal text."""
    values: dict[str, Any] = {"task": group.task}
    if group.drawing is None:
        values["think"] = group.think
        # A later field, which is there only if it is used.
        return _dumps({**values, "function": True} if group.by_function else values)
    values["resolution"] = _size(group.drawing.resolution)
    values["num_steps"] = group.drawing.num_steps
    values["timestep_shift"] = group.drawing.timestep_shift
    # The order in which every version has written them.
    values["think"] = group.think
    values["branches"] = group.drawing.branches
    # Later fields, which are there only if they are used.
    values |= {name: value for name, value in stated(group.drawing).items() if name not in values}
    return _dumps(values)


def group_from_json(text: str) -> GroupKey:
    """Returns the group that `group_to_json` wrote."""
    values = json.loads(text)
    drawing = None
    if (resolution := _resolution(values.get("resolution"))) is not None:
        drawing = Drawing(
            resolution=resolution,
            num_steps=values["num_steps"],
            timestep_shift=values["timestep_shift"],
            branches=tuple(map(Branch, values["branches"])),
            solver=Solver(values.get("solver", Solver.EULER)),
            timesteps=tuple(values.get("timesteps", ())),
            guidance_stride=values.get("guidance_stride", 1),
            layer_stride=values.get("layer_stride", 1),
        )
    return GroupKey(
        task=Task(values["task"]),
        think=values["think"],
        drawing=drawing,
        by_function=values.get("function", False),
    )
