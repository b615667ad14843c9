"""Reads YAML manifests: the header, the defaults and the jobs, with the lines of fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sensebatch.manifest.fields import (
    DEFAULTS_FIELD_NAMES,
    FOREIGN_FIELDS,
    SHARED_FIELD_NAMES,
    DefaultsFields,
    ManifestHeader,
    SharedFields,
    listed,
)
from sensebatch.manifest.ids import id_error
from sensebatch.manifest.problems import RowErrors, found
from sensebatch.manifest.rows import RawRow, Report, given
from sensebatch.tasks import Task
from sensebatch.yaml_values import YamlTextError, YamlValue, read_yaml

_TOP_NAMES = ("version", "name", "defaults", "jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlManifest:
    """A YAML manifest that was read, its rows unchecked."""

    name: str | None
    defaults: Mapping[str, Any]
    """Checked; wrong fields are left out."""
    rows: Iterator[RawRow]


def read_yaml_manifest(path: Path, report: Report) -> YamlManifest:
    """Reads a YAML manifest.

    Args:
        path: The file.
        report: Receives every error outside the rows.

    Raises:
        OSError: The file cannot be read.
    """
    nothing = YamlManifest(name=None, defaults={}, rows=iter(()))
    try:
        document = read_yaml(path)
    except YamlTextError as error:
        report(error.line, (), str(error))
        return nothing
    top = document.value
    if not isinstance(top, dict):
        report(1, (), f"expected a mapping with version and jobs, found {found(top)}")
        return nothing
    errors = RowErrors()
    header = {name: value for name, value in top.items() if name not in ("defaults", "jobs")}
    if header.keys() <= set(_TOP_NAMES):
        # The error then says which value is expected.
        header.setdefault("version", None)
    _validate(ManifestHeader, header, _TOP_NAMES, errors)
    name = top.get("name")
    if isinstance(name, str) and (message := id_error(name)) is not None:
        errors.add("name", message.replace("an id", "a name"))
    defaults = _checked_defaults(top.get("defaults"), errors)
    jobs = top.get("jobs")
    if not isinstance(jobs, list):
        errors.add("jobs", f"expected a list of jobs, found {found(jobs)}")
    for location, message in errors:
        report(document.line_of(location), location, message)
    return YamlManifest(
        name=name if isinstance(name, str) else None,
        defaults=defaults,
        rows=_rows(document, report) if isinstance(jobs, list) else iter(()),
    )


def _rows(document: YamlValue, report: Report) -> Iterator[RawRow]:
    for job in document.children("jobs"):
        if not isinstance(job.value, dict):
            report(job.line_of(()), (), f"expected a mapping, found {found(job.value)}")
            continue
        yield RawRow(fields=given(job.value), number=job.line_of(()), line_of=job.line_of)


def _validate(
    model: type[BaseModel], value: Any, known: tuple[str, ...], errors: RowErrors
) -> None:
    try:
        model.model_validate(value)
    except ValidationError as error:
        errors.add_validation(error, known)


def _checked_defaults(value: Any, errors: RowErrors) -> dict[str, Any]:
    """Returns the defaults without the fields that are wrong."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        errors.add("defaults", f"expected a mapping, found {found(value)}")
        return {}
    common = {name: item for name, item in given(value).items() if name not in set(Task)}
    checked = _section(DefaultsFields, common, ("defaults",), DEFAULTS_FIELD_NAMES, errors)
    for task in Task:
        section = value.get(task)
        if section is None:
            continue
        place = ("defaults", str(task))
        if not isinstance(section, dict):
            errors.add(place, f"expected a mapping, found {found(section)}")
            continue
        foreign = section.keys() & FOREIGN_FIELDS[task]
        for name in sorted(foreign):
            errors.add((*place, name), f"expected a field of {task} jobs, found {name!r}")
        fields = {name: item for name, item in given(section).items() if name not in foreign}
        checked[task] = _section(SharedFields, fields, place, SHARED_FIELD_NAMES, errors)
    return checked


def _section(
    model: type[BaseModel],
    fields: dict[str, Any],
    place: tuple[str, ...],
    known: tuple[str, ...],
    errors: RowErrors,
) -> dict[str, Any]:
    """Returns the valid fields of one section of the defaults."""
    wrong = RowErrors()
    _validate(model, fields, known, wrong)
    bad = {location[0] for location, _ in wrong}
    for location, message in wrong:
        errors.add((*place, *location), message)
    if "accept" in fields.keys() - bad:
        given_checks = SharedFields.model_validate({"accept": fields["accept"]}).accept
        for check in listed(given_checks):
            if check.mistake is not None:
                errors.add((*place, "accept"), check.mistake)
    return {name: value for name, value in fields.items() if name not in bad}
