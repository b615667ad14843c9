"""The curves of docs/quality.md, with few images and steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from sensebatch.config import CONVERGED_END, PRESETS, converged_timesteps
from sensebatch.engine.sampling.flow_matching import T_EPS, explicit_timesteps
from sensebatch.tiny.quality import (
    METHODS,
    Point,
    difference,
    main,
    mean,
    share_difference,
    table,
    verdicts,
    ways,
)


def test_converged_timesteps_stop_where_the_divisor_is_bounded() -> None:
    assert CONVERGED_END == 1 - T_EPS
    schedule = explicit_timesteps(converged_timesteps(5)).tolist()
    assert len(schedule) == 6
    assert schedule[1:-1] == pytest.approx([0.245, 0.49, 0.735, CONVERGED_END])


def test_every_way_is_measured_at_every_number_of_steps() -> None:
    assert [name for name, _ in ways([])] == [f"quality {one}" for one in PRESETS]
    assert [steps["num_steps"] for name, steps in ways([4], ["ab2, shift 3"])][-1] == 4
    found = list(ways([2, 3]))
    assert len(found) == 2 * len(METHODS) + len(PRESETS)
    assert [settings["num_steps"] for name, settings in found if name == "ab2, shift 1"] == [2, 3]


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    out = tmp_path_factory.mktemp("quality")
    main(
        out=out,
        count=2,
        converged_steps=60,
        kinds="t2i",
        num_steps="4",
        guidance="2",
        device="cpu",
        batch_size=2,
    )
    assert (out / "quality.md").read_text(encoding="utf-8").count("| t2i | 2 |") == 12 + 3
    return [Point(**point) for point in json.loads((out / "quality.json").read_text())]


@pytest.mark.slow
def test_evaluations_count_both_branches(points: list[Point]) -> None:
    found = {point.method: point.evaluations for point in points}
    assert found["ab2, shift 1"] == 8
    assert found["ab2, shift 1, stride 2"] == 6
    # Three steps of four are whole, and the other is a third of a step.
    assert found["euler, shift 1, layers 2"] == pytest.approx(2 * (3 + 1 / 3))
    presets = [found[f"quality {one}"] for one in PRESETS]
    assert presets == pytest.approx([100, 46, 30 + 2 / 3])


@pytest.mark.slow
def test_more_steps_come_nearer_to_the_converged_image(points: list[Point]) -> None:
    found = {point.method: point for point in points}
    few, exact = found["euler, shift 3"], found["quality exact"]
    assert mean(few.psnrs_db)[0] + 10 < mean(exact.psnrs_db)[0]
    assert mean(few.ssims)[0] < mean(exact.ssims)[0] <= 1
    assert all(len(point.psnrs_db) == len(point.rights) == 2 for point in points)
    assert table(points).count("\n") == len(points) + 2


def _point(method: str, psnrs_db: tuple[float | None, ...], rights: tuple[bool, ...]) -> Point:
    return Point(
        kind="t2i",
        cfg_scale=2.0,
        method=method,
        num_steps=1,
        evaluations=2,
        psnrs_db=psnrs_db,
        ssims=psnrs_db,
        rights=rights,
    )


def test_presets_are_compared_image_by_image() -> None:
    exact = _point("quality exact", (40.0, 50.0, 60.0, None), (True, True, False, False))
    high = _point("quality high", (41.0, 51.0, None, 30.0), (True, True, True, False))
    assert difference(high.psnrs_db, exact.psnrs_db) == (1.0, 0.0)
    text = verdicts([exact, high]).splitlines()[-1]
    # Equal differences, although the images are 10 dB apart from one another.
    assert text.startswith("| t2i | 2 | high | 3 | 40.7 ± 11.9 | 1.0 ± 0.0 |")
    assert "| 75.0 % of 4 | 16.7 ± 44.2 |" in text


def test_no_share_is_found_the_same_for_certain() -> None:
    few, many = ([True] * count for count in (8, 1000))
    assert share_difference(few, few)[0] == share_difference(many, many)[0] == 0
    assert 0.15 < share_difference(few, few)[1] < 0.25
    assert share_difference(many, many)[1] < 0.002


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": ["euler", "ab2"]}, r"--method: expected one of 'euler, shift 3', .*'euler'$"),
        ({"kinds": "t2i,sketch"}, r"--kinds: expected one of 't2i', .* found 'sketch'$"),
        ({"num_steps": "8,few"}, r"--num-steps: expected numbers .* found '8,few'$"),
        ({"num_steps": "8,0"}, r"--num-steps: expected numbers from 1 on .* found '8,0'$"),
        ({"guidance": "nan"}, r"--guidance: expected numbers from 0 on .* found 'nan'$"),
        ({"guidance": ""}, r"--guidance: expected numbers .* found ''$"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_is_loaded(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        main(out=tmp_path / "out", model="none", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_right_answers_are_counted_without_converged_images(tmp_path: Path) -> None:
    main(
        out=tmp_path,
        count=1,
        converged_steps=0,
        kinds="edit",
        num_steps="",
        guidance="2",
        device="cpu",
        batch_size=1,
    )
    points = json.loads((tmp_path / "quality.json").read_text())
    assert [point["method"] for point in points] == [f"quality {one}" for one in PRESETS]
    assert all(point["psnrs_db"] == [None] for point in points)
    assert not (tmp_path / "quality.png").exists()
