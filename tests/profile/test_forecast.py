"""A suite says how long it takes, from the plan first and then from what was measured."""

from __future__ import annotations

from pathlib import Path

from sensebatch.plan.work import Speeds
from sensebatch.profile.forecast import Forecast
from sensebatch.profile.suites import Scale, Suite, suite_cases

SPEEDS = {
    "a GPU": Speeds(
        copy_bytes_per_s=50e9,
        gemm_flop_per_s=734e12,
        attention_flop_per_s=604e12,
        memory_bytes_per_s=4e12,
    )
}


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_plan_says_how_long_a_suite_takes_at_least(tmp_path: Path) -> None:
    scale = Scale()
    cases = suite_cases(Suite.MODES, scale)
    line = Forecast(cases, scale, tmp_path, SPEEDS).before()
    # 8 jobs of 50 steps at 0.222 s each are 89 s, and a little for prompts.
    each = "full 1 min, fast 1 min, balanced 1 min, low 2 min"
    assert line == f"4 cases, at least 7 min on a GPU besides loading: {each}"


def test_what_was_measured_says_how_long_the_rest_takes(tmp_path: Path) -> None:
    scale, clock = Scale(), Clock()
    cases = suite_cases(Suite.MODES, scale)[:2]
    forecast = Forecast(cases, scale, tmp_path, SPEEDS, clock)
    clock.now = 180.0
    assert forecast.after(cases[0]) == "1 of 2 cases after 3 min, about 3 min left"
    assert forecast.left == ["fast"]
    clock.now = 360.0
    assert forecast.after(cases[1]) == "2 of 2 cases after 6 min"
    assert forecast.left == []


def test_without_speeds_only_the_cases_are_counted(tmp_path: Path) -> None:
    scale = Scale(model="synthetic:tiny")
    cases = suite_cases(Suite.MODES, scale)[:1]
    forecast = Forecast(cases, scale, tmp_path, {})
    assert forecast.before().startswith("1 case; sensebatch doctor measures")
    assert forecast.after(cases[0]) == "1 of 1 cases after 0 s"


def test_without_a_gpu_there_is_nothing_for_doctor_to_measure(tmp_path: Path) -> None:
    scale = Scale(model="synthetic:tiny")
    cases = suite_cases(Suite.MODES, scale)
    line = Forecast(cases, scale, tmp_path, {}, has_gpu=False).before()
    assert line == "4 cases; how long they take is known for GPUs alone"


def test_a_case_without_known_seconds_is_left_out(tmp_path: Path) -> None:
    scale, names = Scale(), ("t2i", "t2i-fp8")
    cases = [case for case in suite_cases(Suite.SPEED, scale) if case.name in names]
    before = Forecast(cases, scale, tmp_path, SPEEDS).before()
    assert before == "2 cases, at least 1 min on a GPU besides loading"
    unknown = Forecast(cases[1:], scale, tmp_path, SPEEDS)
    assert unknown.before() == "1 case; a plan knows no seconds for what they compute with"
