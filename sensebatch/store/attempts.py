"""One attempt at one job: the row of the log, as the executor makes it and the state keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Annotated, Any

DONE = "done"
FAILED = "failed"
PENDING = "pending"
BLOCKED = "blocked"
"""Status of a job that starts from an image of one that failed."""
HELD = "held"
"""Status of a try that is not needed so far, and of what starts from it."""
ELSEWHERE = "elsewhere"
"""Status of a job that another shard runs."""

_TIMES = ("started_at", "finished_at")


Int32 = Annotated[int, "int32"]
"""A number whose column has 32 bits; columns of plain `int` have 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt at one job; each field is a column of the log, in its order.

    This is the one declaration of the columns: `columns` makes the schema from it, and the table in
    docs/log.md is written from the text under the fields by `python -m tests.store.documented`. A
    new column may be None, since the rows of earlier versions do not have it.
    """

    run: str
    """The run folder's id: 12 random hex digits, made with the folder."""
    session: Int32
    """Number of the process that made the row, in this folder, from 1."""
    worker: Int32 | None
    """Number of the worker that did the job, from 0; 0 for a run with one engine. Null in rows of
    functions, which run outside the workers, and of versions that had no workers."""
    node: str | None
    """Name of the host that the worker ran on. Null where `worker` is."""
    job_id: str
    """The job's id in the manifest."""
    key: str
    """Hash (64 hex digits) of everything that decides the job's pixels and text."""
    task: str
    """`t2i`, `edit`, `interleave` or `ask`."""
    status: str
    """`done` or `failed`, of this attempt."""
    attempt: Int32
    """Number of the attempt at this job, from 1, over all sessions."""
    error_type: str | None = None
    """Type of the error of a failed attempt; else null."""
    error_message: str | None = None
    """Message of that error; else null."""
    error_file: str | None = None
    """Path, in the folder, of the traceback; else null."""
    finish_reason: str | None = None
    """Why the job's text ended: `complete`, `token_limit` (cut at `max_think_tokens` or
    `max_new_tokens`), `max_images` (the job has all images it may have), `stopped_empty` (a story
    without an image) or `unfinished_thought` (a text that ended within its thought). `complete` for
    a job without text. Null for a failed attempt, unless `--fail-truncated` made it one, and in
    rows of versions that did not record it."""
    prompt: str
    """The job's prompt, or its question."""
    history: str | None = None
    """The questions before a question, each with its answer, as JSON; null where there are none."""
    seed: int
    """Seed of the job's noise."""
    width: Int32 | None
    """Width in pixels of every image the job makes; null if it makes none."""
    height: Int32 | None
    """Height in pixels of every image the job makes; null if it makes none."""
    num_steps: Int32
    """Steps for one image."""
    cfg_scale: float
    """Guidance scale of the text."""
    img_cfg_scale: float
    """Guidance scale of the input images; not used by t2i."""
    cfg_norm: str
    """`none`, `global`, `channel` or `cfg_zero_star`."""
    cfg_interval: tuple[float, float]
    """Two timesteps between which guidance is applied."""
    timestep_shift: float
    """Shift of the timestep schedule."""
    solver: str | None = None
    """`euler`, `ab2` or `dpm2m`; null in rows of versions that had only Euler's steps."""
    timesteps: tuple[float, ...] | None = None
    """The timesteps between 0 and 1, if they were given instead of a shift; else empty, and null in
    rows of versions without it."""
    guidance_stride: Int32 | None = None
    """Guidance was evaluated in every n-th of its steps; null in rows of versions without it."""
    layer_stride: Int32 | None = None
    """Every layer was evaluated in every n-th step; null in rows of versions without it."""
    think: bool
    """Whether the model thinks before it draws or answers."""
    choices: tuple[str, ...] | None = None
    """The answers that a question allows; empty if it is answered freely, null for other tasks."""
    function: str | None = None
    """Your function that judged instead of the model, `module:function`
    (manifest.md#functions-of-your-own); else null."""
    do_sample: bool | None = None
    """Whether the tokens of an answer are drawn at random; null for other tasks."""
    temperature: float | None = None
    """What logits are divided by before a token is drawn; null for other tasks."""
    top_p: float | None = None
    """Total probability of the tokens that are drawn from; null for other tasks."""
    top_k: Int32 | None = None
    """How many of the most probable tokens are drawn from, 0 for all; null for other tasks."""
    repetition_penalty: float | None = None
    """How much less probable the tokens become that the answer already has; null for other
    tasks."""
    num_input_images: Int32
    """Number of input images of the job."""
    input_image_paths: tuple[str, ...] | None = None
    """Paths of the input images, as the manifest led to them; `FILE#ROW/COLUMN/INDEX` for one
    inside a Parquet manifest. Null in rows of versions that did not record them."""
    input_image_sha256: tuple[str, ...] | None = None
    """SHA-256 of the file of each input image. Null in rows of versions that did not record it."""
    num_images: Int32 = 0
    """Number of images the attempt made; 0 if it failed."""
    image_tokens: int = 0
    """Image tokens (squares of 32 by 32 pixels) of these images."""
    think_tokens: int = 0
    """Tokens of the thoughts of a t2i, edit or ask job, even if the job failed afterwards."""
    text_tokens: int = 0
    """Tokens of the text of an interleave job, its thoughts included, or of an answer, even if the
    job failed afterwards."""
    batch_id: str | None = None
    """Hash (16 hex digits) of the keys of the batch's jobs in their order; null if the job failed
    before a batch began."""
    batch_size: Int32 = 0
    """Jobs in the batch; 0 if there was none."""
    shared_figures: bool = False
    """Whether the columns marked *batch* are figures of several jobs together. The same figures
    then stand in the row of each of these jobs: count them once for each (`session`, `batch_id`,
    `started_at`), and never sum them over rows."""
    queue_s: float
    """Seconds from the start of the session's run to the start of the batch. *Batch.*"""
    load_s: float
    """Seconds the worker took to load the model; without workers, the same in all rows of a
    session."""
    wait_s: float | None = None
    """Seconds the worker's device waited for the batch: from the end of its last phase in the
    worker's previous batch to the start of its first phase in this one. That includes what follows
    a batch's last step (images copied back) and what precedes the next one's first (inputs that are
    not ready, a writer that is not done, recording the start of the batch). Null for a worker's
    first batch in a session, for a batch that raised an error and the one after it, and in rows of
    versions that did not measure it. *Batch.*"""
    prefill_s: float = 0.0
    """Seconds of input images, prompts and re-encoded images. Prompts that were read while another
    batch was drawn are in `total_s` of that one. *Batch.*"""
    think_s: float = 0.0
    """Seconds of decoding text, think or interleave. *Batch.*"""
    denoise_s: float = 0.0
    """Seconds of denoising, without what was read for the next batch between two steps; images
    that an interrupted run had kept (resume.md) take none. *Batch.*"""
    encode_s: float = 0.0
    """Seconds of encoding and writing this job's files, in the background; not part of
    `total_s`."""
    total_s: float = 0.0
    """Wall seconds of the generation. For a batch that was interrupted: of what was done after it
    was resumed. *Batch.*"""
    num_kept_images: Int32 | None = None
    """Images of the batch that were not drawn in these `total_s`, but kept by an interrupted or
    split batch before it (resume.md). `report` counts such a batch's images and seconds, but
    measures no speed by them. Null if the job failed before a batch began, and in rows of versions
    that did not record it. *Batch.*"""
    step_s: float | None = None
    """Seconds of one denoising step of the jobs that share a pass, which are the whole batch unless
    memory.md says otherwise; null without one. *Batch.*"""
    image_tok_per_s: float | None = None
    """Image tokens of all images of the batch divided by `total_s`: the published tok/s. Null
    without images, and if some of them were kept. *Batch.*"""
    text_tok_per_s: float | None = None
    """Think and text tokens of all jobs of the batch divided by `think_s`; null without text.
    *Batch.*"""
    peak_allocated_bytes: int = 0
    """Most device memory allocated during the batch; 0 on a CPU. *Batch.*"""
    peak_reserved_bytes: int = 0
    """Most device memory reserved during the batch; 0 on a CPU. *Batch.*"""
    peak_rss_bytes: int
    """Most host memory the worker's process had held resident by the time of the row, the pages of
    mapped files (libraries) included. The page cache of the checkpoint's files is not part of
    it."""
    load_peak_allocated_bytes: int
    """Most device memory allocated while the model was loaded."""
    load_peak_reserved_bytes: int
    """Most device memory reserved while the model was loaded."""
    load_peak_rss_bytes: int
    """Most host memory the process had held resident by the end of the load."""
    vram_mode: str
    """Where weights were kept: `full`, `fast`, `balanced` or `low` (memory.md). It changes within a
    run if memory ran out. Empty in rows of functions that judged before any weights were loaded."""
    budget_bytes: int | None
    """Device memory the run was allowed (`--vram-budget` or `--max-memory`); null without a
    limit."""
    attn_backend: str
    """Attention kernel: `cudnn`, `flash` or `sdpa`. Empty where `vram_mode` is."""
    compile_s: float | None = None
    """Seconds of compiling kernels and trying them once, part of `load_s`; null if nothing was
    compiled (`--no-compile`, a CPU, no Triton)."""
    dtype: str
    """Type of weights and activations."""
    precision: str | None
    """`fp8` or `fp8-all` if matrices are float8, `int8` or `int8-all` if they are int8 (memory.md);
    null if all weights are in the dtype."""
    device: str
    """The device, as torch names it. Empty where `vram_mode` is."""
    torch_version: str
    """Version of torch. Empty where `vram_mode` is."""
    model: str
    """The checkpoint, as the user named it."""
    model_license: str | None = None
    """The licence that the model card names; null if it names none, and in rows of versions that
    did not record it."""
    checkpoint: str
    """Fingerprint of the checkpoint's tensors, configuration and tokenizer."""
    lora: str | None
    """Fingerprint of the merged LoRA; null without one."""
    system_prompt_source: str
    """Where the job's system prompt comes from: `job`, or the place where the run's was found."""
    image_paths: tuple[str, ...] = ()
    """Paths of the images, in the folder, in the order drawn."""
    image_sha256: tuple[str, ...] = ()
    """SHA-256 of each of the images' files."""
    dropped: bool | None = None
    """True if the files were removed after the image was rejected (`--drop-rejected`); else
    null."""
    image_phash: tuple[str, ...] | None = None
    """Perceptual hash of each image, 16 hex digits: images that look alike differ in few of its 64
    bits (dataset.md). Null in rows of versions that did not record it, until `sensebatch hash`."""
    text_path: str | None = None
    """Path of the think or interleave text or of the answer; null without one."""
    text_sha256: str | None = None
    """SHA-256 of the text's file."""
    text_chars: Int32 | None = None
    """Characters of the text; null without one, and in rows of versions that did not record it."""
    answer: str | None = None
    """The answer to a question, without thoughts; null for other tasks."""
    choice_probabilities: tuple[float, ...] | None = None
    """Probability of each of `choices`; they sum to 1. Empty without choices, null in rows of
    versions that had none."""
    choice_log_probabilities: tuple[float, ...] | None = None
    """Logarithm of the probability that the model itself gives each of `choices`
    (manifest.md#questions), -1000 for a function's score of 0. Empty or null as above."""
    started_at: datetime
    """UTC, when the batch began."""
    finished_at: datetime
    """UTC, when the files of the batch were in place."""
    source_file: str
    """The manifest, as the user named it."""
    source_row: str
    """Line or row of the job in the manifest."""
    metadata: str
    """The job's tags and metadata, as a JSON object."""
    matrix: str | None = None
    """The values of the row's matrix that made this job of it, as a JSON object; null in rows of
    versions that did not record it."""

    @property
    def is_truncated(self) -> bool:
        """Whether it failed because its text is truncated, which no attempt would change."""
        return self.status == FAILED and self.finish_reason is not None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Paths, in the run's folder, of every file the attempt made for its job."""
        return self.image_paths if self.text_path is None else (*self.image_paths, self.text_path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What later attempts and manifests make of a row; the last columns of `log.parquet`.

    They change, so that they are in no row that the state keeps and in no finished part of the log.
    """

    current: bool | None
    """Whether the row says what its job is now. False if the job was tried again since, was edited
    and is still to be drawn, or if its files are missing: the row is superseded. Null in logs of
    versions that did not mark rows."""
    in_manifest: bool | None
    """Whether the job is still in the manifests. If not, its files are still there
    (`sensebatch prune` removes them). Null in logs of versions that did not mark rows."""


def attempt_to_json(attempt: Attempt) -> str:
    """Returns an attempt as the state keeps it."""
    return row_to_json({field.name: getattr(attempt, field.name) for field in fields(attempt)})


def row_to_json(row: Mapping[str, Any]) -> str:
    """Returns a row of the log as the state keeps it."""
    values = {**row, **{name: row[name].isoformat() for name in _TIMES}}
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)


def row_from_json(text: str) -> dict[str, Any]:
    """Returns an attempt as a row of the log: a value for each column."""
    values: dict[str, Any] = json.loads(text)
    for name in _TIMES:
        values[name] = datetime.fromisoformat(values[name])
    return values


def digests_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (path in the run's folder, SHA-256) of every file that an attempt made."""
    files = list(zip(row["image_paths"], row["image_sha256"], strict=True))
    return files if row["text_path"] is None else [*files, (row["text_path"], row["text_sha256"])]
