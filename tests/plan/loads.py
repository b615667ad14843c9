"""Loads of the 8B model, and where they are placed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sensebatch.checkpoint.architecture import OFFICIAL_8B, parse_architecture
from sensebatch.config import MemoryConfig
from sensebatch.jobs import Drawing, GroupKey, Precision, VramMode
from sensebatch.plan.computation import Computation
from sensebatch.plan.device import place
from sensebatch.plan.load import Load
from sensebatch.plan.placement import Placement, Placements
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Task
from sensebatch.units import GIB

ARCH = parse_architecture(OFFICIAL_8B)
COMPUTATION = Computation(arch=ARCH, item_bytes=2)
FP8 = replace(COMPUTATION, precision=Precision.FP8)


def make_load(jobs: int = 4, *, branches: int = 2, prompt: int = 500, text: int = 0) -> Load:
    drawing = Drawing(
        resolution=Resolution(height=2048, width=2048),
        num_steps=50,
        timestep_shift=3.0,
        branches=(Branch.COND, Branch.UNCOND)[:branches],
    )
    group = GroupKey(task=Task.T2I, think=text > 0, drawing=drawing)
    return Load(group=group, batch_size=jobs, prompt_tokens=prompt, text_tokens=text)


def make_interleave(jobs: int = 4) -> Load:
    load = make_load(jobs, prompt=1000, text=4000)
    group = replace(load.group, task=Task.INTERLEAVE, think=True)
    return replace(load, group=group, drawn_tokens=6 * 4098)


def make_edits(jobs: int) -> Load:
    load = with_drawing(make_load(jobs, prompt=5000), branches=(Branch.COND, Branch.IMG_COND))
    return replace(load, group=replace(load.group, task=Task.EDIT))


def with_drawing(load: Load, **changes: Any) -> Load:
    """Returns a load whose group draws in another way."""
    assert load.group.drawing is not None
    drawing = replace(load.group.drawing, **changes)
    return replace(load, group=replace(load.group, drawing=drawing))


def place_all(
    loads: list[Load] | None = None,
    *,
    device_free: int | None = None,
    host_free: int = 200 * GIB,
    precision: Precision | None = None,
    vram_mode: str = "auto",
    num_workers: int = 1,
    **budgets: int,
) -> Placements:
    return place(
        replace(COMPUTATION, precision=precision),
        memory=MemoryConfig(vram_mode=VramMode(vram_mode), **budgets),
        loads=[make_load()] if loads is None else loads,
        device_free=device_free,
        host_free=host_free,
        num_workers=num_workers,
    )


def placed(
    loads: list[Load] | None = None, *, device_free: int | None = None, **memory: Any
) -> Placement:
    return place_all(loads, device_free=device_free, **memory).leanest
