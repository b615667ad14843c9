"""What the processes of a run hold of the host's memory, and what lies there. Linux only.

A process's share is its proportional set size (PSS): a page that several processes map counts for
a part in each, so that shares add up to what all of them take. Resident size counts such a page in
every one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from sensebatch.units import MIB

WORKER = "ray::RayWorker"
"""Begins the title of a worker's process."""


class Part(StrEnum):
    """What lies in a range of a process's memory."""

    WEIGHTS = "shared weights"
    """The copy that all workers of a host have in common."""
    OWN = "own"
    """What the program has asked for: weights that are not shared, images, objects."""
    FILES = "files"
    """Programs and libraries, as far as they were read."""
    SHARED = "shared memory"
    """Messages on their way between workers and driver."""
    DEVICE = "device"
    """What the GPU's driver maps."""


_BEGINS: Mapping[str, Part] = {
    "/memfd:sensebatch-": Part.WEIGHTS,
    "/dev/shm/": Part.SHARED,
    "/memfd:": Part.SHARED,
    "/dev/zero": Part.OWN,
    "/dev/": Part.DEVICE,
    "/": Part.FILES,
}
"""How the names of ranges begin, the first that fits; all others are the process's own."""
_RANGE = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")
"""The line of /proc/PID/smaps that begins a range, with its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """A process's memory at one moment."""

    name: str
    """What it is in the run."""
    pid: int
    rss_bytes: int
    """Resident."""
    pss_bytes: int
    """Its share."""
    private_bytes: int
    """What nobody else maps, and would be freed with it."""
    parts: Mapping[Part, int]
    """Its share, by what lies there."""

    @property
    def is_worker(self) -> bool:
        """Whether it computes."""
        return self.name.startswith(WORKER)


def look(processes: Iterable[psutil.Process]) -> list[ProcessMemory]:
    """Returns what processes hold; those that have ended meanwhile are left out."""
    found = []
    for process in processes:
        with suppress(psutil.Error, OSError):
            lines = Path(f"/proc/{process.pid}/smaps").read_text().splitlines()
            found.append(read_ranges(_name(process.cmdline()), process.pid, lines))
    return found


def read_ranges(name: str, pid: int, lines: Iterable[str]) -> ProcessMemory:
    """Returns what the lines of /proc/PID/smaps come to."""
    sums = dict.fromkeys(("Rss", "Pss", "Private_Clean", "Private_Dirty"), 0)
    parts = dict.fromkeys(Part, 0)
    part = Part.OWN
    for line in lines:
        if (begun := _RANGE.match(line)) is not None:
            part = _part(begun[1])
            continue
        key, _, value = line.partition(":")
        if key in sums:
            size = int(value.split()[0]) * 1024
            sums[key] += size
            parts[part] += size if key == "Pss" else 0
    return ProcessMemory(
        name=name,
        pid=pid,
        rss_bytes=sums["Rss"],
        pss_bytes=sums["Pss"],
        private_bytes=sums["Private_Clean"] + sums["Private_Dirty"],
        parts=parts,
    )


def _part(name: str) -> Part:
    return next((part for begin, part in _BEGINS.items() if name.startswith(begin)), Part.OWN)


def _name(words: Sequence[str]) -> str:
    """Returns what a process is called: Ray's own title, a script, or a program's name."""
    if not words:
        return "-"
    if words[0].startswith("ray::"):
        return words[0].split(".")[0].strip()
    module = words.index("-m") + 1 if "-m" in words else 0
    script = next((word for word in words[1:] if word.endswith(".py")), "")
    return words[module] if module else Path(script or words[0]).name


def shared_weights(processes: Iterable[ProcessMemory]) -> int:
    """Returns the bytes of the copy of the weights that workers share."""
    return sum(process.parts[Part.WEIGHTS] for process in processes)


def memory_table(processes: Sequence[ProcessMemory]) -> str:
    """Returns a Markdown table of what processes hold, in MiB, the largest first."""
    titles = ["process", "share", "resident", "private", *(part.value for part in Part)]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for process in sorted(processes, key=lambda one: -one.pss_bytes):
        sizes = [process.pss_bytes, process.rss_bytes, process.private_bytes]
        sizes += [process.parts[part] for part in Part]
        lines.append(_row(process.name, sizes))
    totals: list[int | None] = [sum(process.pss_bytes for process in processes), None]
    totals.append(sum(process.private_bytes for process in processes))
    totals += [sum(process.parts[part] for process in processes) for part in Part]
    return "\n".join([*lines, _row("all", totals)])


def _row(name: str, sizes: Iterable[int | None]) -> str:
    cells = ("" if size is None else f"{size / MIB:,.0f}" for size in sizes)
    return f"| {name} | {' | '.join(cells)} |"
