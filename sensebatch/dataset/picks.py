"""What a person said of images: kept, rejected or tagged, in a file that a gallery saves.

docs/dataset.md describes the file. It names jobs by the id of their folder and their own, and the
key of what was looked at: an image that was drawn again since is another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sensebatch.bounded import load_json, read_file
from sensebatch.errors import ConfigError

FORMAT = "sensebatch_picks"
"""The name under which a picks file says its version."""
VERSION = 1
_MAX_BYTES = 2**28


class Pick(StrEnum):
    """What a person decided about a job's images."""

    KEEP = "keep"
    REJECT = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class PickedJob:
    """What a person said of a job."""

    pick: Pick | None = None
    tags: tuple[str, ...] = ()
    key: str | None = None
    """The job's key when its images were looked at; None where the file does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """The picks of one or more folders."""

    path: Path
    """The file they were read from."""
    runs: Mapping[str, Mapping[str, PickedJob]]
    """By the folder's id, then by the job's."""

    @property
    def digest(self) -> str:
        """A hash of what is picked, whatever else the file says."""
        return hashlib.sha256(picks_to_json(self.runs).encode()).hexdigest()

    def of_run(self, run_id: str) -> Mapping[str, PickedJob]:
        """Returns the picks of a folder, by the job's id.

        Raises:
            ConfigError: The file has none of it.
        """
        if run_id not in self.runs:
            raise ConfigError(
                f"{self.path}: expected picks of the folder with the id {run_id}, found those of "
                f"{', '.join(self.runs) or 'none'}"
            )
        return self.runs[run_id]


def read_picks(path: Path) -> Picks:
    """Returns the picks in a file.

    Raises:
        ConfigError: It cannot be read, or is not a picks file.
    """
    try:
        document = load_json(read_file(path, _MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected a picks file: {error}") from None
    try:
        return Picks(path=path, runs=_runs(document))
    except _WrongError as error:
        raise ConfigError(f"{path}: {error}") from None


def picks_to_json(runs: Mapping[str, Mapping[str, PickedJob]]) -> str:
    """Returns picks as a file holds them."""
    return json.dumps(
        {
            FORMAT: VERSION,
            "runs": [
                {"run": run, "jobs": {job_id: _to_json(job) for job_id, job in jobs.items()}}
                for run, jobs in runs.items()
            ],
        },
        ensure_ascii=False,
        indent=1,
    )


def _to_json(picked: PickedJob) -> dict[str, Any]:
    values = {"pick": picked.pick, "tags": list(picked.tags), "key": picked.key}
    return {name: value for name, value in values.items() if value}


class _WrongError(Exception):
    """Something in a picks file is not what it should be."""


def _runs(document: Any) -> dict[str, dict[str, PickedJob]]:
    version = document.get(FORMAT) if isinstance(document, dict) else None
    if version is None:
        raise _WrongError(f"expected a picks file, an object with {FORMAT!r}, found none")
    if version != VERSION:
        raise _WrongError(f"{FORMAT}: expected {VERSION}, found {version!r}; update sensebatch")
    found: dict[str, dict[str, PickedJob]] = {}
    for number, run in enumerate(_expected(document, "runs", list, "runs")):
        place = f"runs[{number}]"
        if not isinstance(run, dict):
            raise _WrongError(f"{place}: expected an object, found {run!r}")
        jobs = _expected(run, "jobs", dict, f"{place}.jobs")
        of_run = found.setdefault(_expected(run, "run", str, f"{place}.run"), {})
        for job_id, values in jobs.items():
            of_run[job_id] = _picked(values, f"{place}.jobs[{job_id!r}]")
    return found


def _picked(values: Any, place: str) -> PickedJob:
    if not isinstance(values, dict):
        raise _WrongError(f"{place}: expected an object, found {values!r}")
    pick, tags, key = values.get("pick"), values.get("tags") or [], values.get("key")
    if pick is not None and pick not in list(Pick):
        raise _WrongError(f"{place}.pick: expected keep, reject or null, found {pick!r}")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise _WrongError(f"{place}.tags: expected a list of words, found {tags!r}")
    if key is not None and not isinstance(key, str):
        raise _WrongError(f"{place}.key: expected text, found {key!r}")
    return PickedJob(pick=None if pick is None else Pick(pick), tags=tuple(tags), key=key)


def _expected(values: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    words: dict[type, str] = {list: "a list", dict: "an object", str: "text"}
    found = values.get(name)
    if not isinstance(found, kind):
        raise _WrongError(f"{place}: expected {words[kind]}, found {found!r}")
    return found
