"""The options that commands share. Each group is declared once and expanded into signatures."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from sensebatch.cli.paths import path
from sensebatch.errors import ConfigError
from sensebatch.jobs import Precision, VramMode
from sensebatch.settings import (
    AMOUNT,
    AttnBackend,
    Device,
    Dtype,
    ImageFormat,
    amount_bytes,
)
from sensebatch.tasks import Task

if TYPE_CHECKING:
    from sensebatch.cli.voice import Voice

_MODEL = "Model"
_OUTPUT = "Output"
_EXECUTION = "Execution"

Manifests = Annotated[
    list[Path],
    typer.Argument(parser=path, help="YAML, Parquet or JSONL files.", metavar="MANIFEST..."),
]
RowTask = Annotated[Task | None, typer.Option(help="The task of rows that name none (JSONL).")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N jobs.")]

_NOT_OF_MODEL = ("config", "vram_mode", "device_map", "max_memory", "vram_budget")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which checkpoint is loaded, and how it is computed with."""

    config: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="YAML file with settings; flags override it.", rich_help_panel=_MODEL
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--model-path",
            help="Checkpoint folder, Hub id (owner/name), tiny (embedded), or synthetic weights "
            "for profiling: synthetic:8b, synthetic:u1.5 (convolutional head), synthetic:tiny.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=_MODEL),
    ] = None
    lora_path: Annotated[
        str | None,
        typer.Option(help="LoRA file to merge into the weights.", rich_help_panel=_MODEL),
    ] = None
    device: Annotated[
        Device | None, typer.Option(help="Where to compute.", rich_help_panel=_MODEL)
    ] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Type of weights and activations; auto is bfloat16 on a GPU, float32 on a CPU.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="How the layers' matrices are stored: fp8 in float8 for the generation expert, "
            "fp8-all for both experts; half the bytes, faster, different images.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    attn_backend: Annotated[
        AttnBackend | None,
        typer.Option(
            help="Attention kernel; auto is the fastest that is available.", rich_help_panel=_MODEL
        ),
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile each chain of small operations to one kernel, on a GPU.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    vram_mode: Annotated[
        VramMode | None,
        typer.Option(
            help="Where weights are kept; auto is the fastest that fits.", rich_help_panel=_MODEL
        ),
    ] = None
    device_map: Annotated[
        Literal["auto"] | None,
        typer.Option(
            help="Only auto: weights are placed automatically, within --max-memory or "
            "--vram-budget.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        typer.Option(
            help='The most memory of GPU, host or both, in GiB: "0=20GiB,cpu=80GiB". cpu is the '
            "resident memory of the process.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    vram_budget: Annotated[
        str | None,
        typer.Option(
            help="The most memory of the GPU, activations included, such as 13GiB; the same as "
            '--max-memory "0=13GiB".',
            rich_help_panel=_MODEL,
        ),
    ] = None
    system_prompt_file: Annotated[
        str | None,
        typer.Option(
            help="JSON with generation and interleave system prompts.", rich_help_panel=_MODEL
        ),
    ] = None

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        names = (field.name for field in fields(self) if field.name not in _NOT_OF_MODEL)
        device, host = _budgets(self.max_memory, self.vram_budget)
        return {
            **{f"model.{name}": getattr(self, name) for name in names},
            "memory.vram_mode": self.vram_mode,
            "memory.vram_budget_bytes": device,
            "memory.host_budget_bytes": host,
        }


def _budgets(max_memory: str | None, vram_budget: str | None) -> tuple[int | None, int | None]:
    """Returns the bytes of device and host; None for one without a budget.

    Args:
        max_memory: `0=20GiB,cpu=80GiB`, or one of the two.
        vram_budget: The device's, such as `20GiB`.

    Raises:
        ConfigError: One has another form, or they differ about the device.
    """
    parts = [] if max_memory is None else max_memory.split(",")
    matches = [re.fullmatch(rf"(0|cpu)=({AMOUNT})", part) for part in parts]
    amounts = {match[1]: amount_bytes(match[2]) for match in matches if match is not None}
    if len(amounts) < len(parts) or not all(amounts.values()):
        raise ConfigError(
            f"--max-memory: expected 0=AMOUNT, cpu=AMOUNT or both with a comma, an AMOUNT such "
            f"as 20GiB, found {max_memory!r}"
        )
    if vram_budget is None:
        return amounts.get("0"), amounts.get("cpu")
    device = amount_bytes(vram_budget) if re.fullmatch(AMOUNT, vram_budget) else 0
    if not device:
        raise ConfigError(
            f"--vram-budget: expected a positive number of GiB such as 13GiB, found {vram_budget!r}"
        )
    if amounts.get("0", device) != device:
        raise ConfigError(
            f"--vram-budget and --max-memory: expected one amount for the GPU, found "
            f"{vram_budget!r} and {max_memory!r}"
        )
    return device, amounts.get("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How many jobs go through the engine together."""

    max_batch_size: Annotated[
        int | None,
        typer.Option(
            help="The most jobs in one batch, fewer if memory is short; 16 if not given.",
            rich_help_panel=_EXECUTION,
        ),
    ] = None
    max_batch_image_tokens: Annotated[
        int | None,
        typer.Option(
            help="The most image tokens (32 by 32 pixels each) in one batch, except for t2i "
            "jobs that think; 16384 if not given.",
            rich_help_panel=_EXECUTION,
        ),
    ] = None

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return {f"memory.{field.name}": getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionOptions:
    """How failures are handled."""

    max_attempts: Annotated[
        int | None,
        typer.Option(
            help="How often a job is tried before it counts as failed.", rich_help_panel=_EXECUTION
        ),
    ] = None
    max_failures: Annotated[
        int | None,
        typer.Option(help="Stop after this many failed jobs.", rich_help_panel=_EXECUTION),
    ] = None
    retry_failed: Annotated[
        bool | None,
        typer.Option(
            "--retry-failed/--no-retry-failed",
            help="Try jobs that failed in an earlier run again.",
            rich_help_panel=_EXECUTION,
        ),
    ] = None

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return {f"execution.{field.name}": getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How images are written."""

    image_format: Annotated[
        ImageFormat | None, typer.Option(help="File format.", rich_help_panel=_OUTPUT)
    ] = None
    image_quality: Annotated[
        int | None,
        typer.Option(
            help="1 to 100, for jpeg and webp; webp is lossless at 100.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    embed_metadata: Annotated[
        bool | None,
        typer.Option(
            "--embed-metadata/--no-embed-metadata",
            help="Write the prompt, the seed and the settings into the images.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return {f"output.{field.name}": getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenOptions:
    """How much is said of a run."""

    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print only warnings, failures and errors."),
    ] = False
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print the files of every job as well."),
    ] = False

    def voice(self, *, one_job: bool = False) -> Voice:
        """Returns what says it.

        Args:
            one_job: Whether the command makes one job, of which little is said.

        Raises:
            ConfigError: Both were given.
        """
        from sensebatch.cli.voice import Level, Voice

        if self.quiet and self.verbose:
            raise ConfigError("--quiet: expected no --verbose beside it")
        if self.quiet:
            return Voice(Level.ALERT)
        if self.verbose:
            return Voice(Level.DETAIL)
        return Voice(Level.BRIEF if one_job else Level.INFO)


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Returns a command with the fields of dataclasses in place of parameters of their types.

    Every field becomes a keyword parameter with the field's annotation and default. The function
    is called with the dataclasses that the values make.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters[name] = parameter.replace(annotation=hints[name], kind=keyword)
            continue
        of_group = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            parameters[field.name] = inspect.Parameter(
                field.name,
                keyword,
                default=field.default,
                annotation=of_group[field.name],
            )

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        function(**values)

    # Each paragraph becomes one line, which the terminal breaks at its own width.
    command.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: item.annotation for name, item in parameters.items()}
    return command
