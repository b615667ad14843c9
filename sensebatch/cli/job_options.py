"""The options of the one-job commands; `options` holds those that `run` has as well."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from sensebatch.cli.paths import path
from sensebatch.jobs import CfgNorm
from sensebatch.tasks import Task

_SAMPLING = "Sampling"
_OUTPUT = "Output"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How one task samples; what a manifest's row says wins over these."""

    num_steps: Annotated[
        int | None, typer.Option(help="Steps from noise to image.", rich_help_panel=_SAMPLING)
    ] = None
    timestep_shift: Annotated[
        float | None,
        typer.Option(help="Shift of the timesteps towards noise.", rich_help_panel=_SAMPLING),
    ] = None
    cfg_scale: Annotated[
        float | None,
        typer.Option(help="Guidance of the text; 1 is none.", rich_help_panel=_SAMPLING),
    ] = None
    cfg_norm: Annotated[
        CfgNorm | None,
        typer.Option(help="How the guided velocity is rescaled.", rich_help_panel=_SAMPLING),
    ] = None
    cfg_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="First and last timestep with guidance: two numbers from 0 to 1.",
            metavar="FROM TO",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Of the job's noise.", rich_help_panel=_SAMPLING)
    ] = None
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think", help="Let the model think first.", rich_help_panel=_SAMPLING
        ),
    ] = None

    def flags(self, task: Task) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return {
            f"tasks.{task.value}.{field.name}": getattr(self, field.name) for field in fields(self)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageGuidanceOptions:
    """Guidance by input images, of edit and interleave."""

    img_cfg_scale: Annotated[
        float | None,
        typer.Option(help="Guidance of the input images; 1 is none.", rich_help_panel=_SAMPLING),
    ] = None

    def flags(self, task: Task) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return {f"tasks.{task.value}.img_cfg_scale": self.img_cfg_scale}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What to make, where to put it and what to print."""

    prompt: Annotated[str | None, typer.Option(help="What to make.")] = None
    jsonl: Annotated[
        Path | None,
        typer.Option(parser=path, help="JSONL file with a job a line, in place of a prompt."),
    ] = None
    system_prompt: Annotated[
        str | None,
        typer.Option("--system-prompt", "--system-message", help="In place of the model's own."),
    ] = None
    output_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Folder to write to; outputs/TASK if not given.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    stem: Annotated[
        str | None,
        typer.Option(help="Name of the files without suffix.", rich_help_panel=_OUTPUT),
    ] = None
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also write a picture of inputs and outputs with the prompt under them.",
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
class SingleImageOptions:
    """What only tasks with one output have."""

    output: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="File to write; its suffix says the format (png, webp, jpg).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    max_think_tokens: Annotated[
        int | None, typer.Option(help="Longest think text.", rich_help_panel=_SAMPLING)
    ] = None

    def flags(self, task: Task) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return {f"tasks.{task.value}.max_think_tokens": self.max_think_tokens}


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeOptions:
    """The size of the pictures; without it, that of the model's task or the first input."""

    width: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 32.", rich_help_panel=_SAMPLING)
    ] = None
    height: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 32.", rich_help_panel=_SAMPLING)
    ] = None
    resolution: Annotated[
        str | None,
        typer.Option(
            help="WIDTHxHEIGHT, or an aspect ratio such as 16:9.", rich_help_panel=_SAMPLING
        ),
    ] = None

    def fields(self) -> dict[str, object]:
        """Returns what was given, as a manifest's row says it."""
        return {"width": self.width, "height": self.height, "resolution": self.resolution}


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """What only edit has."""

    target_pixels: Annotated[
        int | None,
        typer.Option(
            help="Pixels of the output, in the first input's aspect ratio.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    input_max_pixels: Annotated[
        str | None,
        typer.Option(
            help="Pixels that inputs are brought to first: a number, auto, or none to leave them.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return {f"tasks.edit.{field.name}": getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleaveOptions:
    """What only interleave has."""

    max_images: Annotated[
        int | None, typer.Option(help="Most pictures.", rich_help_panel=_SAMPLING)
    ] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most text tokens.", rich_help_panel=_SAMPLING)
    ] = None

    def flags(self) -> dict[str, object]:
        """Returns what was given, by place in the settings."""
        return {
            f"tasks.interleave.{field.name}": getattr(self, field.name) for field in fields(self)
        }


InputImages = Annotated[
    list[str] | None,
    typer.Option("--image", help="An input picture; give it again for another one."),
]
