"""The measured suites: which cases they have, and each case as a manifest and a command line.

Knows what is run, not how it went. A case is an ordinary manifest run with ordinary options, so
that what is measured is what a user gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from sensebatch.config import PRESETS, SYNTHETIC_PREFIX, TINY_MODEL, converged_timesteps
from sensebatch.errors import ConfigError
from sensebatch.jobs import Precision, Quality
from sensebatch.profile.night import night_parts
from sensebatch.resolutions import Resolution
from sensebatch.store.files import write_atomic
from sensebatch.tasks import Inputs, Output, Task
from sensebatch.units import GIB
from sensebatch.yaml_values import dump_yaml

SMALL_MODEL = f"{SYNTHETIC_PREFIX}tiny"
SQUARE = Resolution(height=2048, width=2048)
WIDE = Resolution(height=1152, width=2048)
SMALL = Resolution(height=1024, width=1024)
SMALLEST = Resolution(height=512, width=512)
CFG_SCALE = 4.0
TIMESTEP_SHIFT = 3.0
FEW_STEPS = 8
"""The steps of suite `few`, if none are asked for."""
FEW_BATCHES = 4
"""The batches of a case of suite `few`; the time between batches is seen from the third on."""
FIRST_SEED = 42
STORY_IMAGES = 6
TEXT_TOKENS = 300
"""Tokens of a thought, and before every image of a story, where weights are synthetic."""
QUANTISED_CASES = ("t2i", "balanced", "7gib")
"""Cases of suite `speed` that are also run with linear layers of 8-bit numbers."""
QUANTISED_TO = ("fp8", "int8")
"""The precisions that they are run with."""
MANY_JOBS = 16
"""Jobs of the cases that compare thinking with not thinking."""
MOST_JOBS = 64
"""Jobs whose texts are decoded together while weights are streamed, over several batches."""
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
QUESTION = "Is there a red disc in the image?"
CHOICES = ("yes", "no")
CONVERGED = "converged"
"""The case of suite `quality` whose images all others are compared with."""
CONVERGED_STEPS = 128
STORY_PROMPT = (
    "Explain how a sailing boat is built, in exactly six steps, with one picture for each step"
)


class Suite(StrEnum):
    """A set of cases, named by what they differ in."""

    TASKS = "tasks"
    BUDGETS = "budgets"
    MODES = "modes"
    SPEED = "speed"
    NIGHT = "night"
    ASK = "ask"
    QUALITY = "quality"
    FEW = "few"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large a suite is; the defaults are those of the published tables."""

    model: str = f"{SYNTHETIC_PREFIX}8b"
    """As `sensebatch run --model` takes it."""
    num_steps: int = 50
    num_jobs: int = 8
    """Jobs of every case, except those whose names say how many there are, interleave, whose one
    job makes several images, and images of 1024x1024, of which there are four times as many."""
    resolution: Resolution | None = None
    """Size of every image; None for each case's own."""
    cfg_scale: float = CFG_SCALE
    """Guidance of every image."""
    text_tokens: int = TEXT_TOKENS
    """Tokens of a thought, and of the text before each image of a story, where weights are
    synthetic."""

    @property
    def is_small(self) -> bool:
        """Whether a suite ends within minutes without a GPU, going by model and size."""
        return self.resolution is not None and self.model in (TINY_MODEL, SMALL_MODEL)

    @property
    def scripted(self) -> bool:
        """Whether weights are synthetic, so that the settings decide how much text there is."""
        return self.model.startswith(SYNTHETIC_PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One manifest with some options."""

    name: str
    """Unique in its suite; names the run's folder."""
    task: Task = Task.T2I
    think: bool = False
    resolution: Resolution = SQUARE
    """Size of every image that is drawn, or that a question is about."""
    choices: tuple[str, ...] = ()
    """What a question is to be answered with."""
    num_jobs: int
    vram_mode: str = "auto"
    device_gib: int | None = None
    """Budget of device memory."""
    host_gib: int | None = None
    """Budget of host memory for weights."""
    compile: bool = True
    """Whether kernels are compiled."""
    precision: str = "auto"
    """Precision of linear layers; auto is that of the other weights."""
    baseline: str | None = None
    """The case of the same suite that this one's speed is compared with."""
    max_batch_size: int | None = None
    """The most jobs of a batch; None leaves it to the run."""
    steps: Mapping[str, Any] = field(default_factory=dict)
    """How steps are taken, as fields of a manifest; those of the scale if empty."""
    parts: tuple[Case, ...] = ()
    """The cases whose jobs a mixed manifest holds; task, size and thinking are then theirs."""

    @property
    def max_images(self) -> int:
        """The most images that all jobs make."""
        if self.parts:
            return sum(part.max_images for part in self.parts)
        if self.task.spec.drawing is None:
            return 0
        return self.num_jobs * (STORY_IMAGES if self.tells_stories else 1)

    def num_steps(self, scale: Scale) -> int:
        """Returns the steps of each image."""
        if "timesteps" in self.steps:
            return len(self.steps["timesteps"]) + 1
        quality = self.steps.get("quality")
        own: int = self.steps.get("num_steps", scale.num_steps)
        steps: int = own if quality is None else PRESETS[Quality(quality)]["num_steps"]
        return steps

    @property
    def tells_stories(self) -> bool:
        """Whether the jobs make several images each."""
        return self.task.spec.output is Output.IMAGES

    @property
    def what(self) -> str:
        """The task in a word; `mixed` where there are several."""
        return "mixed" if self.parts else self.task.value

    @property
    def max_memory(self) -> str | None:
        """The budgets in the words of `--max-memory`; None without any."""
        budgets = (("0", self.device_gib), ("cpu", self.host_gib))
        return ",".join(f"{name}={gib}GiB" for name, gib in budgets if gib is not None) or None

    @property
    def setting(self) -> str:
        """The options, as they are typed."""
        words = [] if self.vram_mode == "auto" else [f"--vram-mode {self.vram_mode}"]
        words += [f"--max-memory {self.max_memory}"] if self.max_memory else []
        words += [] if self.compile else ["--no-compile"]
        words += [] if self.precision == "auto" else [f"--precision {self.precision}"]
        words += [f"--max-batch-size {self.max_batch_size}"] if self.max_batch_size else []
        return " ".join(words)

    @property
    def flags(self) -> dict[str, object]:
        """The options by place in the settings."""
        return {
            "model.compile": self.compile,
            "model.precision": self.precision,
            "memory.vram_mode": self.vram_mode,
            "memory.vram_budget_bytes": in_bytes(self.device_gib),
            "memory.host_budget_bytes": in_bytes(self.host_gib),
            "memory.max_batch_size": self.max_batch_size,
        }


def in_bytes(gib: int | None) -> int | None:
    """Returns an amount of GiB in bytes; None for None."""
    return None if gib is None else gib * GIB


def default_steps(suite: Suite) -> int:
    """Returns the steps of a suite's images if none are asked for."""
    return FEW_STEPS if suite is Suite.FEW else Scale().num_steps


def suite_cases(suite: Suite, scale: Scale) -> tuple[Case, ...]:
    """Returns the cases of a suite, in the order they are run."""
    full = Case(name="full", num_jobs=scale.num_jobs, vram_mode="full", baseline="full")
    if suite is Suite.MODES:
        leaner = [replace(full, name=mode, vram_mode=mode) for mode in ("fast", "balanced", "low")]
        cases = [full, *leaner]
    elif suite is Suite.BUDGETS:
        auto = replace(full, vram_mode="auto")
        cases = [full]
        cases += [replace(auto, name=f"{gib}gib", device_gib=gib) for gib in (27, 20, 13, 9, 7)]
        cases.append(replace(auto, name="7gib-cpu20gib", device_gib=7, host_gib=20))
    elif suite is Suite.SPEED:
        cases = _speed_cases(full)
    elif suite is Suite.NIGHT:
        return (_night_case(scale.resolution or SQUARE),)
    elif suite is Suite.ASK:
        cases = _question_cases(full)
    elif suite is Suite.QUALITY:
        cases = _quality_cases(full)
    elif suite is Suite.FEW:
        cases = _few_cases(full, scale)
    else:
        cases = _task_cases(full)
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
    many = replace(alone, num_jobs=MANY_JOBS)
    lean: dict[str, Any] = {"vram_mode": "auto", "device_gib": 7}
    most = replace(alone, name=f"think-{MOST_JOBS}-7gib", num_jobs=MOST_JOBS, think=True, **lean)
    return [
        replace(alone, name="t2i"),
        replace(alone, name="t2i-think", think=True),
        replace(alone, name="edit", task=Task.EDIT),
        replace(full, name="edit-13gib", task=Task.EDIT, baseline="edit", **capped),
        replace(alone, name="interleave", **story),
        replace(alone, name="interleave-4", **story | {"num_jobs": 4}),
        replace(full, name="interleave-13gib", baseline="interleave", **story | capped),
        replace(many, name=f"plain-{MANY_JOBS}"),
        replace(many, name=f"think-{MANY_JOBS}", think=True, baseline=f"plain-{MANY_JOBS}"),
        replace(
            many, name=f"think-{MANY_JOBS}-7gib", think=True, baseline=f"think-{MANY_JOBS}", **lean
        ),
        most,
        replace(most, name=f"{most.name}-int8", precision=Precision.INT8_ALL, baseline=most.name),
    ]


def _speed_cases(full: Case) -> list[Case]:
    """Returns cases, each followed by its variants, which are compared with it."""
    plain = replace(full, name="t2i", baseline=None)
    # As many image tokens as the others, so that there are several batches of these as well.
    small = replace(plain, name="t2i-1024", resolution=SMALL, num_jobs=4 * full.num_jobs)
    edit = replace(plain, name="edit", task=Task.EDIT)
    balanced = replace(plain, name="balanced", vram_mode="balanced", baseline="t2i")
    lean = replace(plain, name="7gib", vram_mode="auto", device_gib=7, baseline="t2i")
    cases = []
    for case in (plain, small, edit, balanced, lean):
        variant = replace(case, baseline=case.name)
        cases += [case, replace(variant, name=f"{case.name}-no-compile", compile=False)]
        if case.name in QUANTISED_CASES:
            cases += [
                replace(variant, name=f"{case.name}-{precision}", precision=precision)
                for precision in QUANTISED_TO
            ]
    return cases


def _question_cases(full: Case) -> list[Case]:
    """Returns cases of questions about one image each; there are at least two full batches."""
    asked = replace(
        full, task=Task.ASK, resolution=SMALL, num_jobs=4 * full.num_jobs, baseline=None
    )
    choices = replace(asked, name="choices", choices=CHOICES, num_jobs=16 * full.num_jobs)
    lean: dict[str, Any] = {"vram_mode": "auto", "device_gib": 7}
    return [
        replace(asked, name="answers"),
        replace(asked, name="answers-7gib", **lean),
        choices,
        replace(choices, name="choices-2048", resolution=SQUARE, num_jobs=4 * full.num_jobs),
        replace(choices, name="choices-balanced", vram_mode="balanced"),
        replace(choices, name="choices-7gib", **lean),
    ]


def _quality_cases(full: Case) -> list[Case]:
    """Returns the presets of `quality`, and before them what they are compared with."""
    case = replace(full, vram_mode="auto", baseline=None)
    converged = {"solver": "ab2", "timesteps": list(converged_timesteps(CONVERGED_STEPS))}
    presets = [replace(case, name=one.value, steps={"quality": one.value}) for one in Quality]
    return [replace(case, name=CONVERGED, steps=converged), *presets]


def _few_cases(full: Case, scale: Scale) -> list[Case]:
    """Returns cases of few steps without guidance, as a distilled LoRA draws, in several batches.

    Full-size images come to four batches by themselves. All jobs of smaller ones fit one batch, so
    there batches are bounded.
    """
    num_jobs = 2 * full.num_jobs if scale.resolution is None else max(2 * full.num_jobs, 4)
    steps = {
        "num_steps": scale.num_steps,
        "timestep_shift": TIMESTEP_SHIFT,
        "cfg_scale": 1.0,
    }
    case = replace(full, num_jobs=num_jobs, baseline=None, steps=steps)
    large = replace(case, name="few-2048")
    small = replace(case, name="few-1024", resolution=SMALL, num_jobs=4 * case.num_jobs)
    smallest = replace(small, name="few-512", resolution=SMALLEST)
    fp8 = replace(large, name="few-2048-fp8", precision="fp8", baseline="few-2048")
    cases = [large, fp8, small, smallest]
    if scale.resolution is None:
        return cases
    return [replace(case, max_batch_size=case.num_jobs // FEW_BATCHES) for case in cases]


def _night_case(size: Resolution) -> Case:
    parts = tuple(
        Case(
            name=part.name,
            task=part.task,
            think=part.think,
            resolution=part.resolution,
            num_jobs=part.num_jobs,
        )
        for part in night_parts(size)
    )
    num_jobs = sum(part.num_jobs for part in parts)
    return Case(name="night", resolution=size, num_jobs=num_jobs, parts=parts)


def chosen_cases(cases: tuple[Case, ...], only: list[str]) -> tuple[Case, ...]:
    """Returns the cases of these names, in the suite's order; all if no name is given.

    Raises:
        ConfigError: No case has that name.
    """
    names = [case.name for case in cases]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: expected one of {', '.join(names)}, found {name!r}")
    return tuple(case for case in cases if not only or case.name in only)


def write_manifest(case: Case, scale: Scale, folder: Path) -> Path:
    """Writes a case's manifest, with its input image if it has one, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "cfg_scale": scale.cfg_scale,
        **(case.steps or {"num_steps": scale.num_steps, "timestep_shift": TIMESTEP_SHIFT}),
        "width": case.resolution.width,
        "height": case.resolution.height,
        "think": case.think,
    }
    jobs = [
        _job(part, scale, index, folder, defaults)
        for part in case.parts or (case,)
        for index in range(part.num_jobs)
    ]
    path = folder / f"{case.name}.yaml"
    manifest = {"version": 1, "name": case.name, "defaults": defaults, "jobs": jobs}
    write_atomic(path, dump_yaml(manifest).encode())
    return path


def _job(
    case: Case, scale: Scale, index: int, folder: Path, defaults: dict[str, Any]
) -> dict[str, Any]:
    """Returns a job of a manifest, without what its defaults say as well."""
    job: dict[str, Any] = {
        "id": f"{case.name}-{index + 1}",
        "task": case.task.value,
        "prompt": PROMPTS[index % len(PROMPTS)],
        "seed": FIRST_SEED + index,
    }
    size = {"width": case.resolution.width, "height": case.resolution.height}
    for own in (size, {"think": case.think}):
        job |= own if any(defaults[name] != value for name, value in own.items()) else {}
    if case.task.spec.inputs is Inputs.REQUIRED:
        job |= {"prompt": EDIT_PROMPT, "image": _draw_input(case.resolution, folder).name}
    elif case.tells_stories:
        job |= {"prompt": STORY_PROMPT, "max_images": STORY_IMAGES}
    elif case.task.spec.drawing is None:
        job |= {"prompt": QUESTION, "image": _draw_input(case.resolution, folder).name}
        job |= {"choices": list(case.choices)} if case.choices else {}
        if scale.scripted and not case.choices:
            job["max_new_tokens"] = scale.text_tokens
    if scale.scripted and case.tells_stories:
        job["max_new_tokens"] = STORY_IMAGES * scale.text_tokens
    elif scale.scripted and case.think:
        job["max_think_tokens"] = scale.text_tokens
    return job


def _draw_input(resolution: Resolution, folder: Path) -> Path:
    """Draws a red disc on sand, so that no image has to be shipped or fetched."""
    from PIL import Image, ImageDraw

    path = folder / f"disc-{resolution}.png"
    if path.exists():
        return path
    width, height = resolution.width, resolution.height
    image = Image.new("RGB", (width, height), (222, 205, 170))
    radius = min(width, height) // 3
    left, top = width // 2 - radius, height // 2 - radius
    ImageDraw.Draw(image).ellipse((left, top, left + 2 * radius, top + 2 * radius), (196, 40, 32))
    image.save(path)
    return path


def run_arguments(case: Case, scale: Scale, manifest: Path, output_dir: Path) -> list[str]:
    """Returns what is typed after `sensebatch` to run a case."""
    words = ["run", str(manifest), "--model", scale.model, *case.setting.split()]
    return [*words, "--output-dir", str(output_dir), "--json"]
