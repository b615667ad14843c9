"""`sensebatch doctor`: what this machine is and how fast it copies and multiplies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: bytes and bytes a second.")
    ] = False,
) -> None:
    """Print what this machine computes with, what memory is free, and how fast a GPU is.

    Speeds are measured in about a second: copies from host memory to the device, pinned and
    pageable, a matrix product and attention in bfloat16, and reads of the device's memory. They
    are kept for sensebatch plan. A machine without a GPU has none of them.
    """
    from dataclasses import asdict

    from sensebatch.cli.messages import show
    from sensebatch.engine.device.machine import look_at_machine

    machine = asdict(look_at_machine())
    machine["speeds_file"] = None if machine["gpu"] is None else _keep(machine)
    if as_json:
        show(json.dumps(machine))
    else:
        show("\n".join(_lines(machine)))


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
    )
    try:
        return str(write_speeds(speeds))
    except (OSError, SensebatchError) as error:
        warn(f"the speeds are not kept for sensebatch plan: {error}")
        return None


def _lines(machine: Mapping[str, Any]) -> list[str]:
    from sensebatch.units import GIB

    free, total = (machine[f"host_{kind}_bytes"] / GIB for kind in ("free", "total"))
    lines = [
        f"sensebatch      {machine['sensebatch']}",
        f"python          {machine['python']}",
        f"torch           {machine['torch']}, CUDA {machine['cuda'] or 'none'}",
        f"flash-attn      {machine['flash_obstacle'] or 'usable'}",
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
        f"matrix product  {gpu['gemm_flop_per_s'] / 1e12:.0f} TFLOP/s in bfloat16",
        f"attention       {gpu['attention_flop_per_s'] / 1e12:.0f} TFLOP/s in bfloat16",
        f"memory reads    {gpu['memory_bytes_per_s'] / GIB:,.0f} GiB/s",
        f"speeds kept in  {machine['speeds_file'] or 'no file'}",
    ]
