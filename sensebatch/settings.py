"""Settings from a YAML file and from flags on top of the defaults, and back to plain data.

Knows the shape of a configuration file; the defaults stay in `config.py`. What `dump_settings`
returns is itself such a file, so a run's folder says how to repeat the run.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails

from sensebatch.config import (
    SCHEDULE_SETTINGS,
    TINY_MODEL,
    ExecutionConfig,
    InputConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TaskDefaults,
    default_config,
    scheduled,
    sets_aside,
)
from sensebatch.declarations import Declared, declared, implications, plain
from sensebatch.errors import ConfigError, found
from sensebatch.functions import FUNCTION_NAME, AcceptFunction, is_function_name
from sensebatch.image_files import MAX_PIXELS
from sensebatch.jobs import (
    COUNT,
    Precision,
    Sampling,
    VramMode,
)
from sensebatch.resolutions import PixelLimits, Resolution, ResolutionError
from sensebatch.tasks import TASKS, Task, TaskSpec
from sensebatch.units import GIB
from sensebatch.yaml_values import YamlTextError, YamlValue, read_yaml

AMOUNT = r"[0-9]{1,9}(?:\.[0-9]+)? ?GiB"
"""Memory as people write it: `20GiB`."""
RUN_SECTION = "config"
"""The key that holds the settings in `run.yaml`, which is a valid configuration file too."""

_COMMAND_LINE = "command line"
_FLAGS = {"inputs.max_pixels": "max-image-pixels"}
"""The flags that are not named like their setting."""

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list",
    "model_type": "a section",
    "string_too_short": "text",
    "string_type": "text",
    "too_long": "at most {max_length} values",
    "too_short": "at least {min_length} values",
    "tuple_type": "a list",
}
"""What was expected, by pydantic's type of error; filled from its context."""


def _parse_size(value: object) -> Resolution:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f"expected WIDTHxHEIGHT in pixels or a bucket of the task, found {found(value)}"
        )
    try:
        return Resolution.asked_for(width=int(match[1]), height=int(match[2]))
    except ResolutionError as error:
        raise ValueError(str(error)) from None


def _parse_pixels(value: object) -> object:
    """Returns a flag's value as a file would say it: null for `none`, a number for digits."""
    if value == "none":
        return None
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def amount_bytes(amount: str) -> int:
    """Returns the bytes that a text means which `AMOUNT` matches."""
    return round(float(amount.removesuffix("GiB")) * GIB)


def _parse_bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    if re.fullmatch(AMOUNT, value) is None:
        raise ValueError(f"expected a number of bytes or text such as 20GiB, found {found(value)}")
    return amount_bytes(value)


Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
AttnBackend = Literal["auto", "cudnn", "flash", "sdpa"]
ImageFormat = Literal["png", "webp", "jpeg"]
Count = Annotated[int, COUNT]
Bytes = Annotated[int, Field(gt=0, le=2**63 - 1), BeforeValidator(_parse_bytes)]
"""A number of bytes, or text such as `20GiB`."""
Size = Annotated[Any, BeforeValidator(_parse_size), PlainSerializer(str)]
InputMaxPixels = Annotated[Literal["auto"] | Count | None, BeforeValidator(_parse_pixels)]


class _Section(BaseModel):
    """Part of a configuration file: unknown keys and loose types are errors."""

    # Built on first use: help needs only the literals above.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class ModelSection(_Section):
    """The file's form of `config.ModelConfig`."""

    model: Annotated[str, Field(min_length=1)]
    revision: str | None
    lora_path: str | None
    device: Device
    dtype: Dtype
    precision: Precision
    attn_backend: AttnBackend
    compile: bool
    system_prompt_file: str | None


class MemorySection(_Section):
    """The file's form of `config.MemoryConfig`."""

    vram_mode: VramMode
    vram_budget_bytes: Bytes | None
    host_budget_bytes: Bytes | None
    max_batch_size: Count
    max_batch_image_tokens: Count


class InputSection(_Section):
    """The file's form of `config.InputConfig`."""

    max_pixels: Annotated[int, Field(gt=0, le=MAX_PIXELS)]


class OutputSection(_Section):
    """The file's form of `config.OutputConfig`."""

    image_format: ImageFormat
    image_quality: Annotated[int, Field(ge=1, le=100)]
    embed_metadata: bool
    keep_rejected: bool
    num_writers: Count | None


class ExecutionSection(_Section):
    """The file's form of `config.ExecutionConfig`."""

    max_attempts: Count
    max_failures: Count | None
    retry_failed: bool
    fail_truncated: bool


class PixelLimitsSection(_Section):
    """The file's form of `resolutions.PixelLimits`."""

    base_pixels: Count
    min_pixels: Count
    min_asked_pixels: Count


def _listed(value: object) -> object:
    """Returns functions as a list, of which a file may leave out the brackets."""
    return value if isinstance(value, list) else [value]


def _function_name(value: object) -> object:
    if not is_function_name(value):
        raise ValueError(f"expected module:function, found {found(value)}")
    return value


class FunctionSection(_Section):
    """The file's form of `functions.AcceptFunction`."""

    function: Annotated[str, Field(pattern=FUNCTION_NAME), BeforeValidator(_function_name)]
    at_least: Annotated[float, Field(gt=0, le=1)] = 0.5
    folder: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if isinstance(value, str):
            return {"function": value}
        if isinstance(value, dict) and "ask" not in value:
            return value
        wanted = "expected module:function, or a mapping of function, at_least and folder"
        if isinstance(value, dict):
            raise ValueError(f"{wanted}, found a question; a manifest asks questions, under accept")
        raise ValueError(f"{wanted}, found {found(value)}")


def _different(functions: list[FunctionSection]) -> list[FunctionSection]:
    names = [one.function for one in functions]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"expected every function once, found {again} again")
    return functions


def _checked(setting: Declared, spec: TaskSpec) -> Any:
    """Returns the type of a task's setting, which accepts valid values alone."""
    error_of = setting.setting.error
    if error_of is None:
        return setting.type

    def check(value: Any) -> Any:
        if (message := error_of(value, spec)) is not None:
            raise ValueError(message)
        return value

    return Annotated[setting.type, AfterValidator(check)]


def _task_section(spec: TaskSpec) -> type[_Section]:
    """Returns the file's form of a task's `config.TaskDefaults`, sampling settings included."""
    settings = {**declared(Sampling), **declared(TaskDefaults)}
    types = {
        **{name: _checked(setting, spec) for name, setting in settings.items()},
        "input_max_pixels": InputMaxPixels,
        # `WIDTHxHEIGHT`, or the name of one of the buckets.
        "resolution": None if spec.drawing is None else Size,
        "buckets": dict[str, Size],
        "snap_sizes": bool,
    }
    fields: Any = {name: (kind, ...) for name, kind in types.items()}
    return create_model(f"{spec.task.name}_Section", __base__=_Section, **fields)


if TYPE_CHECKING:
    TasksSection = _Section
else:
    TasksSection = create_model(
        "TasksSection",
        __base__=_Section,
        __doc__="The defaults of each task.",
        **{task.value: (_task_section(spec), ...) for task, spec in TASKS.items()},
    )


class Settings(_Section):
    """A whole configuration file with every setting filled in."""

    model: ModelSection
    memory: MemorySection
    inputs: InputSection
    output: OutputSection
    execution: ExecutionSection
    pixel_limits: PixelLimitsSection
    accept: Annotated[list[FunctionSection], BeforeValidator(_listed), AfterValidator(_different)]
    tasks: TasksSection


def resolve_settings(
    *,
    config_file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    dashed: bool = True,
) -> RunConfig:
    """Returns the settings of a run: the model's defaults < the file < the flags.

    Args:
        config_file: A YAML file; every key may be left out.
        flags: Values by dotted place (`execution.max_attempts`); None if not given.
        dashed: Whether errors name a flag as a command line does (`--max-attempts`), or by its
            place.

    Raises:
        ConfigError: Every unknown key and unusable value, each with its place; or the working
            directory is gone.
    """
    working_directory = _working_directory()
    document = None if config_file is None else _read_yaml(config_file)
    from_file = {} if document is None else document.value
    from_flags = _nested(
        {name: value for name, value in (flags or {}).items() if value is not None}
    )
    below, above = _scheduled(from_file), _scheduled(from_flags)
    chosen = _merge(_without_replaced(below, above), above)
    _imply(chosen.get("tasks"))
    section = chosen.get("model")
    model = section.get("model") if isinstance(section, Mapping) else None
    defaults = dump_settings(default_config(model if isinstance(model, str) else TINY_MODEL))
    values = _merge(defaults, chosen)
    _name_buckets(values)

    def place_in_file(path: list[str | int]) -> str:
        assert document is not None
        return f"{config_file}: line {document.line_of(path)}: {_dotted(path)}"

    def place(path: list[str | int]) -> str:
        name = _dotted(path)
        if list(_existing(from_flags, path)) == path:
            *_, last = (part for part in path if isinstance(part, str))
            flag = _FLAGS.get(name, last.replace("_", "-"))
            return f"--{flag}" if dashed else name
        if document is None:
            return f"{_COMMAND_LINE}: {name}" if dashed else name
        return place_in_file(path)

    complaints = [*_contradictions(from_file, place_in_file), *_contradictions(from_flags, place)]
    try:
        settings = Settings.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        complaints.append(_complaints(error.errors(), values, place))
    if complaints:
        raise ConfigError("\n".join(complaints)) from None
    config = _run_config(settings, working_directory if config_file is None else config_file.parent)
    _require_folders(config.accept, values, place)
    return config


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError("expected a working directory, found that it was deleted") from None


def _require_folders(
    functions: Sequence[AcceptFunction],
    values: Mapping[str, Any],
    place: Callable[[list[str | int]], str],
) -> None:
    """Raises ConfigError for a function whose module's folder is missing."""
    for number, function in enumerate(functions):
        if not Path(function.folder).is_dir():
            where = place(list(_existing(values, ["accept", number, "folder"])))
            raise ConfigError(
                f"{where}: expected the folder of the module of {function.function}, found none at "
                f"{function.folder}"
            )


def dump_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the settings as plain data that YAML and JSON can hold; a valid file again."""
    return {
        "model": asdict(config.model, dict_factory=_plain),
        "memory": asdict(config.memory, dict_factory=_plain),
        "inputs": asdict(config.inputs),
        "output": asdict(config.output),
        "execution": asdict(config.execution),
        "pixel_limits": asdict(config.pixel_limits),
        "accept": [asdict(one) for one in config.accept],
        "tasks": {task.value: _dump_task(defaults) for task, defaults in config.tasks.items()},
    }


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a section with the values of its enums."""
    return {name: value.value if isinstance(value, Enum) else value for name, value in items}


def _dump_task(defaults: TaskDefaults) -> dict[str, Any]:
    values = asdict(defaults)
    sampling = values.pop("sampling")
    values["resolution"] = None if defaults.resolution is None else str(defaults.resolution)
    values["buckets"] = {name: str(size) for name, size in defaults.buckets.items()}
    values |= sampling
    return {name: plain(value) for name, value in values.items()}


def _task_defaults(section: _Section) -> TaskDefaults:
    values = {name: getattr(section, name) for name in type(section).model_fields}
    sampling = Sampling(**{name: values.pop(name) for name in declared(Sampling)})
    return TaskDefaults(sampling=sampling, **values)


def _run_config(settings: Settings, folder: Path) -> RunConfig:
    """Returns the settings of a run.

    Args:
        settings: Checked.
        folder: Where functions are looked for that do not say where they are.
    """
    functions = (AcceptFunction(**one.model_dump()) for one in settings.accept)
    return RunConfig(
        model=ModelConfig(**settings.model.model_dump()),
        memory=MemoryConfig(**settings.memory.model_dump()),
        inputs=InputConfig(**settings.inputs.model_dump()),
        output=OutputConfig(**settings.output.model_dump()),
        execution=ExecutionConfig(**settings.execution.model_dump()),
        pixel_limits=PixelLimits(**settings.pixel_limits.model_dump()),
        accept=tuple(replace(one, folder=str(folder.resolve() / one.folder)) for one in functions),
        tasks={task: _task_defaults(getattr(settings.tasks, task.value)) for task in Task},
    )


def _read_yaml(path: Path) -> YamlValue:
    """Returns the mapping in a file, or that under `RUN_SECTION`."""
    try:
        document = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except YamlTextError as error:
        raise ConfigError(f"{path}: line {error.line}: {error}") from None
    if isinstance(document.value, dict) and RUN_SECTION in document.value:
        document = document.child(RUN_SECTION)
    if document.value is None:
        return YamlValue(value={}, node=document.node)
    if not isinstance(document.value, dict):
        line = document.line_of(())
        raise ConfigError(
            f"{path}: line {line}: expected sections with settings, found {found(document.value)}"
        )
    return document


def _nested(values: Mapping[str, object]) -> dict[str, Any]:
    """Turns `{"a.b": 1}` into `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return nested


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `below` with the values of `above`; sections are merged, all else replaced.

    A section left empty in YAML is null and changes nothing.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping):
            merged[key] = old if value is None else value
            if isinstance(value, Mapping):
                merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _scheduled(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a file's settings, or the flags', with what they imply for each task's steps."""
    tasks = layer.get("tasks")
    if not isinstance(tasks, Mapping):
        return layer
    implied = {
        name: {key: plain(value) for key, value in (dict(section) | scheduled(section)).items()}
        if isinstance(section, Mapping)
        else section
        for name, section in tasks.items()
    }
    return {**layer, "tasks": implied}


def _without_replaced(below: Mapping[str, Any], above: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a file's settings without the steps that flags set aside with their timesteps."""
    tasks, flags = below.get("tasks"), above.get("tasks")
    if not isinstance(tasks, Mapping) or not isinstance(flags, Mapping):
        return below
    kept = {}
    for name, section in tasks.items():
        over = flags.get(name)
        kept[name] = section
        if not isinstance(section, Mapping) or not isinstance(over, Mapping):
            continue
        if sets_aside(section.get("timesteps"), over):
            kept[name] = {k: v for k, v in section.items() if k not in SCHEDULE_SETTINGS}
    return {**below, "tasks": kept}


def _contradictions(
    layer: Mapping[str, Any], place: Callable[[list[str | int]], str]
) -> Iterator[str]:
    """Yields a line for each setting of a file, or of the flags, that the timesteps beside it deny.

    Settings that a run has resolved have all of them, and they agree.
    """
    tasks = layer.get("tasks")
    for task, section in tasks.items() if isinstance(tasks, Mapping) else ():
        timesteps = section.get("timesteps") if isinstance(section, Mapping) else None
        if not isinstance(timesteps, list | tuple) or not timesteps:
            continue
        implied = scheduled({"timesteps": timesteps})
        for name in ("num_steps", "timestep_shift"):
            value = section.get(name)
            if value is not None and value != implied[name]:
                yield (
                    f"{place(['tasks', task, name])}: expected none beside timesteps, or "
                    f"{implied[name]:g}, which they come to, found {found(value)}"
                )


def _imply(tasks: object) -> None:
    """Adds the settings that follow from others to what was given for each task."""
    for section in tasks.values() if isinstance(tasks, Mapping) else ():
        if isinstance(section, dict):
            section.update(implications(Sampling, section))


def _name_buckets(values: dict[str, Any]) -> None:
    """Replaces a default resolution that names one of its task's buckets by the size."""
    tasks = values["tasks"]
    for section in tasks.values() if isinstance(tasks, Mapping) else ():
        if isinstance(section, dict) and isinstance(section.get("buckets"), Mapping):
            name = section.get("resolution")
            section["resolution"] = section["buckets"].get(str(name), name)


def _complaints(
    errors: list[ErrorDetails],
    values: Mapping[str, Any],
    place: Callable[[list[str | int]], str],
) -> str:
    """Returns a line for each place that pydantic found an error in, as `place` names it."""
    misspelled = {error["loc"][:-1] for error in errors if error["type"] == "extra_forbidden"}
    complaints: dict[str, dict[str, None]] = {}
    inputs: dict[str, str] = {}
    for error in errors:
        path = list(_existing(values, error["loc"]))
        where, kind = place(path), error["type"]
        message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if kind == "extra_forbidden":
            message = f"unknown setting{_suggestion(path)}"
        elif kind == "missing" and isinstance(error["loc"][-1], int):
            message, inputs[where] = "more values", found(error["input"])
        elif kind == "missing":
            if error["loc"][:-1] in misspelled:
                continue
            message = f"expected {error['loc'][-1]} beside the others, found none"
        elif not message.startswith("expected "):
            message = expected(error) or message
            inputs[where] = found(error["input"])
        complaints.setdefault(where, {})[message] = None
    return "\n".join(
        f"{where}: expected {' or '.join(m.removeprefix('expected ') for m in messages)}"
        f", found {inputs[where]}"
        if where in inputs
        else f"{where}: {next(iter(messages))}"
        for where, messages in complaints.items()
    )


def expected(error: ErrorDetails) -> str | None:
    """Returns what was expected, by one of pydantic's errors; None if it says so itself."""
    limits = {
        name: int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        for name, limit in error.get("ctx", {}).items()
    }
    words = _EXPECTED.get(error["type"])
    return words and words.format(**limits)


def _existing(values: object, path: Iterable[str | int]) -> Iterator[str | int]:
    """Yields the parts of a place that are in the data; pydantic appends names of its own."""
    for part in path:
        if isinstance(values, list | tuple) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif isinstance(values, Mapping) and part == 0:
            # The only one, without brackets.
            continue
        elif isinstance(values, Mapping) and part in values:
            values = values[part]
        else:
            return
        yield part


def _dotted(path: Iterable[str | int]) -> str:
    """Returns a place as people write it: `accept[1].at_least`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def _suggestion(path: list[str | int]) -> str:
    """Returns `; did you mean ...?` for a key that resembles one of its section, or of another."""
    section: Any = Settings
    for part in path[:-1]:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
            section = next(iter(get_args(section)), section)
    name = str(path[-1])
    close = difflib.get_close_matches(name, section.model_fields, n=1)
    if not close:
        names = list(_names(Settings))
        alike = difflib.get_close_matches(name, [known[-1] for known in names], n=1)
        close = [".".join(known) for known in names if [known[-1]] == alike]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _names(section: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Yields every place of a setting below a section."""
    for name, field in section.model_fields.items():
        yield (name,)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ((name, *rest) for rest in _names(field.annotation))
