"""Limits of cases are those of the time arithmetic, a step's and the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch.jobs import Stored
from sensebatch.plan.work import Speeds
from sensebatch.profile.expected import Expectation, expectation, with_expectation
from sensebatch.profile.suites import Scale, Suite, chosen_cases, suite_cases, write_manifest
from sensebatch.units import GIB
from tests.profile.results import result

SPEEDS = Speeds(
    copy_bytes_per_s=51.6 * GIB,
    gemm_flop_per_s=734e12,
    attention_flop_per_s=604e12,
    memory_bytes_per_s=4.2e12,
)


def _expected(name: str, folder: Path, suite: Suite = Suite.TASKS) -> Expectation:
    scale = Scale()
    (case,) = chosen_cases(suite_cases(suite, scale), [name])
    return expectation(case, scale.model, write_manifest(case, scale, folder), "bfloat16")


def _limits(
    name: str, folder: Path, suite: Suite = Suite.TASKS, *, with_text: bool = True
) -> tuple[float, float]:
    limits = _expected(name, folder, suite).limits(SPEEDS, with_text=with_text)
    assert limits is not None
    return limits


def test_a_step_cannot_beat_the_products_and_attention_of_both_branches(tmp_path: Path) -> None:
    total, step = _limits("t2i", tmp_path)
    assert step == pytest.approx(0.222, rel=0.03)
    assert 8 * 50 * step < total < 8 * 50 * step * 1.03


def test_a_step_of_a_story_is_one_of_one_image(tmp_path: Path) -> None:
    """A smaller image after longer prompts: less than in proportion, more than without them."""
    _, square = _limits("t2i", tmp_path)
    _, wide = _limits("interleave", tmp_path)
    _, four = _limits("interleave-4", tmp_path)
    assert 0.45 < wide / square < 0.75
    assert four == pytest.approx(wide, rel=0.01)


def test_text_counts_where_it_is_sure_to_be_written(tmp_path: Path) -> None:
    with_text, step = _limits("think-16", tmp_path)
    without, same = _limits("think-16", tmp_path, with_text=False)
    # At least the weights of the understanding expert are read for each of 300 tokens.
    assert with_text - without > 300 * 15e9 / SPEEDS.memory_bytes_per_s
    assert step == same


def test_speeds_of_other_numbers_say_nothing_of_float8(tmp_path: Path) -> None:
    expected = _expected("t2i-fp8", tmp_path, Suite.SPEED)
    assert expected.limits(SPEEDS, with_text=True) is None
    speeds = replace(SPEEDS, quantised_flop_per_s={Stored.INT8: 1.4e15})
    assert expected.limits(speeds, with_text=True) is None
    int8 = _expected("t2i-int8", tmp_path, Suite.SPEED).limits(speeds, with_text=True)
    assert int8 is not None
    plain = _expected("t2i", tmp_path, Suite.SPEED).placements
    assert expected.placements.device_bytes < plain.device_bytes - 5 * GIB


def test_streaming_for_one_job_is_bound_by_its_copies(tmp_path: Path) -> None:
    _, low = _limits("low", tmp_path, Suite.MODES)
    assert low == pytest.approx(0.293, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "expected_bytes", "limits"),
    [
        ({}, True, True),
        ({"device": "another GPU"}, True, False),
        ({"dtype": "float32"}, True, False),
        ({"images": 7}, True, False),
        ({"vram_mode": "low"}, False, False),
    ],
)
def test_what_was_not_expected_is_not_held_against_it(
    tmp_path: Path, changes: dict[str, Any], expected_bytes: bool, limits: bool
) -> None:
    scale = Scale()
    (case,) = chosen_cases(suite_cases(Suite.MODES, scale), ["full"])
    nothing = {"expected_peak_bytes": None, "limit_s": None, "limit_step_s": None}
    row = with_expectation(
        result("full", **nothing | changes),
        case,
        scale,
        write_manifest(case, scale, tmp_path),
        {"a GPU": SPEEDS},
    )
    assert (row.expected_peak_bytes is not None) == expected_bytes
    assert (row.limit_s is not None, row.limit_step_s is not None) == (limits, limits)
