"""Thumbnails on sheets: made once, kept, and made again only where something changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from sensebatch.gallery.sheets import (
    ACROSS,
    INDEX,
    MARGIN,
    PER_SHEET,
    Sheets,
    Source,
    make_sheets,
    remove_unused,
)

SIDE = 64


def _source(folder: Path, number: int, size: tuple[int, int] = (96, 48)) -> Source:
    path = folder / f"{number}.png"
    Image.new("RGB", size, (number % 256, 255 - number % 256, 90)).save(path)
    return Source(digest=hashlib.sha256(path.read_bytes()).hexdigest(), path=path)


def _make(sources: Sequence[Source], folder: Path, side: int = SIDE) -> Sheets:
    folder.mkdir(exist_ok=True)
    sheets = make_sheets(sources, folder, side=side, workers=2, progress=lambda *_: None)
    remove_unused(sheets, folder)
    return sheets


def _colour(sheets: Sheets, folder: Path, digest: str) -> tuple[int, ...]:
    """Returns the colour in the middle of a thumbnail."""
    place = sheets.places[digest]
    sheet = Image.open(folder / sheets.names[place.number // PER_SHEET])
    inside = place.number % PER_SHEET
    left, top = inside % ACROSS * sheets.cell, inside // ACROSS * sheets.cell
    at = (left + MARGIN + place.width // 2, top + MARGIN + place.height // 2)
    return sheet.convert("RGB").getpixel(at)  # type: ignore[return-value]


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.webp")}


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    return [_source(tmp_path, number) for number in range(2 * PER_SHEET + 3)]


def test_each_image_has_its_own_thumbnail_where_the_place_says(
    tmp_path: Path, sources: list[Source]
) -> None:
    sheets = _make(sources, tmp_path / "sheets")
    assert len(sheets.names) == 3
    assert sheets.num_made == len(sources)
    for number, source in enumerate(sources):
        place = sheets.places[source.digest]
        assert (place.width, place.height) == (SIDE, SIDE // 2)
        expected = (number, 255 - number, 90)
        found = _colour(sheets, tmp_path / "sheets", source.digest)
        assert found == pytest.approx(expected, abs=12)


def test_nothing_is_made_again_while_nothing_changed(tmp_path: Path, sources: list[Source]) -> None:
    first = _make(sources, tmp_path / "sheets")
    before = _times(tmp_path / "sheets")
    again = _make(sources, tmp_path / "sheets")
    assert again.num_made == 0
    assert (again.names, again.places) == (first.names, first.places)
    assert _times(tmp_path / "sheets") == before


def test_one_new_image_makes_one_sheet(tmp_path: Path, sources: list[Source]) -> None:
    full = sources[: 2 * PER_SHEET]
    _make(full, tmp_path / "sheets")
    before = _times(tmp_path / "sheets")
    changed = _source(tmp_path, 200)
    sheets = _make([changed, *full[1:]], tmp_path / "sheets")
    assert sheets.num_made == 1
    after = _times(tmp_path / "sheets")
    assert before.items() <= after.items()
    assert len(after) == 3
    assert full[0].digest not in sheets.places


def test_sheets_that_are_half_empty_are_put_together(tmp_path: Path, sources: list[Source]) -> None:
    half = PER_SHEET // 2
    _make(sources[: 2 * PER_SHEET], tmp_path / "sheets")
    left = [*sources[:half], *sources[PER_SHEET : PER_SHEET + half]]
    sheets = _make(left, tmp_path / "sheets")
    assert len(sheets.names) == 1
    assert _times(tmp_path / "sheets").keys() == set(sheets.names)
    assert sheets.places.keys() == {source.digest for source in left}


def test_a_small_gallery_is_not_made_again_either(tmp_path: Path, sources: list[Source]) -> None:
    _make(sources[:3], tmp_path / "sheets")
    assert _make(sources[:3], tmp_path / "sheets").num_made == 0
    # One that grows has few sheets all the same.
    for count in range(4, 14):
        sheets = _make(sources[:count], tmp_path / "sheets")
    assert len(sheets.names) <= 4


def test_equal_images_share_a_thumbnail(tmp_path: Path, sources: list[Source]) -> None:
    sheets = _make([sources[0], sources[1], sources[0]], tmp_path / "sheets")
    assert sheets.num_made == 2


def test_images_that_cannot_be_read_are_named_and_the_others_drawn(
    tmp_path: Path, sources: list[Source]
) -> None:
    sources[1].path.write_bytes(sources[1].path.read_bytes()[:60])
    sources[2].path.unlink()
    sheets = _make(sources[:4], tmp_path / "sheets")
    assert sheets.places.keys() == {sources[0].digest, sources[3].digest}
    damaged, missing = (sheets.problems[sources[number].digest] for number in (1, 2))
    assert "1.png: expected a complete image, found a damaged one" in damaged
    assert missing == f"{sources[2].path}: No such file or directory"
    # They are tried again the next time.
    again = _source(tmp_path, 2)
    assert again.digest in _make(sources[:4], tmp_path / "sheets").places


def test_small_images_are_not_enlarged(tmp_path: Path) -> None:
    source = _source(tmp_path, 5, size=(20, 10))
    place = _make([source], tmp_path / "sheets").places[source.digest]
    assert (place.width, place.height) == (20, 10)


def test_another_size_makes_all_again(tmp_path: Path, sources: list[Source]) -> None:
    _make(sources[:PER_SHEET], tmp_path / "sheets")
    sheets = _make(sources[:PER_SHEET], tmp_path / "sheets", side=80)
    assert sheets.num_made == PER_SHEET
    assert _times(tmp_path / "sheets").keys() == set(sheets.names)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"format": 1, "side": 64, "sheets": [3]}'])
def test_a_damaged_index_only_costs_time(
    tmp_path: Path, sources: list[Source], content: bytes
) -> None:
    _make(sources[:PER_SHEET], tmp_path / "sheets")
    (tmp_path / "sheets" / INDEX).write_bytes(content)
    sheets = _make(sources[:PER_SHEET], tmp_path / "sheets")
    assert sheets.num_made == PER_SHEET


def test_a_sheet_that_was_deleted_is_drawn_again(tmp_path: Path, sources: list[Source]) -> None:
    first = _make(sources[: 2 * PER_SHEET], tmp_path / "sheets")
    (tmp_path / "sheets" / first.names[0]).unlink()
    sheets = _make(sources[: 2 * PER_SHEET], tmp_path / "sheets")
    assert sheets.num_made == PER_SHEET
    assert len(sheets.places) == 2 * PER_SHEET


def test_the_same_images_give_the_same_files(tmp_path: Path, sources: list[Source]) -> None:
    for name in ("one", "other"):
        _make(sources, tmp_path / name)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "other")
    )
    assert one == other


def test_what_was_drawn_before_a_stop_is_not_drawn_again(
    tmp_path: Path, sources: list[Source]
) -> None:
    def stop(done: int, _total: int) -> None:
        if done >= PER_SHEET:
            raise KeyboardInterrupt

    folder = tmp_path / "sheets"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        make_sheets(sources, folder, side=SIDE, workers=1, progress=stop)
    assert _make(sources, folder).num_made == len(sources) - PER_SHEET
