"""Host memory that several processes share: the same pages, filled by the first that needs them.

It is an anonymous file (`memfd_create(2)`), which has no name in any file system: the kernel frees
it with the last process that holds it, however that one ends. Processes find it by the file's own
name among what their user's processes have open. A socket's abstract name, which ends with its
process as well, keeps two of them from making it at the same time. Linux only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import socket
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from sensebatch.errors import OutOfMemoryError, StoppedError
from sensebatch.units import GIB

PREFIX = "sensebatch-"
BOUNDARY = 2 << 20
"""Every buffer starts at a multiple of this many bytes: a page, also where pages are huge."""
WAIT_S = 0.05
"""How long a process that waits for another one sleeps before it looks again."""
_LENGTH = struct.Struct("<Q")
"""Bytes of the table of buffers, at the very end of the file."""


def can_share() -> bool:
    """Returns whether processes of this system can share memory."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class SharedBuffers:
    """Buffers that all processes of a host with the same key share.

    Whoever keeps this object keeps the memory, and lets other processes find it.

    Args:
        key: Stands for the content: the same key, the same bytes. Short and printable.
        stop: Whether to give up waiting for another process.
    """

    def __init__(self, key: str, stop: Callable[[], bool] = lambda: False) -> None:
        self._key = key
        self._stop = stop
        self._files: list[int] = []
        weakref.finalize(self, _close_all, self._files)

    def get(
        self,
        part: str,
        sizes: Mapping[str, int],
        fill: Callable[[Mapping[str, Tensor]], object],
    ) -> dict[str, Tensor]:
        """Returns named buffers with their content; the first process makes and fills them.

        Processes that come later wait until they are filled, and take those that there are. If
        the first one fails or dies meanwhile, the next one begins again.

        Args:
            part: Which set of buffers.
            sizes: The bytes of each buffer, if this process is the first.
            fill: Writes the content of them all.

        Raises:
            StoppedError: The stop was set while another process filled them.
            OutOfMemoryError: The host does not have so much memory.
            Exception: What `fill` raised.
        """
        name = _name(self._key, part)
        with _alone(name, self._stop):
            file = _found(name)
            if file is None:
                file, buffers = _made(name, sizes, fill)
            else:
                buffers = _mapped(file, _table(file))
            self._files.append(file)
        return buffers


def taken_bytes(key: str | None, *parts: str) -> int:
    """Returns how much memory sets of buffers take already, whoever has made them."""
    taken = 0
    for part in parts:
        file = None if key is None else _found(_name(key, part))
        if file is not None:
            # In blocks of 512 bytes, whatever the system's own are.
            taken += os.fstat(file).st_blocks * 512
            os.close(file)
    return taken


def _name(key: str, part: str) -> str:
    return f"{PREFIX}{key}-{part}"


@contextmanager
def _alone(name: str, stop: Callable[[], bool]) -> Iterator[None]:
    """Keeps every other process of the host out of a block under the same name."""
    with socket.socket(socket.AF_UNIX) as taken:
        while True:
            try:
                taken.bind(f"\0{name}")
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            if stop():
                raise StoppedError("the run was stopped while the weights were loaded")
            time.sleep(WAIT_S)
        yield


def _found(name: str) -> int | None:
    """Returns the anonymous file of this name that some process of the user has open, opened."""
    target = f"/memfd:{name} (deleted)"
    for place in _open_files():
        # Processes end meanwhile, and most are somebody else's.
        with contextlib.suppress(OSError):
            if os.readlink(place) == target and os.stat(place).st_uid == os.geteuid():  # noqa: PTH115, PTH116
                return os.open(place, os.O_RDWR | os.O_CLOEXEC)
    return None


def _open_files() -> Iterator[str]:
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError), os.scandir(process / "fd") as entries:
                yield from (entry.path for entry in entries)


def _made(
    name: str, sizes: Mapping[str, int], fill: Callable[[Mapping[str, Tensor]], object]
) -> tuple[int, dict[str, Tensor]]:
    """Returns a new file with its buffers filled; leaves none where that fails."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        rounded = (-(-size // BOUNDARY) * BOUNDARY for size in sizes.values())
        *starts, total = accumulate(rounded, initial=0)
        table = {
            key: (start, size) for (key, size), start in zip(sizes.items(), starts, strict=True)
        }
        os.ftruncate(file, total)
        buffers = _mapped(file, table)
        fill(buffers)
        written = json.dumps(table).encode()
        os.pwrite(file, written + _LENGTH.pack(len(written)), total)
    except BaseException:
        # Before another process may look for it.
        os.close(file)
        raise
    return file, buffers


def _table(file: int) -> dict[str, tuple[int, int]]:
    """Returns where each buffer of a filled file lies, as (start, bytes)."""
    end = os.fstat(file).st_size - _LENGTH.size
    (length,) = _LENGTH.unpack(os.pread(file, _LENGTH.size, end))
    table = json.loads(os.pread(file, length, end - length))
    return {key: (start, size) for key, (start, size) in table.items()}


def _mapped(file: int, table: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Returns views of a file's memory.

    Raises:
        OutOfMemoryError: The host has no room for it.
    """
    total = max((start + size for start, size in table.values()), default=0)
    if not total:
        return {}
    try:
        memory = mmap.mmap(file, total)
    except OSError as error:
        raise OutOfMemoryError(
            f"the host has no {total / GIB:.2f} GiB for weights: {error.strerror}"
        ) from error
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return {
        key: torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
        for key, (start, size) in table.items()
    }


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)
