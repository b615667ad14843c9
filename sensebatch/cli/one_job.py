"""Turns the command line of a one-job command into a run: of one job, or of a JSONL file."""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sensebatch.cli.answers import (
    ANSWERS_FILE,
    answer_json,
    answer_text,
    chances_line,
    write_answers,
)
from sensebatch.cli.compare import compose
from sensebatch.cli.job_options import JobOptions
from sensebatch.cli.messages import show_anyway
from sensebatch.cli.options import ScreenOptions
from sensebatch.cli.outcome import finish, reporting_stops
from sensebatch.cli.session import run_session
from sensebatch.cli.voice import Level, Voice
from sensebatch.config import ModelConfig, RunConfig
from sensebatch.errors import ConfigError, ManifestError, Problem
from sensebatch.executor.observer import Summary
from sensebatch.image_files import decode_image
from sensebatch.jobs import Job, ModelIdentity, Source, job_key
from sensebatch.manifest.inputs import read_input_image
from sensebatch.manifest.one import job_from_fields
from sensebatch.manifest.read import read_manifests, run_name
from sensebatch.session import Request
from sensebatch.settings import resolve_settings
from sensebatch.store.files import sha256_of, write_atomic
from sensebatch.store.finished import FinishedJob, finished_jobs
from sensebatch.store.images import EXTENSIONS, with_xmp
from sensebatch.tasks import Output, SizeRule, Task

RUNS_FOLDER = ".sensebatch"
"""The folder, inside the one written to, that holds the runs of single jobs."""

WRITTEN_NAME = "written.json"
"""The file, in such a run's folder, with the hashes of what was written for the user."""

STEM_DIGITS = 16
"""Hex digits in the names that earlier versions gave to unnamed files."""
HASH_DIGITS = 12
"""Hex digits in the name of an unnamed file."""
MAX_STEM_BYTES = 40
"""The most bytes that a prompt's words take in such a name."""

_FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_OPTION_OF = {"id": "stem", "images": "image"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """The options of a one-job command."""

    task: Task
    job: JobOptions
    fields: Mapping[str, object]
    """Fields of a manifest's row besides task, prompt and id; None if not given."""
    flags: Mapping[str, object]
    """Settings by place; None if not given."""
    config_file: Path | None
    screen: ScreenOptions
    output: Path | None = None
    """The file to write."""
    question: str | None = None
    """The prompt under its other name."""

    @property
    def prompt(self) -> str | None:
        """The prompt under either name."""
        return self.job.prompt if self.question is None else self.question


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What a command made."""

    root: Path
    """The run's folder."""
    summary: Summary
    files: Mapping[Path, bool]
    """Files where they were asked for, and whether each was written now or was there before."""
    answers: Sequence[Mapping[str, object]] | None = None
    """The answers of a task that answers in text, for `--json`."""


def run_command(command: Command) -> None:
    """Runs the job of a command line, or the jobs of its JSONL file, and ends the command.

    Raises:
        ConfigError: Some options are wrong or contradict one another.
        typer.Exit: Otherwise, with the exit code.
    """
    job = command.job
    with closing(command.screen.voice(one_job=job.jsonl is None)) as voice:
        if job.jsonl is None:
            made = _run_prompt(command, voice)
        else:
            made = _run_jsonl(command, job.jsonl, voice)
        finish(
            made.root,
            made.summary,
            voice=voice,
            profile=job.profile,
            as_json=job.as_json,
            outputs=made.files,
            answers=made.answers,
        )


def _run_prompt(command: Command, voice: Voice) -> _Made:
    if command.prompt is None:
        name = "prompt" if command.task.spec.drawing else "question"
        raise ConfigError(f"expected --{name} or --jsonl, found neither")
    if command.question is not None and command.job.prompt is not None:
        raise ConfigError("--question: cannot be combined with --prompt")
    folder, stem, config = _place(command)
    job = _only_job(command, stem, config, voice)
    suffix = _suffix(command, config)
    if stem is None:
        job = replace(job, id=_unused_stem(job, config.model, folder / RUNS_FOLDER, suffix))
    is_of_job = partial(_is_of_job, job=job, suffix=suffix, compare=command.job.compare)
    _refuse_to_replace_inputs(job, folder, is_of_job)
    root = folder / RUNS_FOLDER / f"{job.id}{suffix}"
    if not command.job.overwrite:
        _refuse_to_replace_others(folder, root, is_of_job)
    request = Request(
        root=root,
        config=config,
        sources=(job.source.file,),
        jobs=lambda: iter([job]),
        is_guarded=False,
    )
    written: dict[Path, bool] = {}
    answers: list[Mapping[str, object]] = []
    with reporting_stops(root, voice, as_json=command.job.as_json):
        summary = run_session(request, voice)
        for finished in finished_jobs(root):
            written |= _copy_out(finished, folder, suffix)
            written |= _extras(command.job, finished, folder / f"{job.id}_compare.png", voice)
            if command.job.print_think and finished.text_file is None:
                voice.warn("--print-think: the job wrote no text; with --think it thinks first")
            if command.task.spec.output is Output.TEXT:
                answers.append(answer_json(finished))
                _show_answer(command, finished, voice)
        _remember(root, written)
    return _Made(root=root, summary=summary, files=written, answers=answers or None)


def _suffix(command: Command, config: RunConfig) -> str:
    """Returns the suffix of the only file of a job; nothing for a job that writes several."""
    if command.output is not None:
        return command.output.suffix
    match command.task.spec.output:
        case Output.IMAGE:
            return f".{EXTENSIONS[config.output.image_format]}"
        case Output.TEXT:
            return ".txt"
        case Output.IMAGES:
            return ""


def _show_answer(command: Command, finished: FinishedJob, voice: Voice) -> None:
    """Prints an answer unless it goes to a file or an object of its own."""
    job = command.job
    if command.output is None and not job.as_json and not job.print_think:
        show_anyway(answer_text(finished))
    if (line := chances_line(finished)) is not None:
        voice.tell(Level.BRIEF, line)


def _run_jsonl(command: Command, path: Path, voice: Voice) -> _Made:
    job, task = command.job, command.task
    for name, value in (
        ("prompt", job.prompt),
        ("question", command.question),
        ("stem", job.stem),
        ("output", command.output),
        ("overwrite", job.overwrite or None),
        ("system_prompt", job.system_prompt),
        ("image", command.fields.get("image")),
    ):
        if value is not None:
            raise ConfigError(f"--{_option(name)}: cannot be combined with --jsonl")
    flags = {**command.flags, **_size_flags(command)}
    config = resolve_settings(config_file=command.config_file, flags=flags)

    def jobs() -> Iterator[Job]:
        return read_manifests([path], config, task=task, warn=voice.warn_of)

    root = Path("outputs") / run_name([path], jobs) if job.output_dir is None else job.output_dir
    request = Request(
        root=root,
        config=config,
        sources=(str(path),),
        jobs=jobs,
        is_guarded=False,
    )
    written: dict[Path, bool] = {}
    with reporting_stops(root, voice, as_json=command.job.as_json):
        summary = run_session(request, voice)
        for finished in finished_jobs(root) if job.compare or job.print_think else ():
            written |= _extras(job, finished, root / "compare" / f"{finished.job.id}.png", voice)
        if task.spec.output is Output.TEXT:
            before = sha256_of(root / ANSWERS_FILE)
            answers = write_answers(root, finished_jobs(root), path)
            written[answers] = sha256_of(answers) != before
    return _Made(root=root, summary=summary, files=written)


def _place(command: Command) -> tuple[Path, str | None, RunConfig]:
    """Returns the folder to write to, the stem of the files if one was given, and the settings."""
    job, output, flags = command.job, command.output, dict(command.flags)
    folder = Path("outputs") / command.task.value if job.output_dir is None else job.output_dir
    stem = job.stem
    if output is not None:
        if stem is not None:
            raise ConfigError("--stem: cannot be combined with --output")
        target = output if job.output_dir is None else folder / output
        folder, stem = target.parent, target.stem
    if output is not None and command.task.spec.drawing is not None:
        image_format = _FORMATS.get(output.suffix.lower())
        if image_format is None:
            raise ConfigError(
                f"--output: expected a file that ends in {', '.join(_FORMATS)}, found {output}"
            )
        if flags.get("output.image_format") not in (None, image_format):
            raise ConfigError(f"--image-format: expected {image_format}, as --output {output} says")
        flags["output.image_format"] = image_format
    return folder, stem, resolve_settings(config_file=command.config_file, flags=flags)


def _only_job(command: Command, stem: str | None, config: RunConfig, voice: Voice) -> Job:
    own = {
        "task": command.task.value,
        "prompt": command.prompt,
        "id": stem,
        "system_prompt": command.job.system_prompt,
    }
    source = Source(file="command line", row=f"sensebatch {command.task.value}")

    # What a field is called where its value came from an option of another name.
    given = {
        name: option
        for name, option, value in (
            ("prompt", "question", command.question),
            ("id", "output", command.output),
        )
        if value is not None
    }

    def complaint(problem: Problem) -> str:
        return _complaint(replace(problem, field=given.get(problem.field, problem.field)))

    try:
        fields = {**command.fields, **own}
        return job_from_fields(
            fields, config, source=source, warn=lambda problem: voice.warn(complaint(problem))
        )
    except ManifestError as error:
        raise ConfigError("\n".join(map(complaint, error.problems))) from None


def _refuse_to_replace_inputs(job: Job, folder: Path, is_of_job: Callable[[Path], bool]) -> None:
    """Makes sure that no file of a job overwrites an image it starts from.

    Raises:
        ConfigError: One would.
    """
    for image in job.images:
        path = Path(image.path)
        # A link is replaced itself, and so is the file that one from elsewhere leads to.
        places = (path.absolute().parent.resolve() / path.name, path.resolve())
        if any(place.parent == folder.resolve() and is_of_job(place) for place in places):
            raise ConfigError(
                f"--output: expected a file other than the input image, found {path}, which would "
                "be overwritten"
            )


def _is_of_job(path: Path, job: Job, suffix: str, *, compare: bool) -> bool:
    """Returns whether a file has the name of one that a job writes."""
    stem = re.escape(job.id.casefold())
    own = stem + re.escape(suffix.casefold())
    if job.task.spec.output is Output.IMAGES:
        own = rf"{stem}_\d+\.\w+|{stem}\.txt"
    if compare:
        own += rf"|{stem}_compare\.png"
    return re.fullmatch(own, path.name.casefold()) is not None


def _refuse_to_replace_others(folder: Path, root: Path, is_of_job: Callable[[Path], bool]) -> None:
    """Makes sure that the files a job would replace are those that its command wrote before.

    Args:
        folder: Where the files are written.
        root: The run's folder.
        is_of_job: Whether a file has the name of one that the job writes.

    Raises:
        ConfigError: Others are in their places.
    """
    if not folder.is_dir():
        return
    there = sorted(path for path in folder.iterdir() if is_of_job(path) and path.is_file())
    known = _written_before(root) if there else frozenset()
    for path in there:
        if sha256_of(path) not in known:
            raise ConfigError(
                f"{path}: expected no file, or one that this command wrote, found another one; "
                "--overwrite replaces it"
            )


def _written_before(root: Path) -> frozenset[str | None]:
    """Returns the hashes of the files that a run's command has written for the user."""
    made = [path for name in ("images", "text") for path in (root / name).rglob("*")]
    hashes = {sha256_of(path) for path in made if path.is_file()}
    with suppress(OSError, ValueError):
        hashes |= set(json.loads((root / WRITTEN_NAME).read_text()))
    return frozenset(hashes)


def _remember(root: Path, written: Iterable[Path]) -> None:
    """Notes the files that were written, so that the same command may replace them."""
    hashes = _written_before(root).union(map(sha256_of, written))
    write_atomic(root / WRITTEN_NAME, json.dumps(sorted(filter(None, hashes))).encode())


def _unused_stem(job: Job, model: ModelConfig, runs: Path, suffix: str) -> str:
    """Returns a name for files that were given none: the prompt's words and a hash.

    It differs for every job and model, so that no file is overwritten. If an earlier version ran
    the job, its name is used again.
    """
    digest = _digest(job, model)
    before = f"{job.task.value}-{digest[:STEM_DIGITS]}"
    if (runs / f"{before}{suffix}").is_dir():
        return before
    name = ""
    for word in re.findall(r"[^\W_]+", unicodedata.normalize("NFC", job.prompt).lower()):
        longer = f"{name}-{word}" if name else word
        if len(longer.encode()) > MAX_STEM_BYTES:
            break
        name = longer
    return f"{name or job.task.value}-{digest[:HASH_DIGITS]}"


def _digest(job: Job, model: ModelConfig) -> str:
    """Returns a hash of a job and of the model as the command line names it."""
    named = ModelIdentity(
        checkpoint=f"{model.model}@{model.revision}",
        lora=model.lora_path,
        dtype=model.dtype,
        precision=model.quantised,
        generation_prompt=str(model.system_prompt_file),
        interleave_prompt=str(model.system_prompt_file),
    )
    return job_key(job, named)


def _complaint(problem: Problem) -> str:
    """Returns a mistake in a manifest's row as one in a command line."""
    name = re.sub(r"\W.*", "", problem.field)
    return f"--{_option(name)}: {problem.message}" if name else problem.message


def _option(name: str) -> str:
    return _OPTION_OF.get(name, name).replace("_", "-")


def _size_flags(command: Command) -> dict[str, object]:
    """Returns the size for the rows of a JSONL file that have none of their own.

    Raises:
        ConfigError: Half a size was given, or a size for edits, which follow their inputs.
    """
    width, height, resolution = (
        command.fields.get(name) for name in ("width", "height", "resolution")
    )
    if (width, height, resolution) == (None, None, None):
        return {}
    rule = command.task.spec.drawing
    if rule is not None and rule.size is SizeRule.TARGET_PIXELS:
        raise ConfigError("--jsonl: expected the sizes of edits in the file's rows")
    if resolution is None and None not in (width, height):
        resolution = f"{width}x{height}"
    elif resolution is None or (width, height) != (None, None):
        raise ConfigError("expected either --resolution or both --width and --height")
    return {f"tasks.{command.task.value}.resolution": resolution}


def _copy_out(finished: FinishedJob, folder: Path, suffix: str) -> dict[Path, bool]:
    """Copies a job's files to where they were asked for; returns the copies, see `_Made.files`."""
    stem, copies, output = finished.job.id, [], finished.job.task.spec.output
    if output is Output.TEXT:
        target = folder / f"{stem}{suffix}"
        return {target: _put(target, answer_text(finished).encode())}
    if output is Output.IMAGE:
        copies = [(path, folder / f"{stem}{suffix}") for path in finished.image_files]
    else:
        for index, path in enumerate(finished.image_files):
            copies.append((path, folder / f"{stem}_{index}{path.suffix}"))
        if finished.text_file is not None:
            copies.append((finished.text_file, folder / f"{stem}.txt"))
    return {target: _put(target, source.read_bytes()) for source, target in copies}


def _put(path: Path, data: bytes) -> bool:
    """Writes a file; returns False if it is there as it should be."""
    if sha256_of(path) == hashlib.sha256(data).hexdigest():
        return False
    write_atomic(path, data)
    return True


def _extras(
    job: JobOptions, finished: FinishedJob, compare: Path, voice: Voice
) -> dict[Path, bool]:
    """Prints the text of a job and writes its comparison, if asked for; returns that file."""
    if job.print_think and (text := finished.read_text()) is not None:
        (voice.alert if job.as_json else show_anyway)(text)
    if not job.compare or not finished.image_files:
        return {}
    inputs = [
        decode_image(read_input_image(image), corrections=image.corrections)
        for image in finished.job.images
    ]
    outputs = finished.open_images()
    buffer = io.BytesIO()
    # It says of itself what the images in it say.
    info = with_xmp(outputs[0].info.get("xmp"))
    compose(inputs, outputs, finished.job.prompt).save(buffer, "PNG", pnginfo=info)
    return {compare: _put(compare, buffer.getvalue())}
