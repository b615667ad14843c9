"""The fields of a manifest: their types, their ranges and the tasks they belong to.

Settings come from their declarations. The models reject unknown names and wrong types, and convert
nothing. A field that is None was not given; defaults are in `config.py`.
"""

from __future__ import annotations

import operator
import re
from enum import Enum
from functools import reduce
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from annotated_types import Len
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    create_model,
)
from pydantic_core import PydanticCustomError

from sensebatch.config import TaskDefaults
from sensebatch.declarations import declared, item_of_any_number
from sensebatch.jobs import COUNT, MAX_SEED, Sampling
from sensebatch.resolutions import MAX_SIDE
from sensebatch.tasks import Output, Task, TaskSpec

SKIP_RESIZE = "none"
"""The `input_max_pixels` that leaves inputs as they are; the readers turn null into it."""

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Count = Annotated[int, COUNT]


class StrictModel(BaseModel):
    """Accepts values that already have the right type, and known names, alone."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    def given(self, name: str) -> Any:
        """Returns the value of a declared setting; None if it was not given."""
        return getattr(self, name)


class ImageStruct(StrictModel):
    """An image as the Hugging Face `datasets` library stores it: its bytes, its path, or both."""

    content: bytes | None = Field(
        None, alias="bytes", description="The encoded image; Parquet only."
    )
    path: str | None = Field(None, description="Used if there are no bytes.")


def _image_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<path>"
    if isinstance(value, dict | ImageStruct):
        return "<struct>"
    return "<list>" if isinstance(value, list) else None


_PIXELS_WORD = rf"^(auto|{SKIP_RESIZE}|[0-9]{{1,10}})$"


def _pixels_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<word>" if re.fullmatch(_PIXELS_WORD, value) else None
    return "<number>" if type(value) is int else None


Image = Annotated[
    Annotated[str, Tag("<path>")] | Annotated[ImageStruct, Tag("<struct>")],
    Discriminator(
        _image_tag,
        custom_error_type="wrong_type",
        custom_error_message="a path, or a mapping of bytes and path",
    ),
]
"""One image."""

Images = Annotated[
    Annotated[str, Tag("<path>")]
    | Annotated[ImageStruct, Tag("<struct>")]
    | Annotated[list[Image], Tag("<list>")],
    Discriminator(
        _image_tag,
        custom_error_type="wrong_type",
        custom_error_message="a path, a mapping of bytes and path, or a list of these",
    ),
]
"""One image or several."""

InputMaxPixels = Annotated[
    Annotated[Count, Tag("<number>")] | Annotated[str, Tag("<word>"), Field(pattern=_PIXELS_WORD)],
    Discriminator(
        _pixels_tag,
        custom_error_type="wrong_type",
        custom_error_message="a number of pixels, 'auto' or 'none'",
    ),
]
"""A number of pixels, also as text, or one of the two words."""


class Turn(BaseModel):
    """One turn of an upstream `conversations` list, whose other names are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    speaker: str = Field(alias="from", description="`human` or `user`; `system`.")
    value: str = Field(description="What is said.")


class Exchange(StrictModel):
    """A question that was asked before, and what was answered."""

    question: str = Field(min_length=1, description="What was asked.")
    answer: str = Field(description="What was answered.")


class _RunFields(StrictModel):
    """The fields that are not settings of a task."""

    resolution: str | None = Field(
        None, description="An aspect ratio of the model's table (`16:9`), or `WIDTHxHEIGHT`."
    )
    width: Side | None = Field(None, description="Width of the image in pixels, a multiple of 32.")
    height: Side | None = Field(
        None, description="Height of the image in pixels, a multiple of 32."
    )
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = Field(
        None, description="One job for each of these seeds."
    )
    n: Count | None = Field(None, description="The number of jobs, with seed, seed + 1 and so on.")
    system_prompt: str | None = Field(
        None, description="The system prompt in place of the model's own."
    )


SETTINGS = {**declared(TaskDefaults), **declared(Sampling)}
"""The settings of a job by name."""


def _plain_type(kind: Any) -> Any:
    """Returns a declared type as files have it: the words of an enum, a list for a tuple."""
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
        return Annotated[(_plain_type(kind), *limits)]
    if (item := item_of_any_number(kind)) is not None:
        return list.__class_getitem__(item)
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        return Annotated[list.__class_getitem__(item), Len(1 + len(rest), 1 + len(rest))]
    if get_origin(kind) is UnionType:
        return reduce(operator.or_, map(_plain_type, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return Literal.__getitem__(tuple(member.value for member in kind))
    return kind


def _setting_fields() -> dict[str, Any]:
    types = {name: _plain_type(setting.type) for name, setting in SETTINGS.items()}
    types["input_max_pixels"] = InputMaxPixels
    some_timesteps: Any = types["timesteps"]
    types["timesteps"] = Annotated[some_timesteps, Len(1)]
    return {
        name: (kind | None, Field(None, description=SETTINGS[name].setting.help))
        for name, kind in types.items()
    }


_TASK_FIELD: Any = (
    Literal[tuple(task.value for task in Task)] | None,
    Field(
        None,
        description="What the job makes; if not given, ask where there is a question, edit where "
        "there are images, else t2i.",
    ),
)

if TYPE_CHECKING:
    _SettingFields = _RunFields
else:
    _SettingFields = create_model(
        "_SettingFields", __base__=_RunFields, task=_TASK_FIELD, **_setting_fields()
    )


class Check(StrictModel):
    """A question about an image, and the answer that speaks for it."""

    ask: str = Field(
        min_length=1,
        description="The question; `{prompt}` is the prompt, names of the matrix are values.",
    )
    choices: Annotated[list[str], Field(min_length=2)] = Field(
        description="The answers to choose from, in the model's own words."
    )
    expected: str = Field(alias="is", description="The answer that speaks for the image.")
    at_least: float = Field(
        0.5, gt=0, le=1, description="The probability that this answer must have."
    )

    @property
    def mistake(self) -> str | None:
        """What is wrong with it that no type says; None if nothing is."""
        if self.expected in self.choices:
            return None
        known = ", ".join(self.choices)
        return f"expected one of the choices ({known}) for is, found {self.expected!r}"


def _check_tag(value: object) -> str | None:
    if isinstance(value, dict | Check):
        return "<check>"
    return "<list>" if isinstance(value, list) else None


Checks = Annotated[
    Annotated[Check, Tag("<check>")] | Annotated[list[Check], Field(min_length=1), Tag("<list>")],
    Discriminator(
        _check_tag,
        custom_error_type="wrong_type",
        custom_error_message="a mapping of ask, choices, is and at_least, or a list of these",
    ),
]
"""One check or several."""


def listed(checks: Check | list[Check] | None) -> tuple[Check, ...]:
    """Returns the checks of a field, of which one needs no list."""
    return (checks,) if isinstance(checks, Check) else tuple(checks or ())


class SharedFields(_SettingFields):
    """The fields that a job and a manifest's `defaults` can both have."""

    accept: Checks | None = Field(
        None, description="Questions about the image, all of which must be answered as said."
    )
    keep: Count | None = Field(
        None, description="How many accepted images are wanted; 1 if not given."
    )
    tries: Count | None = Field(
        None,
        description="The most images that are drawn for them, with one seed each; three for each "
        "that is wanted, if not given.",
    )
    tags: list[str] | None = Field(None, description="Words that are passed through to the log.")
    metadata: dict[str, JsonValue] | None = Field(
        None, description="Anything that JSON can hold; passed through to the log."
    )


class JobFields(SharedFields):
    """One job of a manifest, or several that differ in their seed or the values of a matrix."""

    id: str | None = Field(
        None, description="Names the job's files; a hash of the job's fields if not given."
    )
    prompt: str | None = Field(None, description="What to draw, to change or to ask; required.")
    question: str | None = Field(None, description="Another name for `prompt`, of questions.")
    history: list[Exchange] | None = Field(
        None, description="The questions before this one, in order, each with its answer."
    )
    image: Images | None = Field(
        None,
        description="The input image, or a list of them: paths, or `@ID` for an image that another "
        "job makes, `@ID/N` for image N of several, counted from 0.",
    )
    images: Images | None = Field(None, description="Another name for `image`.")
    matrix: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = Field(
        None, description="Lists by name; there is one job for each combination of values."
    )
    type: str | None = Field(
        None, description="Upstream name of the task; any other word goes to the metadata."
    )
    think_mode: bool | None = Field(None, description="Upstream name of `think`.")
    conversations: Annotated[list[Turn], Field(min_length=1)] | None = Field(
        None, description="Upstream form of the prompt and of history: turns of {from, value}."
    )


if TYPE_CHECKING:
    DefaultsFields = SharedFields
else:
    DefaultsFields = create_model(
        "DefaultsFields",
        __base__=SharedFields,
        __doc__="What jobs get unless they say otherwise: all of them, or those of one task.",
        **{
            task.value: (SharedFields | None, Field(None, description=f"For {task} jobs only."))
            for task in Task
        },
    )


def _number(value: object) -> object:
    # To Python, and so to pydantic, true is 1.
    if value is True:
        raise PydanticCustomError("wrong_type", "1")
    return value


class ManifestHeader(StrictModel):
    """A YAML manifest without its jobs."""

    version: Annotated[Literal[1], BeforeValidator(_number)] = Field(
        description="The version of the format."
    )
    name: str | None = Field(
        None, description="Names the run's folder; the file's stem if not given."
    )
    defaults: DefaultsFields | None = Field(
        None, description="What jobs get unless they say otherwise."
    )


class ManifestFields(ManifestHeader):
    """A YAML manifest."""

    jobs: Annotated[list[JobFields], Field(min_length=1)]


IMAGE_FIELDS = frozenset({"image", "images"})
SIZE_FIELDS = frozenset({"resolution", "width", "height"})
EXPANSION_FIELDS = frozenset({"matrix", "seeds", "n"})
PASSED_THROUGH = frozenset({"tags", "metadata"})
QUESTION_FIELDS = frozenset({"question", "history"})
ACCEPT_FIELDS = frozenset({"accept", "keep", "tries"})

JOB_FIELD_NAMES = tuple(JobFields.model_fields)
DEFAULTS_FIELD_NAMES = tuple(DefaultsFields.model_fields)
SHARED_FIELD_NAMES = tuple(SharedFields.model_fields)


def _foreign_fields(spec: TaskSpec) -> frozenset[str]:
    foreign = {name for name, setting in SETTINGS.items() if not setting.setting.of(spec)}
    if "think" in foreign:
        foreign.add("think_mode")
    if not spec.takes_images:
        foreign |= IMAGE_FIELDS
    foreign |= SIZE_FIELDS if spec.drawing is None else QUESTION_FIELDS
    if spec.output is not Output.IMAGE:
        foreign |= ACCEPT_FIELDS
    return frozenset(foreign)


FOREIGN_FIELDS = {task: _foreign_fields(task.spec) for task in Task}
"""The fields that a task does not have."""


def manifest_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a YAML manifest."""
    schema = ManifestFields.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
