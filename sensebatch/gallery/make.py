"""Makes a gallery: a folder with a page that any browser opens from disk.

Joins the records of runs, their thumbnails and the figures of their logs.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from sensebatch.dataset.duplicates import near_duplicates
from sensebatch.dataset.records import Record, open_dataset
from sensebatch.dataset.selection import Selection
from sensebatch.errors import RunFolderError
from sensebatch.gallery.data import Parts, Run, write_data
from sensebatch.gallery.files import (
    FILES,
    SHEETS,
    START,
    DataFiles,
    copy_images,
    make_own,
    require_own,
    write_page,
)
from sensebatch.gallery.inputs import FOLDER as INPUTS
from sensebatch.gallery.inputs import Inputs
from sensebatch.gallery.items import make_item
from sensebatch.gallery.sheets import Source, make_sheets, remove_unused
from sensebatch.store.attempts import DONE, FAILED, PENDING
from sensebatch.store.files import storage_errors
from sensebatch.store.run_dir import RunDir

THUMBNAIL_SIDE = 192
"""Pixels of the longer side of a thumbnail where nothing else is said."""

Progress = Callable[[str, int, int], None]
"""Receives what is done, and how many of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What became of a gallery."""

    page: Path
    """The file to open."""
    items: int
    images: int
    thumbnails_made: int
    """Thumbnails that were not there from the last time."""
    pending: int
    """Jobs that are still to be run, and not shown."""
    is_running: bool
    """Whether a process works in one of the folders, so that more is to come."""
    problems: Sequence[str]
    """Images that could not be read."""


def make_gallery(
    roots: Sequence[Path],
    out: Path,
    *,
    selection: Selection | None = None,
    side: int = THUMBNAIL_SIDE,
    workers: int = 1,
    copies_images: bool = False,
    progress: Progress = lambda *_: None,
) -> Made:
    """Makes a gallery of runs, or brings one up to date.

    Args:
        roots: The runs' folders.
        out: The gallery's folder.
        selection: Which jobs; None for all in the manifests.
        side: Pixels of the longer side of a thumbnail.
        workers: Sheets of thumbnails that are made at once.
        copies_images: Whether images and inputs are copied into the gallery, so that it can be
            moved without the runs.
        progress: Receives how far it is.

    Raises:
        RunFolderError: A folder is not a run's, has nothing to show, or is there twice; or `out`
            holds something else.
        ConfigError: The selection does not fit a run.
        StorageError: The gallery cannot be written.
    """
    require_own(out)
    runs = _named(roots)
    _require_runs(runs)
    _require_items(runs, selection)
    with storage_errors(out):
        make_own(out)
        files = DataFiles(out)
        with closing(Inputs(out, is_copied=copies_images)) as inputs:
            parts = _collected(runs, selection, files, inputs, progress)
        sheets = make_sheets(
            _sources(runs, parts),
            out / SHEETS,
            side=side,
            workers=workers,
            progress=lambda done, total: progress("thumbnails", done, total),
        )
        _copy(runs if copies_images else (), parts, out)
        write_data(out, files, runs=runs, parts=parts, sheets=sheets, copies_images=copies_images)
        write_page(out)
        remove_unused(sheets, out / SHEETS)
        _remove_others(out / INPUTS, inputs.names)
    return Made(
        page=out / START,
        items=len(parts.ids),
        images=sum(map(len, parts.images)),
        thumbnails_made=sheets.num_made,
        pending=sum(run.counts[PENDING] for run in runs),
        is_running=any(run.is_running for run in runs),
        problems=tuple(sheets.problems.values()),
    )


def _named(roots: Sequence[Path]) -> list[Run]:
    """Returns the runs with names that differ, as short as they can be."""
    names = [root.absolute().name for root in roots]
    if len(set(names)) < len(names):
        names = [f"{root.absolute().parent.name}/{root.absolute().name}" for root in roots]
    if len(set(names)) < len(names):
        names = [str(root) for root in roots]
    return [Run(root=root, name=name) for root, name in zip(roots, names, strict=True)]


def _collected(
    runs: Sequence[Run],
    selection: Selection | None,
    files: DataFiles,
    inputs: Inputs,
    progress: Progress,
) -> Parts:
    """Returns what is known of every item; their details are in the data files by then."""
    parts = Parts()
    for number, run in enumerate(runs):
        alike = _alike(run, selection)
        for record in _records(run, selection):
            item = make_item(
                record, run=run.name, alike=alike.get(record.id), input_of=inputs.shown
            )
            parts.add(item, number, files)
            progress("jobs", len(parts.ids), 0)
    return parts


def _records(run: Run, selection: Selection | None) -> Iterator[Record]:
    """Yields the jobs of a run that there is something to show of, and counts all."""
    is_all = selection in (None, Selection())
    with open_dataset(run.root) as dataset:
        run.is_running = RunDir(run.root).in_use()
        for record in dataset.records(selection):
            run.counts[record.status] += 1
            if record.status not in (DONE, FAILED):
                continue
            if is_all and record.job.verdict is not None and record.status == DONE:
                # It is shown with the image that it is about.
                continue
            if record.finish_reason is not None:
                run.finish_reasons[record.finish_reason] += 1
            if record.status == FAILED:
                row = record.row or {}
                error = (row.get("error_type") or "", row.get("error_message") or "")
                run.failures.append((record.id, *error))
            yield record


def _alike(run: Run, selection: Selection | None) -> dict[str, str]:
    """Returns the first of the jobs whose images look alike, for each of them; none for others."""
    with open_dataset(run.root) as dataset:
        first = near_duplicates(dataset.records(selection))
    sizes = Counter(first.values())
    return {job_id: other for job_id, other in first.items() if sizes[other] > 1}


def _require_runs(runs: Sequence[Run]) -> None:
    """Reads the ids of the runs.

    Raises:
        RunFolderError: A folder is not a run's, or two are of the same run.
    """
    seen: dict[str, Path] = {}
    for run in runs:
        with open_dataset(run.root) as dataset:
            run.id = dataset.run_id
        if run.id in seen:
            raise RunFolderError(
                f"{run.root}: expected another run than {seen[run.id]}, found the same one or a "
                f"copy of it (run {run.id}), which picks could not tell apart"
            )
        seen[run.id] = run.root


def _require_items(runs: Sequence[Run], selection: Selection | None) -> None:
    """Makes sure that there is something to show.

    Raises:
        RunFolderError: No job that is asked for is done or has failed.
    """
    for run in runs:
        with open_dataset(run.root) as dataset:
            if any(record.status in (DONE, FAILED) for record in dataset.records(selection)):
                return
    names = ", ".join(str(run.root) for run in runs)
    chosen = "" if selection in (None, Selection()) else " that was asked for"
    raise RunFolderError(
        f"{names}: expected a job{chosen} that is done or has failed, found none; there is nothing "
        "to show yet"
    )


def _sources(runs: Sequence[Run], parts: Parts) -> Iterator[Source]:
    for number, images in zip(parts.run, parts.images, strict=True):
        for path, digest in images:
            yield Source(digest=digest, path=runs[number].root / path)


def _copy(runs: Sequence[Run], parts: Parts, out: Path) -> None:
    """Makes the gallery's copies of images those of these runs."""
    for number, run in enumerate(runs):
        of_run = (
            path
            for other, images in zip(parts.run, parts.images, strict=True)
            if other == number
            for path, _ in images
        )
        copy_images(run.root, out / FILES / run.id, of_run)
    ids = {run.id for run in runs}
    for folder in (out / FILES).iterdir() if (out / FILES).is_dir() else ():
        if folder.name not in ids:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_others(folder: Path, names: set[str]) -> None:
    """Removes the files of a folder that have none of these names."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in names:
                with suppress(OSError):
                    path.unlink()
