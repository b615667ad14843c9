"""Files of two runs are compared by their bytes, and differences are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sensebatch.verify.compare import Outcome, compare, worst


def write_run(root: Path, level: int = 7) -> Path:
    """Writes a run with an edit, a story of two images, and its text."""
    pixels = np.zeros((4, 5, 3), np.uint8)
    for name in ("edit-1.png", "interleave-1/000.png", "interleave-1/001.png"):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels[0, 0, 0] = level if name == "interleave-1/001.png" else 0
        Image.fromarray(pixels).save(path)
    (root / "text").mkdir()
    (root / "text" / "interleave-1.txt").write_text("A keel.")
    return root


def test_equal_runs_are_equal(tmp_path: Path) -> None:
    found = compare(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert found == {
        "edit": Outcome(num_files=1, num_equal=1),
        "interleave": Outcome(num_files=3, num_equal=3),
    }
    assert all(outcome.equal for outcome in found.values())


def test_a_different_pixel_is_measured(tmp_path: Path) -> None:
    found = compare(write_run(tmp_path / "a"), write_run(tmp_path / "b", level=12))
    assert found["edit"].equal
    story = found["interleave"]
    assert (story.equal, story.num_equal, story.levels) == (False, 2, 5)
    assert story.share == pytest.approx(1 / 60)
    assert worst(found) == (5, story.share)


def test_other_text_and_a_missing_file_are_differences(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (second / "text" / "interleave-1.txt").write_text("A hull.")
    (second / "images" / "edit-1.png").unlink()
    for pair in ((first, second), (second, first)):
        found = compare(*pair)
        assert found["edit"] == Outcome(num_files=1, num_equal=0)
        assert found["interleave"].num_equal == 2


def test_images_of_other_sizes_are_as_different_as_can_be(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    Image.new("RGB", (5, 5)).save(second / "images" / "edit-1.png")
    assert compare(first, second)["edit"].levels == 255
