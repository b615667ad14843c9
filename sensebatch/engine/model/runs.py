"""Tables of runs that one launch attends from: where the queries and keys of each are.

A launch takes the host longer than a short run takes a GPU. So all prompts of a pass attend in one
launch a layer, and so do all small images of a part. Knows addresses, not kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sensebatch.engine.model.attention import Run
from sensebatch.engine.model.copies import to_device
from sensebatch.plan.passes import FEW_KEYS, LONG_RUN, SPLIT_QUERIES

COLUMNS = 6
"""Numbers of a run in a table: the addresses of its sequence's keys and values, how many keys it
sees, the row of its first query in the pass, how many queries it has, and how many keys its first
query sees besides its own."""

Addresses = Sequence[tuple[int, int]]
"""Where the keys and the values of a sequence begin on the device, layer by layer."""


def goes_together(run: Run) -> bool:
    """Returns whether a kernel attends from a run that shares its launch with others.

    Few queries that see many keys share these among programs, and long runs of an image go to the
    backend.
    """
    size = run.end - run.start
    if size > SPLIT_QUERIES:
        return run.causal or size < LONG_RUN
    return run.num_keys <= FEW_KEYS


def table_of_runs(runs: Sequence[tuple[Addresses, int, Run]], device: torch.device) -> Tensor:
    """Returns the table of runs of several prompts, int64 `[layers, runs, COLUMNS]`.

    Args:
        runs: Each with the addresses of its sequence and the row of the sequence's first new token.
        device: Where the table is read.
    """
    fixed = [
        (
            run.num_keys,
            row + run.start,
            run.end - run.start,
            run.num_keys - (run.end - run.start) if run.causal else run.num_keys,
        )
        for _, row, run in runs
    ]
    return _table([addresses for addresses, _, _ in runs], fixed, device)


def table_of_prefixes(prefixes: Sequence[tuple[Addresses, int]], device: torch.device) -> Tensor:
    """Returns the table of images that see a prefix each, int64 `[layers, images, COLUMNS]`.

    Where an image's own tokens are follows from its number.

    Args:
        prefixes: The addresses of each image's prefix, and how many tokens it has.
        device: Where the table is read.
    """
    fixed = [(length, 0, 0, 0) for _, length in prefixes]
    return _table([addresses for addresses, _ in prefixes], fixed, device)


def _table(
    addresses: Sequence[Addresses], fixed: Sequence[tuple[int, ...]], device: torch.device
) -> Tensor:
    table_LRx = np.empty((len(addresses[0]), len(addresses), COLUMNS), dtype=np.int64)
    table_LRx[:, :, :2] = np.array(addresses).swapaxes(0, 1)
    table_LRx[:, :, 2:] = np.array(fixed)
    return to_device(torch.from_numpy(table_LRx), device)
