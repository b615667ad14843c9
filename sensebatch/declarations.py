"""Settings declared once: a field's type, its range, its words and the tasks that have it.

Configuration files, manifests, flags, job keys, the state database and the log read declarations
from here; none of them lists settings of its own. Knows nothing of pydantic or the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import cache
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from sensebatch.tasks import TaskSpec

_T = TypeVar("_T")


def of_every_task(_: TaskSpec) -> bool:
    """Whether a task has a setting that all of them have."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a field's `Annotated` says beside its type and the range (`annotated_types`)."""

    help: str
    """A sentence for `--help`, the JSON Schema and people."""
    of: Callable[[TaskSpec], bool] = of_every_task
    """Whether a task has the setting."""
    error: Callable[[Any], str | None] | None = None
    """Returns what is wrong with a value of the right type and range; None if nothing is."""
    metavar: str | None = None
    """What stands for the value in `--help`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A setting as its field declares it."""

    name: str
    type: Any
    """With its range: a type, or `Annotated`."""
    setting: Setting

    @property
    def plain_type(self) -> Any:
        """The type without ranges."""
        return _without_ranges(self.type)


def _without_ranges(kind: Any) -> Any:
    if get_origin(kind) is Annotated:
        return _without_ranges(get_args(kind)[0])
    if get_origin(kind) is tuple:
        return tuple.__class_getitem__(tuple(map(_without_ranges, get_args(kind))))
    return kind


@cache
def declared(declaring: type) -> Mapping[str, Declared]:
    """Returns the settings among the fields of a dataclass, in the order of the fields."""
    settings = {}
    for name, hint in get_type_hints(declaring, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        kind, *metadata = get_args(hint)
        for setting in metadata:
            if isinstance(setting, Setting):
                limits = tuple(item for item in metadata if item is not setting)
                ranged = Annotated[(kind, *limits)] if limits else kind
                settings[name] = Declared(name=name, type=ranged, setting=setting)
    return settings


def stated(instance: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, but for those that are neutral.

    A field is neutral at its default: whatever has it there is what it was before there was such
    a field. So a key or a record that leaves neutral fields out survives an upgrade.
    """
    return {
        field.name: value
        for field in fields(instance)
        if (value := getattr(instance, field.name)) != field.default or field.default is MISSING
    }


def restored(declaring: type[_T], values: Mapping[str, Any]) -> _T:
    """Returns the instance whose `stated` fields were read back from JSON or YAML."""
    kinds = declared(cast(Hashable, declaring))
    return declaring(
        **{name: converted(kinds[name].plain_type, value) for name, value in values.items()}
    )


def converted(kind: Any, value: Any) -> Any:
    """Returns a valid value in the type of its field: numbers, enums and tuples as declared.

    A whole number that was given for a float must not make another job key than the same number
    with a point.
    """
    if get_origin(kind) is tuple:
        return tuple(map(converted, get_args(kind), value))
    if isinstance(kind, type) and (kind is float or issubclass(kind, Enum)):
        return kind(value)
    return value


def plain(value: Any) -> Any:
    """Returns a value as JSON, YAML and Arrow hold it: enums as their values, tuples as lists."""
    if isinstance(value, Enum):
        return value.value
    return [plain(item) for item in value] if isinstance(value, tuple) else value
