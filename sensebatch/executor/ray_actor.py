"""A worker of a run as a Ray actor: moves messages between the executor and a `WorkerHost`.

The executor asks for news again and again and gets them as soon as there are some. So every
message is the answer to a call of the executor's, which works from outside a cluster as well. Ray
itself is imported late: nothing here needs it but the actor's place in the cluster.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import sensebatch
from sensebatch.config import OutputConfig
from sensebatch.contract import Engine, HostShare, Raised
from sensebatch.errors import CheckpointError, ConfigError
from sensebatch.executor.guard import guarded
from sensebatch.executor.host import Outbox, WorkerHost
from sensebatch.executor.messages import News, Order, Unusable
from sensebatch.jobs import GroupKey
from sensebatch.process import keep_little_memory

LISTEN_S = 1.0
"""Seconds that a question for news waits for some."""
LONELY_S = 60.0
"""Seconds without a question after which a worker ends itself. Ray ends the workers of a process
that died within a second or so; this is for networks that part."""
FINAL = {kind.__name__ for kind in (CheckpointError, ConfigError)}
"""What another try to load the engine would come to again."""


class OpenEngine(Protocol):
    """Loads an engine in a worker's process; pickles."""

    def __call__(self, gpu: str | None, share: HostShare | None) -> Engine:
        """Returns the engine, loaded.

        Args:
            gpu: Number of the GPU that the worker has, as the machine counts them.
            share: How the host is shared with the run's other workers; None without a GPU.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a worker begins."""

    open_engine: OpenEngine
    output: OutputConfig
    """How images are written."""
    groups: tuple[GroupKey, ...]
    """Those of the jobs to come."""
    environment: Mapping[str, str | None]
    """Variables that decide how libraries compute, as the executor has them; None for unset."""
    version: str
    """The executor's version of sensebatch."""
    share: str
    """The run's name among the workers of a host."""


class RayWorker:
    """The actor's class.

    Args:
        number: The worker's number in the run.
        recipe: How it begins.
        num_workers: How many workers the run has.
    """

    def __init__(self, number: int, recipe: Recipe, num_workers: int) -> None:
        keep_little_memory()
        # Before torch is imported; Ray sets the number of threads for all it starts.
        for name, value in recipe.environment.items():
            if value is None:
                os.unsetenv(name)
            else:
                os.putenv(name, value)
        self._number = number
        self._recipe = recipe
        self._num_workers = num_workers
        self._outbox = Outbox()
        self._host: WorkerHost | None = None
        self._early: dict[int, Order] = {}
        """Orders that overtook others, by their place in order."""
        self._next_order = 0
        self._taking = threading.Lock()
        self._asked_at = time.monotonic()
        self._place = Place.own()
        for call in (self._load, self._watch):
            threading.Thread(target=call, daemon=True).start()

    def listen(self) -> tuple[str, Sequence[News]]:
        """Returns the id of the worker's node, and news as soon as there are some."""
        self._asked_at = time.monotonic()
        return self._place.node_id, self._outbox.fetch(LISTEN_S)

    def tell(self, place: int, order: Order) -> None:
        """Takes an order; large ones may be overtaken, so each has its place."""
        with self._taking:
            self._early[place] = order
            while self._next_order in self._early:
                found = self._early.pop(self._next_order)
                self._next_order += 1
                if self._host is not None:
                    self._host.take(found)

    def _load(self) -> None:
        host = guarded(self._loaded)
        if isinstance(host, Raised):
            is_final = host.failure.type in FINAL
            self._outbox.put(Unusable(failure=host.failure, is_final=is_final))
            return
        self._host = host
        self._outbox.put(host.ready(self._recipe.groups))

    def _loaded(self) -> WorkerHost:
        recipe = self._recipe
        if recipe.version != sensebatch.__version__:
            raise ConfigError(
                f"expected sensebatch {recipe.version} on {socket.gethostname()} as on the "
                f"machine of the run, found {sensebatch.__version__}"
            )
        gpu, share = self._place.gpu, None
        if gpu is not None:
            num_workers = min(self._num_workers, self._place.num_gpus)
            share = HostShare(name=recipe.share, num_workers=num_workers)
        engine = recipe.open_engine(gpu, share)
        device = engine.info.device
        return WorkerHost(
            engine,
            number=self._number,
            device=device if gpu is None else f"{device}, GPU {gpu}",
            output=recipe.output,
            outbox=self._outbox,
        )

    def _watch(self) -> None:
        while time.monotonic() - self._asked_at < LONELY_S:
            time.sleep(LISTEN_S)
        os._exit(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a cluster a worker is."""

    node_id: str
    num_gpus: int
    """GPUs of its node."""
    gpu: str | None
    """Number of the one it has; None without one."""

    @classmethod
    def own(cls) -> Place:
        """Returns the place of this process."""
        import ray

        context = ray.get_runtime_context()
        ids = context.get_accelerator_ids().get("GPU", [])
        node_id = context.get_node_id()
        resources: dict[str, float] = {}
        for node in ray.nodes():
            if node["NodeID"] == node_id:
                resources = node["Resources"]
        return cls(
            node_id=node_id,
            num_gpus=int(resources.get("GPU", 0)),
            gpu=str(ids[0]) if ids else None,
        )
