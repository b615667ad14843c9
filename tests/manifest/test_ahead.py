"""Images are looked at before their row's turn, and nothing else of a manifest shows it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import default_config
from sensebatch.errors import ManifestError
from sensebatch.image_files import ImageFacts, check_image
from sensebatch.manifest import images
from sensebatch.manifest.ahead import ROWS_AHEAD, RowsAhead
from sensebatch.manifest.images import ImageProbe
from sensebatch.manifest.problems import Location
from sensebatch.manifest.read import read_manifest
from sensebatch.manifest.rows import RawRow
from sensebatch.settings import resolve_settings
from tests.manifest.test_images import encoded

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


def raw(number: int) -> RawRow:
    return RawRow(fields={"prompt": "x"}, number=number)


def test_rows_are_shown_ahead_and_yielded_in_turn() -> None:
    shown: list[int] = []
    rows = RowsAhead(lambda *_: None).rows(
        map(raw, range(20)), lambda row: shown.append(row.number)
    )
    for number, row in enumerate(rows):
        assert row.number == number
        assert shown == list(range(min(number + ROWS_AHEAD, 20)))
    assert shown == list(range(20))


def test_what_is_wrong_in_a_file_is_said_and_raised_in_its_turn() -> None:
    said: list[object] = []
    ahead = RowsAhead(lambda number, *_: said.append(f"problem {number}"))

    def rows() -> Iterator[RawRow]:
        yield raw(0)
        yield raw(1)
        ahead.report(2, (), "not a mapping")
        yield raw(3)
        raise OSError("the disk was removed")

    def read() -> None:
        said.extend(row.number for row in ahead.rows(rows(), lambda _: None))

    ahead.report(-1, (), "before the rows")
    with pytest.raises(OSError, match="the disk was removed"):
        read()
    assert said == ["problem -1", 0, 1, "problem 2", 3]


def write_manifest(folder: Path, names: list[str]) -> Path:
    path = folder / "jobs.jsonl"
    rows = [
        {"task": "ask", "prompt": f"What is {number}?", "image": name}
        for number, name in enumerate(names)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_images_of_several_rows_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(4)

    def waiting(content: bytes, **options: Any) -> ImageFacts:
        together.wait(PATIENCE_S)
        return check_image(content, **options)

    monkeypatch.setattr(images, "check_image", waiting)
    names = [f"{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded("PNG", (8 + number, 8)))
    jobs = list(read_manifest(write_manifest(tmp_path, names), default_config()))
    assert [job.images[0].width for job in jobs] == list(range(8, 16))


@pytest.mark.parametrize("place", ["configuration", "defaults", "row"])
def test_images_are_looked_at_ahead_as_their_rows_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    looks: list[bool] = []

    def look_ahead(_: ImageProbe, _path: Path, *, as_stored: bool) -> None:
        looks.append(as_stored)

    monkeypatch.setattr(ImageProbe, "look_ahead", look_ahead)
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    given = {name: {"raw_inputs": True} if name == place else {} for name in ("defaults", "row")}
    row = {"task": "ask", "prompt": "What?", "image": "a.png", **given["row"]}
    path = tmp_path / "jobs.yaml"
    path.write_text(json.dumps({"version": 1, "defaults": given["defaults"], "jobs": [row]}))
    flags = {"tasks.ask.raw_inputs": place == "configuration" or None}
    list(read_manifest(path, resolve_settings(flags=flags)))
    assert looks == [True]


def test_what_is_wrong_with_an_image_is_said_of_its_rows(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded("PNG"))
    (tmp_path / "bad.png").write_bytes(encoded("PNG")[:100])
    names = ["good.png", "bad.png", "missing.png", "good.png", "bad.png"]
    with pytest.raises(ManifestError) as raised:
        list(read_manifest(write_manifest(tmp_path, names), default_config()))
    found = [(problem.row, problem.message.split(",")[0]) for problem in raised.value.problems]
    assert found == [
        ("line 2", "expected a complete image"),
        ("line 3", "expected an image file"),
        ("line 5", "expected a complete image"),
    ]


@pytest.mark.parametrize("bound", ["MAX_BYTES_AHEAD", "MAX_PIXELS_AHEAD"])
def test_an_image_is_decoded_once_and_a_large_one_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    threads: list[str] = []

    def counting(content: bytes, *, max_pixels: int, **options: Any) -> ImageFacts:
        facts = check_image(content, max_pixels=max_pixels, **options)
        threads.append(threading.current_thread().name.split("_")[0])
        return facts

    monkeypatch.setattr(images, "check_image", counting)
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    small.write_bytes(encoded("PNG"))
    large.write_bytes(encoded("PNG", (90, 90)))
    of_small = {"MAX_BYTES_AHEAD": small.stat().st_size, "MAX_PIXELS_AHEAD": 60 * 40}
    monkeypatch.setattr(images, bound, of_small[bound])
    probe = ImageProbe()
    for path in (small, large, small, tmp_path / "missing.png"):
        probe.look_ahead(path, as_stored=False)
    assert [probe.file(path).width for path in (small, large, small)] == [60, 90, 60]
    assert threads == ["probe", "MainThread"]


def test_the_location_of_a_problem_is_kept() -> None:
    said: list[tuple[int, Location, str]] = []
    ahead = RowsAhead(lambda *problem: said.append(problem))

    def rows() -> Iterator[RawRow]:
        ahead.report(4, ("image", 1), "expected a path")
        yield raw(5)

    assert [row.number for row in ahead.rows(rows(), lambda _: None)] == [5]
    assert said == [(4, ("image", 1), "expected a path")]
