"""Memory in disorder: reproducible, bounded, and full of garbage."""

from __future__ import annotations

import torch

from sensebatch.engine.device import fragments
from sensebatch.engine.device.fragments import fragment

CPU = torch.device("cpu")


def test_a_seed_decides_what_stays_and_nothing_is_done_for_none() -> None:
    first, again, other = (fragment(seed, CPU) for seed in (3, 3, 4))
    assert [len(piece) for piece in first] == [len(piece) for piece in again]
    assert [len(piece) for piece in first] != [len(piece) for piece in other]
    assert fragment(0, CPU) == []


def test_what_stays_is_little_and_full_of_garbage() -> None:
    held = fragment(1, CPU)
    assert len(held) > 10
    limit = fragments.CPU_BYTES * fragments.SHARE
    assert sum(piece.numel() * piece.element_size() for piece in held) <= limit
    values = torch.cat([piece[:1] for piece in held])
    assert values.isnan().any()
    assert values.isinf().any()
