"""`sensebatch run`: manifests to images and a log; typed again, it goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from sensebatch.cli.options import BatchOptions, ExecutionOptions, ImageOptions, ModelOptions
from sensebatch.jobs import Job
from sensebatch.tasks import Task


def run(
    manifests: Annotated[
        list[Path], typer.Argument(help="YAML, Parquet or JSONL files.", metavar="MANIFEST...")
    ],
    model: ModelOptions,
    batch: BatchOptions,
    execution: ExecutionOptions,
    images: ImageOptions,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="The run's folder; outputs/NAME of the manifest if not given."),
    ] = None,
    task: Annotated[
        Task | None, typer.Option(help="What rows make that do not say so (JSONL).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N jobs.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print what this run cost, call by call.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout at the end.")
    ] = False,
) -> None:
    """Run what is missing of one or more manifests.

    Exit codes: 0 all jobs done, 1 some failed, 2 nothing started because of a mistake, 75 stopped
    and resumable by the same command, 130 or 143 after a second signal.
    """
    from sensebatch.cli.messages import warn_of
    from sensebatch.cli.outcome import finish, telling_stops
    from sensebatch.cli.session import run_session
    from sensebatch.manifest.read import read_manifests, run_name
    from sensebatch.session import Request
    from sensebatch.settings import resolve_settings

    flags = model.flags() | batch.flags() | execution.flags() | images.flags()
    config = resolve_settings(config_file=model.config, flags=flags)

    def jobs() -> Iterator[Job]:
        return read_manifests(manifests, config, task=task, limit=limit, warn=warn_of)

    root = Path("outputs") / run_name(manifests, jobs) if output_dir is None else output_dir
    request = Request(
        root=root,
        config=config,
        sources=tuple(str(path) for path in manifests),
        jobs=jobs,
        limit=limit,
    )
    with telling_stops(root, as_json=as_json):
        summary = run_session(request)
    finish(root, summary, profile=profile, as_json=as_json)
