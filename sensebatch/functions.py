"""The user's functions that judge images: what they are called, where they are, what they say.

They are named in configuration files alone. Reading a manifest looks at the file that one is in and
never runs it; a run imports it before anything else.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from sensebatch.bounded import abridged
from sensebatch.errors import ConfigError, JobError, found

FUNCTION_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""`module:function`; the module may be inside of packages."""

_LATER: Mapping[Callable[[Any], bool], str] = {
    inspect.iscoroutinefunction: "an async one",
    inspect.isasyncgenfunction: "an async generator",
    inspect.isgeneratorfunction: "a generator",
}
"""What gives no score when it is called, and its name."""

_MAX_MESSAGE = 2000
"""Longest message of an error in the user's module that is shown whole, in characters."""

Judge: TypeAlias = Callable[[Any, Mapping[str, Any]], Any]
"""Takes an image (PIL) and the row of the log of the job that drew it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptFunction:
    """A function that decides, beside questions, whether an image is accepted."""

    function: str
    """`module:function`."""
    at_least: float = 0.5
    """The score that an image must have; True is 1 and False is 0."""
    folder: str = ""
    """Where the module is looked for before the working directory and Python's own path."""

    @property
    def source_sha256(self) -> str:
        """The SHA-256 of the module's file; empty where there is none that can be read."""
        path = _source(self)
        try:
            return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            return ""


def is_function_name(text: object) -> bool:
    """Returns whether a value names a function."""
    return isinstance(text, str) and re.fullmatch(FUNCTION_NAME, text) is not None


def load_functions(functions: Iterable[AcceptFunction]) -> dict[str, Judge]:
    """Imports functions and returns them by their names.

    Raises:
        ConfigError: A module or a function is missing, or the module cannot be imported.
    """
    return {one.function: _load(one) for one in functions}


def unused_words(functions: Iterable[AcceptFunction]) -> str:
    """Returns the warning about functions that judge nothing a manifest has."""
    return (
        f"{', '.join(one.function for one in functions)}: called for no image, since no row of the "
        "manifest has accept, keep or tries"
    )


def score(function: str, judge: Judge, image: Any, row: Mapping[str, Any]) -> float:
    """Returns what a function says of an image, from 0 to 1; lets through what it raises.

    Args:
        function: Its name.
        judge: The function.
        image: As PIL has it.
        row: The row of the log of the job that drew it.

    Raises:
        JobError: What it returns is not a score.
    """
    said = judge(image, row)
    # numpy's booleans and numbers are neither, but they say what they are.
    value = said.item() if hasattr(said, "item") and getattr(said, "ndim", 0) == 0 else said
    if not isinstance(value, bool | Real) or not 0 <= float(value) <= 1:
        raise JobError(
            f"{function}: expected True, False or a number from 0 to 1, found {_shown(said)}"
        )
    return float(value)


def _shown(value: object) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, str):
        return found(value)
    return repr(value) if isinstance(value, Real) or value is None else type(value).__name__


def _own_places(function: AcceptFunction) -> list[str]:
    """Returns the folders that a module is looked for in before Python's path, in order."""
    return list(dict.fromkeys((*filter(None, [function.folder]), str(Path.cwd()))))


def _source(function: AcceptFunction) -> Path | None:
    """Returns the file of a function's module, which is not imported."""
    return _file_in((*_own_places(function), *sys.path), function)


def _file_in(places: Iterable[str], function: AcceptFunction) -> Path | None:
    name = function.function.partition(":")[0].replace(".", "/")
    for place in places:
        # A package comes before a module of its name, as in Python's own import.
        for path in (Path(place, name, "__init__.py"), Path(place, f"{name}.py")):
            if path.is_file():
                return path
    return None


def _load(function: AcceptFunction) -> Judge:
    module_name, _, name = function.function.partition(":")
    sys.path[:0] = [place for place in _own_places(function) if place not in sys.path]
    try:
        module = _imported(module_name, _file_in(_own_places(function), function))
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise _cannot_import(function, error) from error
        where = ", ".join(_own_places(function))
        raise ConfigError(
            f"accept: expected a module that can be imported, found none named {module_name!r} in "
            f"{where} or on Python's path"
        ) from None
    except (Exception, SystemExit) as error:
        raise _cannot_import(function, error) from error
    judge = getattr(module, name, None)
    if (wrong := _wrong(name, judge)) is not None:
        that, told = wrong
        raise ConfigError(
            f"accept: expected a function {name} in {module.__file__ or module_name}{that}, found "
            f"{told}"
        )
    assert callable(judge)
    return judge


def _wrong(name: str, judge: object) -> tuple[str, str] | None:
    """Returns what something lacks that cannot judge, and what it is; None if it can."""
    if not callable(judge):
        return "", "none" if judge is None else found(judge)
    called = judge if inspect.isroutine(judge) else type(judge).__call__
    for is_kind, kind in _LATER.items():
        if is_kind(judge) or is_kind(called):
            return " that returns its score when it is called", kind
    # Not every function that is written in C says what it takes; what decorates one does.
    with suppress(ValueError, TypeError):
        signature = inspect.signature(judge, follow_wrapped=False)
        try:
            signature.bind(None, {})
        except TypeError:
            return " that takes an image and a job", f"{name}{signature}"
    return None


def _imported(name: str, own: Path | None) -> ModuleType:
    """Returns a module; the one in the file `own` even if another one has its name."""
    module = importlib.import_module(name)
    file = getattr(module, "__file__", None)
    if own is None or (file is not None and Path(file).resolve() == own.resolve()):
        return module
    digest = hashlib.sha256(str(own.resolve()).encode()).hexdigest()[:12]
    other = f"{name.replace('.', '_')}_{digest}"
    if other in sys.modules:
        return sys.modules[other]
    spec = importlib.util.spec_from_file_location(other, own)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[other] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[other]
        raise
    return module


def _cannot_import(function: AcceptFunction, error: BaseException) -> ConfigError:
    return ConfigError(
        f"accept: expected a module that can be imported for {function.function}, found "
        f"{type(error).__name__}: {abridged(str(error), _MAX_MESSAGE)}"
    )
