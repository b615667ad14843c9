"""Errors that a user can act on. Imports nothing; every other module may import it.

Each says what was expected, what was found, and where. One place in `cli/` maps them to exit
codes; our own mistakes are plain exceptions and keep their traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MAX_FOUND_CHARS = 60
"""The most characters of a wrong text that a message repeats."""


def found(value: object) -> str:
    """Returns a wrong value as a message shows it: shortened, or as its type."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value if len(value) <= MAX_FOUND_CHARS else value[:MAX_FOUND_CHARS] + "...")
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a value of type {type(value).__name__}"


class SensebatchError(Exception):
    """The base class of everything a user can fix."""


class ConfigError(SensebatchError):
    """A setting, on the command line or in a configuration file, that cannot be used."""


class CheckpointError(SensebatchError):
    """A checkpoint, LoRA or tokenizer that cannot be loaded as what it claims to be."""


class ImageFileError(SensebatchError):
    """An image file that cannot be read, or does not say what it should."""


class EngineError(SensebatchError):
    """An engine that cannot serve a run: it is closed, in use, or holds another model."""


class RunFolderError(SensebatchError):
    """A run folder that is in use, damaged, or made by something else."""


class ExportError(SensebatchError):
    """An export that has nothing to write, or not all that it should write."""


class RunStoppedError(SensebatchError):
    """Something that every job needs has failed. What is done stays, and the run can be resumed."""


class StorageError(RunStoppedError):
    """The file system that holds the run's folder failed, or the folder has moved."""


class StorageFullError(StorageError):
    """The disk that holds the run's folder has no room left."""


class DeviceError(RunStoppedError):
    """The device failed; this process can no longer use it."""


class WorkersLostError(RunStoppedError):
    """No worker of the run is left; none could be started again."""


class StoppedError(RunStoppedError):
    """The run was asked to stop before any job had run; nothing was changed."""


class BatchStoppedError(RunStoppedError):
    """A batch ended early because the run stops; the images of its finished passes are kept."""


class JobError(SensebatchError):
    """One job cannot be done; the others are not affected."""


class TruncatedError(JobError):
    """A job's text ended before it was complete, and the run counts that as a failure."""


class ProcessDiedError(JobError):
    """A job that killed its process repeatedly while it ran alone."""


class DoesNotFitError(JobError):
    """A job that needs more memory than is free; it is not begun."""


class OutOfMemoryError(SensebatchError):
    """A batch does not fit the device; the executor may split it and try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One error in a manifest."""

    file: str
    """The manifest as the user named it."""
    row: str
    """The place in it: `line 12` (YAML, JSONL) or `row 3` (Parquet, counted from 0)."""
    field: str
    """The field; empty if the row as a whole is wrong."""
    message: str
    """What was expected and what was found."""

    def __str__(self) -> str:
        place = f"{self.file}: {self.row}"
        return (
            f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"
        )


class ManifestError(SensebatchError):
    """Every error found in a manifest, in the order of its rows.

    Args:
        problems: The errors to print; at least one.
        num_problems: How many errors there are; more than `problems` if the list was cut.
    """

    def __init__(self, problems: list[Problem], num_problems: int | None = None) -> None:
        self.problems = problems
        self.num_problems = len(problems) if num_problems is None else num_problems
        lines = [str(problem) for problem in problems]
        if self.num_problems > len(problems):
            lines.append(f"... and {self.num_problems - len(problems)} more")
        super().__init__("\n".join(lines))
