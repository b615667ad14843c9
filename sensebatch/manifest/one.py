"""Makes one job from plain values, by the rules of a manifest; for the one-job commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensebatch.bounded import is_unicode
from sensebatch.config import RunConfig
from sensebatch.errors import ManifestError, Problem
from sensebatch.jobs import Job, Source
from sensebatch.manifest.expand import Expanded
from sensebatch.manifest.fields import EXPANSION_FIELDS
from sensebatch.manifest.problems import RowErrors, field_name
from sensebatch.manifest.read import job_of
from sensebatch.manifest.resolve import JobResolver, Origin, Warn
from sensebatch.manifest.upstream import choose_task


def job_from_fields(
    fields: Mapping[str, Any],
    config: RunConfig,
    *,
    source: Source,
    base: Path | None = None,
    warn: Warn | None = None,
) -> Job:
    """Returns the job that these fields describe.

    Args:
        fields: Names and values as in a manifest, without `seeds`, `n` and `matrix`; None if not
            given (`input_max_pixels: "none"` skips the first resize).
        config: Holds every default.
        source: Where the values come from; errors name it.
        base: The folder that relative image paths start from; the current one if None.
        warn: Receives what is allowed but worth a look.

    Raises:
        ManifestError: Something is wrong; it has every error.
    """
    errors = RowErrors()
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if not is_unicode(value):
            errors.add(name, "expected Unicode text, found bytes that are not")
    if len(errors):
        raise _error(errors, source)
    for name in sorted(EXPANSION_FIELDS & given.keys()):
        errors.add(name, "expected one job, found a field that makes several")
    task = choose_task(given, None, None, ())
    origin = Origin(base=Path() if base is None else base, source=source)
    expanded = Expanded(fields=given, own=frozenset(given))
    read = job_of(expanded, task, origin, JobResolver(config, warn), errors)
    if len(errors) or read is None:
        raise _error(errors, source)
    return read.job


def _error(errors: RowErrors, source: Source) -> ManifestError:
    problems = [
        Problem(file=source.file, row=source.row, field=field_name(location), message=message)
        for location, message in errors
    ]
    return ManifestError(problems)
