"""`sensebatch doctor`: what this machine is, how fast it is, and whether it keeps the promises."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sensebatch.cli.paths import path
from sensebatch.errors import ConfigError

if TYPE_CHECKING:
    from sensebatch.verify.check import Machine

_VERIFY = "With --verify"


NAMES_WIDTH = 16
"""The columns of the names of figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What is checked; None where the machine decides."""

    model: Annotated[
        str | None,
        typer.Option(
            help="As for run. [default: synthetic:8b with a GPU, tiny without]",
            rich_help_panel=_VERIFY,
        ),
    ] = None
    side: Annotated[
        int | None,
        typer.Option(
            min=128,
            help="Pixels of the largest images, a multiple of 128. [default: 2048 with a GPU, 128 "
            "without]",
            rich_help_panel=_VERIFY,
        ),
    ] = None
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Make this run and its reference only; may be repeated.",
            metavar="RUN",
            rich_help_panel=_VERIFY,
        ),
    ] = None
    output_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="A new folder for the runs. [default: outputs/verify]",
            rich_help_panel=_VERIFY,
        ),
    ] = None


def doctor(
    options: VerifyOptions,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: bytes and bytes a second.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check that runs give the bytes that are promised, on this machine.",
        ),
    ] = False,
) -> None:
    """Print what this machine has, how much memory is free, and how fast its GPU is.

    Speeds are measured in a few seconds: copies from host memory to the device, pinned and
    pageable, a matrix product in bfloat16, float8 and int8, attention in bfloat16, the attention
    backends at three sizes of images, and reads of the device's memory. They are kept for
    sensebatch plan and run. A machine without a GPU has none of them.

    With --verify the same jobs of every task are then run several times, in every memory mode
    and precision, with fragmented memory, killed and resumed, and their files compared. Exit
    codes: 0 all promises hold that this machine can check, 1 one does not hold or a run failed, 75
    stopped. Runs that this machine cannot make, and why, are printed.
    """
    from dataclasses import asdict

    from sensebatch.cli.messages import show
    from sensebatch.cli.verification import check_options, run_verification
    from sensebatch.engine.device.machine import look_at_machine

    if verify:
        check_options(options)
    elif options != VerifyOptions():
        raise ConfigError("--model, --side, --only, --output-dir: expected --verify beside them")
    facts = asdict(look_at_machine())
    if verify:
        run_verification(options, _able(facts), as_json=as_json)
    facts["speeds_file"] = None if facts["gpu"] is None else _keep(facts)
    show(json.dumps(facts) if as_json else "\n".join(map(_wrapped, _lines(facts))))


def _able(facts: Mapping[str, Any]) -> Machine:
    """Returns what decides which promises can be checked."""
    from sensebatch.verify.check import Machine

    gpu = facts["gpu"]
    return Machine(
        has_gpu=gpu is not None,
        kernels_obstacle=facts["kernels_obstacle"],
        fp8_obstacle=facts["fp8_obstacle"],
        int8_obstacle=facts["int8_obstacle"],
        free_bytes=None if gpu is None else gpu["free_bytes"],
    )


def _keep(machine: Mapping[str, Any]) -> str | None:
    """Keeps the speeds for `plan`; returns where, or None where they cannot be written."""
    from datetime import UTC, datetime

    from sensebatch.cli.messages import warn
    from sensebatch.cli.speed_cache import MachineSpeeds, write_speeds
    from sensebatch.errors import SensebatchError

    gpu = machine["gpu"]
    speeds = MachineSpeeds(
        gpu=gpu["name"],
        torch=machine["torch"],
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        free_bytes=gpu["free_bytes"],
        total_bytes=gpu["total_bytes"],
        copy_bytes_per_s=gpu["pinned_bytes_per_s"],
        gemm_flop_per_s=gpu["gemm_flop_per_s"],
        attention_flop_per_s=gpu["attention_flop_per_s"],
        memory_bytes_per_s=gpu["memory_bytes_per_s"],
        attention=gpu["attention_backends"],
        quantised_flop_per_s=gpu["quantised_flop_per_s"],
    )
    try:
        return str(write_speeds(speeds))
    except (OSError, SensebatchError) as error:
        warn(f"the speeds are not kept for sensebatch plan: {error}")
        return None


def _backend_lines(speeds: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Returns what each attention backend reaches, by the number of an image's tokens."""
    return [
        f"  {backend:<14}"
        + ", ".join(
            f"{speed / 1e12:.0f} TFLOP/s for {tokens:,} tokens" for tokens, speed in reached.items()
        )
        for backend, reached in speeds.items()
    ]


def _wrapped(line: str) -> str:
    """Returns a line in several, if the terminal is too narrow for it."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(line)
    return textwrap.fill(line, width, subsequent_indent=" " * NAMES_WIDTH, break_long_words=False)


def _lines(machine: Mapping[str, Any]) -> list[str]:
    from sensebatch.units import GIB

    free, total = (machine[f"host_{kind}_bytes"] / GIB for kind in ("free", "total"))

    def usable(what: str) -> str:
        obstacle = machine[f"{what}_obstacle"]
        return "usable" if obstacle is None else f"not usable: {obstacle}"

    lines = [
        f"sensebatch      {machine['sensebatch']}",
        f"python          {machine['python']}",
        f"torch           {machine['torch']}, CUDA {machine['cuda'] or 'none'}",
        f"flash-attn      {usable('flash')}",
        f"kernels         {usable('kernels')}",
        f"float8          {usable('fp8')}",
        f"int8            {usable('int8')}",
        f"host memory     {free:.1f} GiB free of {total:.1f}",
    ]
    gpu = machine["gpu"]
    if gpu is None:
        return [*lines, "device          cpu; torch finds no GPU, so no speed is measured"]
    return [
        *lines,
        f"device          {gpu['name']}",
        f"device memory   {gpu['free_bytes'] / GIB:.1f} GiB free of {gpu['total_bytes'] / GIB:.1f}",
        f"copy, pinned    {gpu['pinned_bytes_per_s'] / GIB:.1f} GiB/s",
        f"copy, pageable  {gpu['pageable_bytes_per_s'] / GIB:.1f} GiB/s",
        f"matrix product  {gpu['gemm_flop_per_s'] / 1e12:.0f} TFLOP/s in bfloat16"
        + "".join(
            f", {speed / 1e12:.0f} in {stored}"
            for stored, speed in gpu["quantised_flop_per_s"].items()
        ),
        f"attention       {gpu['attention_flop_per_s'] / 1e12:.0f} TFLOP/s in bfloat16",
        *_backend_lines(gpu["attention_backends"]),
        f"memory reads    {gpu['memory_bytes_per_s'] / GIB:,.0f} GiB/s",
        f"speeds kept in  {machine['speeds_file'] or 'no file'}",
    ]
