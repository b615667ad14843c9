"""Defaults < file < flags, and one clear message for every error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sensebatch import config, settings
from sensebatch.config import RunConfig, TaskDefaults, default_config
from sensebatch.errors import ConfigError
from sensebatch.jobs import CfgNorm, Sampling
from sensebatch.resolutions import PixelLimits, Resolution
from sensebatch.settings import amount_bytes, dump_settings, resolve_settings
from sensebatch.tasks import Task
from sensebatch.yaml_values import dump_yaml

CONFIGS = Path(__file__).parent.parent / "configs"


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _complaints(tmp_path: Path, text: str, **flags: Any) -> list[str]:
    path = _file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        resolve_settings(
            config_file=path, flags={k.replace("__", "."): v for k, v in flags.items()}
        )
    return str(caught.value).replace(str(path), "FILE").splitlines()


def test_no_file_and_no_flags_are_the_defaults() -> None:
    assert resolve_settings() == default_config()


@pytest.mark.parametrize("task", Task)
def test_defaults_of_an_official_checkpoint_are_the_published_ones(task: Task) -> None:
    defaults = default_config("owner/name").tasks[task]
    assert defaults.sampling == Sampling(
        num_steps=50,
        timestep_shift=3.0,
        cfg_scale=4.0,
        img_cfg_scale=1.0,
        cfg_norm=CfgNorm.NONE,
        cfg_interval=(0.0, 1.0),
        max_think_tokens=1024,
        max_images=10,
        max_new_tokens=1024 if task is Task.ASK else 8192,
        choices=(),
        do_sample=False,
        temperature=0.7,
        top_p=0.9,
        top_k=50,
        repetition_penalty=1.0,
    )
    assert (defaults.seed, defaults.think) == (42, task is Task.INTERLEAVE)
    assert (defaults.target_pixels, defaults.input_max_pixels) == (4194304, "auto")


def test_file_beats_defaults_and_flags_beat_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "execution: {max_attempts: 3, retry_failed: true}\n")
    flags = {"execution.max_attempts": 5, "execution.max_failures": None}
    execution = resolve_settings(config_file=path, flags=flags).execution
    assert execution == config.ExecutionConfig(max_attempts=5, retry_failed=True)


def test_false_flag_is_given_and_none_is_not(tmp_path: Path) -> None:
    path = _file(tmp_path, "output: {embed_metadata: true, image_quality: 80}\n")
    flags = {"output.embed_metadata": False, "output.image_quality": None}
    output = resolve_settings(config_file=path, flags=flags).output
    assert output == config.OutputConfig(embed_metadata=False, image_quality=80)


@pytest.mark.parametrize("by_flag", [True, False])
def test_model_decides_the_defaults_wherever_it_is_named(tmp_path: Path, by_flag: bool) -> None:
    path = _file(tmp_path, "{}" if by_flag else "model: {model: owner/name}")
    resolved = resolve_settings(
        config_file=path, flags={"model.model": "owner/name" if by_flag else None}
    )
    assert resolved == default_config("owner/name")


def test_null_in_a_file_sets_what_may_be_null_and_empty_section_sets_nothing(
    tmp_path: Path,
) -> None:
    path = _file(tmp_path, "memory:\ntasks: {edit: {input_max_pixels: null}}\n")
    resolved = resolve_settings(config_file=path, flags={"model.model": "owner/name"})
    assert resolved.tasks[Task.EDIT].input_max_pixels is None
    assert resolved.memory == config.MemoryConfig()


def test_memory_can_be_written_in_gib(tmp_path: Path) -> None:
    path = _file(tmp_path, "memory: {vram_budget_bytes: 20GiB, host_budget_bytes: 1024}\n")
    memory = resolve_settings(config_file=path).memory
    assert (memory.vram_budget_bytes, memory.host_budget_bytes) == (20 * 2**30, 1024)


def test_default_resolution_by_size_or_by_bucket(tmp_path: Path) -> None:
    path = _file(tmp_path, "tasks: {t2i: {resolution: '16:9'}, edit: {resolution: 64x32}}\n")
    tasks = resolve_settings(config_file=path).tasks
    assert tasks[Task.T2I].resolution == tasks[Task.T2I].buckets["16:9"]
    assert tasks[Task.EDIT].resolution == Resolution(width=64, height=32)


@pytest.mark.parametrize("model", ["tiny", "owner/name"])
def test_dumped_settings_read_back_the_same(tmp_path: Path, model: str) -> None:
    resolved = default_config(model)
    path = _file(tmp_path, yaml.safe_dump(dump_settings(resolved)))
    assert resolve_settings(config_file=path) == resolved


def test_settings_of_a_run_can_be_given_to_another(tmp_path: Path) -> None:
    resolved = default_config("owner/name")
    run = {"sensebatch": "1.0", "manifests": ["a.yaml"], "config": dump_settings(resolved)}
    assert resolve_settings(config_file=_file(tmp_path, yaml.safe_dump(run))) == resolved


@pytest.mark.slow
@given(
    attempts=st.integers(1, 100),
    interval=st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
    sides=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    prompt_file=st.none() | st.text(st.characters(codec="utf-8", categories=["L", "N"])),
)
def test_any_settings_survive_dump_and_read(
    tmp_path_factory: pytest.TempPathFactory,
    attempts: int,
    interval: tuple[float, float],
    sides: tuple[int, int],
    prompt_file: str | None,
) -> None:
    start = default_config()
    task = start.tasks[Task.T2I]
    changed = dataclasses.replace(
        start,
        model=dataclasses.replace(start.model, system_prompt_file=prompt_file),
        execution=dataclasses.replace(start.execution, max_attempts=attempts),
        tasks={
            **start.tasks,
            Task.T2I: dataclasses.replace(
                task,
                resolution=Resolution(height=32 * sides[0], width=32 * sides[1]),
                sampling=dataclasses.replace(task.sampling, cfg_interval=interval),
            ),
        },
    )
    path = _file(tmp_path_factory.mktemp("settings"), dump_yaml(dump_settings(changed)))
    assert resolve_settings(config_file=path) == changed


@pytest.mark.parametrize(
    ("section", "noun"),
    [
        (settings.ModelSection, config.ModelConfig),
        (settings.MemorySection, config.MemoryConfig),
        (settings.OutputSection, config.OutputConfig),
        (settings.ExecutionSection, config.ExecutionConfig),
        (settings.PixelLimitsSection, PixelLimits),
        (settings.Settings, RunConfig),
    ],
)
def test_file_offers_exactly_the_settings_there_are(section: type[BaseModel], noun: type) -> None:
    assert list(section.model_fields) == [field.name for field in dataclasses.fields(noun)]


@pytest.mark.parametrize("task", Task)
def test_file_offers_exactly_the_settings_of_every_task(task: Task) -> None:
    section = settings.TasksSection.model_fields[task].annotation
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    nouns = {field.name for noun in (TaskDefaults, Sampling) for field in dataclasses.fields(noun)}
    assert section.model_fields.keys() == nouns - {"sampling"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modle: {}", "FILE: line 1: modle: unknown setting; did you mean model?"),
        (
            "model: {devise: cpu}",
            "FILE: line 1: model.devise: unknown setting; did you mean device?",
        ),
        (
            "tasks: {t2i: {nums_steps: 3}}",
            "FILE: line 1: tasks.t2i.nums_steps: unknown setting; did you mean num_steps?",
        ),
        ("1: 2", "FILE: line 1: expected text as a key, found '1'"),
        (
            "model: {device: gpu}",
            "FILE: line 1: model.device: expected 'auto', 'cuda' or 'cpu', found 'gpu'",
        ),
        (
            "memory: {max_batch_size: '8'}",
            "FILE: line 1: memory.max_batch_size: expected a whole number, found '8'",
        ),
        ("memory: 3", "FILE: line 1: memory: expected a section, found 3"),
        (
            "tasks: {t2i: {cfg_interval: [0.1, 2]}}",
            "FILE: line 1: tasks.t2i.cfg_interval[1]: expected a number of at most 1, found 2",
        ),
        (
            "tasks: {t2i: {cfg_interval: []}}",
            "FILE: line 1: tasks.t2i.cfg_interval: expected more values, found a list of 0",
        ),
        (
            "tasks: {t2i: {cfg_interval: [0, 1, 1]}}",
            "FILE: line 1: tasks.t2i.cfg_interval: expected at most 2 values, found a list of 3",
        ),
        (
            "tasks: {edit: {input_max_pixels: 0}}",
            "FILE: line 1: tasks.edit.input_max_pixels: expected 'auto' or a number of at least "
            "1, found 0",
        ),
        (
            "tasks:\n  t2i:\n    resolution: 17:9",
            "FILE: line 3: tasks.t2i.resolution: expected WIDTHxHEIGHT in pixels or a bucket of "
            "the task, found '17:9'",
        ),
        (
            "tasks: {t2i: {resolution: 500x512}}",
            "FILE: line 1: tasks.t2i.resolution: expected width as a positive multiple of 32, "
            "found 500",
        ),
        (
            "tasks: {t2i: {cfg_interval: [0.9, 0.1]}}",
            "FILE: line 1: tasks.t2i.cfg_interval: expected the lower end first, "
            "found 0.9 before 0.1",
        ),
        (
            "vram_mode: full",
            "FILE: line 1: vram_mode: unknown setting; did you mean memory.vram_mode?",
        ),
        (
            "model: {sed: 1}",
            "FILE: line 1: model.sed: unknown setting; did you mean "
            "tasks.t2i.seed or tasks.edit.seed or tasks.interleave.seed or tasks.ask.seed?",
        ),
        (
            "output: {image_format: !!timestamp 2026-01-01}",
            "FILE: line 1: expected a plain value, found the tag '!!timestamp'",
        ),
        ("zzz: 1", "FILE: line 1: zzz: unknown setting"),
        ("model: {model: ''}", "FILE: line 1: model.model: expected text, found ''"),
        (
            "tasks: {t2i: {resolution: 99968x64}}",
            "FILE: line 1: tasks.t2i.resolution: expected width as at most 16384, found 99968",
        ),
        (
            "tasks: {t2i: {num_steps: 2147483648}}",
            "FILE: line 1: tasks.t2i.num_steps: expected a number of at most "
            "2147483647, found 2147483648",
        ),
        (
            "tasks: {t2i: {seed: 9223372036854775808}}",
            "FILE: line 1: tasks.t2i.seed: expected a number of at most "
            "9223372036854775807, found 9223372036854775808",
        ),
        (
            "memory: {vram_budget_bytes: 1234567890GiB}",
            "FILE: line 1: memory.vram_budget_bytes: expected a number of bytes or text such as "
            "20GiB, found '1234567890GiB'",
        ),
        (
            "version: 1\nconfig:\n  memory:\n    vram_mode: huge",
            "FILE: line 4: memory.vram_mode: expected 'auto', 'full', 'fast', 'balanced' or 'low', "
            "found 'huge'",
        ),
        (
            "tasks: {edit: {cfg_norm: cfg_zero_star}}",
            "FILE: line 1: tasks.edit.cfg_norm: expected 'none', 'global' or 'channel' for edit, "
            "found 'cfg_zero_star'",
        ),
        ("model: {}\nmodel: {}", "FILE: line 2: expected every key once, found 'model' again"),
        ("- 1", "FILE: line 1: expected sections with settings, found a list of 1"),
    ],
)
def test_an_error_in_a_file_names_file_place_expected_and_found(
    tmp_path: Path, text: str, complaint: str
) -> None:
    assert _complaints(tmp_path, text) == [complaint]


def test_all_errors_are_reported_at_once_and_flags_by_their_name(tmp_path: Path) -> None:
    text = "model: {dtype: int8}\nmemory: {max_batch_size: 0}\n"
    assert _complaints(tmp_path, text, memory__max_batch_size=-1, execution__max_attempts=0) == [
        "FILE: line 1: model.dtype: expected 'auto', 'bfloat16', 'float16' or 'float32', "
        "found 'int8'",
        "--max-batch-size: expected a number of at least 1, found -1",
        "--max-attempts: expected a number of at least 1, found 0",
    ]


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"a: &x [*x]"])
def test_file_that_is_no_settings_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        resolve_settings(config_file=path)


@pytest.mark.parametrize("text", ["", "# memory:\n#   vram_mode: low\n", "memory:\n", "config:\n"])
def test_file_without_settings_changes_nothing(tmp_path: Path, text: str) -> None:
    assert resolve_settings(config_file=_file(tmp_path, text)) == default_config()


def test_words_of_a_file_mean_what_they_mean_in_a_manifest(tmp_path: Path) -> None:
    text = "model: {model: owner/name}\ntasks: {t2i: {resolution: 16:9, cfg_scale: 1e0}}"
    defaults = resolve_settings(config_file=_file(tmp_path, text)).tasks[Task.T2I]
    assert defaults.resolution == defaults.buckets["16:9"]
    assert defaults.sampling.cfg_scale == 1.0


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        resolve_settings(config_file=tmp_path / "nowhere.yaml")


SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_settings_are_valid_and_say_how_to_use_them(path: Path) -> None:
    resolve_settings(config_file=path)
    assert f"--config configs/{path.name}" in path.read_text()


def test_settings_of_the_distilled_lora_evaluate_once_a_step() -> None:
    path = next(path for path in SHIPPED if path.stem.endswith("8step"))
    tasks = resolve_settings(config_file=path, flags={"model.model": "owner/name"}).tasks
    for task, defaults in tasks.items():
        sampling, rule = defaults.sampling, task.spec.drawing
        if rule is None:
            continue
        assert (sampling.num_steps, sampling.timestep_shift) == (8, 3.0)
        assert rule.guidance.branches(sampling.cfg_scale, sampling.img_cfg_scale) == ("cond",)


@pytest.mark.parametrize("amount", ["20GiB", "13.7GiB", "0.5GiB", "1.74 GiB"])
def test_amounts_of_memory_mean_what_accelerate_means(amount: str) -> None:
    """The published syntax is accelerate's, whose own reader would import torch."""
    from accelerate.utils.modeling import convert_file_size_to_int

    assert abs(amount_bytes(amount) - convert_file_size_to_int(amount)) <= 1


def test_a_working_directory_that_was_deleted_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="expected a working directory, found that it was del"):
        resolve_settings()
