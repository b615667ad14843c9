"""How Ray is started and joined; a stub stands for it."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sensebatch.config import WorkersConfig
from sensebatch.errors import ConfigError, WorkersLostError
from sensebatch.executor import ray_start
from sensebatch.executor.ray_start import join, new_temp, start_local


class Node:
    """What starts Ray's processes."""

    def start_api_server(self, *, include_dashboard: bool) -> str:
        return f"dashboard {include_dashboard}"


class Params:
    """What they are started with."""

    def __init__(self, no_monitor: bool = False, include_log_monitor: bool = True) -> None:
        self.helpers = (not no_monitor, include_log_monitor)


class OtherParams:
    """The same of a Ray that has other names for it."""

    helpers = (True, True)


class Ray:
    """Says what it was started with."""

    exceptions = pytest.importorskip("ray.exceptions")

    def __init__(self, params: type = Params, latest: str | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.started: list[tuple[Any, Any]] = []
        self.looks, self.ready_after = 0, 0
        self._private = SimpleNamespace(
            parameter=SimpleNamespace(RayParams=params),
            node=SimpleNamespace(Node=Node),
            services=SimpleNamespace(
                get_ray_address_from_environment=lambda *_: latest, get_node=self._get_node
            ),
        )

    def _get_node(self, name: str) -> str:
        self.looks += 1
        if self.looks < self.ready_after:
            raise RuntimeError("no such node yet")
        return name

    def init(self, **asked: Any) -> None:
        self.asked.append(asked)
        assert self._private.services.get_node("own") == "own"
        made = self._private.parameter.RayParams()
        server = self._private.node.Node().start_api_server(include_dashboard=False)
        self.started.append((made.helpers, server))


@pytest.fixture
def open_port() -> Any:
    """A port that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def dead_port(open_port: int) -> int:
    """A port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    assert port != open_port
    return port


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_is_joined_where_something_answers(scheme: str, open_port: int) -> None:
    ray = Ray()
    join(ray, f"{scheme}127.0.0.1:{open_port}")
    assert [asked["address"] for asked in ray.asked] == [f"{scheme}127.0.0.1:{open_port}"]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_answers_is_refused_at_once(scheme: str, dead_port: int) -> None:
    ray, address = Ray(), f"{scheme}127.0.0.1:{dead_port}"
    with pytest.raises(ConfigError) as refused:
        join(ray, address)
    assert str(refused.value) == (
        f"--cluster: expected the address of a Ray cluster, found {address!r}: nothing answers at "
        f"127.0.0.1:{dead_port} (Connection refused)"
    )
    assert not ray.asked


def test_the_latest_cluster_of_a_machine_may_be_dead(dead_port: int) -> None:
    ray = Ray(latest=f"127.0.0.1:{dead_port}")
    with pytest.raises(
        ConfigError, match=f"found 'auto': nothing answers at 127.0.0.1:{dead_port}"
    ):
        join(ray, "auto")
    assert not ray.asked


def test_an_address_from_outside_has_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_start._place(Ray(), "ray://head") == ("head", 10001)
    assert ray_start._place(Ray(), "head:6379") == ("head", 6379)
    assert ray_start._place(Ray(), "nonsense") is None
    monkeypatch.setattr(Ray, "init", lambda *_, **__: exec("raise ValueError('no address')"))
    with pytest.raises(ConfigError, match="found 'nonsense': no address"):
        join(Ray(), "nonsense")


def test_a_cluster_that_does_not_let_a_run_in_is_refused(
    open_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*_: object, **__: object) -> None:
        raise Ray.exceptions.AuthenticationError("Missing token")

    monkeypatch.setattr(Ray, "init", init)
    with pytest.raises(ConfigError, match=f"found '127.0.0.1:{open_port}': Missing token"):
        join(Ray(), f"127.0.0.1:{open_port}")


def test_ray_is_started_without_helpers_that_nobody_asks(tmp_path: Path) -> None:
    ray = Ray()
    start_local(ray, WorkersConfig(count=2), uses_gpu=False, temp=tmp_path)
    assert ray.started == [((False, False), None)]
    assert ray.asked[0]["num_cpus"] == 2
    assert ray.asked[0]["_system_config"]["gcs_server_rpc_server_thread_num"] == 1
    assert ray.asked[0]["_system_config"]["worker_register_timeout_seconds"] > 60
    assert ray._private.parameter.RayParams is Params
    assert Node().start_api_server(include_dashboard=True) == "dashboard True"


def test_ray_that_takes_long_to_start_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_start, "_AGAIN_S", 0.0)
    ray = Ray()
    ray.ready_after = 5
    start_local(ray, WorkersConfig(count=1), uses_gpu=False, temp=tmp_path)
    assert ray.looks == 5
    assert ray._private.services.get_node == ray._get_node
    monkeypatch.setattr(ray_start, "START_S", -1.0)
    ray.ready_after = 10
    with pytest.raises(WorkersLostError, match="Ray did not start on this machine: no such node"):
        start_local(ray, WorkersConfig(count=1), uses_gpu=False, temp=tmp_path)


def test_another_ray_is_started_as_it_is(tmp_path: Path) -> None:
    ray = Ray(OtherParams)
    start_local(ray, WorkersConfig(count=1), uses_gpu=False, temp=tmp_path)
    assert ray.started == [((True, True), "dashboard False")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to start GCS.\nLast 0 lines"), "Failed to start GCS."),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError(), "ValueError"),
        (Ray.exceptions.RaySystemError("no raylet"), "System error: no raylet"),
    ],
)
def test_ray_that_does_not_start_is_said_in_a_line(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Ray, "init", init)
    with pytest.raises(WorkersLostError) as lost:
        start_local(Ray(), WorkersConfig(count=1), uses_gpu=False, temp=tmp_path)
    assert str(lost.value) == f"Ray did not start on this machine: {reason}"


def test_files_of_runs_that_were_killed_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ray_start, "_MAX_TEMP_NAME", 1000)
    no_process = 2**22 + 1  # more than Linux ever gives
    left = tmp_path / f"sensebatch-ray-{no_process}-x"
    running = tmp_path / f"sensebatch-ray-{os.getpid()}-x"
    for folder in (left, running):
        folder.mkdir()
    made = new_temp()
    assert not left.exists()
    assert running.exists()
    assert made.name.startswith(f"sensebatch-ray-{os.getpid()}-")
