"""`sensebatch gallery`: makes a page with the images of runs that opens from disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.options import SelectionOptions
from sensebatch.cli.paths import path
from sensebatch.errors import ConfigError

if TYPE_CHECKING:
    from sensebatch.gallery.make import Made, Progress

MAX_PROBLEMS = 5
FOLDER = "gallery"
"""What a gallery is called in its run's folder."""


Output = Annotated[
    Path | None,
    typer.Option(
        parser=path, help="Folder of the gallery; needed for several runs. [default: DIR/gallery]"
    ),
]
CopyImages = Annotated[
    bool,
    typer.Option(
        "--copy-images",
        help="Copy the images into the gallery, so that it can be moved without the run.",
    ),
]
Removed = Annotated[
    bool, typer.Option("--removed", help="Also show jobs that are no longer in the manifest.")
]
Side = Annotated[
    int,
    typer.Option(min=64, max=512, help="Longer side of thumbnails in pixels."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Threads that make thumbnails. [default: one for each core]"),
]


def gallery(
    folders: Annotated[
        list[Path], typer.Argument(parser=path, help="Folders of runs.", metavar="DIR...")
    ],
    selection: SelectionOptions,
    output: Output = None,
    copy_images: CopyImages = False,
    removed: Removed = False,
    thumbnail_side: Side = 192,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a page with the images of one or several runs, which any browser opens from disk.

    Search, filter and compare images, lay them out by seed and setting, pick the good ones, and see
    what the run cost. The page needs no server and no network. The same command again brings it up
    to date, even during the run.
    """
    from sensebatch.cli.jobs import warn_of_picks
    from sensebatch.cli.messages import show
    from sensebatch.dataset.records import open_dataset
    from sensebatch.gallery.make import make_gallery

    if output is None and len(folders) > 1:
        raise ConfigError("--output: expected a folder for the gallery of several runs, found none")
    wanted = selection.selection(removed=removed)
    for folder in folders if wanted.picks else ():
        with open_dataset(folder) as dataset:
            warn_of_picks(dataset, wanted)
    with _progress(shown=not as_json) as progress:
        made = make_gallery(
            folders,
            folders[0] / FOLDER if output is None else output,
            selection=wanted,
            side=thumbnail_side,
            workers=workers or os.cpu_count() or 1,
            copies_images=copy_images,
            progress=progress,
        )
    _warn(made)
    show(json.dumps(_values(made)) if as_json else "\n".join(_lines(made)))


def _warn(made: Made) -> None:
    from sensebatch.cli.messages import warn
    from sensebatch.units import counted

    for problem in made.problems[:MAX_PROBLEMS]:
        warn(f"no thumbnail of {problem}")
    if len(made.problems) > MAX_PROBLEMS:
        warn(f"no thumbnails of {counted(len(made.problems) - MAX_PROBLEMS, 'more image')}")


def _values(made: Made) -> dict[str, object]:
    return {
        "page": str(made.page),
        "items": made.items,
        "images": made.images,
        "thumbnails_made": made.thumbnails_made,
        "pending": made.pending,
        "running": made.is_running,
        "problems": list(made.problems),
    }


def _lines(made: Made) -> Iterator[str]:
    from sensebatch.units import counted

    new = f"{counted(made.thumbnails_made, 'thumbnail')} made now"
    yield f"{counted(made.items, 'job')}, {counted(made.images, 'image')}; {new}"
    if made.pending:
        state = "the run is in progress" if made.is_running else "the run is not complete"
        yield f"{counted(made.pending, 'job')} to come ({state}); the same command adds them"
    yield f"open {made.page.resolve().as_uri()}"


@contextmanager
def _progress(*, shown: bool) -> Iterator[Progress]:
    """Yields what receives how far the gallery is, and shows it on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield progress
