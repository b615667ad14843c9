"""The columns of each task's rows, for every format: which there are, and of which kind.

What an export has of a job follows from the facts of its task (`tasks.TaskSpec`); no task is named
here. A column that the log has keeps its name, its type and its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import pyarrow as pa

from sensebatch.declarations import declared
from sensebatch.jobs import Sampling
from sensebatch.store.log import ROW_SCHEMA
from sensebatch.store.rows import SAMPLING_COLUMNS
from sensebatch.tasks import Output, Task, TaskSpec


class Kind(Enum):
    """What a column holds."""

    VALUE = auto()
    IMAGE = auto()
    IMAGES = auto()
    PARTS = auto()
    """Text and images in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of an export."""

    name: str
    kind: Kind = Kind.VALUE
    type: pa.DataType | None = None
    """The type of a value."""


TAGS = Column(name="tags", type=pa.list_(pa.string()))
TEXT = pa.string()

LOG_COLUMNS = (
    "seed",
    "width",
    "height",
    *sorted(SAMPLING_COLUMNS, key=ROW_SCHEMA.names.index),
    "think",
    "finish_reason",
    "model",
    "model_license",
    "checkpoint",
    "lora",
    "dtype",
    "precision",
    "matrix",
    "metadata",
    "key",
)
"""The log's columns that an export has, as far as a task has them. Its `model` is without the
folders of this machine."""


ANSWER_COLUMNS = ("history", "answer", "function", "choice_probabilities")
"""Those that it has of jobs that answer in text as well."""


@cache
def columns_of(task: Task) -> tuple[Column, ...]:
    """Returns the columns of a task's rows, in their order."""
    return (Column(name="id", type=TEXT), *_content(task.spec), TAGS, *_log_columns(task.spec))


def _content(spec: TaskSpec) -> Iterator[Column]:
    inputs = Column(name="input_images", kind=Kind.IMAGES)
    if spec.output is not Output.IMAGE:
        if spec.takes_images:
            yield inputs
        yield Column(name="prompt", type=TEXT)
        if spec.output is Output.IMAGES:
            yield Column(name="parts", kind=Kind.PARTS)
            return
        yield Column(name="text", type=TEXT)
        for name in ANSWER_COLUMNS:
            yield Column(name=name, type=ROW_SCHEMA.field(name).type)
        return
    if spec.takes_images:
        yield inputs
        yield Column(name="instruction", type=TEXT)
        yield Column(name="output", kind=Kind.IMAGE)
    else:
        yield Column(name="prompt", type=TEXT)
        yield Column(name="image", kind=Kind.IMAGE)
    # What the model thought before it drew.
    yield Column(name="text", type=TEXT)


def _log_columns(spec: TaskSpec) -> Iterator[Column]:
    settings = declared(Sampling)
    for name in LOG_COLUMNS:
        is_size = name in ("width", "height")
        if name in settings and not settings[name].setting.of(spec):
            continue
        if is_size and spec.drawing is None:
            continue
        yield Column(name=name, type=ROW_SCHEMA.field(name).type)


_WORDS = {
    pa.string(): "string",
    pa.bool_(): "bool",
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.float64(): "float64",
}
"""Arrow's types in the words of `datasets`."""


def feature(kind: pa.DataType) -> Mapping[str, Any]:
    """Returns the type of values as `datasets` writes it into files and cards."""
    if pa.types.is_list(kind):
        return {"feature": feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: feature(field.type) for field in kind}
    return {"dtype": _WORDS[kind], "_type": "Value"}
