"""Writes examples as a manifest that anyone can run, and reads answers from a run's folder."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from sensebatch.tiny.scores import Answer
from sensebatch.tiny.world.draw import draw_uint8
from sensebatch.tiny.world.examples import Example
from sensebatch.tiny.world.scene import Scene


def encode_png(scene: Scene, faint: Scene | None = None) -> bytes:
    """Returns the image of a scene, encoded as PNG; half of it is of the other scene, if any."""
    image = Image.fromarray(draw_uint8(scene))
    if faint is not None:
        image = Image.blend(image, Image.fromarray(draw_uint8(faint)), 0.5)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def encode_inputs(example: Example) -> list[bytes]:
    """Returns the input images of an example, encoded as PNG."""
    blends = [example.faint, *[None] * len(example.inputs)]
    return [encode_png(scene, faint) for scene, faint in zip(example.inputs, blends, strict=False)]


def job_id(number: int) -> str:
    """Returns the id of an example's job."""
    return f"example-{number:04d}"


def write_manifest(examples: Sequence[Example], folder: Path) -> Path:
    """Writes `manifest.jsonl` and the input images beside it; returns the manifest.

    An example's number is its job's seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, example in enumerate(examples):
        names = [f"{job_id(number)}-{place}.png" for place in range(len(example.inputs))]
        for name, encoded in zip(names, encode_inputs(example), strict=True):
            (folder / name).write_bytes(encoded)
        row: dict[str, Any] = {
            "id": job_id(number),
            "task": str(example.task),
            "prompt": example.prompt,
            "seed": number,
            "think": example.think is not None,
        }
        if example.images:
            size = example.resolution
            row |= {"width": size.width, "height": size.height}
        lines.append(json.dumps(row | ({"images": names} if names else {})))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def read_answers(folder: Path, count: int) -> list[Answer]:
    """Returns the answers of a finished run of such a manifest, in the order of the examples.

    Raises:
        KeyError: A job is not done.
    """
    columns = ["job_id", "status", "image_paths", "text_path"]
    rows = pq.read_table(folder / "log.parquet", columns=columns).to_pylist()
    done = {row["job_id"]: row for row in rows if row["status"] == "done"}
    answers = []
    for number in range(count):
        row = done[job_id(number)]
        images = tuple(np.asarray(Image.open(folder / path)) for path in row["image_paths"])
        path = row["text_path"]
        text = None if path is None else (folder / path).read_text(encoding="utf-8")
        answers.append(Answer(images=images, text=text))
    return answers
