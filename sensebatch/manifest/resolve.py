"""Makes a job with every default filled in from the validated fields of a row.

Knows the rules that concern several fields: those of a task, sizes, images and their marks.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from sensebatch.config import (
    SCHEDULE_SETTINGS,
    RunConfig,
    default_config,
    scheduled,
    sets_aside,
)
from sensebatch.declarations import converter, declared, implications
from sensebatch.errors import Problem
from sensebatch.image_files import UnusableImageError
from sensebatch.jobs import IMAGE_MARK, InputImage, Job, Sampling, Source
from sensebatch.manifest.chains import Outputs
from sensebatch.manifest.expand import JOB_MARK
from sensebatch.manifest.fields import (
    FOREIGN_FIELDS,
    IMAGE_FIELDS,
    PASSED_THROUGH,
    SIZE_FIELDS,
    ImageStruct,
    JobFields,
)
from sensebatch.manifest.ids import derived_id, id_error
from sensebatch.manifest.images import ImageProbe
from sensebatch.manifest.problems import Location, RowErrors, found
from sensebatch.manifest.sizes import (
    explicit_size,
    has_explicit_size,
    implied_size,
    resolved_input_max_pixels,
)
from sensebatch.manifest.upstream import (
    history_of,
    metadata_of,
    prompt_of,
    system_prompt_of,
    think_of,
)
from sensebatch.resolutions import Resolution, ResolutionError, smart_resize
from sensebatch.tasks import Inputs, Task
from sensebatch.units import counted

Warn = Callable[[Problem], None]
"""Receives what is allowed but worth a look."""

_SAMPLING = declared(Sampling)
_CONVERTERS = {name: converter(setting.plain_type) for name, setting in _SAMPLING.items()}
_ERRORS = [
    (index, name, setting.setting.error)
    for index, (name, setting) in enumerate(_SAMPLING.items())
    if setting.setting.error is not None
]
_sampling_values = attrgetter(*_SAMPLING)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
MAX_WARNED_SIZES = 10
"""How many sizes are warned of; a manifest may have thousands."""
_OWN_STEPS = ("quality", "timesteps", "num_steps", "timestep_shift")
"""The fields that set configured timesteps aside."""
_PROMPT_FIELDS = frozenset({"prompt", "question", "history", "conversations"})
_UNNAMED = PASSED_THROUGH | {"id", "task", "type"}
"""The fields that a derived id does not depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a job's fields come from."""

    base: Path
    """The folder that relative image paths start from."""
    source: Source
    parquet_row: tuple[Path, int] | None = None
    """The Parquet manifest and the row in it, if images may be stored in the row."""
    axes: Mapping[str, Any] = field(default_factory=dict)
    """The seed and the values of the matrix that made this job of the row."""


class JobResolver:
    """Makes jobs out of validated fields.

    Args:
        config: Holds every default.
        warn: Called once for each size that the model was not trained with.
    """

    def __init__(self, config: RunConfig, warn: Warn | None = None) -> None:
        self._config = config
        self._warn = warn
        self._warned_files: set[str] = set()
        self._warned: set[tuple[Task, Resolution]] = set()
        self._warned_steps: set[tuple[str, Task]] = set()
        self._unconfigured = default_config(config.model.model)
        self._probe = ImageProbe(config.inputs.max_pixels)
        self.outputs = Outputs()
        """What the jobs read so far make."""
        # Most rows have the same settings, which become one object.
        self._sampling = lru_cache(maxsize=1024)(_sampling)

    def resolve(
        self,
        fields: JobFields,
        task: Task,
        origin: Origin,
        own: Mapping[str, Any],
        errors: RowErrors,
        *,
        unknown: frozenset[str] = frozenset(),
    ) -> Job | None:
        """Returns the job, or None after adding everything that is wrong with it.

        Args:
            fields: The fields of the row and the manifest's defaults.
            task: The job's task.
            origin: Where the row is.
            own: The fields of the row itself, which a derived id depends on.
            errors: Receives what is wrong.
            unknown: Fields that are given, but missing from `fields` because they are wrong; what
                depends on them is not checked.
        """
        defaults, seed = self._config.tasks[task], fields.given("seed")
        _check_names(fields, task, errors)
        prompt, history = _said(fields, task, errors, unknown)
        images = None if unknown & IMAGE_FIELDS else self._images(fields, task, origin, errors)
        num_images = None if images is None else len(images)
        _check_marks(fields, prompt, history, num_images, errors)
        input_max_pixels = self._input_max_pixels(fields, task, len(images or ()), errors)
        resolution = None
        if unknown.isdisjoint(SIZE_FIELDS):
            resolution = self._size(fields, task, images or (), input_max_pixels, errors)
        think = think_of(fields, errors)
        sampling = self._sampling_of(fields, task, errors)
        metadata = metadata_of(fields, errors)
        system_prompt = system_prompt_of(fields, errors)
        job_id = _id(fields, task, own, images or (), errors)
        if len(errors):
            return None
        job = Job(
            id=job_id,
            task=task,
            prompt=prompt,
            history=history,
            images=images or (),
            resolution=resolution,
            seed=defaults.seed if seed is None else seed,
            think=defaults.think if think is None else think,
            system_prompt=system_prompt,
            input_max_pixels=input_max_pixels,
            sampling=sampling,
            metadata=metadata,
            level=self.outputs.level(images or ()),
            source=origin.source,
        )
        if has_explicit_size(fields):
            self._warn_of_size(job)
        self._warn_of_steps(job, fields)
        return job

    def look_ahead(self, images: Iterable[object], base: Path, *, as_stored: bool) -> None:
        """Begins to look at the images of a row that will be resolved.

        Args:
            images: What it names, unchecked; anything but the path of a file is left for then.
            base: The folder that relative paths start from.
            as_stored: Whether orientation and colour profile are ignored.
        """
        for image in images:
            if isinstance(image, str) and image and not image.startswith(JOB_MARK):
                place = _found_place(base / image, Path(image))
                if place is not None:
                    self._probe.look_ahead(place, as_stored=as_stored)

    def _images(
        self, fields: JobFields, task: Task, origin: Origin, errors: RowErrors
    ) -> tuple[InputImage, ...] | None:
        """Returns the job's input images; None if some cannot be used."""
        if not task.spec.takes_images:
            return ()
        num_errors = len(errors)
        if fields.image is not None and fields.images is not None:
            errors.add("images", "expected either image or images, found both")
            return None
        name = "image" if fields.images is None else "images"
        given = getattr(fields, name)
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if not listed and task.spec.inputs is Inputs.REQUIRED:
            errors.add("image", "expected at least one input image, found none")
        as_stored = fields.given("raw_inputs")
        if as_stored is None:
            as_stored = self._config.tasks[task].raw_inputs
        images: list[InputImage] = []
        for index, image in enumerate(listed):
            location: Location = (name, index) if isinstance(given, list) else (name,)
            try:
                found_image = self._image(image, origin, name, index, as_stored=as_stored)
                self._check_ratio(found_image, task, len(listed))
            except (UnusableImageError, ResolutionError) as error:
                errors.add(location, str(error))
            else:
                images.append(found_image)
        return tuple(images) if len(errors) == num_errors else None

    def _image(
        self,
        image: str | ImageStruct,
        origin: Origin,
        column: str,
        index: int,
        *,
        as_stored: bool,
    ) -> InputImage:
        if isinstance(image, ImageStruct):
            if image.content is not None and origin.parquet_row is not None:
                path, row = origin.parquet_row
                return self._probe.member(path, (row, column, index), image, as_stored=as_stored)
            if image.path is None:
                raise UnusableImageError(
                    "expected a path, or bytes in a Parquet manifest, found neither"
                )
            image = image.path
        if image.startswith(JOB_MARK):
            return self.outputs.image(image, origin.axes)
        path, absent = self._path(image, origin, column)
        probed = self._probe.file(path, as_stored=as_stored)
        return probed if absent is None else replace(probed, absent=str(absent))

    def _path(self, image: str, origin: Origin, column: str) -> tuple[Path, Path | None]:
        """Returns where an image is, and the place before it where there is nothing.

        It is beside the manifest, or where upstream would look.

        Raises:
            UnusableImageError: It is in neither place, or is not a path.
        """
        if not image or _URL.match(image):
            hint = "; download the image first" if image else ""
            raise UnusableImageError(f"expected a path, found {found(image)}{hint}")
        beside, here = origin.base / image, Path(image)
        place = _found_place(beside, here)
        if place is not None:
            if place is here:
                self._warn_of_place(origin.source, column, here)
                return here, beside
            return beside, None
        if "\\" in image and os.sep == "/":
            raise UnusableImageError(
                f"expected an image file, found nothing at {found(image)}; folders are separated "
                "by / here"
            )
        return beside, None

    def _warn_of_place(self, source: Source, column: str, here: Path) -> None:
        """Warns, once for each manifest, of images that are not relative to its own folder."""
        if self._warn is None or source.file in self._warned_files:
            return
        self._warned_files.add(source.file)
        message = f"found nothing beside the manifest, so {here} is taken from the current folder"
        self._warn(Problem(file=source.file, row=source.row, field=column, message=message))

    def _check_ratio(self, image: InputImage, task: Task, num_images: int) -> None:
        """Raises ResolutionError for an image that the model's own resize refuses."""
        fewest, most = self._config.pixel_limits.model_pixels(
            num_images, draws=task.spec.drawing is not None
        )
        smart_resize(image.height, image.width, min_pixels=fewest, max_pixels=most)

    def _sampling_of(self, fields: JobFields, task: Task, errors: RowErrors) -> Sampling:
        given = tuple(
            tuple(value) if isinstance(value, list) else value for value in _sampling_values(fields)
        )
        for index, name, error_of in _ERRORS:
            value = given[index]
            if value is not None and (message := error_of(value, task.spec)) is not None:
                errors.add(name, message)
        if fields.given("timesteps"):
            for name in ("num_steps", "timestep_shift"):
                if fields.given(name) is not None:
                    errors.add(name, "expected none beside timesteps, which say it")
        quality = fields.given("quality")
        unconfigured = self._unconfigured.tasks[task].sampling
        return self._sampling(self._config.tasks[task].sampling, unconfigured, quality, given)

    def _input_max_pixels(
        self, fields: JobFields, task: Task, num_images: int, errors: RowErrors
    ) -> int | None:
        if not task.spec.resizes_inputs:
            return None
        default = self._config.tasks[task].input_max_pixels
        limits = self._config.pixel_limits
        return resolved_input_max_pixels(fields, default, limits, num_images, errors)

    def _size(
        self,
        fields: JobFields,
        task: Task,
        images: tuple[InputImage, ...],
        input_max_pixels: int | None,
        errors: RowErrors,
    ) -> Resolution | None:
        """Returns the size of the job's images; None if there are none, or if it is wrong."""
        defaults, rule = self._config.tasks[task], task.spec.drawing
        if rule is None:
            return None
        if has_explicit_size(fields):
            return explicit_size(fields, defaults.buckets, errors)
        try:
            return implied_size(
                rule,
                fields.given("target_pixels"),
                defaults=defaults,
                limits=self._config.pixel_limits,
                images=images,
                input_max_pixels=input_max_pixels,
            )
        except ResolutionError as error:
            errors.add("image", str(error))
            return None

    def _warn_of_size(self, job: Job) -> None:
        """Warns, once for each of the first sizes, if the model was not trained with it."""
        known = self._config.tasks[job.task].buckets.values()
        if self._warn is None or job.resolution is None or job.resolution in known:
            return
        size = (job.task, job.resolution)
        if size in self._warned or len(self._warned) == MAX_WARNED_SIZES:
            return
        is_first = all(task is not job.task for task, _ in self._warned)
        self._warned.add(size)
        message = f"{job.resolution} is not one of the {job.task} sizes the model was trained with"
        if is_first:
            message += f": {', '.join(str(resolution) for resolution in known)}"
        if len(self._warned) == MAX_WARNED_SIZES:
            message += "; further sizes like it are not reported"
        source = job.source
        self._warn(Problem(file=source.file, row=source.row, field="resolution", message=message))

    def _warn_of_steps(self, job: Job, fields: JobFields) -> None:
        """Warns, once for each manifest and task, of a row that sets configured steps aside."""
        configured = self._config.tasks[job.task].sampling.timesteps
        once = (job.source.file, job.task)
        if self._warn is None or not configured or once in self._warned_steps:
            return
        name = next((name for name in _OWN_STEPS if fields.given(name) is not None), None)
        if name is None:
            return
        self._warned_steps.add(once)
        message = (
            f"given here or in defaults, so the configured timesteps of {job.task} jobs are set "
            "aside, and the configured solver and strides with them; leave it out to use them"
        )
        source = job.source
        self._warn(Problem(file=source.file, row=source.row, field=name, message=message))


def _check_names(fields: JobFields, task: Task, errors: RowErrors) -> None:
    """Checks that every field belongs to the task, except an empty list of images."""
    for name in sorted(fields.model_fields_set & FOREIGN_FIELDS[task]):
        if name not in IMAGE_FIELDS or getattr(fields, name) != []:
            errors.add(name, f"expected a field of {task} jobs, found one of other tasks")


def _said(
    fields: JobFields, task: Task, errors: RowErrors, unknown: frozenset[str]
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Returns the prompt and what precedes it; empty where that cannot be known."""
    if unknown & _PROMPT_FIELDS:
        return "", ()
    return prompt_of(fields, errors, task=task), history_of(fields, errors, task=task)


def _check_marks(
    fields: JobFields,
    prompt: str,
    history: Sequence[tuple[str, str]],
    num_images: int | None,
    errors: RowErrors,
) -> None:
    """Checks that there is an image for every `<image>` mark of a prompt and what precedes it."""
    texts = [prompt, *itertools.chain(*history)]
    num_marks = sum(text.count(IMAGE_MARK) for text in texts)
    if num_images is None:
        return
    found_images = f"{counted(num_marks, 'mark')} and {counted(num_images, 'image')}"
    if history and num_marks < num_images:
        # Without one, nothing says to which of the turns an image belongs.
        message = f"expected an {IMAGE_MARK} mark for each image of a conversation, found "
        errors.add("history" if fields.history else "conversations", message + found_images)
    if num_marks > num_images:
        names = ("prompt", "question", "conversations")
        name = next(name for name in names if fields.given(name) is not None)
        errors.add(name, f"expected at most one {IMAGE_MARK} mark per image, found {found_images}")


def _id(
    fields: JobFields,
    task: Task,
    own: Mapping[str, Any],
    images: Sequence[InputImage],
    errors: RowErrors,
) -> str:
    """Returns the job's id, given or derived from the row's fields and its images' bytes."""
    if fields.id is None:
        if len(errors):
            return ""
        content = {name: value for name, value in own.items() if name not in _UNNAMED}
        if images and not IMAGE_FIELDS.isdisjoint(content):
            for name in IMAGE_FIELDS:
                content.pop(name, None)
            content["images"] = [image.sha256 or image.path for image in images]
        return derived_id(task, content)
    job_id = unicodedata.normalize("NFC", fields.id)
    if (message := id_error(job_id)) is not None:
        errors.add("id", message)
    return job_id


def _found_place(*places: Path) -> Path | None:
    """Returns the first place where there is something."""
    # exists() is False for a name that is too long, too.
    return next((place for place in places if os.path.exists(place)), None)  # noqa: PTH110


def _sampling(
    defaults: Sampling, unconfigured: Sampling, quality: str | None, given: tuple[Any, ...]
) -> Sampling:
    """Returns the defaults, with the given values in their place.

    Args:
        defaults: The task's.
        unconfigured: Those without a configuration, from which steps are taken where the given
            values set configured timesteps aside.
        quality: Stands for several settings; None if not given.
        given: A value for each setting in the order of `_SAMPLING`; None if not given.
    """
    by_name = dict(zip(_CONVERTERS, given, strict=True))
    implied = scheduled({**by_name, "quality": quality})
    if sets_aside(defaults.timesteps, implied):
        steps = {name: getattr(unconfigured, name) for name in SCHEDULE_SETTINGS}
        defaults = replace(defaults, **steps)
    changes = {
        name: convert(implied[name]) for name, convert in _CONVERTERS.items() if name in implied
    }
    return replace(defaults, **changes, **implications(Sampling, changes))
