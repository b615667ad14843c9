"""One attempt at one job: the row of the log, as the executor makes it and the state keeps it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

DONE = "done"
FAILED = "failed"
PENDING = "pending"

_TIMES = ("started_at", "finished_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What became of one try at one job; each field is a column of the log, in its order.

    docs/log.md says what each means and in which unit. Strings are empty and figures 0 or None
    where there is nothing to say.
    """

    run: str
    session: int
    job_id: str
    key: str
    task: str
    status: str
    attempt: int
    error_type: str | None = None
    error_message: str | None = None
    error_file: str | None = None
    prompt: str
    seed: int
    width: int
    height: int
    num_steps: int
    cfg_scale: float
    img_cfg_scale: float
    cfg_norm: str
    cfg_interval: tuple[float, float]
    timestep_shift: float
    think: bool
    num_input_images: int
    num_images: int = 0
    image_tokens: int = 0
    think_tokens: int = 0
    text_tokens: int = 0
    batch_id: str | None = None
    batch_size: int = 0
    shared_figures: bool = False
    queue_s: float
    load_s: float
    wait_s: float | None = None
    prefill_s: float = 0.0
    think_s: float = 0.0
    denoise_s: float = 0.0
    encode_s: float = 0.0
    total_s: float = 0.0
    num_kept_images: int | None = None
    step_s: float | None = None
    image_tok_per_s: float | None = None
    text_tok_per_s: float | None = None
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_rss_bytes: int
    load_peak_allocated_bytes: int
    load_peak_reserved_bytes: int
    load_peak_rss_bytes: int
    vram_mode: str
    budget_bytes: int | None
    attn_backend: str
    compile_s: float | None = None
    dtype: str
    precision: str | None
    device: str
    torch_version: str
    model: str
    checkpoint: str
    lora: str | None
    system_prompt_source: str
    image_paths: tuple[str, ...] = ()
    image_sha256: tuple[str, ...] = ()
    text_path: str | None = None
    text_sha256: str | None = None
    started_at: datetime
    finished_at: datetime
    source_file: str
    source_row: str
    metadata: str

    @property
    def outputs(self) -> tuple[str, ...]:
        """Paths, in the run's folder, of every file the attempt made for its job."""
        return self.image_paths if self.text_path is None else (*self.image_paths, self.text_path)


def attempt_to_json(attempt: Attempt) -> str:
    """Returns an attempt as the state keeps it."""
    values = {field.name: getattr(attempt, field.name) for field in fields(attempt)}
    for name in _TIMES:
        values[name] = values[name].isoformat()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception as text: keeping the exception would keep its frames and their tensors."""

    type: str
    message: str
    traceback: str
    think_tokens: int = 0
    """That the job had decoded before; they took their time all the same."""
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
