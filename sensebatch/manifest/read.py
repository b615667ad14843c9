"""Reads manifests into jobs, one row at a time, and reports every error at the end.

Memory grows by an id's digest a row. Nothing is loaded and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sensebatch.bounded import UnreadableFileError, is_unicode
from sensebatch.config import RunConfig
from sensebatch.errors import ManifestError, Problem
from sensebatch.image_files import UnusableImageError
from sensebatch.jobs import Job, Source
from sensebatch.manifest.accept import Acceptance, acceptance_of
from sensebatch.manifest.ahead import RowsAhead
from sensebatch.manifest.chains import cycle, parse
from sensebatch.manifest.defaults import defaults_for, overlaid
from sensebatch.manifest.expand import Expanded, expand, image_references, without_expansion
from sensebatch.manifest.fields import (
    FOREIGN_FIELDS,
    IMAGE_FIELDS,
    JOB_FIELD_NAMES,
    JobFields,
)
from sensebatch.manifest.ids import IdRegistry, given_id, id_error
from sensebatch.manifest.jsonl import jsonl_rows
from sensebatch.manifest.memory import memory_rows
from sensebatch.manifest.problems import (
    MAX_KEPT,
    MAX_MESSAGE_CHARS,
    Location,
    ProblemList,
    RowErrors,
    field_name,
    printable,
)
from sensebatch.manifest.resolve import JobResolver, Origin, Warn
from sensebatch.manifest.rows import ManifestRows, RawRow, Report
from sensebatch.manifest.upstream import choose_task, named_task, said_task
from sensebatch.manifest.yaml_manifest import read_yaml_manifest
from sensebatch.tasks import Task

YAML_SUFFIXES = (".yaml", ".yml")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
SUFFIXES = YAML_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES


def read_manifest(
    path: Path, config: RunConfig, *, task: Task | None = None, warn: Warn | None = None
) -> Iterator[Job]:
    """Yields the valid jobs of a manifest.

    The jobs can be trusted only once the iterator is exhausted: errors in other rows, or in the
    same one, are raised at the end.

    Args:
        path: A YAML, JSONL or Parquet file, according to its suffix.
        config: Holds every default.
        task: The task of rows that name none.
        warn: Receives what is allowed but worth a look.

    Raises:
        ManifestError: Something is wrong; raised at the end, with every error.
    """
    return read_manifests([path], config, task=task, warn=warn)


def read_manifests(
    paths: Sequence[Path],
    config: RunConfig,
    *,
    task: Task | None = None,
    limit: int | None = None,
    warn: Warn | None = None,
) -> Iterator[Job]:
    """Yields the jobs of several manifests, whose ids must differ; see `read_manifest`.

    Args:
        paths: The files, in order.
        config: Holds every default.
        task: The task of rows that name none.
        limit: The number of jobs to stop after; what follows is not read.
        warn: Receives what is allowed but worth a look.

    Raises:
        ManifestError: Something is wrong; raised at the end, with every error.
    """
    for read in read_jobs(paths, config, task=task, limit=limit, warn=warn):
        yield read.job


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadJob:
    """A job and the fields that it was made from."""

    job: Job
    fields: JobFields
    """The fields of the row and the defaults, with seeds and matrix expanded."""
    accept: Acceptance | None = None
    """What the image must be like, of a try."""


def read_jobs(
    paths: Sequence[Path],
    config: RunConfig,
    *,
    task: Task | None = None,
    limit: int | None = None,
    warn: Warn | None = None,
) -> Iterator[ReadJob]:
    """Yields the jobs that `read_manifests` yields, with the fields they were made from.

    Raises:
        ManifestError: Something is wrong; raised at the end, with every error.
    """
    reader = ManifestReader(config, task=task, warn=warn)
    num_jobs = 0
    if limit is None or limit > 0:
        for path in paths:
            for read in reader.read(path):
                yield read
                num_jobs += 1
                if num_jobs == limit:
                    reader.problems.raise_any()
                    return
    yield from islice(reader.waiting(), None if limit is None else limit - num_jobs)
    reader.problems.raise_any()


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    config: RunConfig,
    *,
    path: Path,
    task: Task | None = None,
    warn: Warn | None = None,
) -> Iterator[Job]:
    """Yields the jobs that rows in memory describe, by the rules of a JSONL manifest.

    Args:
        rows: Names and values; sequences and paths of any type are accepted.
        config: Holds every default.
        path: Names the rows in messages and in the log; relative paths of images start from its
            folder.
        task: The task of rows that name none.
        warn: Receives what is allowed but worth a look.

    Raises:
        ManifestError: Something is wrong; raised at the end, with every error.
    """
    reader = ManifestReader(config, task=task, warn=warn)
    for read in chain(reader.read_rows(rows, path), reader.waiting()):
        yield read.job
    reader.problems.raise_any()


class NotAManifestError(Exception):
    """A file whose name says that it is something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """A job that names one which was not read yet."""

    expanded: Expanded
    task: Task
    origin: Origin
    row: RawRow
    accept: Acceptance | None

    @property
    def job_id(self) -> str | None:
        """Its id; None if it is derived."""
        return given_id(self.expanded.fields.get("id"))

    def parents(self) -> Iterator[str]:
        """Yields the ids that it names, and others that it may mean by them."""
        for _, reference in image_references(self.expanded.fields):
            with suppress(UnusableImageError):
                yield from parse(reference, self.expanded.axes)[0]


class ManifestReader:
    """Reads manifests that belong together.

    Args:
        config: Holds every default.
        task: The task of rows that name none.
        warn: Receives what is allowed but worth a look.
    """

    def __init__(
        self, config: RunConfig, *, task: Task | None = None, warn: Warn | None = None
    ) -> None:
        self.problems = ProblemList()
        self._config = config
        self._task = task
        self._acceptance_of = partial(acceptance_of, functions=config.accept)
        self._resolver = JobResolver(config, warn)
        self._ids, self._series = IdRegistry(), IdRegistry()
        self._outputs = self._resolver.outputs
        self._waiting: list[_Waiting] = []

    def read(self, path: Path) -> Iterator[ReadJob]:
        """Yields the valid jobs of a file and adds the errors in the others to `problems`."""
        yield from self._rows(path, unit_of(path), partial(open_rows, path))

    def read_rows(self, rows: Iterable[Mapping[str, Any]], path: Path) -> Iterator[ReadJob]:
        """Yields the valid jobs of rows in memory, which `path` names."""
        yield from self._rows(
            path, "row", lambda report: ManifestRows(rows=memory_rows(rows, report))
        )

    def _rows(
        self, path: Path, unit: str, opened: Callable[[Report], ManifestRows]
    ) -> Iterator[ReadJob]:
        """Yields the valid jobs of a manifest.

        Args:
            path: Its name.
            unit: What its rows are counted in.
            opened: Opens it; its argument receives errors outside the fields of rows.
        """
        if not is_unicode(str(path)):
            self._add(path, "manifest", (), "expected a path in UTF-8, found bytes that are not")
            return
        for registry in (self._ids, self._series):
            registry.start_file(str(path), unit)

        def report(number: int, location: Location, message: str) -> None:
            self._add(path, f"{unit} {number}", location, message)

        num_rows = 0
        num_problems = self.problems.num_problems
        ahead = RowsAhead(report)
        try:
            manifest = opened(ahead.report)
            per_task = {task: defaults_for(task, manifest.defaults) for task in Task}
            for row in ahead.rows(
                manifest.rows, partial(self._look_ahead, path, manifest, per_task)
            ):
                num_rows += 1
                place = f"{unit} {row.number}"
                yield from self._row(path, place, manifest, per_task, row)
        except NotAManifestError as error:
            self._add(path, "manifest", (), str(error))
        except FileNotFoundError:
            self._add(path, "manifest", (), "expected a file, found none")
        except OSError as error:
            self._add(path, "manifest", (), _unreadable(error))
        if not num_rows and self.problems.num_problems == num_problems:
            self._add(path, "manifest", (), "expected at least one job, found none")

    def _look_ahead(
        self,
        path: Path,
        manifest: ManifestRows,
        per_task: Mapping[Task, Mapping[str, Any]],
        row: RawRow,
    ) -> None:
        """Begins to look at the images in files that a row names itself, before its turn."""
        fields = {name: value for name, value in row.fields.items() if value is not None}
        matrix = fields.get("matrix")
        axes = matrix if isinstance(matrix, dict) else {}
        named = [given.get(name) for name in IMAGE_FIELDS for given in (fields, axes)]
        images = [one for given in named for one in (given if isinstance(given, list) else [given])]
        if not any(images):
            return
        task = choose_task(fields, self._task, manifest.defaults.get("task"), axes)
        as_stored = fields.get("raw_inputs", per_task[task].get("raw_inputs"))
        if not isinstance(as_stored, bool):
            as_stored = self._config.tasks[task].raw_inputs
        self._resolver.look_ahead(images, path.parent, as_stored=as_stored)

    def _row(
        self,
        path: Path,
        place: str,
        manifest: ManifestRows,
        per_task: Mapping[Task, Mapping[str, Any]],
        row: RawRow,
    ) -> Iterator[ReadJob]:
        """Yields the valid jobs of a row."""
        errors = RowErrors()
        row_fields = {name: value for name, value in row.fields.items() if value is not None}
        in_matrix = row_fields.get("matrix")
        matrix = in_matrix.keys() if isinstance(in_matrix, dict) else ()
        default_task = manifest.defaults.get("task")
        task = choose_task(row_fields, self._task, default_task, matrix)
        if said_task(row_fields, self._task, default_task) is None:
            _check_null_images(row.fields, errors)
        said = named_task(row_fields.get("task"))
        if said is not None and said is not task:
            errors.add("task", f"expected {task}, as asked for, found {said}")
        fields = overlaid(per_task[task], row_fields, matrix) if manifest.defaults else row_fields
        source = Source(file=str(path), row=place)
        origin = Origin(
            base=path.parent,
            source=source,
            parquet_row=(path, row.number) if manifest.stores_images else None,
        )
        own, default_seed = frozenset(row_fields), self._config.tasks[task].seed
        num_jobs = num_bad = 0
        tried, accept = self._acceptance_of(fields, task, default_seed, errors, own=own)
        waiting = partial(_Waiting, task=task, origin=origin, row=row, accept=accept)
        for expanded in expand(tried, own, default_seed=default_seed, errors=errors):
            num_jobs += 1
            if self._outputs.is_waiting(expanded.fields, expanded.axes):
                self._waiting.append(waiting(expanded=expanded))
                continue
            read = self._job(expanded, task, origin, row.number, errors)
            if read is not None:
                yield from self._with_questions(read, accept, origin, row.number, errors)
                continue
            num_bad += 1
            if num_bad == MAX_KEPT:
                break
        if not num_jobs:
            # The row has no jobs; report now what else is wrong with it, not at the next attempt.
            unexpanded = Expanded(fields=without_expansion(fields), own=own)
            named = {str(location[0]) for location, _ in image_references(fields)}
            unknown = frozenset(matrix) | named | {"id"}
            job_of(unexpanded, task, origin, self._resolver, errors, unknown=unknown)
        self._report(path, place, row, errors)

    def _report(self, path: Path, place: str, row: RawRow, errors: RowErrors) -> None:
        for location, message in errors:
            if row.line_of is not None:
                place = f"line {row.line_of(location)}"
            self._add(path, place, location, message)

    def waiting(self) -> Iterator[ReadJob]:
        """Yields the valid jobs that start from images of jobs that came later in the manifests.

        Each comes after those it starts from. What is left then has a parent that is not there, or
        waits for itself.
        """
        waiting, self._waiting = self._waiting, []
        while waiting:
            left = []
            for one in waiting:
                if self._outputs.is_waiting(one.expanded.fields, one.expanded.axes):
                    left.append(one)
                    continue
                errors, source = RowErrors(), one.origin.source
                read = self._job(one.expanded, one.task, one.origin, one.row.number, errors)
                if read is not None:
                    number = one.row.number
                    yield from self._with_questions(read, one.accept, one.origin, number, errors)
                self._report(Path(source.file), source.row, one.row, errors)
            if len(left) == len(waiting):
                self._refuse(left)
                return
            waiting = left

    def _with_questions(
        self,
        read: ReadJob,
        accept: Acceptance | None,
        origin: Origin,
        number: int,
        errors: RowErrors,
    ) -> Iterator[ReadJob]:
        """Yields a job, and the questions that decide whether it is accepted."""
        if accept is None:
            yield read
            return
        tried = accept.as_try(read.job)
        self._check_series(tried, origin.source.file, number, errors)
        yield replace(read, job=tried, accept=accept)
        for question in accept.questions(read.job):
            found = self._job(question.expanded, Task.ASK, origin, number, errors)
            if found is not None:
                job = replace(found.job, verdict=question.verdict, judged_by=question.judged_by)
                yield replace(found, job=job)

    def _check_series(self, tried: Job, file: str, number: int, errors: RowErrors) -> None:
        """Checks, at the first try of a series, that no other row has one of its name."""
        assert tried.attempt_at is not None
        series = tried.attempt_at.series
        if tried.attempt_at.number:
            return
        other = self._series.add(series, file, number)
        if other is not None:
            message = f"expected another id than that of {other}, found {series!r}"
            errors.add("id", f"{message}; each row with accept needs one, whatever its seeds are")

    def _refuse(self, waiting: Sequence[_Waiting]) -> None:
        """Reports why jobs can never run."""
        own_ids = {job_id: one for one in waiting if (job_id := one.job_id) is not None}
        waits_for = {
            job_id: [other for other in one.parents() if other in own_ids]
            for job_id, one in own_ids.items()
        }
        for one in waiting:
            errors, source = RowErrors(), one.origin.source
            circle = [] if one.job_id is None else cycle(one.job_id, waits_for)
            for location, reference in image_references(one.expanded.fields):
                candidates = set(parse(reference, one.expanded.axes)[0])
                if circle and candidates & set(circle):
                    words = " -> ".join(circle)
                    errors.add(location, f"expected no job that starts from itself, found {words}")
                elif not (candidates & own_ids.keys() or self._outputs.is_broken(candidates)):
                    try:
                        self._outputs.image(reference, one.expanded.axes)
                    except UnusableImageError as error:
                        errors.add(location, str(error))
            self._report(Path(source.file), source.row, one.row, errors)

    def _job(
        self, expanded: Expanded, task: Task, origin: Origin, number: int, errors: RowErrors
    ) -> ReadJob | None:
        """Returns one job of a row, or None after adding what is wrong with it."""
        found_here = RowErrors()
        read = job_of(expanded, task, origin, self._resolver, found_here)
        given = given_id(expanded.fields.get("id"))
        job_id = given if read is None else read.job.id
        # Checked for jobs with other errors too, so that the next attempt brings no surprise.
        source = origin.source
        other = None if job_id is None else self._ids.add(job_id, source.file, number)
        if job_id is not None and other is not None:
            same_row = other == source.row
            differs = self._ids.differs_in_case(job_id)
            where = "another job of this row" if same_row else other
            found_here.add(*_collision(given, where, differs_in_case=differs))
            read = None
        if given is not None and read is None:
            self._outputs.add_broken(given)
        elif given is not None and read is not None:
            self._outputs.add(read.job)
        for location, message in found_here:
            errors.add(location, message)
        return read

    def _add(self, path: Path, row: str, location: Location, message: str) -> None:
        self.problems.add(
            Problem(
                file=printable(str(path)),
                row=row,
                field=field_name(location)[:MAX_MESSAGE_CHARS],
                message=message[:MAX_MESSAGE_CHARS],
            )
        )


def job_of(
    expanded: Expanded,
    task: Task,
    origin: Origin,
    resolver: JobResolver,
    errors: RowErrors,
    *,
    unknown: frozenset[str] = frozenset(),
) -> ReadJob | None:
    """Returns the job of one combination of fields, or None after adding all that is wrong.

    Args:
        expanded: The fields.
        task: The job's task.
        origin: Where the row is.
        resolver: Joins the fields.
        errors: Receives what is wrong.
        unknown: Fields that are given, but whose values are wrong or not known here.
    """
    values = {name: value for name, value in expanded.fields.items() if name not in unknown}
    try:
        fields = JobFields.model_validate(values)
    except ValidationError as error:
        known = [name for name in JOB_FIELD_NAMES if name not in FOREIGN_FIELDS[task]]
        # Check the other fields all the same, so that the next attempt brings no surprise.
        bad = errors.add_validation(error, known)
        values = {name: value for name, value in values.items() if name not in bad}
        fields, unknown = JobFields.model_validate(values), unknown | bad
    own = {name: values[name] for name in expanded.own if name in values}
    if expanded.axes:
        origin = replace(origin, axes=expanded.axes)
    job = resolver.resolve(fields, task, origin, own, errors, unknown=unknown)
    if job is None:
        return None
    return ReadJob(job=replace(job, matrix=expanded.matrix), fields=fields)


def _check_null_images(fields: Mapping[str, Any], errors: RowErrors) -> None:
    """Adds an error if a row without a task has an image that is null.

    It may be an edit whose image could not be fetched; as a t2i job it would draw the instruction.
    """
    nulls = sorted(name for name in IMAGE_FIELDS & fields.keys() if fields[name] is None)
    if nulls and all(fields.get(name) is None for name in IMAGE_FIELDS):
        message = "expected an image, or the task t2i for a row that needs none, found nothing"
        errors.add(nulls[0], message)


def _collision(given: str | None, where: str, *, differs_in_case: bool) -> tuple[str, str]:
    """Returns the field and the message about an id that another job has too.

    Args:
        given: The later job's id; None if it was derived.
        where: The place of the earlier job.
        differs_in_case: Whether the earlier job's id is the same but for upper and lower case.
    """
    if given is None:
        message = f"expected other content than that of {where}, found the same"
        return "", f"{message}; give one of the two an id or another seed"
    clause = ", even if upper and lower case are the same" if differs_in_case else ""
    return "id", f"expected another id than that of {where}{clause}, found {given!r}"


def unit_of(path: Path) -> str:
    """Returns what the rows of a manifest are counted in."""
    return "row" if path.suffix.lower() in PARQUET_SUFFIXES else "line"


def open_rows(path: Path, report: Report) -> ManifestRows:
    """Returns the rows of a manifest of any format.

    Args:
        path: The file.
        report: Receives errors outside the fields of rows.

    Raises:
        OSError: The file cannot be read.
        NotAManifestError: Its name has no suffix of a manifest.
    """
    suffix = path.suffix.lower()
    if suffix in YAML_SUFFIXES:
        manifest = read_yaml_manifest(path, report)
        return ManifestRows(rows=manifest.rows, defaults=manifest.defaults)
    if suffix in JSONL_SUFFIXES:
        return ManifestRows(rows=jsonl_rows(path, report))
    if suffix in PARQUET_SUFFIXES:
        # pyarrow is slow to import, and most manifests are not Parquet.
        from sensebatch.manifest.parquet import parquet_rows

        return ManifestRows(rows=parquet_rows(path, report), stores_images=True)
    known = ", ".join(SUFFIXES)
    raise NotAManifestError(f"expected a manifest that ends in one of {known}, found {path.name!r}")


def manifest_name(paths: Sequence[Path]) -> str:
    """Returns the name of a run of these manifests, which is the name of its folder.

    It is the `name` of a YAML manifest, else the file's stem; several are joined by `+`.

    Args:
        paths: At least one manifest.

    Raises:
        ManifestError: A YAML manifest cannot be read, or the name is not fit for a folder.
    """
    problems = ProblemList()
    names = [_name(path, problems) for path in paths]
    problems.raise_any()
    joined = "+".join(names)
    return joined if id_error(joined) is None else f"{names[0]}+{len(names) - 1}-more"


def run_name(paths: Sequence[Path], jobs: Callable[[], Iterable[Job]]) -> str:
    """Returns `manifest_name`; if there is none, raises the errors in all manifests.

    Args:
        paths: At least one manifest.
        jobs: Reads them as the run does.

    Raises:
        ManifestError: As in `manifest_name` and `read_manifests`.
    """
    try:
        return manifest_name(paths)
    except ManifestError:
        for _ in jobs():
            pass
        raise


def _unreadable(error: OSError) -> str:
    """Returns what is wrong with a file that cannot be read."""
    if isinstance(error, UnreadableFileError):
        return str(error)
    # The messages of Arrow have several lines.
    return f"expected a readable file: {' '.join((error.strerror or str(error)).split())}"


def _name(path: Path, problems: ProblemList) -> str:
    """Returns the name of one manifest after adding what is wrong with it."""

    def report(number: int, location: Location, message: str) -> None:
        place = f"line {number}" if number else "manifest"
        field = field_name(location)
        problems.add(Problem(file=str(path), row=place, field=field, message=message))

    try:
        if path.suffix.lower() in YAML_SUFFIXES:
            name = read_yaml_manifest(path, report).name
            if name is not None:
                return name
    except OSError as error:
        report(0, (), _unreadable(error))
    if (message := id_error(path.stem)) is not None:
        report(
            0,
            (),
            f"{message}; the file's name names the run's folder".replace(
                " an id ", " a file name "
            ),
        )
    return path.stem
