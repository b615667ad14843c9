"""Expands a row into its jobs: seeds, repetitions and the combinations of a matrix.

The ids of the jobs depend on the values that tell them apart, never on the position of a value in
a list, so adding or moving values renames nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sensebatch.jobs import MAX_SEED
from sensebatch.manifest.fields import ACCEPT_FIELDS, EXPANSION_FIELDS, JOB_FIELD_NAMES, JobFields
from sensebatch.manifest.ids import slug
from sensebatch.manifest.problems import RowErrors, found, suggestion

Axis = tuple[str, Sequence[Any]]
"""A name and the values it takes."""

MATRIX_FIELDS = frozenset(JOB_FIELD_NAMES) - EXPANSION_FIELDS.union(
    ACCEPT_FIELDS,
    ["id", "task", "tags", "metadata", "type", "think_mode", "conversations", "history"],
)
"""The fields that a matrix can set."""

JOB_MARK = "@"
"""What the name of another job's image begins with."""

MAX_JOBS = 1_000_000
"""The most jobs of one row; more would take hours to check, and memory for their ids."""

_TEMPLATES = ("prompt", "question")
"""The fields, besides the id, in which the names of a matrix stand in braces."""
_NAME = re.compile(r"[A-Za-z_]\w*")
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expanded:
    """One job of a row, before validation."""

    fields: Mapping[str, Any]
    """The fields of the row and the defaults, without `seeds`, `n` and `matrix`."""
    own: frozenset[str]
    """The names in `fields` that come from the row itself."""
    matrix: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The values of the matrix that the job has, by name."""
    axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The same with the seed, if the row has several."""


def expand(
    fields: Mapping[str, Any], own: frozenset[str], *, default_seed: int, errors: RowErrors
) -> Iterator[Expanded]:
    """Yields the jobs of a row; the first axis varies slowest.

    Args:
        fields: The row, merged with the defaults.
        own: The names in the row itself.
        default_seed: The first of `n` seeds if the row has none.
        errors: Receives what is wrong with the expansion; then nothing is yielded.
    """
    if EXPANSION_FIELDS.isdisjoint(fields):
        yield Expanded(fields=fields, own=own)
        return
    num_errors = len(errors)
    axes = _axes(fields, default_seed, errors)
    if len(errors) == num_errors:
        _check_used(fields, axes, errors)
    if len(errors) > num_errors:
        return
    names = frozenset(name for name, _ in axes)
    base = without_expansion(fields)
    matrix = fields.get("matrix")
    for values in itertools.product(*(values for _, values in axes)):
        combination = dict(zip((name for name, _ in axes), values, strict=True))
        yield Expanded(
            fields=_combined(base, combination, in_matrix=matrix is not None),
            own=(own | (names & MATRIX_FIELDS)) - EXPANSION_FIELDS,
            matrix={name: combination[name] for name in matrix or ()},
            axes=combination,
        )


def without_expansion(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that do not expand a row."""
    return {name: value for name, value in fields.items() if name not in EXPANSION_FIELDS}


def placeholders(template: object) -> set[str]:
    """Returns the names in braces in a text; none for any other value."""
    if not isinstance(template, str):
        return set()
    return {match.group(1) for match in _TOKEN.finditer(template) if match.group(1) is not None}


def image_references(fields: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yields (location, name) of each image of a row that another job makes: `@ID`."""
    for name in ("image", "images"):
        given = fields.get(name)
        listed = enumerate(given) if isinstance(given, list) else [(None, given)]
        for index, one in listed:
            path = one.get("path") if isinstance(one, dict) and not one.get("bytes") else one
            if isinstance(path, str) and path.startswith(JOB_MARK):
                yield (name,) if index is None else (name, index), path


def _axes(fields: Mapping[str, Any], default_seed: int, errors: RowErrors) -> list[Axis]:
    """Returns the axes of a row after checking their values."""
    concerned = EXPANSION_FIELDS | {"seed"}
    try:
        checked = JobFields.model_validate(
            {name: value for name, value in fields.items() if name in concerned}
        )
    except ValidationError as error:
        errors.add_validation(error, ())
        return []
    axes: list[Axis] = list((checked.matrix or {}).items())
    for name, values in axes:
        _check_axis(name, values, fields, errors)
    if checked.seeds is not None:
        for other in ("seed", "n"):
            if other in fields:
                errors.add("seeds", f"expected either seeds or {other}, found both")
        _check_distinct("seeds", checked.seeds, errors)
        axes.append(("seed", checked.seeds))
    elif checked.n is not None:
        seed = checked.given("seed")
        first = default_seed if seed is None else seed
        if first + checked.n - 1 > MAX_SEED:
            errors.add("n", f"expected seeds up to {MAX_SEED}, found {checked.n} from {first} on")
        axes.append(("seed", range(first, first + checked.n)))
    num_jobs = math.prod(len(values) for _, values in axes)
    if num_jobs > MAX_JOBS:
        place = "n" if checked.n is not None else "seeds" if checked.seeds else "matrix"
        errors.add(place, f"expected at most {MAX_JOBS:,} jobs of a row, found {num_jobs:,}")
    return axes


def _check_axis(
    name: str, values: Sequence[Any], fields: Mapping[str, Any], errors: RowErrors
) -> None:
    """Checks one list of a matrix."""
    location = ("matrix", name)
    if name in MATRIX_FIELDS:
        rivals = {name, "seeds", "n"} if name == "seed" else {name}
        for rival in sorted(rivals & fields.keys()):
            errors.add(location, f"expected either {rival} or a matrix of {name}, found both")
    elif name in JOB_FIELD_NAMES:
        errors.add(location, f"expected a field that a matrix can set, found {name!r}")
    elif not _NAME.fullmatch(name):
        errors.add(location, f"expected a name of letters, digits and _, found {name!r}")
    else:
        for index, value in enumerate(values):
            if not isinstance(value, str | int | float):
                expected = "expected text, a number, true or false"
                errors.add((*location, index), f"{expected}, found {found(value)}")
    _check_distinct(location, values, errors)


def _check_distinct(
    location: str | tuple[str, ...], values: Sequence[Any], errors: RowErrors
) -> None:
    seen: set[str] = set()
    for value in values:
        text = json.dumps(value, sort_keys=True, default=repr)
        if text in seen:
            errors.add(location, f"expected every value once, found {found(value)} again")
        seen.add(text)


def _check_used(fields: Mapping[str, Any], axes: Sequence[Axis], errors: RowErrors) -> None:
    """Checks the braces of the prompt and the id, and that every name of the matrix is used."""
    names = {name for name, _ in axes}
    templates = [("id", fields.get("id"))]
    for field in _TEMPLATES if "matrix" in fields else ():
        templates += [(field, text) for text in dict(axes).get(field, [fields.get(field)])]
    templates += [(str(location[0]), text) for location, text in image_references(fields)]
    used: set[str] = set()
    for field, template in templates:
        used |= placeholders(template)
        check_template(field, template, names - {field}, errors)
    for name in sorted(names - used - MATRIX_FIELDS):
        hint = suggestion(name, MATRIX_FIELDS)
        message = f"expected {{{name}}} in the prompt or the id, or the name of a field"
        errors.add(("matrix", name), f"{message}, found neither{hint}")


def check_template(field: str, template: object, names: set[str], errors: RowErrors) -> None:
    """Adds what is wrong with the braces of a text.

    Args:
        field: The text's.
        template: The text, or something else in its place.
        names: What may be in braces.
        errors: Receives what is wrong.
    """
    if not isinstance(template, str):
        return
    for match in _TOKEN.finditer(template):
        name = match.group(1)
        if match.group() in ("{", "}"):
            errors.add(field, f"expected {match.group() * 2} for a brace, found a single one")
        elif name is not None and name not in names:
            known = ", ".join(f"{{{known}}}" for known in sorted(names))
            message = f"expected one of {known}, found {{{name}}}; a plain brace is doubled"
            errors.add(field, message + suggestion(name, names))


def _combined(
    base: Mapping[str, Any], combination: Mapping[str, Any], *, in_matrix: bool
) -> dict[str, Any]:
    """Returns the fields of one combination, with the names in prompt and id replaced."""
    set_by_matrix = {name: v for name, v in combination.items() if name in MATRIX_FIELDS}
    fields = {**base, **set_by_matrix}
    texts = {name: as_text(value) for name, value in combination.items()}
    for name in _TEMPLATES if in_matrix else ():
        if isinstance(template := fields.get(name), str):
            fields[name] = filled(template, texts)
    job_id = fields.get("id")
    if isinstance(job_id, str):
        fields["id"] = id_of(job_id, combination)
    return fields


def id_of(template: str, combination: Mapping[str, Any], **texts: str) -> str:
    """Returns the id of one combination.

    Args:
        template: The id of the row.
        combination: Values by their names, which are added where the template lacks them.
        texts: Further names and what stands for them, as it is.
    """
    values = {name: slug(value) for name, value in combination.items()} | texts
    missing = sorted(values.keys() - placeholders(template))
    return filled(template, values) + "".join(f"-{name}={values[name]}" for name in missing)


def filled(template: str, texts: Mapping[str, str]) -> str:
    """Returns a checked template with its names replaced and its doubled braces halved."""

    def replacement(match: re.Match[str]) -> str:
        name = match.group(1)
        return match.group()[0] if name is None else texts[name]

    return _TOKEN.sub(replacement, template)


def as_text(value: object) -> str:
    """Returns the value of a matrix as it is put into a text."""
    return value if isinstance(value, str) else json.dumps(value, default=repr)
