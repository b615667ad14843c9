"""File names in an export: what anyone can be given, whatever a job is called."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

MAX_WORDS = 60
"""Characters of an id that go into a name."""


def sample_name(job_id: str, number: int) -> str:
    """Returns a name without dots, slashes or anything that a system refuses: `00017-ship-dawn`.

    Args:
        job_id: Its letters and digits are there to be recognised.
        number: Of the row in its shard, which makes the name unique there.
    """
    plain = unicodedata.normalize("NFKD", job_id).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9_]+", "-", plain).strip("-")[:MAX_WORDS].strip("-")
    return f"{number:05d}-{words}" if words else f"{number:05d}"


def ending_of(file_name: str) -> str:
    """Returns the ending of an image's file, with its dot; empty without one."""
    return PurePosixPath(file_name).suffix
