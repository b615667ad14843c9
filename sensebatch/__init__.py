"""Batch generation of image datasets with SenseNova-U1.

The names below are the Python API, which docs/python.md describes. They are imported on first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sensebatch.api import *

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "EngineError",
    "FinishedJob",
    "Job",
    "ManifestError",
    "Plan",
    "Problem",
    "RunConfig",
    "RunFolderError",
    "RunObserver",
    "RunStatus",
    "RunStoppedError",
    "SensebatchError",
    "Stop",
    "StoppedError",
    "StorageFullError",
    "Summary",
    "Task",
    "WarmEngine",
    "configure",
    "finished_jobs",
    "iter_jobs",
    "make_jobs",
    "make_plan",
    "open_engine",
    "plan_summary",
    "read_jobs",
    "read_log",
    "read_status",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sensebatch import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
