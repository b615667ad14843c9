"""What this process uses of the machine, and how one that it started ended."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
    "total_active_file",
)
_MALLOPT = {-8: 4, -3: 1 << 20, -1: 8 << 20}
"""Options of mallopt(3): most heaps, and bytes of the smallest block that is taken from the system
by itself, and of what may stay free at the end of a heap."""
_CGROUP_2 = ("memory.max", "memory.current", "inactive_file", "active_file")
"""Files with the limit and what is used of it, and lines of what the system would give back."""


def peak_rss_bytes() -> int:
    """Returns the peak of the process's resident host memory so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # The figure of getrusage starts from that of the parent process.
        for line in _STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.removesuffix("kB")) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_little_memory() -> None:
    """Has the C library return memory as soon as it is freed; does nothing where it is not glibc.

    By itself it takes blocks of up to 32 MiB, such as images and their files, from heaps that stay
    as large as they ever were, of which there are several for each core.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def free_memory_bytes(proc: Path = Path("/proc/self"), cgroups: Path = _CGROUPS) -> int:
    """Returns the host memory that a process can still get: of the machine, or of its container.

    Args:
        proc: Where Linux describes the process.
        cgroups: Where it describes groups of processes, which containers and batch systems limit.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, names in _limiting_groups(proc, cgroups):
        # Groups without a limit say so with a word, or with a number that no machine has.
        with suppress(OSError, ValueError):
            limit, used = (int((folder / name).read_text()) for name in names[:2])
            lines = (folder / "memory.stat").read_text().splitlines()
            stat = dict(line.split() for line in lines)
            cached = sum(int(stat[name]) for name in names[2:] if name in stat)
            free = min(free, max(limit - used + cached, 0))
    return free


def _limiting_groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yields the folders of the groups that a process is in, and the names of their figures."""
    with suppress(OSError):
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = cgroups / "memory" if controllers else cgroups
            names = _CGROUP_1 if controllers else _CGROUP_2
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:depth]), names


def last_words(said: Path, code: int) -> str:
    """Returns how a process ended: its exit code, and the last line that it said.

    Args:
        said: Where its standard error went; need not be there.
        code: Its exit code.
    """
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"
