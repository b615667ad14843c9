"""Rows that a Python program holds in memory."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensebatch.config import default_config
from sensebatch.errors import ManifestError
from sensebatch.jobs import Job
from sensebatch.manifest.read import read_manifest, read_rows
from sensebatch.tasks import Task


def _jobs(rows: list[Any], path: Path = Path("rows"), **options: Any) -> list[Job]:
    return list(read_rows(rows, default_config(), path=path, **options))


def _mistakes(rows: list[Any]) -> list[str]:
    with pytest.raises(ManifestError) as raised:
        _jobs(rows)
    return [str(problem) for problem in raised.value.problems]


def test_python_values_mean_what_their_json_means(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    row: dict[str, Any] = {
        "id": 7,
        "task": Task.EDIT,
        "prompt": "blue",
        "image": (PurePosixPath("in.png"),),
        "seeds": np.arange(2),
        "cfg_interval": (np.float64(0.25), 1),
        "metadata": {"place": ("x", Path("y"))},
        "system_prompt": None,
        "input_max_pixels": None,
    }
    file = tmp_path / "jobs.jsonl"
    file.write_text(
        '{"id": "7", "task": "edit", "prompt": "blue", "image": ["in.png"], "seeds": [0, 1],'
        ' "cfg_interval": [0.25, 1], "metadata": {"place": ["x", "y"]}, "input_max_pixels": null}'
    )
    found = _jobs([row], tmp_path / "rows")
    for job, expected in zip(found, read_manifest(file, default_config()), strict=True):
        assert (job.id, job.images, job.seed) == (expected.id, expected.images, expected.seed)
        assert (job.sampling, job.metadata) == (expected.sampling, expected.metadata)
        assert job.input_max_pixels == expected.input_max_pixels
        assert (job.source.file, job.source.row) == (str(tmp_path / "rows"), "row 0")


def test_all_mistakes_are_raised_together_with_their_rows() -> None:
    rows = [{"prompt": "a", "n": 0}, "text", {"prompt": "b"}, {"prompt": "\ud800"}, {"promt": "c"}]
    assert _mistakes(rows) == [
        "rows: row 0: n: expected at least 1, found 0",
        "rows: row 1: expected a mapping of names and values, found 'text'",
        "rows: row 3: expected Unicode text, found half of a surrogate pair",
        "rows: row 4: promt: expected a known field, found 'promt'; did you mean 'prompt'?",
    ]


def test_two_rows_of_one_id_are_a_mistake() -> None:
    (mistake,) = _mistakes([{"id": "a", "prompt": "x"}, {"id": "A", "prompt": "y"}])
    assert mistake.startswith("rows: row 1: id: expected another id than that of row 0")


def test_no_rows_are_a_mistake() -> None:
    assert _mistakes([]) == ["rows: manifest: expected at least one job, found none"]


def test_bytes_are_named_where_text_is_expected() -> None:
    (mistake,) = _mistakes([{"prompt": b"a dot"}])
    assert mistake == "rows: row 0: prompt: expected text, found a value of type bytes"
