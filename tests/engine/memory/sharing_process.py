"""A process that streams weights it may share: `python -m tests.engine.memory.sharing_process KEY`.

Says in JSON, a line each, that it has begun to load, and what it has loaded. Then it waits until
its standard input ends. With a second argument it never finishes the first block it reads.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from dataclasses import replace
from threading import Lock

import torch
from torch import Tensor

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.config import default_config
from sensebatch.engine.weights.loader import NetworkLoader
from sensebatch.engine.weights.sources import SyntheticWeights, WeightSource
from sensebatch.jobs import Precision, VramMode
from sensebatch.plan.device import place
from sensebatch.plan.host import ENOUGH_BYTES

MODEL = "synthetic:tiny"


class CountedWeights:
    """A source that counts the reads of decoder layers and of token embeddings."""

    def __init__(self, source: WeightSource, *, hangs: bool) -> None:
        self._source = source
        self._hangs = hangs
        self._lock = Lock()
        self.num_reads = 0

    def read_into(self, name: str, rows: tuple[int, int] | None, target: Tensor) -> None:
        """See `WeightSource.read_into`."""
        if ".layers." in name or "embed_tokens" in name:
            with self._lock:
                self.num_reads += 1
                if self._hangs and ".layers." in name:
                    # The other threads wait for the lock.
                    say({"filling": True})
                    time.sleep(3600)
        self._source.read_into(name, rows, target)


def say(what: dict[str, object]) -> None:
    print(json.dumps(what), flush=True)


def loaded(key: str | None, precision: Precision | None, *, hangs: bool) -> dict[str, object]:
    """Loads weights so that all are streamed; returns what is in host memory."""
    checkpoint, dtype = open_checkpoint(MODEL), torch.bfloat16
    source = CountedWeights(SyntheticWeights(dtype), hangs=hangs)
    loader = NetworkLoader(
        arch=checkpoint.architecture,
        source=source,
        device=torch.device("cpu"),
        dtype=dtype,
        precision=precision,
        share=key,
    )
    memory = replace(default_config(MODEL).memory, vram_mode=VramMode.LOW)
    placements = place(
        loader.computation, memory=memory, loads=[], device_free=None, host_free=ENOUGH_BYTES
    )
    network, residency = loader.load(placements.leanest)
    HELD.extend((network, residency))
    kept = residency._host._kept
    embeddings = network.embed_tokens.weight.data
    buffers = {block.name: flat for block, flat in kept.items()} | {"": embeddings.view(-1)}
    sums = {
        name: zlib.crc32(flat.view(torch.uint8).numpy()) for name, flat in sorted(buffers.items())
    }
    return {
        "num_reads": source.num_reads,
        "bytes": residency.host_bytes + embeddings.nbytes,
        "sum": zlib.crc32(repr(sums).encode()),
    }


HELD: list[object] = []
"""What keeps the memory until the process ends."""


def main() -> None:
    """Loads, says what it has, and waits."""
    key, precision, *hangs = sys.argv[1:]
    say(loaded(key, Precision(precision) if precision else None, hangs=bool(hangs)))
    sys.stdin.read()


if __name__ == "__main__":
    main()
