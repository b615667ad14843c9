"""The nouns: what a job is, what a batch is, and what becomes of them.

A job arrives here with every default filled in, so that its key covers all that decides its
pixels. Nothing here reads a file or knows how a job is run.
"""

from __future__ import annotations

import hashlib
import json
import traceback
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Interval, Le

from sensebatch.declarations import Setting, stated
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Output, SystemPromptKind, Task, TaskSpec

if TYPE_CHECKING:
    import numpy as np

IMAGE_MARK = "<image>"
"""In a prompt, the place of its next input image; in a story's text, that of a picture."""

KEY_VERSION = 1
"""Raised when a change of the code changes the pixels that a job means."""

MAX_COUNT = 2**31 - 1
"""Largest count or side that the log and the state have room for."""
COUNT = Interval(ge=1, le=MAX_COUNT)
"""The range of a number of things."""
MAX_SEED = 2**63 - 1
"""Largest seed, likewise."""


class CfgNorm(StrEnum):
    """How the guided velocity is rescaled."""

    NONE = "none"
    GLOBAL = "global"
    CHANNEL = "channel"
    CFG_ZERO_STAR = "cfg_zero_star"


class Precision(StrEnum):
    """How the decoder layers' matrices are stored and multiplied."""

    AUTO = "auto"
    """In the dtype of the other weights."""
    FP8 = "fp8"
    """Those of the generation expert in float8."""
    FP8_ALL = "fp8-all"
    """Those of both experts in float8."""


class VramMode(StrEnum):
    """How much of the weights stays on the device."""

    AUTO = "auto"
    """The most that fits."""
    FULL = "full"
    FAST = "fast"
    BALANCED = "balanced"
    LOW = "low"


def _interval_error(ends: Sequence[float]) -> str | None:
    first, last = ends
    if first <= last:
        return None
    return f"expected the lower end first, found {first} before {last}"


def _draws(spec: TaskSpec) -> bool:
    return spec.drawing is not None


def _is_guided_by_images(spec: TaskSpec) -> bool:
    return spec.drawing is not None and spec.drawing.guidance.by_images


def _makes_several_images(spec: TaskSpec) -> bool:
    return spec.output is Output.IMAGES


def _limits_text(name: str) -> Callable[[TaskSpec], bool]:
    return lambda spec: spec.text.limit == name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How images and text are sampled; the defaults are in `config`.

    A new field is declared here alone. It has a default, the value with which jobs are what they
    were before there was the field, so that no key changes until somebody uses it.
    """

    num_steps: Annotated[int, COUNT, Setting(help="Steps from noise to image.", of=_draws)]
    timestep_shift: Annotated[
        float, Gt(0), Setting(help="Shift of the timesteps towards noise.", of=_draws)
    ]
    cfg_scale: Annotated[
        float, Ge(0), Setting(help="Guidance towards the prompt; 1 turns it off.", of=_draws)
    ]
    img_cfg_scale: Annotated[
        float,
        Ge(0),
        Setting(help="Guidance towards the input images; 1 turns it off.", of=_is_guided_by_images),
    ]
    cfg_norm: Annotated[
        CfgNorm,
        Setting(
            help="How the guided velocity is rescaled; cfg_zero_star is for t2i only.", of=_draws
        ),
    ]
    cfg_interval: Annotated[
        tuple[Annotated[float, Ge(0), Le(1)], Annotated[float, Ge(0), Le(1)]],
        Setting(
            help="First and last timestep at which guidance is applied: two numbers from 0 to 1.",
            of=_draws,
            error=_interval_error,
            metavar="FROM TO",
        ),
    ]
    max_think_tokens: Annotated[
        int,
        COUNT,
        Setting(help="Most tokens of the think text.", of=_limits_text("max_think_tokens")),
    ]
    max_images: Annotated[
        int, COUNT, Setting(help="Most images of the job.", of=_makes_several_images)
    ]
    max_new_tokens: Annotated[
        int,
        COUNT,
        Setting(help="Most text tokens of the job.", of=_limits_text("max_new_tokens")),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputImage:
    """A picture a job starts from: where its bytes are, and what they are."""

    path: str
    """An image file, or the Parquet manifest that holds the bytes."""
    member: tuple[int, str, int] | None = None
    """(row, column, index in the column's list) inside a Parquet manifest; None for a file."""
    sha256: str
    """Of the encoded bytes."""
    height: int
    """Pixels, after the corrections."""
    width: int
    """Pixels, after the corrections."""
    corrections: str = ""
    """What decoding does to the stored pixels; see `image_files.ImageFacts`."""

    @property
    def key(self) -> str:
        """What decides the pixels: the hash of the bytes, and what is done to them."""
        return f"{self.sha256}+{self.corrections}" if self.corrections else self.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a job was written down."""

    file: str
    row: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How a job's images are drawn; what jobs must share of it to be drawn together."""

    resolution: Resolution
    """Of every image the job makes."""
    num_steps: int
    timestep_shift: float
    branches: tuple[Branch, ...]
    """Guidance branches that a step may evaluate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One unit of work; it succeeds or fails alone."""

    id: str
    """The manifest's or a derived one; names the job's files."""
    task: Task
    prompt: str
    images: tuple[InputImage, ...] = ()
    resolution: Resolution | None
    """Of every image the job makes; None for a job that makes none."""
    seed: int
    think: bool
    system_prompt: str | None = None
    """The job's own; None uses the run's."""
    input_max_pixels: int | None = None
    """Pixels that edit inputs are brought to before the model's own resize; None skips it."""
    sampling: Sampling
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Passed through to the log; decides nothing."""
    source: Source

    @property
    def drawing(self) -> Drawing | None:
        """How the job's images are drawn; None for a job that makes none."""
        rule, sampling = self.task.spec.drawing, self.sampling
        if rule is None or self.resolution is None:
            return None
        return Drawing(
            resolution=self.resolution,
            num_steps=sampling.num_steps,
            timestep_shift=sampling.timestep_shift,
            branches=rule.guidance.branches(sampling.cfg_scale, sampling.img_cfg_scale),
        )

    @property
    def max_images(self) -> int:
        """Most images the job makes."""
        output = self.task.spec.output
        if output is Output.IMAGES:
            return self.sampling.max_images
        return 1 if output is Output.IMAGE else 0

    @property
    def max_text_tokens(self) -> int:
        """Most tokens of text the job writes, its thoughts included."""
        text = self.task.spec.text
        writes = text.always or self.think
        return getattr(self.sampling, text.limit) if writes else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What a job's result depends on besides the job: the same for every job of a run."""

    checkpoint: str
    """Fingerprint of the checkpoint's tensors, configuration and tokenizer."""
    lora: str | None
    """Fingerprint of the merged LoRA."""
    dtype: str
    """Of weights and activations: `bfloat16`, `float16` or `float32`."""
    precision: Precision | None = None
    """Of matrices in float8; None where all are in the dtype."""
    generation_prompt: str
    """System prompt of t2i and edit jobs that bring none of their own."""
    interleave_prompt: str
    """System prompt of interleave jobs that bring none of their own."""

    def system_prompt(self, task: Task) -> str:
        """Returns the run's system prompt for a task."""
        match task.spec.prompt.system:
            case SystemPromptKind.GENERATION:
                return self.generation_prompt
            case SystemPromptKind.INTERLEAVE:
                return self.interleave_prompt
            case None:
                return ""

    @property
    def system_prompt_bytes(self) -> int:
        """Bytes of UTF-8 of the longer system prompt."""
        return max(len(self.generation_prompt.encode()), len(self.interleave_prompt.encode()))


def job_key(job: Job, identity: ModelIdentity) -> str:
    """Returns the hash (64 hex digits) of everything that decides the job's pixels and text.

    The id, the place in the manifest, metadata and input paths are left out: renaming a job or
    moving its inputs does not make it another job.
    """
    prompt = job.system_prompt
    content = {
        "version": KEY_VERSION,
        "task": job.task,
        "prompt": job.prompt,
        "images": [image.key for image in job.images],
        "resolution": None if job.resolution is None else asdict(job.resolution),
        "seed": job.seed,
        "think": job.think,
        "system_prompt": identity.system_prompt(job.task) if prompt is None else prompt,
        "input_max_pixels": job.input_max_pixels,
        "sampling": stated(job.sampling),
        "checkpoint": identity.checkpoint,
        "lora": identity.lora,
        "dtype": identity.dtype,
    }
    # Later fields are in the key only where they are used, so that an upgrade keeps all others.
    if identity.precision is not None:
        content["precision"] = identity.precision
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def folded_id(job_id: str) -> str:
    """Returns an id as a disk that ignores case and composition compares it."""
    if job_id.isascii():
        return job_id.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", job_id).casefold())


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupKey:
    """What jobs must share to be run in one batch."""

    task: Task
    think: bool
    drawing: Drawing | None
    """None for jobs that make no images."""

    @property
    def image_tokens(self) -> int:
        """Tokens of one image; 0 for jobs that make none."""
        return 0 if self.drawing is None else self.drawing.resolution.image_tokens

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches that are read; of jobs that make no images, the conditional one."""
        return (Branch.COND,) if self.drawing is None else self.drawing.branches

    def __str__(self) -> str:
        size = "" if self.drawing is None else f" {self.drawing.resolution}"
        return f"{self.task}{size}{' with thinking' if self.think else ''}"


def group_key(job: Job) -> GroupKey:
    """Returns the group a job belongs to."""
    return GroupKey(task=job.task, think=job.think, drawing=job.drawing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Jobs of one group that go through the network together, in this order."""

    id: str
    """Derived from the members' keys, so a batch run again has the same id."""
    group: GroupKey
    jobs: tuple[Job, ...]
    keys: tuple[str, ...]
    """The job keys, one for each job."""


def batch_id(keys: tuple[str, ...]) -> str:
    """Returns the id (16 hex digits) of the batch with these members in this order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What the engine made of one job: images and text."""

    images: tuple[np.ndarray, ...] = ()
    """uint8 `[height, width, 3]`, in the order drawn."""
    text: str | None = None
    """The think text of t2i and edit, or the text of interleave with an `<image>` a picture."""
    think_tokens: int = 0
    text_tokens: int = 0
    """Decoded tokens that are not think tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job failed: an exception as text, since its frames would keep tensors alive."""

    type: str
    message: str
    traceback: str
    think_tokens: int = 0
    """Tokens that the job had decoded before; they took their time all the same."""
    text_tokens: int = 0
    """Likewise."""

    @classmethod
    def of(cls, error: BaseException, *, think_tokens: int = 0, text_tokens: int = 0) -> Failure:
        """Returns what is worth keeping of an exception."""
        return cls(
            type=type(error).__name__,
            message=_writable(str(error)),
            traceback=_writable("".join(traceback.format_exception(error))),
            think_tokens=think_tokens,
            text_tokens=text_tokens,
        )


def _writable(text: str) -> str:
    """Returns text without the lone surrogates that stand for undecodable bytes in paths."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetrics:
    """What a batch cost; every figure is the batch's, not a job's. Seconds and bytes."""

    wait_s: float | None = None
    """From the end of the device's last phase in the batch before to the start of its first
    one in this; None where there was none, or it raised an error."""
    prefill_s: float = 0.0
    """Input images, prompts and re-encoded pictures through the understanding path."""
    think_s: float = 0.0
    """Decoding text, think or interleave."""
    denoise_s: float = 0.0
    num_denoise_steps: int = 0
    """Euler steps run, each over the jobs that share a pass."""
    num_kept_images: int = 0
    """Images of the results that were kept before, so that they took none of this time."""
    total_s: float = 0.0
    """Wall time of the generation, what tok/s is measured by."""
    peak_allocated_bytes: int = 0
    """Of device memory; 0 on a CPU."""
    peak_reserved_bytes: int = 0
    """Of device memory; 0 on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What became of a batch: one result for each job, in the batch's order."""

    results: tuple[JobResult | Failure, ...]
    """A failure where one job failed and the rest of the batch did not."""
    metrics: BatchMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the log says of the engine that made a row."""

    identity: ModelIdentity
    model: str
    """As the user named it."""
    system_prompt_source: Mapping[Task, str]
    """Where the run's system prompt of a task was found."""
    device: str
    dtype: str
    attn_backend: str
    compile_s: float | None
    """Seconds of compiling kernels and trying them once, part of `load_s`; None without."""
    vram_mode: VramMode
    budget_bytes: int | None
    torch_version: str
    load_s: float
    load_peak_allocated_bytes: int
    load_peak_reserved_bytes: int
    load_peak_rss_bytes: int
