"""The table of promises: what it must cover, and that its order can be run."""

from __future__ import annotations

import pytest

from sensebatch.errors import ConfigError
from sensebatch.jobs import VramMode
from sensebatch.verify.promises import TRIALS, chosen_trials


def test_a_reference_comes_before_what_is_compared_with_it() -> None:
    seen: set[str] = set()
    references = {trial.name for trial in TRIALS if trial.like is None}
    for trial in TRIALS:
        assert trial.name not in seen
        assert trial.like is None or (trial.like in seen and trial.like in references)
        seen.add(trial.name)


def test_every_reference_is_compared_with_something() -> None:
    likes = {trial.like for trial in TRIALS}
    assert {trial.name for trial in TRIALS if trial.like is None} <= likes


def test_every_mode_a_budget_and_kills_are_covered() -> None:
    of_full = [trial for trial in TRIALS if trial.like == "full"]
    assert {trial.mode for trial in of_full} == {mode.value for mode in VramMode}
    assert any(trial.half_budget for trial in of_full)
    assert sum(trial.kills > 1 for trial in of_full) == 2
    assert any(trial.with_lora for trial in TRIALS)


def test_a_chosen_trial_brings_its_reference() -> None:
    assert [trial.name for trial in chosen_trials(["fp8-killed", "low"])] == [
        *("full", "low", "fp8", "fp8-killed"),
    ]
    assert chosen_trials([]) == TRIALS


def test_an_unknown_trial_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"--only: expected one of full, again, .* found 'fats'"):
        chosen_trials(["fats"])
