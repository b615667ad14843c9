"""Settings declared once: a field's type, its range, its words and the tasks that have it.

Configuration files, manifests, flags, job keys, the state database and the log read the same
declarations; none of them lists settings of its own. Knows neither pydantic nor the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from sensebatch.tasks import TaskSpec

_T = TypeVar("_T")


def of_every_task(_: TaskSpec) -> bool:
    """Returns true: the setting belongs to every task."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the `Annotated` of a field says besides its type and range (`annotated_types`)."""

    help: str
    """A sentence for `--help` and the JSON Schema."""
    of: Callable[[TaskSpec], bool] = of_every_task
    """Whether a task has the setting."""
    error: Callable[[Any, TaskSpec], str | None] | None = None
    """Returns what is wrong with a value of the right type and range for a task; None if nothing
    is."""
    metavar: str | None = None
    """What stands for the value in `--help`."""
    implies: Mapping[str, Any] = field(default_factory=dict)
    """Other settings that follow where this one is given and they are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A setting as its field declares it."""

    name: str
    type: Any
    """The type, in `Annotated` with its range if it has one."""
    plain_type: Any
    """The type without ranges."""
    setting: Setting


def _without_ranges(kind: Any) -> Any:
    if get_origin(kind) is Annotated:
        return _without_ranges(get_args(kind)[0])
    if get_origin(kind) is tuple:
        return tuple.__class_getitem__(tuple(map(_without_ranges, get_args(kind))))
    return kind


def item_of_any_number(kind: Any) -> Any | None:
    """Returns the type of the items of a tuple of any length; None for every other type."""
    if get_origin(kind) is not tuple or get_args(kind)[-1] is not Ellipsis:
        return None
    return get_args(kind)[0]


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
                settings[name] = Declared(
                    name=name,
                    type=ranged,
                    plain_type=_without_ranges(kind),
                    setting=setting,
                )
    return settings


def implications(declaring: type, given: Iterable[str]) -> dict[str, Any]:
    """Returns the settings that follow from those of these names, without those of them."""
    names, settings = set(given), declared(cast(Hashable, declaring))
    return {
        other: value
        for name in settings
        if name in names
        for other, value in settings[name].setting.implies.items()
        if other not in names
    }


def stated(instance: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, except those at their neutral value.

    The neutral value of a field is its default: whatever has that value is what it was before the
    field existed. So keys and records that leave neutral fields out survive an upgrade.
    """
    return {
        one.name: value
        for one in fields(instance)
        if (value := getattr(instance, one.name)) != one.default or one.default is MISSING
    }


def restored(declaring: type[_T], values: Mapping[str, Any]) -> _T:
    """Returns an instance from its `stated` fields, as they were read from JSON or YAML."""
    settings = declared(cast(Hashable, declaring))
    return declaring(
        **{name: converter(settings[name].plain_type)(value) for name, value in values.items()}
    )


@cache
def converter(kind: Any) -> Callable[[Any], Any]:
    """Returns what brings a valid value into a type without ranges.

    A whole number becomes a float where one is declared; otherwise `4` and `4.0` would give two
    job keys.
    """
    if (item := item_of_any_number(kind)) is not None:
        convert = converter(item)
        return lambda values: tuple(map(convert, values))
    if get_origin(kind) is tuple:
        items = [converter(item) for item in get_args(kind)]
        return lambda values: tuple(item(value) for item, value in zip(items, values, strict=True))
    if kind is float or (isinstance(kind, type) and issubclass(kind, Enum)):
        return cast(Callable[[Any], Any], kind)
    return lambda value: value


def plain(value: Any) -> Any:
    """Returns a value as JSON, YAML and Arrow hold it: the value of an enum, a list for a tuple."""
    if isinstance(value, Enum):
        return value.value
    return [plain(item) for item in value] if isinstance(value, tuple) else value
