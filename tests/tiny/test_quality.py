"""The curves of docs/quality.md, with few images and steps."""

from __future__ import annotations

import json

import pytest

from sensebatch.config import CONVERGED_END, PRESETS, converged_timesteps
from sensebatch.engine.sampling.flow_matching import T_EPS, explicit_timesteps
from sensebatch.tiny.quality import METHODS, Point, main, table, ways


def test_converged_timesteps_stop_where_the_divisor_is_bounded() -> None:
    assert CONVERGED_END == 1 - T_EPS
    schedule = explicit_timesteps(converged_timesteps(5)).tolist()
    assert len(schedule) == 6
    assert schedule[1:-1] == pytest.approx([0.245, 0.49, 0.735, CONVERGED_END])


def test_every_way_is_measured_at_every_number_of_steps() -> None:
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
    )
    assert (out / "quality.md").read_text(encoding="utf-8").count("| t2i | 2 |") == 10
    return [Point(**point) for point in json.loads((out / "quality.json").read_text())]


@pytest.mark.slow
def test_evaluations_count_both_branches(points: list[Point]) -> None:
    found = {point.method: point.evaluations for point in points}
    assert found["ab2, shift 1"] == 8
    assert found["ab2, shift 1, stride 2"] == 6
    assert (found["quality exact"], found["quality high"]) == (100, 50)


@pytest.mark.slow
def test_more_steps_come_nearer_to_the_converged_image(points: list[Point]) -> None:
    found = {point.method: point for point in points}
    assert found["euler, shift 3"].psnr_db + 10 < found["quality exact"].psnr_db
    assert found["euler, shift 3"].ssim < found["quality exact"].ssim <= 1
    assert all(point.compared == 2 for point in points)
    assert table(points).count("\n") == len(points) + 2
