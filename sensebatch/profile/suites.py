"""The measured suites: which cases they have, and each case as a manifest and a command line.

Knows what is run, not how it went. A case is an ordinary manifest run with ordinary options, so
that what is measured is what a user gets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from sensebatch.config import SYNTHETIC_PREFIX
from sensebatch.errors import ConfigError
from sensebatch.jobs import Task
from sensebatch.resolutions import Resolution
from sensebatch.store.files import write_atomic

SQUARE = Resolution(height=2048, width=2048)
WIDE = Resolution(height=1152, width=2048)
CFG_SCALE = 4.0
TIMESTEP_SHIFT = 3.0
FIRST_SEED = 42
STORY_IMAGES = 6
PROMPTS = (
    "A studio portrait of an elderly fisherman with a grey beard and a dark blue knitted cap, "
    "soft window light from the left, shallow depth of field",
    "A harbour at dawn after a night of rain, painted in oil, with gulls over the fishing boats "
    "and the first sun on the wet cobblestones",
    "An isometric drawing of a small railway station in the mountains, snow on the roofs, a red "
    "train waiting, people with skis on the platform",
    "A still life with three lemons, a blue glass bottle and a folded linen cloth on a wooden "
    "table, hard light, deep shadows",
)
EDIT_PROMPT = "Make the disc emerald green and keep everything else as it is"
STORY_PROMPT = (
    "Explain how a sailing boat is built, in exactly six steps, with one picture for each step"
)


class Suite(StrEnum):
    """What the cases of a suite differ in."""

    TASKS = "tasks"
    BUDGETS = "budgets"
    MODES = "modes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large a suite is; the defaults are those of the published tables."""

    model: str = f"{SYNTHETIC_PREFIX}8b"
    """As `sensebatch run --model` takes it."""
    num_steps: int = 50
    num_jobs: int = 8
    """Of every case but interleave, whose one job makes several pictures."""
    resolution: Resolution | None = None
    """Of every picture; None for each case's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One manifest with one setting of memory."""

    name: str
    """Unique in its suite; names the run's folder."""
    task: Task = Task.T2I
    think: bool = False
    resolution: Resolution = SQUARE
    num_jobs: int
    vram_mode: str = "auto"
    device_gib: int | None = None
    """Budget of device memory."""
    host_gib: int | None = None
    """Budget of host memory for weights."""
    baseline: str | None = None
    """The case of the same suite that this one's speed is held against."""

    @property
    def max_memory(self) -> str | None:
        """The budgets in the words of `--max-memory`; None without any."""
        budgets = (("0", self.device_gib), ("cpu", self.host_gib))
        return ",".join(f"{name}={gib}GiB" for name, gib in budgets if gib is not None) or None

    @property
    def setting(self) -> str:
        """The options of memory, as they are typed."""
        words = [] if self.vram_mode == "auto" else [f"--vram-mode {self.vram_mode}"]
        return " ".join(words + ([f"--max-memory {self.max_memory}"] if self.max_memory else []))


def suite_cases(suite: Suite, scale: Scale) -> tuple[Case, ...]:
    """Returns the cases of a suite, in the order they are run.

    The interleave cases are left out where weights are made up: such a model does not say when a
    picture begins, so that what would be measured is its chatter.
    """
    full = Case(name="full", num_jobs=scale.num_jobs, vram_mode="full", baseline="full")
    if suite is Suite.MODES:
        leaner = [replace(full, name=mode, vram_mode=mode) for mode in ("fast", "balanced", "low")]
        cases = [full, *leaner]
    elif suite is Suite.BUDGETS:
        auto = replace(full, vram_mode="auto")
        cases = [full]
        cases += [replace(auto, name=f"{gib}gib", device_gib=gib) for gib in (27, 20, 13, 9, 7)]
        cases.append(replace(auto, name="7gib-cpu20gib", device_gib=7, host_gib=20))
    else:
        cases = _task_cases(full)
        if scale.model.startswith(SYNTHETIC_PREFIX):
            cases = [case for case in cases if case.task is not Task.INTERLEAVE]
    if scale.resolution is not None:
        cases = [replace(case, resolution=scale.resolution) for case in cases]
    return tuple(cases)


def _task_cases(full: Case) -> list[Case]:
    alone = replace(full, baseline=None)
    story: dict[str, Any] = {
        "task": Task.INTERLEAVE,
        "think": True,
        "resolution": WIDE,
        "num_jobs": 1,
    }
    capped: dict[str, Any] = {"vram_mode": "auto", "device_gib": 13}
    return [
        replace(alone, name="t2i"),
        replace(alone, name="t2i-think", think=True),
        replace(alone, name="edit", task=Task.EDIT),
        replace(full, name="edit-13gib", task=Task.EDIT, baseline="edit", **capped),
        replace(alone, name="interleave", **story),
        replace(full, name="interleave-13gib", baseline="interleave", **story | capped),
    ]


def chosen_cases(cases: tuple[Case, ...], only: list[str]) -> tuple[Case, ...]:
    """Returns the cases of these names, in the suite's order; all if no name is given.

    Raises:
        ConfigError: There is no case of that name.
    """
    names = [case.name for case in cases]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: expected one of {', '.join(names)}, found {name!r}")
    return tuple(case for case in cases if not only or case.name in only)


def write_manifest(case: Case, scale: Scale, folder: Path) -> Path:
    """Writes a case's manifest, with its input picture if it has one, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "num_steps": scale.num_steps,
        "cfg_scale": CFG_SCALE,
        "timestep_shift": TIMESTEP_SHIFT,
        "width": case.resolution.width,
        "height": case.resolution.height,
        "think": case.think,
    }
    jobs: list[dict[str, Any]] = []
    for index in range(case.num_jobs):
        job: dict[str, Any] = {
            "id": f"{case.name}-{index + 1}",
            "task": case.task.value,
            "prompt": PROMPTS[index % len(PROMPTS)],
            "seed": FIRST_SEED + index,
        }
        if case.task is Task.EDIT:
            job |= {"prompt": EDIT_PROMPT, "image": _draw_input(case.resolution, folder).name}
        elif case.task is Task.INTERLEAVE:
            job |= {"prompt": STORY_PROMPT, "max_images": STORY_IMAGES}
        jobs.append(job)
    path = folder / f"{case.name}.yaml"
    manifest = {"version": 1, "name": case.name, "defaults": defaults, "jobs": jobs}
    write_atomic(path, yaml.safe_dump(manifest, sort_keys=False).encode())
    return path


def _draw_input(resolution: Resolution, folder: Path) -> Path:
    """Draws a red disc on sand, so that no picture has to be shipped or fetched."""
    from PIL import Image, ImageDraw

    path = folder / f"disc-{resolution}.png"
    width, height = resolution.width, resolution.height
    image = Image.new("RGB", (width, height), (222, 205, 170))
    radius = min(width, height) // 3
    left, top = width // 2 - radius, height // 2 - radius
    ImageDraw.Draw(image).ellipse((left, top, left + 2 * radius, top + 2 * radius), (196, 40, 32))
    image.save(path)
    return path


def run_arguments(case: Case, scale: Scale, manifest: Path, output_dir: Path) -> list[str]:
    """Returns what is typed behind `sensebatch` to run a case."""
    words = ["run", str(manifest), "--model", scale.model, *case.setting.split()]
    return [*words, "--output-dir", str(output_dir), "--json"]
