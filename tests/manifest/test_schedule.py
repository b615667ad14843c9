"""Which steps a job takes, when `quality`, `timesteps` and the single settings meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import NEUTRAL, PRESETS, SCHEDULE_SETTINGS, RunConfig, default_config
from sensebatch.errors import ConfigError, ManifestError, Problem
from sensebatch.jobs import Job, Quality, Sampling, Solver, group_key
from sensebatch.manifest.read import read_manifest
from sensebatch.manifest.resolve import Warn
from sensebatch.settings import dump_settings, resolve_settings
from sensebatch.store.codec import group_from_json, group_to_json
from sensebatch.tasks import Task
from sensebatch.yaml_values import dump_yaml

EXACT = {
    "num_steps": 50,
    "timestep_shift": 3.0,
    "solver": Solver.EULER,
    "timesteps": (),
    "guidance_stride": 1,
    "layer_stride": 1,
}


def _steps(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in SCHEDULE_SETTINGS}


CALIBRATED = "tasks: {t2i: {solver: ab2, timesteps: [0.2, 0.6], layer_stride: 3}}"


def _calibrated(tmp_path: Path, **flags: Any) -> RunConfig:
    path = tmp_path / "calibrated.yaml"
    path.write_text(CALIBRATED, encoding="utf-8")
    given = {f"tasks.t2i.{name}": value for name, value in flags.items()}
    return resolve_settings(config_file=path, flags={"model.model": "8b", **given})


def _job(
    tmp_path: Path,
    job: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    config: RunConfig | None = None,
    warn: Warn | None = None,
) -> Job:
    path = tmp_path / "jobs.yaml"
    rows = {"version": 1, "defaults": defaults or {}, "jobs": [{"id": "a", "prompt": "a", **job}]}
    path.write_text(dump_yaml(rows), encoding="utf-8")
    (read,) = read_manifest(path, config or default_config(), warn=warn)
    return read


def test_exact_is_the_published_sampler() -> None:
    assert {**EXACT, **PRESETS[Quality.EXACT]} == EXACT
    assert _steps(default_config("8b").tasks[Task.T2I].sampling) == EXACT


@pytest.mark.parametrize("quality", Quality)
def test_a_quality_stands_for_every_setting_of_the_steps(tmp_path: Path, quality: Quality) -> None:
    defaults = {"num_steps": 30, "solver": "dpm2m", "guidance_stride": 2, "layer_stride": 3}
    job = _job(tmp_path, {"quality": quality.value}, defaults)
    assert _steps(job.sampling) == {**NEUTRAL, **PRESETS[quality]}


def test_what_is_said_beside_a_quality_or_above_it_wins(tmp_path: Path) -> None:
    beside = _job(tmp_path, {"quality": "high", "num_steps": 9})
    above = _job(tmp_path, {"num_steps": 9}, {"quality": "high"})
    assert _steps(beside.sampling) == _steps(above.sampling)
    assert (above.sampling.num_steps, above.sampling.timestep_shift) == (9, 1.0)


def test_timesteps_say_how_many_steps_there_are(tmp_path: Path) -> None:
    job = _job(tmp_path, {"timesteps": [0.25, 0.5]}, {"num_steps": 30})
    assert (job.sampling.num_steps, job.sampling.timesteps) == (3, (0.25, 0.5))
    assert job.drawing is not None
    assert job.drawing.num_evaluations == 3


@pytest.mark.parametrize("name", ["num_steps", "timestep_shift", "quality"])
def test_what_stands_above_timesteps_replaces_them(tmp_path: Path, name: str) -> None:
    value = {"num_steps": 5, "timestep_shift": 2.0, "quality": "fast"}[name]
    job = _job(tmp_path, {name: value}, {"timesteps": [0.25, 0.5]})
    assert job.sampling.timesteps == ()


def test_steps_beside_timesteps_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="num_steps: expected none beside timesteps"):
        _job(tmp_path, {"timesteps": [0.25], "num_steps": 2})


CONTRADICTING = """\
tasks:
  t2i:
    timesteps: [0.25, 0.5]
    num_steps: 50
    timestep_shift: 3
    cfg_scale: much
"""


def test_steps_beside_timesteps_of_a_file_are_a_mistake_unless_they_agree(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(CONTRADICTING, encoding="utf-8")
    # What a flag says instead does not make the file right.
    with pytest.raises(ConfigError) as caught:
        resolve_settings(config_file=path, flags={"tasks.t2i.num_steps": 3})
    beside = "expected none beside timesteps, or"
    assert str(caught.value).splitlines() == [
        f"{path}: line 4: tasks.t2i.num_steps: {beside} 3, which they come to, found 50",
        f"{path}: line 5: tasks.t2i.timestep_shift: {beside} 1, which they come to, found 3",
        f"{path}: line 6: tasks.t2i.cfg_scale: expected a number, found 'much'",
    ]
    agreeing = CONTRADICTING.replace("50", "3").replace("shift: 3", "shift: 1")
    path.write_text(agreeing.replace("    cfg_scale: much\n", ""), encoding="utf-8")
    sampling = resolve_settings(config_file=path).tasks[Task.T2I].sampling
    assert (sampling.num_steps, sampling.timesteps) == (3, (0.25, 0.5))


def test_steps_beside_timesteps_of_flags_are_a_mistake_as_well() -> None:
    flags = {"tasks.t2i.timesteps": [0.25], "tasks.t2i.num_steps": 9}
    with pytest.raises(ConfigError, match=r"^--num-steps: expected none .* or 2, .* found 9$"):
        resolve_settings(flags=flags)
    with pytest.raises(ConfigError, match=r"^tasks\.t2i\.num_steps: expected none"):
        resolve_settings(flags=flags, dashed=False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{timesteps: 0.5, num_steps: 3}", "timesteps: expected a list, found 0.5"),
        ("{timesteps: '0.5', quality: fast}", "timesteps: expected a list, found '0.5'"),
        (
            "{timesteps: [0.5], num_steps: '9'}",
            "num_steps: expected none beside timesteps, or 2, which they come to, found '9'",
        ),
    ],
)
def test_values_of_another_type_are_not_replaced_by_what_others_imply(
    tmp_path: Path, section: str, message: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"tasks: {{t2i: {section}}}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        resolve_settings(config_file=path)
    assert str(caught.value) == f"{path}: line 1: tasks.t2i.{message}"


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([0.5, 0.5], "expected rising timesteps"),
        ([0.0, 0.5], "more than 0"),
        ([0.5, 1.0], "less than 1"),
    ],
)
def test_timesteps_rise_between_0_and_1(tmp_path: Path, timesteps: Any, message: str) -> None:
    with pytest.raises(ManifestError, match=f"timesteps.*{message}"):
        _job(tmp_path, {"timesteps": timesteps})


def test_a_file_and_a_flag_say_it_alike(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("tasks: {t2i: {quality: high, guidance_stride: 2}}", encoding="utf-8")
    of_file = resolve_settings(config_file=path).tasks[Task.T2I]
    assert _steps(of_file.sampling) == {
        **NEUTRAL,
        **PRESETS[Quality.HIGH],
        "guidance_stride": 2,
    }
    flags = {"tasks.t2i.quality": "exact"}
    assert _steps(resolve_settings(config_file=path, flags=flags).tasks[Task.T2I].sampling) == EXACT
    by_flag = resolve_settings(config_file=path, flags={"tasks.t2i.num_steps": 7})
    found = by_flag.tasks[Task.T2I].sampling
    assert (found.num_steps, found.timestep_shift) == (7, 1.0)


def test_settings_with_timesteps_can_be_read_again(tmp_path: Path) -> None:
    flags = {"tasks.t2i.timesteps": [0.25, 0.5], "tasks.edit.quality": "fast"}
    resolved = resolve_settings(flags=flags)
    assert resolved.tasks[Task.T2I].sampling.num_steps == 3
    path = tmp_path / "settings.yaml"
    path.write_text(dump_yaml(dump_settings(resolved)), encoding="utf-8")
    assert resolve_settings(config_file=path) == resolved


@pytest.mark.parametrize(
    ("name", "value", "steps"),
    [
        ("num_steps", 20, {**EXACT, "num_steps": 20}),
        ("timestep_shift", 2.0, {**EXACT, "timestep_shift": 2.0}),
        (
            "timesteps",
            [0.5],
            {**EXACT, "num_steps": 2, "timestep_shift": 1.0, "timesteps": (0.5,)},
        ),
        ("quality", "fast", {**NEUTRAL, **PRESETS[Quality.FAST]}),
    ],
)
def test_a_row_that_sets_configured_timesteps_aside_sets_all_that_came_with_them_aside(
    tmp_path: Path, name: str, value: Any, steps: dict[str, Any]
) -> None:
    warnings: list[Problem] = []
    config = _calibrated(tmp_path)
    job = _job(tmp_path, {}, {name: value}, config, warnings.append)
    assert _steps(job.sampling) == steps
    (warning,) = warnings
    assert warning.field == name
    assert "the configured timesteps of t2i jobs are set aside" in warning.message
    by_flag = _calibrated(tmp_path, **{name: value}).tasks[Task.T2I].sampling
    assert _steps(by_flag) == steps


def test_rows_without_steps_of_their_own_are_drawn_as_configured(tmp_path: Path) -> None:
    warnings: list[Problem] = []
    config = _calibrated(tmp_path)
    job = _job(tmp_path, {"guidance_stride": 2}, None, config, warnings.append)
    assert (job.sampling.timesteps, job.sampling.solver) == ((0.2, 0.6), Solver.AB2)
    assert (job.sampling.layer_stride, job.sampling.guidance_stride) == (3, 2)
    assert warnings == []


def test_a_solver_beside_the_steps_of_a_row_is_the_row_s(tmp_path: Path) -> None:
    row = {"num_steps": 20, "solver": "dpm2m"}
    job = _job(tmp_path, row, config=_calibrated(tmp_path))
    assert _steps(job.sampling) == {**EXACT, "num_steps": 20, "solver": Solver.DPM2M}


def test_jobs_of_other_steps_are_not_drawn_together(tmp_path: Path) -> None:
    plain = _job(tmp_path, {"num_steps": 3})
    others = [
        _job(tmp_path, {"num_steps": 3, **changed})
        for changed in (
            {"solver": "ab2"},
            {"solver": "dpm2m"},
            {"guidance_stride": 2},
            {"layer_stride": 2},
        )
    ]
    others.append(_job(tmp_path, {"timesteps": [0.3, 0.6]}))
    groups = [group_key(job) for job in (plain, *others)]
    assert len(set(groups)) == 6
    assert [group_from_json(group_to_json(group)) for group in groups] == groups


def test_evaluations_count_guided_steps_alone(tmp_path: Path) -> None:
    job = _job(tmp_path, {"num_steps": 7, "cfg_scale": 4.0, "guidance_stride": 3})
    assert job.drawing is not None
    assert (job.drawing.num_guided_steps, job.drawing.num_evaluations) == (3, 10)


@pytest.mark.parametrize(
    ("stride", "num_steps", "whole"),
    [(3, 9, [0, 1, 4, 7, 8]), (2, 4, [0, 1, 3]), (5, 1, [0]), (1, 3, [0, 1, 2])],
)
def test_the_first_steps_and_the_last_evaluate_every_layer(
    tmp_path: Path, stride: int, num_steps: int, whole: list[int]
) -> None:
    drawing = _job(tmp_path, {"num_steps": num_steps, "layer_stride": stride}).drawing
    assert drawing is not None
    assert [step for step in range(num_steps) if drawing.is_whole(step)] == whole
    assert drawing.num_whole_steps == len(whole)


def test_steps_that_evaluate_every_layer_evaluate_every_branch(tmp_path: Path) -> None:
    strides = {"guidance_stride": 4, "layer_stride": 3}
    job = _job(tmp_path, {"num_steps": 9, "cfg_scale": 4.0, **strides})
    assert job.drawing is not None
    assert job.drawing.num_guided_steps == len({0, 4, 8} | {0, 1, 4, 7, 8})
