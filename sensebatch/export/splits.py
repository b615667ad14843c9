"""Which split a row is in: decided by a hash, so that a set that grows moves no row."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from sensebatch.errors import ConfigError

ALL = "train"
"""The split of a set that is not divided."""

_NAME = re.compile(r"[A-Za-z0-9_]+")
_EXPECTED = "--split: expected names and shares that sum to 1, such as train=0.9,test=0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The parts of a set by name, and their shares."""

    names: tuple[str, ...] = (ALL,)
    shares: tuple[Fraction, ...] = (Fraction(1),)

    def of(self, group: str) -> str:
        """Returns the split of a group of rows that stay together.

        Args:
            group: What the rows have in common.
        """
        drawn = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8])
        end = Fraction(0)
        for name, share in zip(self.names, self.shares, strict=True):
            end += share
            if drawn < end * 2**64:
                return name
        return self.names[-1]


def parse_splits(text: str | None) -> Splits:
    """Returns the splits of `train=0.9,test=0.1`; one of everything where there is no text.

    Raises:
        ConfigError: It does not say that, or the shares do not sum to 1.
    """
    if text is None:
        return Splits()
    pairs = [part.strip() for part in text.split(",")]
    names = tuple(pair.partition("=")[0].strip() for pair in pairs)
    for name in names:
        if not _NAME.fullmatch(name) or name == "all":
            raise ConfigError(f"{_EXPECTED}; found the name {name!r}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{_EXPECTED}; found a name twice in {text!r}")
    shares = tuple(_share(pair) for pair in pairs)
    if not math.isclose(total := float(sum(shares)), 1, abs_tol=1e-6):
        raise ConfigError(f"{_EXPECTED}; found a sum of {total:g}")
    return Splits(names=names, shares=shares)


def _share(pair: str) -> Fraction:
    """Returns the share in `train=0.9`."""
    text = pair.partition("=")[2].strip()
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{_EXPECTED}; found {pair!r}") from None
    if not 0 < share <= 1:
        raise ConfigError(f"{_EXPECTED}; found a share of {text}")
    return share


def unused(splits: Splits, found: Sequence[str]) -> list[str]:
    """Returns the splits that no row is in."""
    return [name for name in splits.names if name not in found]
