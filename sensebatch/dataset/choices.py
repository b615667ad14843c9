"""The choices that a command line offers; imports nothing, so that help stays fast."""

from __future__ import annotations

from enum import StrEnum

DISTANCE = 6
"""Most bits of 64 in which the hashes of near duplicates differ, unless another number is given."""
MAX_DISTANCE = 32
"""The largest such number: hashes of images that have nothing in common differ in as many."""


class JobStatus(StrEnum):
    """What a job is now."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    HELD = "held"
    """It is a try that is not needed so far, or starts from one."""
    BLOCKED = "blocked"
    """It starts from an image of a job that failed."""


class Picked(StrEnum):
    """Which jobs a picks file selects."""

    KEEP = "keep"
    REJECT = "reject"
    NONE = "none"
    """Those neither kept nor rejected."""
    ANY = "any"
    """All: the file only adds its tags, and `pick` for an expression."""
