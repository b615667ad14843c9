"""What the process takes is its own, and what another one said last is kept."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sensebatch.process import free_memory_bytes, last_words, peak_rss_bytes

MIB = 2**20


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    code = "from sensebatch.process import peak_rss_bytes; print(peak_rss_bytes())"
    held = bytearray(b"x") * (256 * MIB)
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert 4 * MIB < int(child.stdout) < len(held)
    assert peak_rss_bytes() > len(held)


def test_the_last_line_that_was_said_is_found(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    assert last_words(said, 2) == "exit code 2: it said nothing"
    said.write_bytes(b"reading\nno room \xff\n\n")
    assert last_words(said, 2) == "exit code 2: no room \ufffd"


GROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUP_2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/box/job", "box/job", GROUP_2),
        ("0::/box/job", "box", GROUP_2),
        ("0::/", "", GROUP_2),
        ("0::/../../elsewhere", "elsewhere", GROUP_2),
        ("4:cpu,memory:/box", "memory/box", GROUP_1),
        ("4:memory:/box", "memory", GROUP_1),
    ],
)
def test_free_memory_is_what_the_container_allows(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str, str]
) -> None:
    limit, used, cached = names
    group = tmp_path / "cgroup.fs" / folder
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text(f"7:cpuset:/\n{line}\n")
    (group / limit).write_text(f"{9 * MIB}\n")
    (group / used).write_text(f"{5 * MIB}\n")
    (group / "memory.stat").write_text(f"anon 7\n{cached} {2 * MIB}\n")
    assert free_memory_bytes(tmp_path, tmp_path / "cgroup.fs") == 6 * MIB
    (group / limit).write_text("max\n")
    assert free_memory_bytes(tmp_path, tmp_path / "cgroup.fs") > 9 * MIB
    assert free_memory_bytes(tmp_path / "none") > 9 * MIB


KEEPS = """
import ctypes, sys
from pathlib import Path
from sensebatch.process import keep_little_memory

def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))

if sys.argv[1] == "little":
    keep_little_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
# After it, blocks that are smaller come from the heap.
libc.free(libc.malloc(31 << 20))
before = resident_mib()
blocks = [libc.malloc(8 << 20) for _ in range(20)]
for block in blocks:
    ctypes.memset(block, 1, 8 << 20)
last = libc.malloc(512 << 10)
for block in blocks:
    libc.free(block)
print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_blocks_that_are_freed_go_back_to_the_system() -> None:
    kept = {}
    for how in ("little", "much"):
        command = [sys.executable, "-c", KEEPS, how]
        kept[how] = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert kept["little"] < 20
    assert kept["much"] > 100
