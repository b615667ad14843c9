"""What the process takes of the machine."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int:
    """Returns the most host memory the process has held resident so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
