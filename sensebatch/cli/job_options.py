"""The options of the one-job commands, and the commands themselves.

A task's row says which options its command has, and the declarations of settings say how they
look. `options` holds those that `run` has too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer

from sensebatch.cli.options import (
    BatchOptions,
    ExecutionOptions,
    ImageOptions,
    ModelOptions,
    ReadingOptions,
    ScreenOptions,
)
from sensebatch.cli.paths import path
from sensebatch.config import TaskDefaults
from sensebatch.declarations import Declared, declared, item_of_any_number
from sensebatch.jobs import Sampling
from sensebatch.tasks import Output, Task

_SAMPLING = "Sampling"
_OUTPUT = "Output"
_SETTINGS = {**declared(Sampling), **declared(TaskDefaults)}
_ABOUT_THE_RUN = """\
The job is a run of its own, with its folder in OUTPUT_DIR/.sensebatch, so the same command draws
nothing twice. With --jsonl, the folder is OUTPUT_DIR itself, as with `sensebatch run`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What to make, where to put it and what to print."""

    prompt: Annotated[str | None, typer.Option(help="What to make.")] = None
    jsonl: Annotated[
        Path | None,
        typer.Option(parser=path, help="JSONL file with one job per line, in place of a prompt."),
    ] = None
    system_prompt: Annotated[
        str | None,
        typer.Option(
            "--system-prompt",
            "--system-message",
            help="System prompt in place of the model's own.",
        ),
    ] = None
    output_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Folder to write to. [default: outputs/TASK]",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    stem: Annotated[
        str | None,
        typer.Option(help="Name of the files without suffix.", rich_help_panel=_OUTPUT),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace files that something else wrote.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also write an image of inputs and outputs with the prompt below them.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False
    print_think: Annotated[
        bool,
        typer.Option(
            "--print-think", help="Print the text that was written.", rich_help_panel=_OUTPUT
        ),
    ] = False
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Print what it cost, call by call.", rich_help_panel=_OUTPUT
        ),
    ] = False
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object on stdout at the end.", rich_help_panel=_OUTPUT
        ),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeOptions:
    """The size of the images; without it, that of the first input or the model's default."""

    width: Annotated[
        int | None,
        typer.Option(help="Width in pixels, a multiple of 32.", rich_help_panel=_SAMPLING),
    ] = None
    height: Annotated[
        int | None,
        typer.Option(help="Height in pixels, a multiple of 32.", rich_help_panel=_SAMPLING),
    ] = None
    resolution: Annotated[
        str | None,
        typer.Option(
            help="WIDTHxHEIGHT, or an aspect ratio such as 16:9.", rich_help_panel=_SAMPLING
        ),
    ] = None

    def fields(self) -> dict[str, object]:
        """Returns what was given, as fields of a manifest's row."""
        return {"width": self.width, "height": self.height, "resolution": self.resolution}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """The input images."""

    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="An input image; repeat the option for more."),
    ] = None

    def fields(self) -> dict[str, object]:
        """Returns what was given, as fields of a manifest's row."""
        return {"image": self.image or None}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """The file of a task that makes one image."""

    output: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="File to write; its suffix says the format (png, webp, jpg).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionOptions:
    """The question of a task that answers in text, and the file of the answer."""

    question: Annotated[
        str | None, typer.Option(help="What to ask; another name for --prompt.")
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="File to write the answer to; else it is printed on stdout.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None


def setting_options(task: Task) -> type[Any]:
    """Returns a dataclass of options: one for each declared setting that a task has."""

    def places(options: type[Any]) -> dict[str, str]:
        return {name: f"tasks.{task}.{name}" for name in options.__dataclass_fields__}

    return make_dataclass(
        f"{task.name}_Settings",
        [
            (name, _annotation(setting), field(default=None))
            for name, setting in _SETTINGS.items()
            if setting.setting.of(task.spec)
        ],
        namespace={"places": classmethod(places)},
        frozen=True,
        slots=True,
        kw_only=True,
    )


def _annotation(setting: Declared) -> Any:
    kind, words = setting.plain_type, setting.setting
    flag = f"--{setting.name.replace('_', '-')}"
    several = " Repeat the option for each." if item_of_any_number(kind) is not None else ""
    option: Any = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=words.help + several,
        metavar=words.metavar,
        rich_help_panel=_SAMPLING,
    )
    if (item := item_of_any_number(kind)) is not None:
        return Annotated[list.__class_getitem__(item) | None, option]
    if get_origin(kind) is UnionType and issubclass(first := get_args(kind)[0], Enum):
        return Annotated[first | None, option]
    # A number or a word in a file is text on the command line.
    is_simple = isinstance(kind, type) or words.metavar is not None
    return Annotated[(kind if is_simple else str) | None, option]


def _given(value: Any) -> Any:
    """Returns the value of an option; None if it was not given, as an empty list says too."""
    return None if value == [] else value


def _option_groups(task: Task) -> dict[str, type[Any]]:
    """Returns the groups of options that a task's command has, by name."""
    spec = task.spec
    groups: dict[str, type[Any]] = {"job": JobOptions}
    if spec.takes_images:
        groups |= {"inputs": InputOptions, "reading": ReadingOptions}
    if spec.drawing is not None:
        groups["size"] = SizeOptions
    groups["settings"] = setting_options(task)
    if spec.output is Output.IMAGE:
        groups["file"] = FileOptions
    if spec.output is Output.TEXT:
        groups["file"] = QuestionOptions
    groups |= {"model": ModelOptions, "batch": BatchOptions, "execution": ExecutionOptions}
    if spec.drawing is not None:
        groups["images"] = ImageOptions
    return groups | {"screen": ScreenOptions}


def one_job_command(task: Task, about: str) -> Callable[..., None]:
    """Returns a command for `with_options` that runs one job of a task, or a JSONL file's.

    Args:
        task: Its row says which options there are.
        about: Help: what the command makes.
    """
    groups = _option_groups(task)

    def run(**given: Any) -> None:
        from sensebatch.cli.one_job import Command, run_command

        given["model"].require_one_budget()
        fields, flags = dict[str, object](), dict[str, object]()
        for name in ("inputs", "size"):
            fields |= given[name].fields() if name in given else {}
        for name in ("model", "batch", "execution", "images", "reading"):
            flags |= given[name].flags() if name in given else {}
        for name, place in groups["settings"].places().items():
            flags[place] = _given(getattr(given["settings"], name))
        run_command(
            Command(
                task=task,
                job=given["job"],
                fields=fields,
                flags=flags,
                config_file=given["model"].config,
                screen=given["screen"],
                output=given["file"].output if "file" in given else None,
                question=getattr(given.get("file"), "question", None),
            )
        )

    keyword = inspect.Parameter.KEYWORD_ONLY
    run.__doc__ = f"{about}\n\n{_ABOUT_THE_RUN}"
    run.__annotations__ = groups
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword, annotation=group) for name, group in groups.items()]
    )
    return run


def command_of(task: Task) -> Callable[..., None]:
    """Returns the command of a task: the `COMMAND` of the module of `cli` with the task's name."""
    command: Callable[..., None] = import_module(f"sensebatch.cli.{task}").COMMAND
    return command
