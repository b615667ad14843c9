"""A run on the command line: the library's session with signals and a display around it."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from sensebatch import loading, session
from sensebatch.cli.messages import output_apart
from sensebatch.cli.progress import watch
from sensebatch.cli.signals import Interrupt, StopSignals
from sensebatch.cli.speed_cache import read_speeds
from sensebatch.cli.voice import Voice
from sensebatch.config import WorkersConfig
from sensebatch.errors import ConfigError, StoppedError
from sensebatch.executor.observer import Summary
from sensebatch.loading import Backend
from sensebatch.plan.patience import MeasuredGpu
from sensebatch.session import Request

_COMPUTES_ALIKE = (
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
"""Variables by which libraries compute, and so what must be the same in every worker."""


def run_session(
    request: Request,
    voice: Voice,
    backend: Backend | None = None,
    stop: StopSignals | None = None,
) -> Summary:
    """Runs what is missing in a run's folder, shows its progress, and returns what became of it.

    Args:
        request: What to run.
        voice: Prints how the run goes.
        backend: Computes; torch if None.
        stop: Says afterwards whether a signal came; one of the run's own if None.

    Raises:
        SensebatchError: As `session.run_session` raises it.
    """
    _settle_allocator()
    stop = StopSignals() if stop is None else stop
    # What the user's functions print is for people; stdout is for the result of the command. The
    # display replaces stdout as well while it lasts, so it has to begin later and to end earlier.
    apart = output_apart() if request.config.accept else nullcontext()
    try:
        with apart, stop.installed(interrupts=True), voice.logging(), watch(stop, voice) as display:
            voice.info(f"reading {', '.join(request.sources)}")
            computes = _backend() if backend is None else backend
            return session.run_session(request, computes, observer=display, stop=stop)
    except Interrupt:
        raise StoppedError("a signal came before any job was run") from None


def _backend() -> Backend:
    """Returns what computes; it knows what attention backends reach if doctor has measured it."""
    # What is wrong with the file is for plan to say: a run needs nothing of it.
    measured, _ = read_speeds()
    return loading.TorchBackend(None if measured is None else measured.attention_speeds)


def measured_gpu() -> MeasuredGpu | None:
    """Returns the GPU that doctor has measured; None where it has not."""
    found, _ = read_speeds()
    return None if found is None else MeasuredGpu(name=found.gpu, speeds=found.machine.speeds)


def _settle_allocator() -> None:
    """Lets torch's allocator grow its segments in place; it reads this setting on first use.

    Otherwise it keeps freed segments of sizes that no later tensor has, so less fits a budget. A
    setting that the user made is left alone.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def settled(workers: WorkersConfig | None) -> WorkersConfig | None:
    """Returns the workers with what they take from the environment, and hides the other GPUs.

    Numbers of GPUs are places among those that `CUDA_VISIBLE_DEVICES` shows, as torch counts them.
    """
    if workers is None:
        return None
    _settle_allocator()
    _settle_token(workers)
    # Ray takes the parent of this process for its own, unless it is told otherwise. Where it has
    # lost its own, it would end a run without a word whose parent has ended, as after a logout.
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    environment = {name: os.environ.get(name) for name in _COMPUTES_ALIKE}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    shown = [gpu for gpu in visible.split(",") if gpu] if workers.cluster is None else []

    def of_driver(gpu: str) -> str:
        if not shown:
            return gpu
        if int(gpu) >= len(shown):
            raise ConfigError(
                f"--gpus: expected numbers below {len(shown)}, since CUDA_VISIBLE_DEVICES shows "
                f"{visible!r}, found {gpu}"
            )
        return shown[int(gpu)]

    gpus = tuple(of_driver(gpu) for gpu in workers.gpus)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    budgets = {of_driver(gpu): amount for gpu, amount in workers.gpu_budget_bytes.items()}
    return replace(workers, gpus=gpus, gpu_budget_bytes=budgets, environment=environment)


def _settle_token(workers: WorkersConfig) -> None:
    """Says by which token Ray's processes know each other, unless the user does.

    Ray that is started for the run gets one of its own, or else it would leave one at home. On a
    cluster it is that of `ray start`, which is at home.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    token = os.path.expanduser("~/.ray/auth_token")  # noqa: PTH111, a user may have no home
    if workers.cluster is None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    elif Path(token).is_file() or "RAY_AUTH_TOKEN" in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
