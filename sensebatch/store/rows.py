"""What a row of the log says: a job, its result and the figures of its batch, joined. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sensebatch.declarations import declared, plain
from sensebatch.jobs import (
    BatchMetrics,
    EngineInfo,
    Failure,
    FinishReason,
    Job,
    Sampling,
    group_key,
    history_fields,
)
from sensebatch.store.attempts import DONE, FAILED, Attempt
from sensebatch.store.state import StoredJob

_DEFAULTS = {column.name: column.default for column in fields(Attempt)}
SAMPLING_COLUMNS = {n: setting for n, setting in declared(Sampling).items() if n in _DEFAULTS}
"""The sampling settings that are columns of the log."""
OPTIONAL_COLUMNS = {name for name in SAMPLING_COLUMNS if _DEFAULTS[name] is None}
"""Those of them that are null for tasks without the setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenJob:
    """What the files of a job came to."""

    image_paths: tuple[str, ...] = ()
    image_sha256: tuple[str, ...] = ()
    text_path: str | None = None
    text_sha256: str | None = None
    answer: str | None = None
    choice_log_probabilities: tuple[float, ...] = ()
    think_tokens: int = 0
    text_tokens: int = 0
    text_chars: int | None = None
    image_phash: tuple[str, ...] = ()
    finish_reason: FinishReason | None = None
    encode_s: float = 0.0
    failure: Failure | None = None
    error_file: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowContext:
    """What all rows of a process have in common, as far as one worker ran their jobs."""

    run: str
    session: int
    worker: int
    node: str
    info: EngineInfo


def job_columns(context: RowContext, stored: StoredJob) -> dict[str, Any]:
    """Returns the columns that say what was to be done and by what."""
    job, info = stored.job, context.info
    own_prompt = job.system_prompt is not None
    return {
        "run": context.run,
        "session": context.session,
        "worker": None if job.judged_by else context.worker,
        "node": None if job.judged_by else context.node,
        "job_id": job.id,
        "key": stored.key,
        "task": job.task.value,
        "attempt": stored.attempts + 1,
        "prompt": job.prompt,
        "history": json.dumps(history_fields(job), ensure_ascii=False) if job.history else None,
        "seed": job.seed,
        "width": None if job.resolution is None else job.resolution.width,
        "height": None if job.resolution is None else job.resolution.height,
        **{
            name: plain(getattr(job.sampling, name))
            for name, setting in SAMPLING_COLUMNS.items()
            if name not in OPTIONAL_COLUMNS or setting.setting.of(job.task.spec)
        },
        "think": job.think,
        "function": None if job.judged_by is None else job.judged_by.function,
        "num_input_images": len(job.images),
        "input_image_paths": tuple(image.place for image in job.images),
        "input_image_sha256": tuple(image.sha256 for image in job.images),
        "load_s": info.load_s,
        "load_peak_allocated_bytes": info.load_peak_allocated_bytes,
        "load_peak_reserved_bytes": info.load_peak_reserved_bytes,
        "load_peak_rss_bytes": info.load_peak_rss_bytes,
        "vram_mode": info.vram_mode or "",
        "budget_bytes": info.budget_bytes,
        "attn_backend": info.attn_backend,
        "compile_s": info.compile_s,
        "dtype": info.dtype,
        "precision": info.identity.precision,
        "device": info.device,
        "torch_version": info.torch_version,
        "model": info.model,
        "model_license": info.model_license,
        "checkpoint": info.identity.checkpoint,
        "lora": info.identity.lora,
        "system_prompt_source": "job" if own_prompt else info.system_prompt_source[job.task],
        "source_file": job.source.file,
        "source_row": job.source.row,
        "metadata": json.dumps(dict(job.metadata), ensure_ascii=False, sort_keys=True),
        "matrix": json.dumps(dict(job.matrix), ensure_ascii=False),
    }


def job_figures(stored: StoredJob, written: WrittenJob) -> dict[str, Any]:
    """Returns the columns that say what became of one job."""
    failure = written.failure
    num_images = len(written.image_paths)
    return {
        "status": DONE if failure is None else FAILED,
        "error_type": None if failure is None else failure.type,
        "error_message": None if failure is None else failure.message,
        "error_file": written.error_file,
        "finish_reason": written.finish_reason,
        "num_images": num_images,
        "image_tokens": num_images * group_key(stored.job).image_tokens,
        "think_tokens": written.think_tokens,
        "text_tokens": written.text_tokens,
        "encode_s": written.encode_s,
        "image_paths": written.image_paths,
        "image_sha256": written.image_sha256,
        "image_phash": written.image_phash,
        "text_path": written.text_path,
        "text_sha256": written.text_sha256,
        "text_chars": written.text_chars,
        "answer": written.answer,
        "choice_log_probabilities": written.choice_log_probabilities,
        "choice_probabilities": _shares(written.choice_log_probabilities),
    }


def truncation(job: Job, reason: FinishReason) -> str:
    """Returns what is wrong with the text of a job that is not complete, and what may help."""
    limit = job.task.spec.text.limit
    found = {
        FinishReason.TOKEN_LIMIT: f"one cut at {limit} ({getattr(job.sampling, limit)})",
        FinishReason.STOPPED_EMPTY: "one that ended without an image",
        FinishReason.UNFINISHED_THOUGHT: "one that ended within its thought",
    }[reason]
    return f"expected a complete text, found {found}; without --fail-truncated the job is done"


def batch_figures(
    metrics: BatchMetrics, jobs: Sequence[StoredJob], written: Sequence[WrittenJob]
) -> dict[str, Any]:
    """Returns the columns that the jobs of a batch share.

    Source: tok/s as the published summary counts it, image tokens by the generation's wall time.
    """
    num_images = sum(len(job.image_paths) for job in written)
    image_tokens = num_images * group_key(jobs[0].job).image_tokens
    text_tokens = sum(w.think_tokens + w.text_tokens for w in written)
    return {
        "batch_size": len(jobs),
        "shared_figures": len(jobs) > 1,
        "wait_s": metrics.wait_s,
        "prefill_s": metrics.prefill_s,
        "think_s": metrics.think_s,
        "denoise_s": metrics.denoise_s,
        "total_s": metrics.total_s,
        "num_kept_images": metrics.num_kept_images,
        "step_s": _ratio(metrics.denoise_s, metrics.num_denoise_steps),
        "image_tok_per_s": (
            None if metrics.num_kept_images else _ratio(image_tokens, metrics.total_s)
        ),
        "text_tok_per_s": _ratio(text_tokens, metrics.think_s),
        "peak_allocated_bytes": metrics.peak_allocated_bytes,
        "peak_reserved_bytes": metrics.peak_reserved_bytes,
    }


def _shares(log_probabilities: Sequence[float]) -> tuple[float, ...]:
    """Returns probabilities that are in the same proportion and sum to 1."""
    most = max(log_probabilities, default=0.0)
    weights = [math.exp(value - most) for value in log_probabilities]
    return tuple(weight / math.fsum(weights) for weight in weights)


def _ratio(amount: float, per: float) -> float | None:
    return amount / per if amount > 0 and per > 0 else None


def early_failure(
    context: RowContext,
    stored: StoredJob,
    written: WrittenJob,
    *,
    queue_s: float,
    at: datetime,
    rss_bytes: int,
) -> Attempt:
    """Returns the row of a job that failed before a batch could begin."""
    return Attempt(
        **job_columns(context, stored),
        **job_figures(stored, written),
        queue_s=queue_s,
        peak_rss_bytes=rss_bytes,
        started_at=at,
        finished_at=at,
    )
