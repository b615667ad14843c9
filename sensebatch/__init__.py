"""Batch generation of image datasets with SenseNova-U1.

The names below are the Python API, which docs/python.md describes. They are imported on first use.
"""

__version__ = "0.1.0"

# Type checkers take this name for true, as they do the one in `typing`, which takes long to import:
# until commands handle signals, Ctrl-C ends with a traceback.
TYPE_CHECKING = False
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
    "Verdict",
    "WarmEngine",
    "WorkersConfig",
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


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sensebatch import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
