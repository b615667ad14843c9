"""`sensebatch demo`: the catalog, drawn with the embedded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sensebatch
from sensebatch.cli.options import (
    BatchOptions,
    DeadlineOptions,
    ExecutionOptions,
    FolderOptions,
    ImageOptions,
    ModelOptions,
    ReadingOptions,
    ScreenOptions,
    WorkerOptions,
)
from sensebatch.cli.paths import path
from sensebatch.cli.run import run


def catalog() -> Path:
    """Returns the catalog's manifest: in the installed package, or in the checkout around it."""
    package = Path(sensebatch.__file__).parent
    name = Path("manifests") / "catalog.yaml"
    installed = package / name
    return installed if installed.exists() else package.parent / name


def demo(
    output_dir: Annotated[Path, typer.Option(parser=path, help="The run's folder.")] = Path(
        "outputs/catalog"
    ),
) -> None:
    """Run the 30 jobs of the catalog with the tiny checkpoint that comes with the package.

    It is `sensebatch run` of that manifest: the same command again runs what is missing.
    """
    run(
        [catalog()],
        ModelOptions(),
        BatchOptions(),
        ExecutionOptions(),
        ImageOptions(),
        WorkerOptions(),
        ScreenOptions(),
        ReadingOptions(),
        # What the checkpoint of an earlier version drew is nothing that anybody would miss.
        FolderOptions(output_dir=output_dir, redraw=True),
        DeadlineOptions(),
    )
