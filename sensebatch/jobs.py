"""The nouns: what a job is, what a batch is, and what becomes of them.

A job has every default filled in, so its key covers everything that decides its pixels. Nothing
here reads a file or knows how a job is run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import traceback
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Interval, Le, Lt

from sensebatch.bounded import abridged
from sensebatch.declarations import Setting, stated
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Output, SystemPromptKind, Task, TaskSpec

if TYPE_CHECKING:
    import numpy as np

IMAGE_MARK = "<image>"
"""Stands for an input image in a prompt, and for a drawn one in the text of an interleave job."""

KEY_VERSION = 1
"""Raised when a change to the code changes the pixels of a job."""

MAX_COUNT = 2**31 - 1
"""The largest count or side that the log and the state database can hold."""
COUNT = Interval(ge=1, le=MAX_COUNT)
"""The range of every count."""
MAX_SEED = 2**63 - 1
"""The largest seed that they can hold."""
_MAX_MESSAGE = 2000
"""Longest message of a failed job's error that is kept whole, in characters."""
_MAX_TRACEBACK = 50_000
"""Longest traceback, likewise."""


class CfgNorm(StrEnum):
    """How the guided velocity is rescaled."""

    NONE = "none"
    GLOBAL = "global"
    CHANNEL = "channel"
    CFG_ZERO_STAR = "cfg_zero_star"


class Solver(StrEnum):
    """How the steps from noise to image are taken; each evaluates the network once."""

    EULER = "euler"
    """With the velocity at its beginning, as published."""
    AB2 = "ab2"
    """Adams-Bashforth: with the line through this velocity and the one before."""
    DPM2M = "dpm2m"
    """DPM-Solver++ (2M): with the line through this predicted image and the one before."""


class Quality(StrEnum):
    """How many evaluations of the network an image is worth; `config.PRESETS` has the settings."""

    EXACT = "exact"
    """The published sampler."""
    HIGH = "high"
    """As near to the converged image, with half the computation."""
    FAST = "fast"
    """A third of the computation."""


class Stored(StrEnum):
    """8-bit numbers that matrices may be stored in."""

    FLOAT8 = "float8"
    INT8 = "int8"


class Precision(StrEnum):
    """How the decoder layers' matrices are stored and multiplied; `QUANTISED` has the facts."""

    AUTO = "auto"
    """In the dtype of the other weights."""
    FP8 = "fp8"
    """Those of the generation expert in float8."""
    FP8_ALL = "fp8-all"
    """Those of both experts in float8."""
    INT8 = "int8"
    """Those of the generation expert in int8."""
    INT8_ALL = "int8-all"
    """Those of both experts in int8."""

    @property
    def stored(self) -> Stored | None:
        """The 8-bit numbers of the generation expert; None where there are none."""
        return QUANTISED[self].stored if self in QUANTISED else None

    @property
    def stored_for_text(self) -> Stored | None:
        """Those of the understanding expert, which reads prompts and writes text."""
        return QUANTISED[self].stored if self in QUANTISED and QUANTISED[self].text else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """What a precision quantises."""

    stored: Stored
    text: bool
    """Whether the understanding expert is quantised as well as the generation expert."""


QUANTISED = {
    Precision.FP8: Quantisation(stored=Stored.FLOAT8, text=False),
    Precision.FP8_ALL: Quantisation(stored=Stored.FLOAT8, text=True),
    Precision.INT8: Quantisation(stored=Stored.INT8, text=False),
    Precision.INT8_ALL: Quantisation(stored=Stored.INT8, text=True),
}
"""A row for each precision that is not the dtype."""


class FinishReason(StrEnum):
    """Why a job's text ended, and with it the job."""

    COMPLETE = "complete"
    """The model ended the text itself, and made what the task asks for."""
    TOKEN_LIMIT = "token_limit"
    """The text was cut at `max_think_tokens` or `max_new_tokens`."""
    MAX_IMAGES = "max_images"
    """The job has as many images as `max_images` allows; the model was not asked for more."""
    STOPPED_EMPTY = "stopped_empty"
    """The model ended a text with images before it drew one."""
    UNFINISHED_THOUGHT = "unfinished_thought"
    """The model ended its text within the thought, before the image."""

    @property
    def is_truncated(self) -> bool:
        """Whether something is missing of what the task asks for."""
        return self not in (FinishReason.COMPLETE, FinishReason.MAX_IMAGES)


class VramMode(StrEnum):
    """How much of the weights stays on the device."""

    AUTO = "auto"
    """The most that fits."""
    FULL = "full"
    FAST = "fast"
    BALANCED = "balanced"
    LOW = "low"


def _interval_error(ends: Sequence[float], _: TaskSpec) -> str | None:
    first, last = ends
    if first <= last:
        return None
    return f"expected the lower end first, found {first} before {last}"


def _norm_error(norm: str, spec: TaskSpec) -> str | None:
    if norm != CfgNorm.CFG_ZERO_STAR or not _is_guided_by_images(spec):
        return None
    *first, last = (repr(other.value) for other in CfgNorm if other != norm)
    return f"expected {', '.join(first)} or {last} for {spec.task}, found {str(norm)!r}"


def _timesteps_error(between: Sequence[float], _: TaskSpec) -> str | None:
    if all(first < second for first, second in itertools.pairwise(between)):
        return None
    return f"expected rising timesteps, found {list(between)}"


def draws(spec: TaskSpec) -> bool:
    return spec.drawing is not None


def _is_guided_by_images(spec: TaskSpec) -> bool:
    return spec.drawing is not None and spec.drawing.guidance.by_images


def _makes_several_images(spec: TaskSpec) -> bool:
    return spec.output is Output.IMAGES


def _answers(spec: TaskSpec) -> bool:
    return spec.output is Output.TEXT


def _choices_error(choices: Sequence[str], _: TaskSpec) -> str | None:
    for choice in choices:
        if not choice or choice != choice.strip():
            return f"expected short texts without space around them, found {choice!r}"
    if len(choices) == 1:
        return f"expected two or more, found {choices[0]!r} alone"
    if again := next((c for c in choices if choices.count(c) > 1), None):
        return f"expected every choice once, found {again!r} again"
    return None


def _limits_text(name: str) -> Callable[[TaskSpec], bool]:
    return lambda spec: spec.text.limit == name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How images and text are sampled; the defaults are in `config`.

    A new field is declared here and nowhere else. Its default is the value at which jobs are what
    they were before the field existed, so no key changes until someone uses it.
    """

    num_steps: Annotated[int, COUNT, Setting(help="Steps from noise to image.", of=draws)]
    timestep_shift: Annotated[
        float, Gt(0), Setting(help="Shift of the timesteps towards noise.", of=draws)
    ]
    cfg_scale: Annotated[
        float, Ge(0), Setting(help="Guidance towards the prompt; 1 turns it off.", of=draws)
    ]
    img_cfg_scale: Annotated[
        float,
        Ge(0),
        Setting(help="Guidance towards the input images; 1 turns it off.", of=_is_guided_by_images),
    ]
    cfg_norm: Annotated[
        CfgNorm,
        Setting(
            help="How the guided velocity is rescaled; cfg_zero_star is for t2i only.",
            of=draws,
            error=_norm_error,
        ),
    ]
    cfg_interval: Annotated[
        tuple[Annotated[float, Ge(0), Le(1)], Annotated[float, Ge(0), Le(1)]],
        Setting(
            help="First and last timestep at which guidance is applied: two numbers from 0 to 1.",
            of=draws,
            error=_interval_error,
            metavar="FROM TO",
        ),
    ]
    max_think_tokens: Annotated[
        int,
        COUNT,
        Setting(help="The most tokens of the think text.", of=_limits_text("max_think_tokens")),
    ]
    max_images: Annotated[
        int, COUNT, Setting(help="The most images of the job.", of=_makes_several_images)
    ]
    max_new_tokens: Annotated[
        int,
        COUNT,
        Setting(help="The most text tokens of the job.", of=_limits_text("max_new_tokens")),
    ]
    solver: Annotated[
        Solver,
        Setting(help="How a step is taken; ab2 and dpm2m also use the one before.", of=draws),
    ] = Solver.EULER
    timesteps: Annotated[
        tuple[Annotated[float, Gt(0), Lt(1)], ...],
        Setting(
            help="The timesteps between 0 and 1, instead of num_steps and timestep_shift.",
            of=draws,
            error=_timesteps_error,
        ),
    ] = ()
    guidance_stride: Annotated[
        int,
        COUNT,
        Setting(
            help="Guidance is evaluated in every n-th of its steps, and reused in the others.",
            of=draws,
        ),
    ] = 1
    layer_stride: Annotated[
        int,
        COUNT,
        Setting(
            help="Every layer is evaluated in every n-th step; "
            "the others reuse what the middle layers added.",
            of=draws,
        ),
    ] = 1
    choices: Annotated[
        tuple[str, ...],
        Setting(
            help="The answers to choose from, in the model's own words; nothing else is written.",
            of=_answers,
            error=_choices_error,
            metavar="TEXT",
        ),
    ] = ()
    do_sample: Annotated[
        bool,
        Setting(
            help="Draw each token at random by its probability, not the most probable one.",
            of=_answers,
        ),
    ] = False
    temperature: Annotated[
        float,
        Gt(0),
        Setting(
            help="What logits are divided by before a token is drawn.",
            of=_answers,
            implies={"do_sample": True},
        ),
    ] = 0.7
    top_p: Annotated[
        float,
        Gt(0),
        Le(1),
        Setting(
            help="Draw from the most probable tokens that together have this probability.",
            of=_answers,
            implies={"do_sample": True},
        ),
    ] = 0.9
    top_k: Annotated[
        int,
        Interval(ge=0, le=MAX_COUNT),
        Setting(
            help="Draw from this many of the most probable tokens; 0 for all.",
            of=_answers,
            implies={"do_sample": True},
        ),
    ] = 50
    repetition_penalty: Annotated[
        float,
        Gt(0),
        Setting(
            help="How much less probable tokens become that the answer has; 1 turns it off.",
            of=_answers,
        ),
    ] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InputImage:
    """An image that a job starts from: where its bytes are, and what they are."""

    path: str
    """An image file, or the Parquet manifest that holds the bytes."""
    member: tuple[int, str, int] | None = None
    """(row, column, index in the column's list) inside a Parquet manifest; None for a file."""
    sha256: str
    """Hash of the encoded bytes."""
    height: int
    """In pixels, after the corrections."""
    width: int
    """In pixels, after the corrections."""
    corrections: str = ""
    """What decoding does to the stored pixels; see `image_files.ImageFacts`."""
    output: tuple[str, int] | None = None
    """(id, index) of the job whose image it is; None for an image that is there before the run.
    The bytes are then known only once that job is done."""
    absent: str | None = field(default=None, compare=False)
    """A path at which nothing was found, and where an image would have been taken in its place;
    None if there is none, or if the job comes from the state database."""

    @property
    def place(self) -> str:
        """Where the bytes are, as one word: a path, or `FILE#ROW/COLUMN/INDEX`."""
        if self.member is None:
            return self.path
        return f"{self.path}#{'/'.join(map(str, self.member))}"

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
    """How a job's images are drawn. Jobs with equal drawings can be drawn together."""

    resolution: Resolution
    """The size of every image that the job makes."""
    num_steps: int
    timestep_shift: float
    branches: tuple[Branch, ...]
    """The guidance branches that a step may evaluate."""
    solver: Solver = Solver.EULER
    timesteps: tuple[float, ...] = ()
    """Those between 0 and 1; empty where `num_steps` and `timestep_shift` say them."""
    guidance_stride: int = 1
    layer_stride: int = 1

    def is_whole(self, step: int) -> bool:
        """Returns whether a step evaluates every layer.

        The first does, whose image is nothing but noise, every n-th from the second on, and the
        last, which leads to the image.
        """
        return step in (0, self.num_steps - 1) or (step - 1) % self.layer_stride == 0

    @property
    def num_whole_steps(self) -> int:
        """How many steps evaluate every layer."""
        return sum(map(self.is_whole, range(self.num_steps)))

    @property
    def num_guided_steps(self) -> int:
        """The most steps that evaluate every branch; the others evaluate the conditional one."""
        if self.layer_stride == 1:
            return -(-self.num_steps // self.guidance_stride)
        guided = (step % self.guidance_stride == 0 for step in range(self.num_steps))
        return sum(one or self.is_whole(step) for step, one in enumerate(guided))

    @property
    def num_evaluations(self) -> int:
        """The most evaluations of the network for one image."""
        return self.num_steps + (len(self.branches) - 1) * self.num_guided_steps

    @property
    def cost(self) -> float:
        """The same by the layers that they take: without those in the middle they are a third."""
        if self.layer_stride == 1:
            return float(self.num_evaluations)
        short = self.num_evaluations - self.num_whole_steps * len(self.branches)
        return self.num_evaluations - short * 2 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptAt:
    """Which try of a series a job is."""

    series: str
    """The name of the tries that differ in their seeds alone."""
    number: int
    """From 0."""
    keep: int
    """How many of the series are to be accepted; the rest need not run."""
    checks: int = 1
    """How many questions decide about a try; it is open until all are answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictOn:
    """What the answer of a question decides."""

    job: str
    """The id of the try that it is about."""
    answer: str
    """The choice that speaks for it."""
    at_least: float
    """The probability that the choice must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedBy:
    """The function that answers a question in place of the model."""

    function: str
    """`module:function`."""
    source_sha256: str
    """The hash of the module's file; another one may say something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One unit of work; it succeeds or fails alone."""

    id: str
    """Given in the manifest or derived from the row; names the job's files."""
    task: Task
    prompt: str
    history: tuple[tuple[str, str], ...] = ()
    """The questions before a question, each with its answer."""
    images: tuple[InputImage, ...] = ()
    resolution: Resolution | None
    """The size of every image that the job makes; None for a job that makes none."""
    seed: int
    think: bool
    system_prompt: str | None = None
    """The job's own system prompt; None for that of the run."""
    input_max_pixels: int | None = None
    """Pixels that input images are brought to before the model's own resize; None skips that."""
    sampling: Sampling
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Passed through to the log; has no effect on the job."""
    matrix: Mapping[str, Any] = field(default_factory=dict)
    """The values of the row's matrix that made this job of it, by name; likewise."""
    level: int = 0
    """How many jobs have to be done before it, one after the other, because each starts from an
    image of the one before."""
    attempt_at: AttemptAt | None = None
    """The series of which it is a try; None if it is to be run in any case."""
    verdict: VerdictOn | None = None
    """What it decides about a try; None if nothing."""
    judged_by: JudgedBy | None = None
    """The user's function that answers it; None for what the model does."""
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
            solver=sampling.solver,
            timesteps=sampling.timesteps,
            guidance_stride=sampling.guidance_stride,
            layer_stride=sampling.layer_stride,
        )

    @property
    def max_images(self) -> int:
        """The most images that the job makes."""
        output = self.task.spec.output
        if output is Output.IMAGES:
            return self.sampling.max_images
        return 1 if output is Output.IMAGE else 0

    @property
    def max_text_tokens(self) -> int:
        """The most tokens of text that the job writes, thoughts included."""
        text, choices = self.task.spec.text, self.sampling.choices
        if choices and not self.think:
            # Only what a choice is scored with is cached, and only if others begin alike.
            first = {choice[0] for choice in choices}
            longest = max(len(choice.encode()) for choice in choices)
            return longest if len(first) < len(choices) else 0
        writes = text.always or self.think
        return getattr(self.sampling, text.limit) if writes else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What a job's result depends on besides the job; the same for every job of a run."""

    checkpoint: str
    """Fingerprint of the checkpoint's tensors, configuration and tokenizer."""
    lora: str | None
    """Fingerprint of the merged LoRA."""
    dtype: str
    """Type of weights and activations: `bfloat16`, `float16` or `float32`."""
    precision: Precision | None = None
    """How matrices are stored in 8 bits; None if all weights are in the dtype."""
    generation_prompt: str
    """System prompt of t2i and edit jobs without one of their own."""
    interleave_prompt: str
    """System prompt of interleave jobs without one of their own."""

    def system_prompt(self, task: Task) -> str:
        """Returns the run's system prompt for a task; empty for a task without one."""
        match task.spec.prompt.system:
            case SystemPromptKind.GENERATION:
                return self.generation_prompt
            case SystemPromptKind.INTERLEAVE:
                return self.interleave_prompt
            case None:
                return ""

    @property
    def system_prompt_bytes(self) -> int:
        """UTF-8 bytes of the longer system prompt."""
        return max(len(self.generation_prompt.encode()), len(self.interleave_prompt.encode()))


def job_key(job: Job, identity: ModelIdentity, parents: Mapping[str, str] | None = None) -> str:
    """Returns the hash (64 hex digits) of everything that decides the job's pixels and text.

    The id, the place in the manifest, metadata, matrix and the paths of inputs are left out:
    renaming a job or moving its inputs does not make it another job. So is every setting at its
    neutral value (`declarations.stated`): a version that adds a setting keeps all keys.

    Args:
        job: The job.
        identity: The model.
        parents: The keys of the jobs that it starts from images of, by their ids.
    """
    prompt = job.system_prompt
    content = {
        "version": KEY_VERSION,
        "task": job.task,
        "prompt": job.prompt,
        "images": [_image_key(image, parents or {}) for image in job.images],
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
    # Later fields, which are in the key only if they are used.
    if identity.precision is not None:
        content["precision"] = identity.precision
    if job.history:
        content["history"] = job.history
    if job.judged_by is not None:
        content["function"] = asdict(job.judged_by)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def history_fields(job: Job) -> list[dict[str, str]]:
    """Returns the turns before a question as a manifest has them."""
    return [{"question": question, "answer": answer} for question, answer in job.history]


def parents_of(job: Job) -> tuple[str, ...]:
    """Returns the ids of the jobs whose images a job starts from, each once."""
    if not job.images:
        return ()
    return tuple(dict.fromkeys(image.output[0] for image in job.images if image.output))


def _image_key(image: InputImage, parents: Mapping[str, str]) -> str:
    if image.output is None:
        return image.key
    parent, index = image.output
    return f"@{parents[parent]}/{index}"


def folded_id(job_id: str) -> str:
    """Returns an id in the form in which a disk that ignores case and composition compares it."""
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
    by_function: bool = False
    """Whether the user's functions do the jobs, not an engine."""

    @property
    def image_tokens(self) -> int:
        """Tokens of one image; 0 for jobs that make none."""
        return 0 if self.drawing is None else self.drawing.resolution.image_tokens

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches whose prompts are read; only the conditional one if there are no images."""
        return (Branch.COND,) if self.drawing is None else self.drawing.branches

    def __str__(self) -> str:
        size = "" if self.drawing is None else f" {self.drawing.resolution}"
        return f"{self.task}{size}{' with thinking' if self.think else ''}" + (
            " by function" if self.by_function else ""
        )


def group_key(job: Job) -> GroupKey:
    """Returns the group a job belongs to."""
    by_function = job.judged_by is not None
    return GroupKey(task=job.task, think=job.think, drawing=job.drawing, by_function=by_function)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Jobs of one group that go through the engine together, in this order."""

    id: str
    """Derived from the members' keys, so a batch that runs again has the same id."""
    group: GroupKey
    jobs: tuple[Job, ...]
    keys: tuple[str, ...]
    """The job keys, one for each job."""


def batch_id(keys: tuple[str, ...]) -> str:
    """Returns the id (16 hex digits) of the batch with these members in this order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What the engine made for one job: images and text."""

    images: tuple[np.ndarray, ...] = ()
    """uint8 `[height, width, 3]`, in the order drawn."""
    text: str | None = None
    """The think text of a t2i or edit job, the text of an interleave job with an `<image>` for
    each image, or the answer to a question with the thoughts before it."""
    answer: str | None = None
    """The answer to a question: its text without thoughts."""
    choice_log_probabilities: tuple[float, ...] = ()
    """What the model gives each of a question's choices, in their order."""
    think_tokens: int = 0
    text_tokens: int = 0
    """Decoded tokens that are not think tokens."""
    finish_reason: FinishReason = FinishReason.COMPLETE


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedJob:
    """What the engine made for one job, with its images as the bytes of their files."""

    images: tuple[bytes, ...]
    """In the order drawn."""
    text: str | None
    """See `JobResult`."""
    answer: str | None
    choice_log_probabilities: tuple[float, ...]
    think_tokens: int
    text_tokens: int
    finish_reason: FinishReason
    image_phash: tuple[str, ...]
    """Perceptual hash of each image."""
    encode_s: float
    """Seconds that encoding took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job failed: an exception as text, because its frames would keep tensors alive."""

    type: str
    message: str
    traceback: str
    think_tokens: int = 0
    """Tokens that the job had decoded by then; they took time all the same."""
    text_tokens: int = 0
    """Likewise."""
    finish_reason: FinishReason | None = None
    """The finish reason of a job that failed because its text is truncated."""

    @classmethod
    def of(cls, error: BaseException, *, think_tokens: int = 0, text_tokens: int = 0) -> Failure:
        """Returns what to keep of an exception, even of one whose own text cannot be read.

        Texts that are too long, as of a user's function, lose their middle.
        """
        found = traceback.TracebackException.from_exception(error, compact=True)
        return cls(
            type=type(error).__name__,
            message=_writable(abridged(str(found), _MAX_MESSAGE)),
            traceback=_writable(abridged("".join(found.format()), _MAX_TRACEBACK)),
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
    """From the end of the device's last phase in the previous batch to the start of its first
    phase in this one; None if there was no such batch, or if it raised an error."""
    prefill_s: float = 0.0
    """Input images, prompts and re-encoded images through the understanding path."""
    think_s: float = 0.0
    """Decoding thoughts and other text."""
    denoise_s: float = 0.0
    num_denoise_steps: int = 0
    """Euler steps that ran, each for the jobs that share a pass."""
    num_kept_images: int = 0
    """Images of the results that were kept by an earlier run and took none of this time."""
    total_s: float = 0.0
    """Wall time of the generation; tok/s is measured by it."""
    peak_allocated_bytes: int = 0
    """Device memory; 0 on a CPU."""
    peak_reserved_bytes: int = 0
    """Device memory; 0 on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What became of a batch: one result for each job, in the batch's order."""

    results: tuple[JobResult | Failure, ...]
    """A failure for each job that failed while the rest of the batch did not."""
    metrics: BatchMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the log says about the engine that made a row."""

    identity: ModelIdentity
    model: str
    """As the user named it."""
    model_license: str | None
    """The licence that the checkpoint's model card names; None where it names none."""
    system_prompt_source: Mapping[Task, str]
    """Where the run's system prompt for each task was found."""
    device: str
    dtype: str
    attn_backend: str
    compile_s: float | None
    """Seconds of compiling kernels and trying them once, part of `load_s`; None without kernels."""
    vram_mode: VramMode | None
    """None where no weights are loaded."""
    budget_bytes: int | None
    torch_version: str
    load_s: float
    load_peak_allocated_bytes: int
    load_peak_reserved_bytes: int
    load_peak_rss_bytes: int
    refusals: tuple[str, ...] = ()
    """What people should know of jobs that do not fit the memory, which fail in their turn."""

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are loaded."""
        return self.vram_mode is not None
