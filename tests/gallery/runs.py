"""Runs to make galleries of, by the fake engine: stories, edits, thoughts and failures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sensebatch.contract import Channel, Kept
from sensebatch.jobs import Batch, Failure, InputImage, Job, JobResult
from sensebatch.tasks import Task
from tests.executor.fakes import FakeEngine, drawn_image, make_job, run_folder, to_pixels

HOSTILE = (
    '<img src=x onerror="window.harmed=1"> </script><script>window.harmed=1</script> '
    "&lt;b&gt; {{7*7}} ${7*7} javascript:alert(1) \u202e 🎨 'quoted' \"twice\""
)
HOSTILE_ID = "a&b #%25 'x' + $& $$ {n} {id} __proto__"
COLOURS = ["red", "green"]
STORY = (
    "<think>\nTwo steps & a plan.\n</think>\n\nFirst <b>a dot</b>.\n<image>\nThen a line.\n<image>"
)


@dataclass
class StoryEngine(FakeEngine):
    """Writes a story of two images for every interleave job."""

    def _interleave(
        self, batch: Batch, _kept: Kept, _channel: Channel
    ) -> list[JobResult | Failure]:
        return [
            JobResult(
                images=tuple(to_pixels(drawn_image(job.resolution, job.id, n)) for n in range(2)),
                text=STORY,
                text_tokens=12,
            )
            for job in batch.jobs
        ]


def make_input_file(path: Path, colour: str = "red") -> InputImage:
    """Writes an image; returns it as an input."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 32), colour).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return InputImage(path=str(path), sha256=digest, height=32, width=64)


def make_jobs(inputs: Path) -> list[Job]:
    """Returns jobs of every kind, the matrix of colours and seeds first."""
    matrix = [
        make_job(f"{colour}-{seed}", prompt=f"a {colour} dot", seed=seed, matrix={"colour": colour})
        for colour in COLOURS
        for seed in (1, 2, 3)
    ]
    edit = make_input_file(inputs / "harbour #1.png")
    return [
        *matrix,
        make_job(HOSTILE_ID, prompt=HOSTILE, metadata={"tags": ["<i>tag</i>", "odd"], "by": "me"}),
        make_job("thought", prompt="thinks first", think=True),
        make_job("edited", Task.EDIT, prompt="make it night", images=(edit,), think=False),
        make_job("story", Task.INTERLEAVE, prompt="a dot becomes a line"),
        make_job("broken", prompt="this fails"),
    ]


def make_run(root: Path, jobs: Sequence[Job] | None = None, **changes: Any) -> Path:
    """Makes a run's folder, of all kinds of jobs unless some are given."""
    own = make_jobs(root.parent / "inputs") if jobs is None else jobs
    run_folder(root, own, engine=StoryEngine(), **changes)
    return root
