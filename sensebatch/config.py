"""Every setting of a run and every default. Flags and files start out unset and override these.

Precedence: the defaults here < the model's own defaults (`default_config`) < a configuration
file < command line flags. Nothing else in the package states a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import Interval

from sensebatch.declarations import Setting
from sensebatch.functions import AcceptFunction
from sensebatch.image_files import MAX_PIXELS
from sensebatch.jobs import (
    MAX_SEED,
    CfgNorm,
    Precision,
    Quality,
    Sampling,
    Solver,
    VramMode,
    draws,
)
from sensebatch.resolutions import (
    BUCKETS_TINY,
    MAX_SIDE,
    PixelLimits,
    Resolution,
)
from sensebatch.tasks import TASKS, SizeRule, Task, TaskSpec

TINY_MODEL = "tiny"
"""Name of the embedded checkpoint."""
SYNTHETIC_PREFIX = "synthetic:"
"""The names of models with synthetic weights begin with this."""


def _follows_target_pixels(spec: TaskSpec) -> bool:
    return spec.drawing is not None and spec.drawing.size is SizeRule.TARGET_PIXELS


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDefaults:
    """What a job of one task gets unless its manifest says otherwise.

    Fields that are settings of a job are declared here alone, like those of `Sampling`.

    Source: the published defaults of the SenseNova-U1 inference scripts.
    """

    resolution: Resolution | None
    """The size of images without an input image to follow; None for a task that makes none."""
    buckets: Mapping[str, Resolution]
    """The size that each aspect ratio stands for."""
    snap_sizes: bool = False
    """Whether a size that follows an input image is the nearest of `buckets`, because the model
    knows no others."""
    seed: Annotated[
        int, Interval(ge=0, le=MAX_SEED), Setting(help="Seed of the job's own random generator.")
    ] = 42
    think: Annotated[
        bool,
        Setting(
            help="Let the model think before it draws or answers.",
            of=lambda spec: spec.thinks is not None,
        ),
    ] = False
    target_pixels: Annotated[
        int,
        Interval(ge=1, le=MAX_SIDE**2),
        Setting(
            help="Pixels of the image, in the aspect ratio of the first input.",
            of=_follows_target_pixels,
        ),
    ] = 2048 * 2048
    input_max_pixels: Annotated[
        int | str | None,
        Setting(
            help="Pixels that inputs are brought to first: a number, auto to go by how many there "
            "are, or none to leave them as they are.",
            of=lambda spec: spec.resizes_inputs,
        ),
    ] = "auto"
    raw_inputs: Annotated[
        bool,
        Setting(
            help="Take input images as stored, without the orientation in EXIF and the colour "
            "profile, as the reference does.",
            of=lambda spec: spec.takes_images,
        ),
    ] = False
    quality: Annotated[
        Quality | None,
        Setting(help="The steps, their timesteps and the solver at once.", of=draws),
    ] = None
    """What `sampling` was filled in by; None if it is as the task's defaults or the user say."""
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights are loaded, and how they are computed with."""

    model: str = TINY_MODEL
    """A checkpoint folder, a Hub id, `tiny`, or synthetic weights such as `synthetic:8b`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    lora_path: str | None = None
    """LoRA file that is merged into the weights when they are loaded."""
    device: str = "auto"
    """`auto`, `cuda` or `cpu`."""
    dtype: str = "auto"
    """`bfloat16`, `float16`, `float32`; auto is bfloat16 on a GPU and float32 on a CPU."""
    precision: Precision = Precision.AUTO
    """How the decoder layers' matrices are stored: `auto` in the dtype, `fp8` in float8 for the
    generation expert, `fp8-all` in float8 for both experts, `int8` and `int8-all` in int8."""
    attn_backend: str = "auto"
    """`auto`, `cudnn`, `flash` or `sdpa`; auto is the fastest that is available."""
    compile: bool = True
    """Whether each chain of small operations is compiled to one kernel, on a GPU with Triton."""
    system_prompt_file: str | None = None
    """JSON with `generation` and `interleave` prompts; None looks in the checkpoint."""

    @property
    def quantised(self) -> Precision | None:
        """The precision; None if all weights are in the dtype."""
        return None if self.precision is Precision.AUTO else self.precision


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How much memory a run may use, and so how many jobs share a pass."""

    vram_mode: VramMode = VramMode.AUTO
    """`auto` (the fastest that fits), `full`, `fast`, `balanced` or `low`."""
    vram_budget_bytes: int | None = None
    """The most device memory the run may reserve, activations included; None for what is free."""
    host_budget_bytes: int | None = None
    """The most resident memory of the process; None gives weights a safe part of what is free."""
    max_batch_size: int = 16
    """The most jobs in one batch; fewer where memory does not hold as many."""
    max_batch_image_tokens: int = 16384
    """The most image tokens in one batch, over all its jobs; one job always fits. t2i jobs that
    think are not limited by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """How input images are decoded."""

    max_pixels: int = MAX_PIXELS
    """The most pixels of one image; larger images are refused before they are decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """How images are written."""

    image_format: str = "png"
    """`png`, `webp` or `jpeg`."""
    image_quality: int = 95
    """1 to 100, for jpeg and webp; webp is lossless at 100."""
    embed_metadata: bool = True
    """Whether the prompt, the seed and the settings are written into the image."""
    keep_rejected: bool = True
    """Whether images that were not accepted stay; their rows in the log always do."""
    num_writers: int | None = None
    """Background threads that encode; None for half of the cores, within limits. A lossless WebP
    of 2048x2048 takes a core seconds, so too few of them would hold up a fast device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    """How failures are handled."""

    max_attempts: int = 1
    """How often a job is tried before it counts as failed."""
    max_failures: int | None = None
    """The number of failed jobs after which the run stops; None for no limit."""
    retry_failed: bool = False
    """Whether jobs that failed in an earlier run are tried again."""
    fail_truncated: bool = False
    """Whether a job fails whose text is truncated: cut at its token limit, ended within a thought,
    or a story without an image. It is not tried again, since the same text would come out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersConfig:
    """Workers in processes of their own. What they make does not depend on it, nor do job keys."""

    backend: str = "ray"
    """What starts them; a name of `executor.backends`."""
    count: int | None = None
    """How many; None for one on each GPU."""
    cluster: str | None = None
    """Address of the Ray cluster they run on: `auto` or `ray://HOST:PORT`; None for this machine,
    on which Ray is started for the run."""
    gpus: tuple[str, ...] = ()
    """Numbers of the GPUs of this machine, as its driver counts them; all if there are none."""
    needs_gpu: bool = False
    """Whether the CPU must not take the place of GPUs, even where the workers are counted."""
    gpu_budget_bytes: Mapping[str, int] = field(default_factory=dict)
    """Device memory of single GPUs by their numbers, in place of `memory.vram_budget_bytes`."""
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variables that decide how libraries compute, for all workers alike; None for unset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a run needs to know besides its manifests."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    inputs: InputConfig = field(default_factory=InputConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    pixel_limits: PixelLimits = field(default_factory=PixelLimits)
    accept: tuple[AcceptFunction, ...] = ()
    """The user's functions, which judge each image of which only accepted ones are wanted."""
    tasks: Mapping[Task, TaskDefaults]


PRESETS: Mapping[Quality, Mapping[str, Any]] = {
    Quality.EXACT: {"num_steps": 50, "timestep_shift": 3.0, "solver": Solver.EULER},
    Quality.HIGH: {
        "num_steps": 33,
        "timestep_shift": 1.0,
        "solver": Solver.EULER,
        "layer_stride": 2,
    },
    Quality.FAST: {
        "num_steps": 22,
        "timestep_shift": 1.0,
        "solver": Solver.EULER,
        "layer_stride": 2,
    },
}
"""What `quality` stands for, among `SCHEDULE_SETTINGS`; those it does not name are neutral.

docs/quality.md has how far each is from the converged image.
"""

NEUTRAL: Mapping[str, Any] = {"timesteps": (), "guidance_stride": 1, "layer_stride": 1}
"""Those of `SCHEDULE_SETTINGS` that a preset leaves alone."""
SCHEDULE_SETTINGS = (
    "num_steps",
    "timestep_shift",
    "solver",
    "timesteps",
    "guidance_stride",
    "layer_stride",
)
"""The settings that together say how an image's steps are taken."""


CONVERGED_END = 0.98
"""Where the published loop begins to bound the divisor of the velocity. Steps beyond it leave noise
in an image, however many they are."""


def converged_timesteps(num_steps: int) -> tuple[float, ...]:
    """Returns the timesteps between 0 and 1 of an image as near to its limit as can be drawn.

    They are evenly spaced up to `CONVERGED_END`, from where one step leads to the predicted image.
    """
    return tuple(CONVERGED_END * step / (num_steps - 1) for step in range(1, num_steps))


def scheduled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of one layer with what they imply for `SCHEDULE_SETTINGS`.

    `quality` stands for all of them, and each that is given beside it wins. Timesteps say how many
    steps there are, and steps or a shift replace timesteps of the layer below.

    Args:
        given: Settings by name, from a file, from flags or from a manifest; None if not given.
            What is wrong with a value is left for others to say.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if values.get("quality") in list(Quality):
        preset = PRESETS[Quality(values["quality"])]
        values = {**NEUTRAL, **preset, **values}
    timesteps = values.get("timesteps", ())
    if not isinstance(timesteps, list | tuple):
        return values
    if timesteps:
        values |= {"num_steps": len(timesteps) + 1, "timestep_shift": 1.0}
    elif "num_steps" in values or "timestep_shift" in values:
        values["timesteps"] = ()
    return values


def sets_aside(timesteps: object, above: Mapping[str, Any]) -> bool:
    """Returns whether a layer of settings replaces the timesteps of the one below.

    The solver and the strides that came with those timesteps were chosen for them, so then they
    fall away as well.

    Args:
        timesteps: Those of the layer below; empty or None if it has none.
        above: What `scheduled` made of the upper layer.
    """
    return bool(timesteps) and "timesteps" in above


def _sampling() -> Sampling:
    return Sampling(
        num_steps=50,
        timestep_shift=3.0,
        cfg_scale=4.0,
        img_cfg_scale=1.0,
        cfg_norm=CfgNorm.NONE,
        cfg_interval=(0.0, 1.0),
        max_think_tokens=1024,
        max_images=10,
        max_new_tokens=8192,
    )


def _published(spec: TaskSpec) -> TaskDefaults:
    rule = spec.drawing
    return TaskDefaults(
        resolution=None if rule is None else rule.buckets[rule.ratio],
        buckets={} if rule is None else rule.buckets,
        think=bool(spec.thinks),
        sampling=replace(_sampling(), **spec.sampling),
    )


def _tiny(spec: TaskSpec) -> TaskDefaults:
    return TaskDefaults(
        resolution=None if spec.drawing is None else BUCKETS_TINY["1:1"],
        buckets={} if spec.drawing is None else BUCKETS_TINY,
        snap_sizes=spec.drawing is not None,
        target_pixels=256 * 256,
        input_max_pixels=None,
        sampling=replace(
            _sampling(), num_steps=8, cfg_scale=1.0, max_think_tokens=64, max_new_tokens=256
        ),
    )


def default_config(model: str = TINY_MODEL) -> RunConfig:
    """Returns the defaults for a model: the published ones, or small ones for `tiny`."""
    if model in (TINY_MODEL, SYNTHETIC_PREFIX + TINY_MODEL):
        return RunConfig(
            model=ModelConfig(model=model),
            pixel_limits=PixelLimits(
                base_pixels=2 * 256 * 256, min_pixels=128 * 128, min_asked_pixels=128 * 128
            ),
            tasks={task: _tiny(spec) for task, spec in TASKS.items()},
        )
    tasks = {task: _published(spec) for task, spec in TASKS.items()}
    return RunConfig(model=ModelConfig(model=model), tasks=tasks)
