"""Adds the perceptual hashes that rows of earlier versions lack, from the images' files."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from sensebatch.store.attempts import row_from_json
from sensebatch.store.images import FORMATS
from sensebatch.store.phash import phash_of
from sensebatch.store.run_dir import RunDir
from sensebatch.store.store import open_store

_CHUNK = 500
"""Jobs that are recorded at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """What came of it."""

    jobs: int
    """Jobs whose images have hashes now and had none."""
    wrong: tuple[str, ...]
    """Jobs of which an image is missing, has changed or cannot be read."""


def add_hashes(root: Path, progress: Callable[[int, int], None] = lambda *_: None) -> Hashed:
    """Adds hashes to the current rows of the log that have none.

    Args:
        root: The run's folder.
        progress: Receives how many jobs are done, of how many.

    Raises:
        RunFolderError: It is not a run's folder, or a process works in it.
        StorageError: The file system failed; what was recorded stays.
    """
    RunDir(root).require_state()
    with open_store(root) as store, ThreadPoolExecutor(os.cpu_count()) as threads:
        todo = [(seq, row_from_json(row)) for seq, row in store.state.unhashed()]
        wrong: list[str] = []
        done = 0
        rows = iter(todo)
        while chunk := list(islice(rows, _CHUNK)):
            hashes = list(threads.map(lambda pair: _hashes(root, pair[1]), chunk))
            found = [
                (seq, own) for (seq, _), own in zip(chunk, hashes, strict=True) if own is not None
            ]
            wrong += [
                row["job_id"] for (_, row), own in zip(chunk, hashes, strict=True) if own is None
            ]
            store.state.add_hashes(found)
            done += len(chunk)
            progress(done, len(todo))
        if todo:
            store.log.write()
    return Hashed(jobs=len(todo) - len(wrong), wrong=tuple(wrong))


def _hashes(root: Path, row: Mapping[str, Any]) -> list[str] | None:
    """Returns the hashes of a job's images; None if one is not as the job made it."""
    hashes = []
    for path, digest in zip(row["image_paths"], row["image_sha256"], strict=True):
        try:
            content = (root / path).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                return None
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                hashes.append(phash_of(image))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
    return hashes
