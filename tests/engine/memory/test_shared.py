"""Weights that several processes stream from one copy in host memory."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sensebatch.contract import HostShare
from sensebatch.engine.engine import _share_key
from sensebatch.engine.memory.host import BLOCKS
from sensebatch.engine.memory.shared import (
    BOUNDARY,
    PREFIX,
    SharedBuffers,
    _alone,
    can_share,
    taken_bytes,
)
from sensebatch.engine.weights.residency import EMBEDDINGS
from sensebatch.errors import StoppedError
from sensebatch.jobs import ModelIdentity, Precision
from tests.engine.memory.sharing_process import loaded

pytestmark = [
    pytest.mark.skipif(not can_share(), reason="only Linux shares weights"),
    pytest.mark.slow,
]


@pytest.fixture
def key() -> str:
    return secrets.token_hex(8)


class Process:
    """A process that shares weights."""

    def __init__(self, key: str, precision: Precision | None, *, hangs: bool = False) -> None:
        words = [key, precision or "", *(["hangs"] if hangs else [])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.memory.sharing_process", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def said(self) -> dict[str, Any]:
        """Returns the next thing that it says."""
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said

    def shared(self, what: str) -> int:
        """Returns a figure of its mappings of shared weights, in bytes."""
        mappings = Path(f"/proc/{self._process.pid}/smaps").read_text().split("VmFlags")
        return sum(
            int(line.split()[1]) * 1024
            for mapping in mappings
            if f"/memfd:{PREFIX}" in mapping
            for line in mapping.splitlines()
            if line.startswith(f"{what}:")
        )

    def kill(self) -> None:
        """Ends it with SIGKILL, if it has not ended."""
        self._process.kill()
        self._process.communicate()


class Processes:
    """Starts processes."""

    def __init__(self) -> None:
        self._all: list[Process] = []

    def start(self, *words: Any, **options: Any) -> Process:
        """Returns a process that begins to load."""
        self._all.append(Process(*words, **options))
        return self._all[-1]

    def kill(self) -> None:
        """Ends them all."""
        for process in self._all:
            process.kill()


@pytest.fixture
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.kill()


@pytest.mark.parametrize("precision", [None, Precision.FP8])
def test_two_processes_have_one_copy_of_the_weights(
    processes: Processes, key: str, precision: Precision | None
) -> None:
    alone = loaded(None, precision, hangs=False)
    first, second = [processes.start(key, precision) for _ in range(2)]
    figures = [process.said() for process in (first, second)]
    reads = [figure.pop("num_reads") for figure in figures]
    assert sorted(reads) == [0, alone.pop("num_reads")]
    assert figures == [alone, alone]
    size = figures[0]["bytes"]
    # Both have read all of it.
    assert size <= first.shared("Rss") == second.shared("Rss") <= 1.01 * size
    together = first.shared("Pss") + second.shared("Pss")
    assert size * 0.99 <= together <= 1.01 * size
    assert size <= taken_bytes(key, BLOCKS, EMBEDDINGS) <= 1.01 * size


def test_whichever_process_is_killed_the_others_keep_the_copy_and_the_last_one_frees_it(
    processes: Processes, key: str
) -> None:
    before = sorted(Path("/dev/shm").iterdir())
    first = processes.start(key, None)
    expected = first.said()
    assert expected.pop("num_reads")
    second = processes.start(key, None)
    assert second.said() == expected | {"num_reads": 0}
    first.kill()
    third = processes.start(key, None)
    assert third.said() == expected | {"num_reads": 0}
    second.kill()
    assert taken_bytes(key, BLOCKS, EMBEDDINGS)
    third.kill()
    assert not taken_bytes(key, BLOCKS, EMBEDDINGS)
    assert sorted(Path("/dev/shm").iterdir()) == before


def test_the_next_process_fills_what_one_was_killed_in(processes: Processes, key: str) -> None:
    first = processes.start(key, None, hangs=True)
    assert first.said() == {"filling": True}
    second = processes.start(key, None)
    first.kill()
    alone = loaded(None, None, hangs=False)
    found = second.said()
    # The first had filled the embeddings.
    assert 0 < found.pop("num_reads") <= alone.pop("num_reads")
    assert found == alone


def test_workers_share_what_is_the_same_for_all_of_them() -> None:
    identity = ModelIdentity(
        checkpoint="aa", lora=None, dtype="bfloat16", generation_prompt="", interleave_prompt=""
    )
    share = HostShare(name="run", num_workers=2)
    key = _share_key(share, identity)
    assert key is not None
    assert _share_key(share, replace(identity, generation_prompt="Draw")) == key
    others = [
        _share_key(replace(share, name="another"), identity),
        _share_key(share, replace(identity, checkpoint="bb")),
        _share_key(share, replace(identity, lora="cc")),
        _share_key(share, replace(identity, dtype="float16")),
        _share_key(share, replace(identity, precision=Precision.FP8)),
    ]
    assert len({key, *others}) == 6
    assert None not in others
    assert _share_key(replace(share, num_workers=1), identity) is None
    assert _share_key(None, identity) is None


def _ones(buffers: Mapping[str, Tensor]) -> None:
    for buffer in buffers.values():
        buffer.fill_(1)


def test_what_failed_half_way_is_begun_again(key: str) -> None:
    shared = SharedBuffers(key)

    def fail(buffers: Mapping[str, Tensor]) -> None:
        _ones(buffers)
        raise ValueError("cannot be read")

    with pytest.raises(ValueError, match="cannot be read"):
        shared.get("part", {"a": 4}, fail)
    assert not taken_bytes(key, "part")
    buffers = shared.get("part", {"a": 2, "b": BOUNDARY + 1}, _ones)
    assert [buffer.sum().item() for buffer in buffers.values()] == [2, BOUNDARY + 1]


def test_who_comes_later_takes_what_there_is(key: str) -> None:
    first = SharedBuffers(key)
    made = first.get("part", {"a": 2, "b": 3}, _ones)
    found = SharedBuffers(key).get("part", {"b": 3, "c": 4}, lambda _: pytest.fail("filled again"))
    assert {name: len(buffer) for name, buffer in found.items()} == {"a": 2, "b": 3}
    made["b"][1] = 7
    assert found["b"].tolist() == [1, 7, 1]
    assert SharedBuffers(f"{key}-other").get("part", {"a": 2}, _ones)["a"].tolist() == [1, 1]
    assert first.get("nothing", {}, _ones) == SharedBuffers(key).get("nothing", {}, _ones) == {}


def test_memory_is_freed_with_the_last_object_that_keeps_it(key: str) -> None:
    shared = SharedBuffers(key)
    shared.get("part", {"a": 2}, _ones)
    assert taken_bytes(key, "part")
    del shared
    assert not taken_bytes(key, "part")


def test_a_stop_ends_the_wait_for_another_process(key: str) -> None:
    stops = iter([False, True])
    shared = SharedBuffers(key, lambda: next(stops))
    with _alone(f"{PREFIX}{key}-part", lambda: False), pytest.raises(StoppedError):
        shared.get("part", {"a": 2}, _ones)
    assert shared.get("part", {"a": 2}, _ones)["a"].tolist() == [1, 1]
