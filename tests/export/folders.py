"""Small folders to export, and what an export has of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from sensebatch.dataset.records import Record, open_dataset
from sensebatch.declarations import plain
from sensebatch.export.run import ExportConfig, Exported, ExportObserver, export
from sensebatch.export.target import open_target
from sensebatch.jobs import InputImage, Job
from sensebatch.manifest.inputs import InputReader
from sensebatch.store.files import sha256_of
from sensebatch.tasks import Task
from tests.executor.fakes import make_job, run_folder

HOSTILE_IDS = (
    "../../etc".replace("..", "dots"),
    "a.b.c",
    "sub/folder/image",
    "-rf",
    "ünïcödé 船",
    "x" * 120,
    "[glob]*?",
    ".hidden",
    "%s{0}",
)


def input_file(folder: Path, name: str) -> InputImage:
    """Writes an image to start from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    Image.fromarray(np.full((32, 64, 3), len(name), np.uint8)).save(path)
    return InputImage(path=str(path), sha256=sha256_of(path) or "", height=32, width=64)


def mixed_jobs(inputs: Path) -> list[Job]:
    """Returns jobs of all tasks, with text and without, under names that are hard to write."""
    images = [input_file(inputs, name) for name in ("one.png", "two.PNG")]
    jobs = [make_job(job_id, metadata={"tags": ["hostile"]}) for job_id in HOSTILE_IDS]
    jobs += [make_job("thinks", think=True, prompt='<script>"&\n船')]
    jobs += [make_job("edit", Task.EDIT, images=tuple(images[:1]))]
    jobs += [make_job("edit-two", Task.EDIT, images=tuple(images), think=True)]
    asked = replace(make_job("x", Task.ASK).sampling, choices=("yes", "no"))
    before = (("<image> A dot?", "yes"),)
    question = make_job("question", Task.ASK, images=tuple(images[:1]), sampling=asked)
    jobs += [replace(question, history=before)]
    jobs += [make_job("story", Task.INTERLEAVE), make_job("grows", Task.INTERLEAVE, prompt="grows")]
    return jobs


def grid(num_jobs: int, **changes: Any) -> list[Job]:
    """Returns text-to-image jobs, four seeds of each prompt."""
    return [
        make_job(f"image-{number:04d}", prompt=f"prompt {number // 4}", seed=number, **changes)
        for number in range(num_jobs)
    ]


def make_folder(root: Path, jobs: Sequence[Job]) -> Path:
    """Runs jobs of the fake engine, whose input images need not be read."""
    run_folder(root, jobs)
    return root


def export_folder(
    root: Path, out: Path | str, observer: ExportObserver | None = None, **config: Any
) -> Exported:
    """Exports a folder."""
    with open_dataset(root) as dataset:
        return export(
            dataset,
            open_target(str(out)),
            ExportConfig(**{"format": "hf", **config}),
            read_input=InputReader().read,
            observer=observer,
        )


def records_of(root: Path) -> dict[str, Record]:
    """Returns the jobs of a folder that are done."""
    with open_dataset(root) as dataset:
        return {record.id: record for record in dataset.records() if record.is_done}


def parquet_rows(out: Path) -> list[dict[str, Any]]:
    """Returns the rows of all Parquet shards of an export."""
    shards = sorted(out.glob("*/*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def parquet_ids(out: Path) -> list[str]:
    """Returns the ids of these rows."""
    return [row["id"] for row in parquet_rows(out)]


def expected_columns(record: Record) -> dict[str, Any]:
    """Returns what a row of any format has of a job besides its images."""
    row = dict(record.row)
    names = ["seed", "think", "finish_reason", "key"]
    if record.job.task.spec.drawing is not None:
        names += ["width", "height", "num_steps", "cfg_scale", "cfg_interval"]
    names += ["history", "answer", "choice_probabilities"] if row["answer"] is not None else []
    return {
        **{name: plain(row[name]) for name in names},
        "id": record.id,
        "model": "fake",
        "model_license": "apache-2.0",
        "tags": list(record.tags),
        "metadata": json.dumps(dict(record.metadata)),
    }
