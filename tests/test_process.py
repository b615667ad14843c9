"""What the process takes is its own, and what another one said last is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sensebatch.process import last_words, peak_rss_bytes

MIB = 2**20


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    code = "from sensebatch.process import last_words, peak_rss_bytes; print(peak_rss_bytes())"
    held = bytearray(b"x") * (256 * MIB)
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert 4 * MIB < int(child.stdout) < len(held)
    assert peak_rss_bytes() > len(held)


def test_the_last_line_that_was_said_is_found(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    assert last_words(said, 2) == "exit code 2: it said nothing"
    said.write_bytes(b"reading\nno room \xff\n\n")
    assert last_words(said, 2) == "exit code 2: no room \ufffd"
