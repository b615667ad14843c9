"""How Ray is reached: started on this machine for a run, or joined where somebody started it.

Knows addresses, options and folders, and no workers.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from sensebatch.config import WorkersConfig
from sensebatch.errors import ConfigError, WorkersLostError

INSTALL_COMMAND = "pip install 'sensebatch[cluster]'"
REACH_S = 10.0
"""Seconds within which a cluster has to take a connection."""
START_S, _AGAIN_S = 75.0, 0.1
"""Seconds within which Ray has to start on this machine, and between two looks."""
CLIENT_PORT = 10001
"""Where a cluster takes those that come from outside, unless an address says another one."""
_COMMON = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "sensebatch"}
_SYSTEM = {
    # Budgets say what workers may take of the host.
    "memory_monitor_refresh_ms": 0,
    # There would be one for every four cores, of 2 MiB each; a run has few messages for it.
    "gcs_server_rpc_server_thread_num": 1,
    # Ray kills and starts again what takes a minute to start, as a worker may on a busy machine.
    "worker_register_timeout_seconds": 600,
}
_NEWS_BYTES = 256 << 20
"""Ray's shared memory for each worker: a batch's images on their way, or those to be kept."""
_MAX_SHARE = 0.3
"""Most of the host's memory for that; Ray brings what does not fit to the disk."""
_TEMP_PREFIX = "sensebatch-ray-"
"""Begins the name of the folder of Ray's files; the number of the process follows."""
_MAX_TEMP_NAME = 30
"""Characters of the folder for temporary files that leave room for the names of Ray's sockets."""


def import_ray() -> Any:
    """Returns the package `ray`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            f"several workers need Ray, which is not installed; install it with: {INSTALL_COMMAND}"
        ) from None
    return ray


def join(ray: Any, address: str) -> None:
    """Joins a cluster.

    Raises:
        ConfigError: There is none at this address, or it does not let the run in.
    """
    found = f"--cluster: expected the address of a Ray cluster, found {address!r}"
    try:
        # A dead one would be waited for, for ten minutes.
        _require_answer(_place(ray, address), found)
        ray.init(address=address, **_COMMON)
    except (OSError, ImportError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"{found}: {in_a_line(error)}") from error


def start_local(ray: Any, workers: WorkersConfig, *, uses_gpu: bool, temp: Path) -> None:
    """Starts Ray on this machine; it ends with the thread that calls this.

    Raises:
        WorkersLostError: It does not start.
    """
    num_workers = workers.count or 1
    resources: dict[str, Any] = {"num_cpus": num_workers}
    if workers.gpus or not uses_gpu:
        resources["num_gpus"] = len(workers.gpus) if uses_gpu else 0
    try:
        with _without_helpers(ray), _with_patience(ray):
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_store_bytes(num_workers),
                _temp_dir=str(temp),
                _node_ip_address="127.0.0.1",
                _system_config=_SYSTEM,
                **resources,
                **_COMMON,
            )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise WorkersLostError(f"Ray did not start on this machine: {in_a_line(error)}") from error


def new_temp() -> Path:
    """Makes a folder for what Ray writes; removes those of runs that were killed."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _MAX_TEMP_NAME:
        base = Path("/tmp")
    for folder in base.glob(f"{_TEMP_PREFIX}*-*"):
        owner = folder.name.removeprefix(_TEMP_PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_TEMP_PREFIX}{os.getpid()}-", dir=base))


def _place(ray: Any, address: str) -> tuple[str, int] | None:
    """Returns the host and the port of a cluster; None if only Ray can make sense of the address.

    Raises:
        ConnectionError: Ray knows of no cluster on this machine.
    """
    if address == "auto":
        # What ray.init does first. There is no public way to ask for it.
        with suppress(AttributeError):
            logging.getLogger("ray._private.services").setLevel(logging.ERROR)
            address = ray._private.services.get_ray_address_from_environment(address, None)
    default = CLIENT_PORT if address.startswith("ray://") else None
    with suppress(ValueError):
        parts = urlsplit(address if "://" in address else f"//{address}")
        port = parts.port or default
        if parts.hostname and port:
            return parts.hostname, port
    return None


def _require_answer(place: tuple[str, int] | None, found: str) -> None:
    """Makes sure that something takes connections at a place.

    Raises:
        ConfigError: Nothing does.
    """
    if place is None:
        return
    host, port = place
    try:
        socket.create_connection(place, REACH_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{found}: nothing answers at {host}:{port} ({reason})") from error


def in_a_line(error: Exception) -> str:
    """Returns the first line of what Ray says; its name if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _without_helpers(ray: Any) -> Iterator[None]:
    """Lets Ray start without what a run has no use for: autoscaler, log reader, dashboard.

    They take 150 MiB and half of the time that it takes to start. The command `ray start` has
    options for that and `ray.init` has none; a version of Ray that calls them otherwise starts
    them all.
    """
    parameter, node = ray._private.parameter, ray._private.node.Node
    as_found = parameter.RayParams, node.start_api_server
    unwanted = {"no_monitor": True, "include_log_monitor": False}
    if unwanted.keys() <= inspect.signature(parameter.RayParams).parameters.keys():
        parameter.RayParams = partial(parameter.RayParams, **unwanted)
        node.start_api_server = lambda _node, **_: None
    try:
        yield
    finally:
        parameter.RayParams, node.start_api_server = as_found


@contextmanager
def _with_patience(ray: Any) -> Iterator[None]:
    """Gives Ray's process longer to start than Ray does, as a busy machine takes.

    Half a minute is written in `Node`, which then raises.
    """
    services = ray._private.services
    get_node, end = services.get_node, time.monotonic() + START_S

    def wait_for_node(*args: Any, **options: Any) -> Any:
        while True:
            try:
                return get_node(*args, **options)
            except RuntimeError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_AGAIN_S)

    services.get_node = wait_for_node
    try:
        yield
    finally:
        services.get_node = get_node


def _store_bytes(num_workers: int) -> int:
    """Returns how much of the host's memory Ray may use for messages on their way."""
    most = int(psutil.virtual_memory().total * _MAX_SHARE)
    return min(max(num_workers, 2) * _NEWS_BYTES, most)
