"""The data of a gallery: what the page has of every item, and where it reads the rest.

Knows items and sheets of thumbnails; neither how they were made nor where a record comes from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sensebatch.gallery import figures
from sensebatch.gallery.columns import Column, Columns
from sensebatch.gallery.files import FILES, DataFiles
from sensebatch.gallery.inputs import address
from sensebatch.gallery.items import Item
from sensebatch.gallery.sheets import ACROSS, MARGIN, Sheets
from sensebatch.store.attempts import BLOCKED, DONE, FAILED, PENDING
from sensebatch.store.log import read_log
from sensebatch.store.run_dir import RunDir
from sensebatch.units import counted

PROMPTS_IN_PART = 5000
DETAILS_IN_PART = 200
MARK_DIGITS = 16
"""Digits of a job's key by which the page knows which image a pick is of."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One of the runs of a gallery."""

    root: Path
    name: str
    """What the gallery calls it; no two runs of a gallery have the same."""
    id: str = ""
    is_running: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    """Jobs by their status."""
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    """(id, type of the error, message) of each failed job."""
    finish_reasons: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, kw_only=True)
class Parts:
    """What is collected of the items while their records are read."""

    columns: Columns = field(default_factory=Columns)
    ids: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    run: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    images: list[tuple[tuple[str, str], ...]] = field(default_factory=list)
    snippets: dict[int, str] = field(default_factory=dict)
    """The beginnings of the texts of jobs that make no image, by the number of the item."""
    details: list[Any] = field(default_factory=list)
    """Those of the part that is being filled."""
    num_parts: int = 0

    def add(self, item: Item, run: int, files: DataFiles) -> None:
        """Adds an item; writes its details once a part of them is full."""
        self.columns.add(item.values, matrix=item.matrix, metadata=item.metadata)
        if item.snippet is not None:
            self.snippets[len(self.ids)] = item.snippet
        self.ids.append(item.id)
        self.keys.append(item.key)
        self.run.append(run)
        self.prompt.append(self.prompts.setdefault(item.prompt, len(self.prompts)))
        self.images.append(item.images)
        self.details.append(item.details)
        if len(self.details) == DETAILS_IN_PART:
            self.flush(files)

    def flush(self, files: DataFiles) -> None:
        """Writes the details that are left."""
        if self.details:
            files.write(f"details-{self.num_parts}", self.details)
            self.num_parts += 1
            self.details = []


def write_data(
    out: Path,
    files: DataFiles,
    *,
    runs: Sequence[Run],
    parts: Parts,
    sheets: Sheets,
    copies_images: bool,
) -> None:
    """Writes the data of a gallery, its index last."""
    parts.flush(files)
    columns = [
        column
        for column in parts.columns.finished()
        # What is the same everywhere unless someone asks for it says nothing.
        if column.name not in ("run", "in_manifest") or len(set(column.values)) > 1
    ]
    shapes: dict[tuple[int, int], int] = {}
    forms: dict[str, int] = {}
    files.write("items", _items(parts, columns, sheets, shapes, forms))
    files.write("keys", parts.keys)
    prompts = list(parts.prompts)
    starts = range(0, len(prompts), PROMPTS_IN_PART)
    for number, start in enumerate(starts):
        files.write(f"prompts-{number}", prompts[start : start + PROMPTS_IN_PART])
    files.write("report", {"runs": [_report(run) for run in runs]})
    files.finish(
        {
            **_index(out, runs, parts, sheets, copies_images),
            "columns": [column.declaration() for column in columns],
            "shapes": list(shapes),
            "files": list(forms),
            "prompt_parts": len(starts),
        }
    )


def _index(
    out: Path, runs: Sequence[Run], parts: Parts, sheets: Sheets, copies_images: bool
) -> dict[str, Any]:
    """Returns what the page has to know before anything else."""
    return {
        "title": ", ".join(run.name for run in runs),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "count": len(parts.ids),
        "pending": sum(run.counts[PENDING] for run in runs),
        "runs": [
            {"id": run.id, "name": run.name, "root": _root(run, out, copies_images)} for run in runs
        ],
        "prompts_in_part": PROMPTS_IN_PART,
        "details_in_part": DETAILS_IN_PART,
        "sheets": {
            "side": sheets.side,
            "cell": sheets.cell,
            "across": ACROSS,
            "margin": MARGIN,
            "names": sheets.names,
        },
    }


def _root(run: Run, out: Path, copies_images: bool) -> str:
    """Returns the address that the paths of a run's images follow."""
    return f"{FILES}/{run.id}/" if copies_images else f"{address(run.root, out)}/"


def _items(
    parts: Parts,
    columns: Sequence[Column],
    sheets: Sheets,
    shapes: dict[tuple[int, int], int],
    forms: dict[str, int],
) -> dict[str, Any]:
    """Returns what the page has of every item; fills the tables that it refers to."""
    cells, shape_of, file_of = [], [], []
    for job_id, images in zip(parts.ids, parts.images, strict=True):
        for number, (path, digest) in enumerate(images):
            place = sheets.places.get(digest)
            shape = (1, 1) if place is None else (place.width, place.height)
            cells.append(-1 if place is None else place.number)
            shape_of.append(shapes.setdefault(shape, len(shapes)))
            form = path_form(path, job_id, number)
            file_of.append(forms.setdefault(form, len(forms)))
    return {
        "ids": parts.ids,
        "marks": [key[:MARK_DIGITS] for key in parts.keys],
        "run": parts.run,
        "prompt": parts.prompt,
        "num_images": [len(images) for images in parts.images],
        "cells": cells,
        "shapes": shape_of,
        "files": file_of,
        "snippets": parts.snippets,
        "values": {column.name: column.encoded() for column in columns},
    }


def path_form(path: str, job_id: str, number: int) -> str:
    """Returns a path with the id and the image's number left open, or after `=` as it is.

    Most images of a gallery have the same form, so that the page need not hold their paths.
    """
    for form in ("images/{id}.", "images/{id}/{n}."):
        # The number first: the id may hold its mark.
        start = form.replace("{n}", f"{number:03d}").replace("{id}", job_id)
        ending = path.removeprefix(start)
        if path.startswith(start) and ending.isalnum():
            return form + ending
    return f"={path}"


def _report(run: Run) -> dict[str, Any]:
    log = RunDir(run.root).log
    counts = run.counts
    words = [
        f"{counted(counts[DONE], 'job')} done",
        f"{counts[FAILED]:,} failed",
    ]
    if counts[PENDING]:
        words.append(f"{counts[PENDING]:,} still to be run")
    if counts[BLOCKED]:
        words.append(f"{counts[BLOCKED]:,} blocked by jobs that failed")
    if run.is_running:
        words.append("running when this gallery was made")
    found = figures.run_figures(read_log(log, figures.COLUMNS)) if log.is_file() else {}
    totals = {**found.get("totals", {}), "done": counts[DONE], "failed": counts[FAILED]}
    return {
        **figures.EMPTY,
        **found,
        "totals": totals,
        "name": run.name,
        "words": "; ".join(words),
        "finish_reasons": run.finish_reasons.most_common(),
        "failures": figures.failures(run.failures),
    }
