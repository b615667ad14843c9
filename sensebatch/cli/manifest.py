"""`sensebatch manifest`: check, describe and convert manifests. Loads no model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from sensebatch.cli.help import HelpCommand, new_app
from sensebatch.cli.options import (
    UNUSED_WITHOUT_WEIGHTS,
    Manifests,
    ModelOptions,
    ReadingOptions,
    RowTask,
    flags_of,
    with_options,
)
from sensebatch.cli.paths import path
from sensebatch.tasks import Task

app = new_app(add_completion=False, help="Check, describe and convert manifests.")


@app.command(cls=HelpCommand)
@with_options(hidden=UNUSED_WITHOUT_WEIGHTS)
def validate(
    manifests: Manifests,
    model: ModelOptions,
    reading: ReadingOptions,
    task: RowTask = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: jobs by task.")
    ] = False,
) -> None:
    """Check manifests as a run does before it starts, and print every error in them."""
    from sensebatch.cli.messages import show, warn, warn_of
    from sensebatch.functions import unused_words
    from sensebatch.manifest.read import read_manifests
    from sensebatch.plan.summary import long_prompts
    from sensebatch.settings import resolve_settings
    from sensebatch.units import counted

    config = resolve_settings(config_file=model.config, flags=flags_of(model, reading))
    jobs = read_manifests(manifests, config, task=task, warn=warn_of)
    jobs = long_prompts(config, None, warn_of).watch(jobs)
    by_task, judged = Counter[Task](), 0
    for job in jobs:
        by_task[job.task] += 1
        judged += job.judged_by is not None
    if config.accept and not judged:
        warn(unused_words(config.accept))
    if as_json:
        counts = {task.value: by_task[task] for task in Task}
        show(json.dumps({"jobs": by_task.total(), "by_task": counts}))
        return
    words = ", ".join(f"{count:,} {task.value}" for task, count in by_task.items())
    verb = "is" if by_task.total() == 1 else "are"
    show(f"{counted(by_task.total(), 'job')} {verb} valid ({words})")


@app.command(cls=HelpCommand)
def schema() -> None:
    """Print the JSON Schema of a YAML manifest, for editors."""
    from sensebatch.cli.messages import show
    from sensebatch.manifest.fields import manifest_schema

    show(json.dumps(manifest_schema(), indent=2))


@app.command(cls=HelpCommand)
@with_options(hidden=UNUSED_WITHOUT_WEIGHTS)
def convert(
    source: Annotated[
        Path, typer.Argument(parser=path, help="YAML, Parquet or JSONL file.", metavar="SOURCE")
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            parser=path, help="File to write; its suffix says the format.", metavar="DEST"
        ),
    ],
    model: ModelOptions,
    reading: ReadingOptions,
    task: RowTask = None,
    embed_images: Annotated[
        bool, typer.Option("--embed-images", help="Store the images inside DEST (Parquet).")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DEST if it exists.")
    ] = False,
) -> None:
    """Write a manifest in another format, with one row per job, matrices and defaults expanded."""
    from sensebatch.cli.messages import show
    from sensebatch.manifest.convert import convert_manifest
    from sensebatch.settings import resolve_settings
    from sensebatch.units import counted

    config = resolve_settings(config_file=model.config, flags=flags_of(model, reading))
    num_jobs = convert_manifest(
        source,
        destination,
        config,
        task=task,
        embed_images=embed_images,
        overwrite=overwrite,
    )
    show(f"{counted(num_jobs, 'job')} written to {destination}")
