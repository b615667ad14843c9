"""`sensebatch run`: from manifests to images and a log. The same command resumes the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.options import (
    BatchOptions,
    DeadlineOptions,
    ExecutionOptions,
    FolderOptions,
    ImageOptions,
    Limit,
    Manifests,
    ModelOptions,
    ReadingOptions,
    RowTask,
    ScreenOptions,
    WorkerOptions,
    flags_of,
)

if TYPE_CHECKING:
    from sensebatch.config import RunConfig
    from sensebatch.store.manifests import ManifestFiles


DryRunFlag = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what would be drawn, redrawn and kept, and why; run nothing."
    ),
]
ProfileFlag = Annotated[
    bool, typer.Option("--profile", help="Print what this run cost, call by call.")
]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout at the end.")
]


def run(
    manifests: Manifests,
    model: ModelOptions,
    batch: BatchOptions,
    execution: ExecutionOptions,
    images: ImageOptions,
    workers: WorkerOptions,
    screen: ScreenOptions,
    reading: ReadingOptions,
    folder: FolderOptions,
    deadline: DeadlineOptions,
    task: RowTask = None,
    limit: Limit = None,
    dry_run: DryRunFlag = False,
    profile: ProfileFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Run the jobs of one or more manifests that are not done yet.

    Exit codes: 0 all jobs done, 1 some failed, 2 nothing started because of an error, 75 stopped
    and resumable by the same command. 129, 130 and 143: ended at once by SIGHUP, SIGINT or
    SIGTERM, the second one or one that came before there was a run.
    """
    from sensebatch import session
    from sensebatch.cli.dry_run import print_dry_run
    from sensebatch.cli.outcome import finish, reporting_stops
    from sensebatch.cli.session import measured_gpu, run_session, settled
    from sensebatch.manifest.read import read_manifests, run_name
    from sensebatch.settings import resolve_settings

    until = deadline.at(session.clock())
    flags = flags_of(model, batch, execution, images, reading)
    config = resolve_settings(config_file=model.config, flags=flags)
    voice = screen.voice()
    jobs = partial(read_manifests, manifests, config, task=task, limit=limit, warn=voice.warn_of)
    root = folder.root(lambda: run_name(manifests, jobs))
    request = session.Request(
        root=root,
        config=config,
        sources=tuple(str(path) for path in manifests),
        jobs=jobs,
        limit=limit,
        files=_files(manifests, folder, config, [task, limit]),
        until=until,
        workers=settled(workers.config(model, config.model.device)),
        measured=measured_gpu(),
        **folder.said(),
    )
    with closing(voice), reporting_stops(root, voice, as_json=as_json):
        if dry_run:
            print_dry_run(request, voice, as_json=as_json)
            return
        summary = run_session(request, voice)
        finish(root, summary, voice=voice, profile=profile, as_json=as_json, until=until)


def _files(
    manifests: Sequence[Path], folder: FolderOptions, config: RunConfig, said: list[object]
) -> ManifestFiles:
    """Returns the files of a run, with what else decides its jobs."""
    from sensebatch.settings import dump_settings
    from sensebatch.store.manifests import ManifestFiles

    functions = [one.source_sha256 for one in config.accept]
    settings = json.dumps([*said, dump_settings(config), functions])
    return ManifestFiles(paths=tuple(manifests), settings=settings, is_other=folder.other_manifest)
