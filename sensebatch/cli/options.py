"""The options that commands share. Each group is declared once and expanded into signatures."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from sensebatch.cli.paths import path, path_text
from sensebatch.config import TINY_MODEL, WorkersConfig, default_config
from sensebatch.dataset.choices import DISTANCE, MAX_DISTANCE, JobStatus, Picked
from sensebatch.errors import ConfigError
from sensebatch.jobs import FinishReason, Precision, VramMode
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
    from sensebatch.dataset.selection import Selection
    from sensebatch.store.shards import Shard

_MODEL = "Model"
_OUTPUT = "Output"
_EXECUTION = "Execution"
_SELECTION = "Which jobs"
_WORKERS = "Workers"

_GPU = "[0-9]{1,3}"
"""How people write the number of a GPU."""

Manifests = Annotated[
    list[Path],
    typer.Argument(parser=path, help="YAML, Parquet or JSONL files.", metavar="MANIFEST..."),
]
RowTask = Annotated[Task | None, typer.Option(help="The task of rows that name none (JSONL).")]
MAX_LIMIT = 10**9
"""More jobs than a manifest has."""
Limit = Annotated[int | None, typer.Option(min=1, max=MAX_LIMIT, help="Use only the first N jobs.")]
MAX_HOURS = 24 * 365 * 10
"""More hours than a run may be given."""
_ANOTHER_MODEL = "another model"
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
            "for profiling: synthetic:8b, synthetic:u1.5 (convolutional head), "
            "synthetic:a3b (sparse), synthetic:tiny.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=_MODEL),
    ] = None
    lora_path: Annotated[
        str | None,
        typer.Option(
            parser=path_text,
            metavar="PATH",
            help="LoRA to merge into the weights: a safetensors file, or a PEFT folder.",
            rich_help_panel=_MODEL,
        ),
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
            help="How the layers' matrices are stored: fp8 is float8 for the generation expert, "
            "fp8-all for both experts, int8 and int8-all the same in int8; half the bytes, faster, "
            "different images.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    attn_backend: Annotated[
        AttnBackend | None,
        typer.Option(
            help="Attention kernel for images; auto is the fastest of those that sensebatch doctor "
            "measured, or a guess.",
            rich_help_panel=_MODEL,
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
            "resident memory of the process. With several workers, an amount for one GPU holds for "
            "each, unless others are named.",
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
            parser=path_text,
            metavar="PATH",
            help="JSON with generation and interleave system prompts.",
            rich_help_panel=_MODEL,
        ),
    ] = None

    @classmethod
    def places(cls) -> dict[str, str]:
        """Returns the settings that options are, by their place; budgets are two in one."""
        names = (field.name for field in fields(cls) if field.name not in _NOT_OF_MODEL)
        return {**{name: f"model.{name}" for name in names}, "vram_mode": "memory.vram_mode"}

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings; of several GPUs the least budget."""
        budgets = _budgets(self.max_memory, self.vram_budget)
        return {
            **_given(self),
            "memory.vram_budget_bytes": min(budgets.gpus.values(), default=None),
            "memory.host_budget_bytes": budgets.host,
        }

    def gpu_budget_bytes(self) -> dict[str, int]:
        """Returns the budget of each GPU by its number; nothing where one counts for all."""
        gpus = _budgets(self.max_memory, self.vram_budget).gpus
        return {} if len(gpus) == 1 else gpus

    def require_one_budget(self) -> None:
        """Makes sure that no budget is for a GPU other than the one of a run without workers.

        Raises:
            ConfigError: There is one.
        """
        others = sorted(set(_budgets(self.max_memory, self.vram_budget).gpus) - {"0"})
        if others:
            raise ConfigError(
                f"--max-memory: expected a budget for GPU 0 alone, found one for {others[0]}; "
                "--gpus runs on several"
            )


def _given(options: Any) -> dict[str, object]:
    return {place: getattr(options, name) for name, place in options.places().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budgets:
    """Bytes that a run may take."""

    gpus: dict[str, int]
    """Budgets of GPUs by their numbers."""
    host: int | None
    """The host's budget; None without one."""


def _budgets(max_memory: str | None, vram_budget: str | None) -> _Budgets:
    """Returns the budgets of GPUs and host.

    Args:
        max_memory: `0=20GiB,cpu=80GiB`, or some of it.
        vram_budget: The GPU's, such as `20GiB`.

    Raises:
        ConfigError: One has another form, or they differ about the GPU.
    """
    parts = [] if max_memory is None else max_memory.split(",")
    matches = [re.fullmatch(rf"({_GPU}|cpu)=({AMOUNT})", part) for part in parts]
    amounts = {match[1]: amount_bytes(match[2]) for match in matches if match is not None}
    if len(amounts) < len(parts) or not all(amounts.values()):
        raise ConfigError(
            f"--max-memory: expected 0=AMOUNT, cpu=AMOUNT or both with a comma, an AMOUNT such "
            f"as 20GiB, found {max_memory!r}"
        )
    host = amounts.pop("cpu", None)
    if vram_budget is None:
        return _Budgets(gpus=amounts, host=host)
    device = amount_bytes(vram_budget) if re.fullmatch(AMOUNT, vram_budget) else 0
    if not device:
        raise ConfigError(
            f"--vram-budget: expected a positive number of GiB such as 13GiB, found {vram_budget!r}"
        )
    if set(amounts.values()) - {device}:
        raise ConfigError(
            f"--vram-budget and --max-memory: expected one amount for the GPU, found "
            f"{vram_budget!r} and {max_memory!r}"
        )
    return _Budgets(gpus={"0": device}, host=host)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOptions:
    """What input images are accepted."""

    max_image_pixels: Annotated[
        int | None,
        typer.Option(
            help="Refuse input images of more pixels, which bounds the memory of decoding.",
        ),
    ] = None

    @classmethod
    def places(cls) -> dict[str, str]:
        """Returns the settings that options are, by their place."""
        return {"max_image_pixels": "inputs.max_pixels"}

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return _given(self)


class SettingOptions(Protocol):
    """A group of options that are settings."""

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""


def flags_of(*groups: SettingOptions) -> dict[str, object]:
    """Returns what was given of several groups of options, by place in the settings."""
    return {place: value for group in groups for place, value in group.flags().items()}


UNUSED_WITHOUT_WEIGHTS = frozenset(field.name for field in fields(ModelOptions)) - {
    "config",
    "model",
}
"""Options of the model that say nothing of jobs."""
UNUSED_BY_PLAN = frozenset({"lora_path"})
"""Options of the model that decide neither batches nor memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How many jobs go through the engine together."""

    max_batch_size: Annotated[
        int | None,
        typer.Option(
            help="The most jobs in one batch, fewer if memory is short.",
            rich_help_panel=_EXECUTION,
        ),
    ] = None
    max_batch_image_tokens: Annotated[
        int | None,
        typer.Option(
            help="The most image tokens (32 by 32 pixels each) in one batch, except for t2i "
            "jobs that think.",
            rich_help_panel=_EXECUTION,
        ),
    ] = None

    @classmethod
    def places(cls) -> dict[str, str]:
        """Returns the settings that options are, by their place."""
        return {field.name: f"memory.{field.name}" for field in fields(cls)}

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return _given(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Whether the run has workers in processes of their own, and where."""

    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="all|N,N",
            help="Compute on several GPUs of this machine: all of them, or those with these "
            "numbers.",
            rich_help_panel=_WORKERS,
        ),
    ] = None
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Compute on a Ray cluster that is running: auto, HOST:PORT or ray://HOST:PORT.",
            rich_help_panel=_WORKERS,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many workers: without it, one for each GPU. With --device cpu, workers "
            "without a GPU.",
            rich_help_panel=_WORKERS,
        ),
    ] = None

    def config(self, model: ModelOptions, device: str) -> WorkersConfig | None:
        """Returns the workers that were asked for; None for one engine in this process.

        Args:
            model: Has the budgets of GPUs.
            device: `model.device` of the settings.

        Raises:
            ConfigError: Options contradict one another.
        """
        if self.gpus is None and self.cluster is None and self.workers is None:
            model.require_one_budget()
            return None
        numbers = self._gpu_numbers()
        if self.gpus is not None and (self.cluster is not None or device == "cpu"):
            other = "--device cpu" if device == "cpu" else "--cluster"
            raise ConfigError(f"--gpus: expected no {other} beside it")
        if numbers and self.workers is not None and self.workers != len(numbers):
            raise ConfigError(
                f"--workers: expected {len(numbers)}, one for each GPU of --gpus, found "
                f"{self.workers}"
            )
        return WorkersConfig(
            count=len(numbers) or self.workers,
            cluster=self.cluster,
            gpus=tuple(numbers),
            needs_gpu=self.gpus is not None,
            gpu_budget_bytes=model.gpu_budget_bytes(),
        )

    def _gpu_numbers(self) -> list[str]:
        if self.gpus in (None, "all"):
            return []
        numbers = self.gpus.split(",")
        is_list = all(re.fullmatch(_GPU, number) for number in numbers)
        if not is_list or len(set(numbers)) < len(numbers):
            raise ConfigError(
                f"--gpus: expected all, or different numbers such as 0,1, found {self.gpus!r}"
            )
        return numbers


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
    fail_truncated: Annotated[
        bool | None,
        typer.Option(
            "--fail-truncated/--no-fail-truncated",
            help="Fail jobs whose text is truncated: cut at its token limit, ended within its "
            "thought, or a story without an image.",
            rich_help_panel=_EXECUTION,
        ),
    ] = None

    @classmethod
    def places(cls) -> dict[str, str]:
        """Returns the settings that options are, by their place."""
        return {field.name: f"execution.{field.name}" for field in fields(cls)}

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return _given(self)


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
    keep_rejected: Annotated[
        bool | None,
        typer.Option(
            "--keep-rejected/--drop-rejected",
            help="Keep images that were not accepted, or remove them after the verdict.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None

    @classmethod
    def places(cls) -> dict[str, str]:
        """Returns the settings that options are, by their place."""
        return {field.name: f"output.{field.name}" for field in fields(cls)}

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return _given(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineOptions:
    """When a run is to be over."""

    until: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Stop before a time of day, such as 07:00, or of another day: 2026-12-24T07:00. "
            "No batch begins that would not end by then.",
        ),
    ] = None
    max_hours: Annotated[
        float | None, typer.Option(help="Stop before this many hours have passed, as with --until.")
    ] = None

    def at(self, now: float) -> float | None:
        """Returns when it is to be over, in seconds since the epoch; None if nothing was given.

        Args:
            now: The time, in seconds since the epoch.

        Raises:
            ConfigError: Something else was given.
        """
        ends = []
        if self.max_hours is not None:
            if not 0 < self.max_hours < MAX_HOURS:
                raise ConfigError(
                    f"--max-hours: expected a number of hours above 0 and below {MAX_HOURS:,}, "
                    f"found {self.max_hours:g}"
                )
            ends.append(now + 3600 * self.max_hours)
        if self.until is not None:
            ends.append(_time(self.until, now))
        return min(ends, default=None)


def _time(text: str, now: float) -> float:
    """Returns a local time as seconds since the epoch; a time of day is the next of its kind.

    Raises:
        ConfigError: It is not a time, or not a future one.
    """
    today = datetime.fromtimestamp(now).astimezone()
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}", text):
            hour, minute = map(int, text.split(":"))
            day = today.replace(hour=hour, minute=minute, second=0, microsecond=0, tzinfo=None)
            # By the calendar, and not in 24 hours, for the days on which clocks are changed.
            found = day if day.timestamp() > now else day + timedelta(days=1)
        elif re.fullmatch(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*", text):
            found = datetime.fromisoformat(text)
        else:
            raise ValueError(text)
        # A year that is too early or too late for the local time has none.
        seconds = found.timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"--until: expected a time such as 07:00 or 2026-12-24T07:00, found {text!r}"
        ) from None
    if seconds <= now:
        raise ConfigError(
            f"--until: expected a future time, found {text}, and it is {today:%Y-%m-%dT%H:%M}"
        )
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastOptions(DeadlineOptions):
    """What a forecast of a plan is for."""

    until: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Print how far a run that begins now comes by a time of day, such as 07:00, or of "
            "another day: 2026-12-24T07:00.",
        ),
    ] = None
    max_hours: Annotated[
        float | None, typer.Option(help="Print how far it comes in this many hours.")
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Divide the time among N GPUs, and print how long they idle."),
    ] = None
    speed_of: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="DIR",
            help="Take the speed from a run's folder, instead of the least time of a measured GPU.",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderOptions:
    """Which folder a run writes to, and for which part of the manifests."""

    output_dir: Annotated[
        Path | None,
        typer.Option(parser=path, help="The run's folder. [default: outputs/NAME of the manifest]"),
    ] = None
    other_manifest: Annotated[
        bool,
        typer.Option(
            "--other-manifest",
            help="Run other manifests than the folder's; it then belongs to both.",
        ),
    ] = False
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Run the I-th of N parts of the batches, in a folder of its own; sensebatch merge "
            "joins the folders.",
        ),
    ] = None

    state_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="DIR",
            help="Keep state.db in a folder of this machine, if the run's folder is on a network.",
        ),
    ] = None

    redraw: Annotated[
        bool,
        typer.Option(
            "--redraw",
            help="Draw finished jobs again if the model, dtype or precision has changed. Without "
            "it, a run asks on a terminal, and refuses elsewhere.",
        ),
    ] = False
    retry_from: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="Run the jobs again that a picks file rejects, as the manifest has them now.",
        ),
    ] = None

    def said(self) -> dict[str, Any]:
        """Returns what a `session.Request` says of the folder, and of its jobs that are done.

        Raises:
            ConfigError: The shard names none, or the picks cannot be used.
        """
        from sensebatch.cli.messages import asking
        from sensebatch.dataset.picks import read_picks

        picks = None if self.retry_from is None else read_picks(self.retry_from)
        return {
            "shard": self.part(),
            "state_dir": self.state_dir,
            "redraw": self.redraw,
            "confirm": asking(),
            "retry_from": picks,
        }

    def part(self) -> Shard | None:
        """Returns the shard that was given.

        Raises:
            ConfigError: It names none.
        """
        from sensebatch.store.shards import Shard

        return None if self.shard is None else Shard.parse(self.shard)

    def root(self, name: Callable[[], str]) -> Path:
        """Returns the run's folder.

        Args:
            name: Returns the name of the manifests, where no folder was given.
        """
        if self.output_dir is not None:
            return self.output_dir
        part = self.part()
        return Path("outputs") / f"{name()}{'' if part is None else part.suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOptions:
    """Which jobs of a folder are meant."""

    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL",
            help="Only jobs of which this is true: an SQL expression such as \"status = 'failed'\" "
            "or \"seed > 3 AND has(tags, 'sky')\", over the columns of docs/dataset.md.",
            rich_help_panel=_SELECTION,
        ),
    ] = None
    task: Annotated[
        list[Task] | None,
        typer.Option(help="Only jobs of this task; may be repeated.", rich_help_panel=_SELECTION),
    ] = None
    status: Annotated[
        list[JobStatus] | None,
        typer.Option(
            help="Only jobs with this status; may be repeated.", rich_help_panel=_SELECTION
        ),
    ] = None
    finish_reason: Annotated[
        list[FinishReason] | None,
        typer.Option(
            metavar="REASON",
            help="Only jobs whose text ended like this; may be repeated: "
            f"{', '.join(FinishReason)}.",
            rich_help_panel=_SELECTION,
        ),
    ] = None
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TAG",
            help="Only jobs with this tag; if repeated, with all of them.",
            rich_help_panel=_SELECTION,
        ),
    ] = None
    matrix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Only jobs that the matrix gave this value; if repeated, all of them.",
            rich_help_panel=_SELECTION,
        ),
    ] = None
    picks: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="Only jobs that this file of picks keeps, unless --picked says otherwise; the "
            "gallery saves such a file.",
            rich_help_panel=_SELECTION,
        ),
    ] = None
    picked: Annotated[
        Picked | None,
        typer.Option(
            help="Which of the --picks: none are those neither kept nor rejected, any are all. "
            "[default: keep]",
            rich_help_panel=_SELECTION,
        ),
    ] = None
    dedupe: Annotated[
        bool,
        typer.Option(
            "--dedupe",
            help="Only the first of jobs whose images look alike.",
            rich_help_panel=_SELECTION,
        ),
    ] = False
    dedupe_distance: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_DISTANCE,
            help="In how many of 64 bits the hashes of images that look alike may differ; 0 finds "
            f"nearly equal ones. [default: {DISTANCE}]",
            rich_help_panel=_SELECTION,
        ),
    ] = None

    def selection(self, *, removed: bool = False) -> Selection:
        """Returns what was asked for.

        Args:
            removed: Whether jobs count that are no longer in the manifests.

        Raises:
            ConfigError: An option cannot be used, or the picks cannot be read.
        """
        from sensebatch.dataset.picks import read_picks
        from sensebatch.dataset.selection import Selection, matrix_conditions

        if self.picked is not None and self.picks is None:
            raise ConfigError("--picked: expected --picks FILE beside it, found none")
        if self.dedupe_distance is not None and not self.dedupe:
            raise ConfigError("--dedupe-distance: expected --dedupe beside it, found none")
        distance = DISTANCE if self.dedupe_distance is None else self.dedupe_distance
        return Selection(
            where=self.where,
            tasks=tuple(self.task or ()),
            statuses=tuple(self.status or ()),
            finish_reasons=tuple(self.finish_reason or ()),
            tags=tuple(self.tag or ()),
            matrix=matrix_conditions(self.matrix or ()),
            picks=None if self.picks is None else read_picks(self.picks),
            picked=self.picked or Picked.KEEP,
            removed=removed,
            dedupe=distance if self.dedupe else None,
        )


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


def with_options(
    function: Callable[..., None] | None = None, *, hidden: Collection[str] = ()
) -> Callable[..., Any]:
    """Returns a command with the fields of dataclasses in place of parameters of their types.

    Every field becomes a keyword parameter with the field's annotation and default. The function
    is called with the dataclasses that the values make. Help says what stands for each value, and
    the default of each setting.

    Args:
        function: The command; without it, a decorator is returned.
        hidden: Names of options that the command accepts although they change nothing it does,
            so that the options of a `sensebatch run` can be pasted; help leaves them out.
    """
    if function is None:
        return functools.partial(with_options, hidden=hidden)
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            annotation = explained(hints[name], None, is_hidden=name in hidden)
            parameters[name] = parameter.replace(annotation=annotation, kind=keyword)
            continue
        of_group = get_type_hints(groups[name], include_extras=True)
        places = groups[name].places() if hasattr(groups[name], "places") else {}
        for field in fields(groups[name]):
            place = places.get(field.name)
            is_hidden = field.name in hidden
            parameters[field.name] = inspect.Parameter(
                field.name,
                keyword,
                default=field.default,
                annotation=explained(of_group[field.name], place, is_hidden=is_hidden),
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


def explained(annotation: Any, place: str | None, *, is_hidden: bool) -> Any:
    """Returns an option's annotation with words for its value and its default in help.

    Args:
        annotation: `Annotated` with typer's own declaration.
        place: Of the setting, if the option is one: `memory.max_batch_size`.
        is_hidden: Whether help leaves the option out.
    """
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, *metadata = get_args(annotation)
    declaration = copy.copy(metadata[0])
    declaration.hidden = is_hidden
    declaration.metavar = declaration.metavar or _metavar(kind)
    default = None if place is None else default_words(place)
    if default is not None:
        declaration.help = f"{declaration.help} [default: {default}]"
    return Annotated[(kind, declaration)]


def _metavar(kind: Any) -> str | None:
    """Returns what stands for a value in help; None for a switch, which has none."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(member.value for member in kind)
    return {bool: None, Path: "PATH", int: "N", float: "X", str: "TEXT"}[kind]


def default_words(place: str) -> str | None:
    """Returns the default of a setting for help, with that of the embedded model if it differs.

    Args:
        place: Such as `memory.max_batch_size` or `tasks.t2i.num_steps`.

    Returns:
        `50; tiny: 8`, or None where a setting is unset by default.
    """
    official, tiny = (_default(place, model) for model in (_ANOTHER_MODEL, TINY_MODEL))
    if official == _ANOTHER_MODEL:
        return tiny
    if official is None:
        return None
    return official if official == tiny else f"{official}; tiny: {tiny or 'none'}"


def _default(place: str, model: str) -> str | None:
    value: Any = default_config(model)
    section, *names = place.split(".")
    value = getattr(value, section)
    if section == "tasks":
        value = value[Task(names.pop(0))]
        value = value if hasattr(value, names[0]) else value.sampling
    value = getattr(value, names[0])
    if value is None or value == ():
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
