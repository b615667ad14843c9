"""How far the images of the cases of suite `quality` are from the converged ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from sensebatch.profile.rows import DONE, Row
from sensebatch.profile.suites import CONVERGED
from sensebatch.report.distance import psnr, ssim
from sensebatch.store.finished import FinishedJob, finished_jobs


def with_distances(folder: Path, rows: Iterable[Row]) -> list[Row]:
    """Returns the rows with their evaluations, and the mean distance to the converged images.

    Args:
        folder: Where the runs are.
        rows: Of suite `quality`. Without a finished converged case there are no distances.
    """
    rows = list(rows)
    converged = next((r for r in rows if r.case == CONVERGED and r.status == DONE), None)
    truth = {} if converged is None else _by_seed(folder, converged)
    return [row if row.status != DONE else _measured(folder, row, truth) for row in rows]


def _measured(folder: Path, row: Row, truth: dict[int, FinishedJob]) -> Row:
    done = _by_seed(folder, row)
    drawing = next(iter(done.values())).job.drawing
    assert drawing is not None
    row = replace(row, evaluations=round(drawing.cost))
    if row.case == CONVERGED or not truth:
        return row
    pairs = [(_pixels(one), _pixels(truth[seed])) for seed, one in done.items() if seed in truth]
    return replace(
        row,
        psnr_db=float(np.mean([psnr(*pair) for pair in pairs])),
        ssim=float(np.mean([ssim(*pair) for pair in pairs])),
    )


def _by_seed(folder: Path, row: Row) -> dict[int, FinishedJob]:
    """Returns the finished jobs of a case; each case has the same prompt for a seed."""
    assert row.run_folder is not None
    return {done.job.seed: done for done in finished_jobs(folder / row.run_folder)}


def _pixels(done: FinishedJob) -> np.ndarray:
    (image,) = done.open_images()
    return np.asarray(image.convert("RGB"))
