"""What the process takes is its own."""

from __future__ import annotations

import subprocess
import sys

from sensebatch.process import peak_rss_bytes

MIB = 2**20


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    code = "from sensebatch.process import peak_rss_bytes; print(peak_rss_bytes())"
    held = bytearray(b"x") * (256 * MIB)
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert 4 * MIB < int(child.stdout) < len(held)
    assert peak_rss_bytes() > len(held)
