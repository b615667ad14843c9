"""Whether a cluster still answers; a stub stands for Ray."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sensebatch.executor import ray_watch
from sensebatch.executor.ray_watch import ClusterWatch

PATIENCE_S = 60.0


class Ray:
    """A cluster of two nodes."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.fails = False
        self.alive = {"driver": True, "other": True}
        self.socket = "/nowhere"

    def nodes(self) -> list[dict[str, Any]]:
        self.answers.wait()
        if self.fails:
            raise ConnectionError("no such head")
        return [
            {
                "NodeID": name,
                "Alive": alive,
                "Resources": {"CPU": 8.0, "GPU": 2.0},
                "RayletSocketName": self.socket if name == "driver" else "/elsewhere",
            }
            for name, alive in self.alive.items()
        ]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    for name, seconds in {"LOOK_S": 0.01, "TICK_S": 0.01, "FRESH_S": 0.02}.items():
        monkeypatch.setattr(ray_watch, name, seconds)
    return Ray()


@pytest.fixture
def watch(ray: Ray) -> Iterator[ClusterWatch]:
    watch = ClusterWatch(ray, "driver")
    yield watch
    watch.close()
    ray.answers.set()


def lost_or_found(watch: ClusterWatch, *, is_lost: bool) -> str | None:
    """Returns why a cluster is lost once it is, or None once it is not."""
    end = time.monotonic() + PATIENCE_S
    while ((lost := watch.lost) is not None) is not is_lost:
        assert time.monotonic() < end
        time.sleep(0.01)
    return lost


@pytest.mark.parametrize("how", ["waits", "fails"])
def test_a_cluster_that_does_not_answer_is_lost_until_it_does(
    how: str, ray: Ray, watch: ClusterWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_watch, "LOST_S", 0.1)
    if how == "waits":
        ray.answers.clear()
    else:
        ray.fails = True
    lost = lost_or_found(watch, is_lost=True)
    assert lost == "the Ray cluster has not answered for 0 s"
    assert watch.alive() == {"driver", "other"}, "as it was heard last"
    ray.fails = False
    ray.answers.set()
    assert lost_or_found(watch, is_lost=False) is None


def test_nodes_are_those_of_now(
    ray: Ray, watch: ClusterWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_watch, "LOOK_S", PATIENCE_S)
    monkeypatch.setattr(ray_watch, "FRESH_S", PATIENCE_S)
    assert watch.num_gpus == 4
    ray.alive["other"] = False
    assert watch.alive() == {"driver"}
    assert watch.num_gpus == 2
    assert watch.lost is None


def test_a_run_whose_own_node_has_ended_is_lost(ray: Ray, watch: ClusterWatch) -> None:
    ray.alive["driver"] = False
    lost = lost_or_found(watch, is_lost=True)
    assert lost == "Ray has ended on the machine of the run"


def test_ray_that_has_ended_here_is_seen_before_its_cluster_knows(ray: Ray) -> None:
    # Names of sockets are short.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as server:
        ray.socket = f"{folder}/raylet"
        server.bind(ray.socket)
        server.listen()
        watch = ClusterWatch(ray, "driver")
        process, _ = server.accept()
        assert not watch.has_ended_here
        assert watch.lost is None
        process.close()
        assert watch.has_ended_here
        assert watch.lost == "Ray has ended on the machine of the run"
        watch.close()
