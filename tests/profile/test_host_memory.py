"""What the processes of a run hold of the host's memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import psutil
import pytest

from sensebatch.profile.host_memory import (
    Part,
    ProcessMemory,
    look,
    memory_table,
    read_ranges,
    shared_weights,
)
from sensebatch.units import MIB

SMAPS = """\
00400000-00a52000 r-xp 00000000 08:02 173521      /opt/ray/raylet
Rss:                  40 kB
Pss:                  20 kB
Shared_Clean:         40 kB
Private_Clean:         0 kB
Private_Dirty:         0 kB
VmFlags: rd ex mr mw me dw
01b2e000-01d2e000 rw-p 00000000 00:00 0           [heap]
Rss:                  10 kB
Pss:                  10 kB
Private_Clean:         2 kB
Private_Dirty:         8 kB
7f00aa000000-7f00ba000000 rw-p 00000000 00:00 0
Rss:                   5 kB
Pss:                   5 kB
Private_Dirty:         5 kB
7f01aa000000-7f01ba000000 rw-s 00000000 00:01 2048 /memfd:sensebatch-3f9c-blocks (deleted)
Rss:                 300 kB
Pss:                 100 kB
Shared_Dirty:        300 kB
7f02aa000000-7f02ba000000 rw-s 00000000 00:01 9    /dev/shm/plasmaXYZ (deleted)
Rss:                   4 kB
Pss:                   2 kB
7f03aa000000-7f03ba000000 rw-s 00000000 00:01 9    /dev/nvidia0
Rss:                   6 kB
Pss:                   6 kB
"""


def memory_of(name: str, own: int, weights: int = 0) -> ProcessMemory:
    parts = {**dict.fromkeys(Part, 0), Part.OWN: own, Part.WEIGHTS: weights}
    return ProcessMemory(
        name=name,
        pid=1,
        rss_bytes=own + 2 * weights,
        pss_bytes=own + weights,
        private_bytes=own,
        parts=parts,
    )


def test_shares_are_summed_by_what_lies_there() -> None:
    found = read_ranges("ray::RayWorker", 7, SMAPS.splitlines())
    assert {part.value: size // 1024 for part, size in found.parts.items()} == {
        "shared weights": 100,
        "own": 15,
        "files": 20,
        "shared memory": 2,
        "device": 6,
    }
    assert found.pss_bytes == sum(found.parts.values())
    assert (found.rss_bytes, found.private_bytes) == (365 * 1024, 15 * 1024)
    assert found.is_worker


def test_table_names_processes_the_largest_first_and_sums_their_shares() -> None:
    workers = [memory_of("ray::RayWorker", 700 * MIB, 16000 * MIB) for _ in range(2)]
    processes = [memory_of("sensebatch", 200 * MIB), *workers]
    assert shared_weights(processes) == 32000 * MIB
    rows = [line.strip("| ").split(" | ") for line in memory_table(processes).splitlines()[2:]]
    assert [row[0] for row in rows] == ["ray::RayWorker", "ray::RayWorker", "sensebatch", "all"]
    assert rows[0][1:6] == ["16,700", "32,700", "700", "16,000", "700"]
    assert rows[-1][1:6] == ["33,600", "", "1,600", "32,000", "1,600"]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_memory_that_a_process_maps_is_found_where_it_lies() -> None:
    me = psutil.Process()
    (before,) = look([me])
    file = os.memfd_create("sensebatch-test")
    os.ftruncate(file, 8 * MIB)
    with mmap.mmap(file, 8 * MIB) as shared, mmap.mmap(-1, 4 * MIB, mmap.MAP_PRIVATE) as own:
        for memory in (shared, own):
            memory.write(b"x" * len(memory))
        (after,) = look([me])
    os.close(file)
    assert after.parts[Part.WEIGHTS] - before.parts[Part.WEIGHTS] == 8 * MIB
    assert after.parts[Part.OWN] - before.parts[Part.OWN] >= 3 * MIB


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_a_process_that_has_ended_is_left_out() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    process = psutil.Process(child)
    os.waitpid(child, 0)
    assert [found.pid for found in look([process, psutil.Process()])] == [os.getpid()]
