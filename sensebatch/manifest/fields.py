"""The fields of a manifest: their types and ranges, and which task they belong to.

These models are the edge: they reject unknown names and wrong types and convert nothing. A field
that is None was not given. Defaults are not stated here but in `config.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

from sensebatch.jobs import MAX_COUNT, MAX_SEED
from sensebatch.tasks import Output, SizeRule, Task, TaskSpec

SKIP_RESIZE = "none"
"""`input_max_pixels` that leaves the inputs as they are; the readers write null as this."""

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Side = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Scale = Annotated[float, Field(ge=0)]
Timestep = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TaskName = Literal["t2i", "edit", "interleave"]


class StrictModel(BaseModel):
    """Takes a value only if it already has the right type; refuses unknown names."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ImageStruct(StrictModel):
    """A picture as the Hugging Face `datasets` library stores it: its bytes, its path, or both."""

    content: bytes | None = Field(
        None, alias="bytes", description="The encoded picture; Parquet only."
    )
    path: str | None = Field(None, description="Used where there are no bytes.")


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
"""One picture."""

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
"""One picture or several."""

InputMaxPixels = Annotated[
    Annotated[Count, Tag("<number>")] | Annotated[str, Tag("<word>"), Field(pattern=_PIXELS_WORD)],
    Discriminator(
        _pixels_tag,
        custom_error_type="wrong_type",
        custom_error_message="a number of pixels, 'auto' or 'none'",
    ),
]
"""Pixels, as a number or in digits, or one of the two words."""


class Turn(BaseModel):
    """One turn of an upstream `conversations` list; other names in it are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    speaker: str = Field(alias="from", description="`human` or `user`; `system`.")
    value: str = Field(description="What is said.")


class SharedFields(StrictModel):
    """What a job and a manifest's `defaults` can both say."""

    task: TaskName | None = Field(
        None, description="What the job makes; without it, edit where images are given, else t2i."
    )
    resolution: str | None = Field(
        None, description="An aspect ratio of the model's table (`16:9`), or `WIDTHxHEIGHT`."
    )
    width: Side | None = Field(None, description="Of the picture in pixels, a multiple of 32.")
    height: Side | None = Field(None, description="Of the picture in pixels, a multiple of 32.")
    seed: Seed | None = Field(None, description="Of the job's own random generator.")
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = Field(
        None, description="One job for each of these seeds."
    )
    n: Count | None = Field(None, description="So many jobs, with seed, seed + 1 and so on.")
    think: bool | None = Field(None, description="Whether the model writes a plan first.")
    system_prompt: str | None = Field(None, description="In place of the model's own.")
    num_steps: Count | None = Field(None, description="Steps from noise to picture.")
    cfg_scale: Scale | None = Field(None, description="Guidance towards the prompt.")
    img_cfg_scale: Scale | None = Field(None, description="Guidance towards the input images.")
    cfg_norm: Literal["none", "global", "channel", "cfg_zero_star"] | None = Field(
        None, description="How the guided velocity is rescaled; `cfg_zero_star` is for t2i only."
    )
    cfg_interval: Annotated[list[Timestep], Field(min_length=2, max_length=2)] | None = Field(
        None, description="First and last timestep at which guidance is applied."
    )
    timestep_shift: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Shift of the timesteps towards noise."
    )
    target_pixels: Count | None = Field(
        None, description="Pixels of the picture, in the aspect ratio of the first input."
    )
    input_max_pixels: InputMaxPixels | None = Field(
        None,
        description="Pixels that inputs are brought to first; `auto` goes by their number, "
        "`none` or null leaves them as they are.",
    )
    max_think_tokens: Count | None = Field(None, description="Longest plan.")
    max_images: Count | None = Field(None, description="Most pictures of the job.")
    max_new_tokens: Count | None = Field(None, description="Most text tokens of the job.")
    tags: list[str] | None = Field(None, description="Words passed through to the log.")
    metadata: dict[str, JsonValue] | None = Field(
        None, description="Anything JSON can hold, passed through to the log."
    )


class JobFields(SharedFields):
    """One job of a manifest, or several of them that differ in their seed or a matrix."""

    id: str | None = Field(
        None, description="Names the job's files; without it, a hash of what the job says."
    )
    prompt: str | None = Field(None, description="What to draw or to change; required.")
    image: Images | None = Field(None, description="The input picture, or a list of them.")
    images: Images | None = Field(None, description="Another name of `image`.")
    matrix: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = Field(
        None, description="Lists by name; one job for each combination of their values."
    )
    type: str | None = Field(
        None, description="Upstream name: a task, else a word kept in the metadata."
    )
    think_mode: bool | None = Field(None, description="Upstream name of `think`.")
    conversations: Annotated[list[Turn], Field(min_length=1)] | None = Field(
        None, description="Upstream form of the prompt: turns of {from, value}."
    )


class DefaultsFields(SharedFields):
    """What jobs get that do not say otherwise: all of them, or those of one task."""

    t2i: SharedFields | None = Field(None, description="For t2i jobs only.")
    edit: SharedFields | None = Field(None, description="For edit jobs only.")
    interleave: SharedFields | None = Field(None, description="For interleave jobs only.")


class ManifestHeader(StrictModel):
    """A YAML manifest but for its jobs."""

    version: Literal[1] = Field(description="Of this format.")
    name: str | None = Field(None, description="Names the run's folder; else the file's stem.")
    defaults: DefaultsFields | None = Field(None, description="What jobs get that are silent.")


class ManifestFields(ManifestHeader):
    """A YAML manifest."""

    jobs: Annotated[list[JobFields], Field(min_length=1)]


IMAGE_FIELDS = frozenset({"image", "images"})
SIZE_FIELDS = frozenset({"resolution", "width", "height"})
EXPANSION_FIELDS = frozenset({"matrix", "seeds", "n"})
PASSED_THROUGH = frozenset({"tags", "metadata"})

JOB_FIELD_NAMES = tuple(JobFields.model_fields)
DEFAULTS_FIELD_NAMES = tuple(DefaultsFields.model_fields)
SHARED_FIELD_NAMES = tuple(SharedFields.model_fields)


def _foreign_fields(spec: TaskSpec) -> frozenset[str]:
    rule = spec.drawing
    has = {
        **dict.fromkeys(IMAGE_FIELDS, spec.takes_images),
        **dict.fromkeys(SIZE_FIELDS | _DRAWING_FIELDS, rule is not None),
        **dict.fromkeys(("think", "think_mode"), spec.thinks is not None),
        "img_cfg_scale": rule is not None and rule.guidance.by_images,
        "target_pixels": rule is not None and rule.size is SizeRule.TARGET_PIXELS,
        "input_max_pixels": spec.resizes_inputs,
        "max_images": spec.output is Output.IMAGES,
        "max_think_tokens": spec.text.limit == "max_think_tokens",
        "max_new_tokens": spec.text.limit == "max_new_tokens",
    }
    return frozenset(name for name, had in has.items() if not had)


_DRAWING_FIELDS = frozenset(
    {"num_steps", "timestep_shift", "cfg_scale", "cfg_norm", "cfg_interval"}
)

FOREIGN_FIELDS = {task: _foreign_fields(task.spec) for task in Task}
"""The fields that a task does not have."""


def manifest_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a YAML manifest."""
    schema = ManifestFields.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
