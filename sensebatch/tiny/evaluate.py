"""Scores a checkpoint on held-out scenes: `python -m sensebatch.tiny.evaluate MODEL --out DIR`.

Examples become jobs of the engine, with the settings that a run would give them; the checker reads
the results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.checkpoint.fingerprint import model_identity
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.config import ModelConfig, RunConfig, default_config
from sensebatch.contract import Channel, Engine
from sensebatch.engine.device.choice import resolve_runtime
from sensebatch.engine.engine import load_engine
from sensebatch.errors import JobError
from sensebatch.jobs import (
    Batch,
    Failure,
    GroupKey,
    InputImage,
    Job,
    JobResult,
    Sampling,
    Source,
    batch_id,
    group_key,
)
from sensebatch.report.sheet import Tile, contact_sheet
from sensebatch.resolutions import BUCKETS_TINY
from sensebatch.tiny.manifests import encode_inputs, read_answers, write_manifest
from sensebatch.tiny.scores import Answer, Scores, score
from sensebatch.tiny.world.edits import edit
from sensebatch.tiny.world.examples import Example, text_to_image
from sensebatch.tiny.world.questions import SHORT, ask
from sensebatch.tiny.world.scene import Split, sample_resolution
from sensebatch.tiny.world.stories import story

KINDS = ("t2i", "think", "edit", "interleave", "ask", "caption")
BATCH_SIZE = 50


def held_out_examples(
    kind: str, count: int, *, first: int = 0, square: bool = False
) -> list[Example]:
    """Returns examples that training never shows, each determined by its number.

    Args:
        kind: One of `KINDS`.
        count: How many.
        first: Number of the first. Reported scores begin at 0; settings are chosen on others.
        square: Whether all have the square size, so that they take few batches.
    """
    split = Split.HELD_OUT
    examples = []
    for index in range(first, first + count):
        rng = np.random.default_rng((KINDS.index(kind), index))
        size = sample_resolution(rng)
        size = BUCKETS_TINY["1:1"] if square else size
        match kind:
            case "t2i" | "think":
                examples.append(text_to_image(rng, split, size, think=kind == "think"))
            case "edit":
                examples.append(edit(rng, split, size, think=False))
            case "ask":
                examples.append(ask(rng, split, size, kinds=SHORT))
            case "caption":
                examples.append(ask(rng, split, size, kinds=("caption",)))
            case _:
                examples.append(story(rng, split, size, think=False))
    return examples


def example_job(example: Example, number: int, sampling: Sampling) -> Job:
    """Returns an example as a job whose seed is its number."""
    images = tuple(
        InputImage(
            path=f"{number}-{place}.png",
            sha256="",
            height=scene.resolution.height,
            width=scene.resolution.width,
        )
        for place, scene in enumerate(example.inputs)
    )
    return Job(
        id=f"{example.kind}-{number:04d}",
        task=example.task,
        prompt=example.prompt,
        images=images,
        resolution=example.resolution if example.images else None,
        seed=number,
        think=example.think is not None,
        sampling=sampling,
        source=Source(file="evaluate", row=str(number)),
    )


def answer_examples(
    engine: Engine, examples: Sequence[Example], config: RunConfig, batch_size: int = BATCH_SIZE
) -> list[Answer]:
    """Returns the engine's answers, in the order of the examples.

    Raises:
        JobError: A job failed.
    """
    jobs = [
        example_job(example, number, config.tasks[example.task].sampling)
        for number, example in enumerate(examples)
    ]
    inputs = [encode_inputs(example) for example in examples]
    results = run_jobs(engine, jobs, inputs, batch_size)
    return [Answer(images=result.images, text=result.text) for result in results]


def run_jobs(
    engine: Engine,
    jobs: Sequence[Job],
    inputs: Sequence[Sequence[bytes]],
    batch_size: int = BATCH_SIZE,
) -> list[JobResult]:
    """Returns what an engine makes of jobs, in their order.

    Args:
        engine: Runs them.
        jobs: The jobs.
        inputs: The encoded input images of each.
        batch_size: The most jobs of a batch.

    Raises:
        JobError: A job failed.
    """
    groups: dict[GroupKey, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        groups[group_key(job)].append(number)
    results: dict[int, JobResult] = {}
    for group, members in groups.items():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            keys = tuple(jobs[number].id for number in chosen)
            batch = Batch(
                id=batch_id(keys),
                group=group,
                jobs=tuple(jobs[number] for number in chosen),
                keys=keys,
            )
            prepared = [engine.prepare(jobs[number], inputs[number]) for number in chosen]
            made = engine.generate(batch, prepared, kept=(), channel=Channel()).results
            results |= {n: _succeeded(one) for n, one in zip(chosen, made, strict=True)}
    return [results[number] for number in range(len(jobs))]


def _succeeded(result: JobResult | Failure) -> JobResult:
    if isinstance(result, Failure):
        raise JobError(result.message)
    return result


def open_engine(model: str, config: RunConfig) -> Engine:
    """Returns a checkpoint's engine, loaded as in a run."""
    checkpoint = open_checkpoint(model)
    device, dtype = resolve_runtime(config.model)
    prompts = resolve_system_prompts(checkpoint)
    identity = model_identity(checkpoint, prompts, config.model, dtype=dtype)
    return load_engine(
        config,
        checkpoint=checkpoint,
        identity=identity,
        system_prompt_source=prompts.sources,
        device=device,
    )


def run_config(*, device: str, sampling: Mapping[str, Any]) -> RunConfig:
    """Returns the embedded checkpoint's defaults in float32, with these sampling settings."""
    config = default_config()
    tasks = {
        task: replace(defaults, sampling=replace(defaults.sampling, **sampling))
        for task, defaults in config.tasks.items()
    }
    model = ModelConfig(device=device, dtype="float32")
    return replace(config, model=model, tasks=tasks)


def evaluate(
    engine: Engine,
    config: RunConfig,
    counts: Mapping[str, int],
    *,
    first: int = 0,
    square: bool = False,
) -> dict[str, Scores]:
    """Returns the scores of each kind; see `held_out_examples`."""
    scores = {}
    for kind, count in counts.items():
        examples = held_out_examples(kind, count, first=first, square=square)
        answers = answer_examples(engine, examples, config)
        scores[kind] = score(kind, examples, answers)
    return scores


def sample_grid(engine: Engine, config: RunConfig, count: int = 64) -> Image.Image:
    """Returns the square images of the first held-out prompts, all of them."""
    square = BUCKETS_TINY["1:1"]
    examples = [
        replace(example, answer=(replace(example.images[0], resolution=square),))
        for example in held_out_examples("t2i", count)
    ]
    answers = answer_examples(engine, examples, config)
    tiles = [
        Tile(image=Image.fromarray(answer.images[0]), caption=example.prompt)
        for example, answer in zip(examples, answers, strict=True)
    ]
    return contact_sheet(tiles)


def evaluate_run(
    model: str, out: Path, config_file: Path | None, counts: Mapping[str, int]
) -> dict[str, Scores]:
    """Returns the scores of `sensebatch run` itself, on one manifest of each kind.

    Args:
        model: Checkpoint folder, or tiny.
        out: Receives the manifests and run folders; a run that was stopped continues there.
        config_file: Settings of the run; None for the defaults.
        counts: Held-out examples of each kind.
    """
    settings = [] if config_file is None else ["--config", str(config_file)]
    scores = {}
    for kind, count in counts.items():
        examples = held_out_examples(kind, count)
        manifest = write_manifest(examples, out / kind)
        folder = out / f"{kind}-run"
        # The weights of a folder change while they are trained.
        arguments = ["run", str(manifest), "--output-dir", str(folder), "--model", model]
        arguments += ["--redraw", *settings]
        subprocess.run([sys.executable, "-m", "sensebatch", *arguments], check=True)
        scores[kind] = score(kind, examples, read_answers(folder, len(examples)))
    return scores


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or tiny.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.json and grid.png.")],
    count: Annotated[int, typer.Option(help="Held-out examples of each kind.")] = 500,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind; repeat the option for more.")
    ] = None,
    first: Annotated[int, typer.Option(help="Number of the first example.")] = 0,
    through_run: Annotated[
        bool, typer.Option(help="Score `sensebatch run` on manifests of the examples.")
    ] = False,
    config_file: Annotated[Path | None, typer.Option("--config", help="Its settings.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    num_steps: Annotated[int | None, typer.Option()] = None,
    cfg_scale: Annotated[float | None, typer.Option()] = None,
    img_cfg_scale: Annotated[float | None, typer.Option()] = None,
    timestep_shift: Annotated[float | None, typer.Option()] = None,
) -> None:
    """Scores a checkpoint on held-out scenes, in float32."""
    given = {
        "num_steps": num_steps,
        "cfg_scale": cfg_scale,
        "img_cfg_scale": img_cfg_scale,
        "timestep_shift": timestep_shift,
    }
    sampling = {name: value for name, value in given.items() if value is not None}
    if through_run and sampling:
        raise typer.BadParameter("sampling settings of a run belong in its --config")
    if through_run and first:
        raise typer.BadParameter("a run is scored on the examples from 0 on")
    kinds = [name for name in KINDS if not kind or name in kind]
    config = run_config(device=device, sampling=sampling)
    engine = open_engine(model, config)
    out.mkdir(parents=True, exist_ok=True)
    scores = (
        evaluate_run(model, out, config_file, dict.fromkeys(kinds, count))
        if through_run
        else evaluate(engine, config, dict.fromkeys(kinds, count), first=first)
    )
    for name, values in scores.items():
        print(name, values.line(), flush=True)
    content = {name: values.as_dict() for name, values in scores.items()}
    (out / "scores.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if "t2i" in kinds:
        sample_grid(engine, config).save(out / "grid.png")


if __name__ == "__main__":
    typer.run(main)
