"""Whether a Ray cluster still answers, and which machines it has; asks in a thread of its own.

Ray waits a minute for a cluster that does not answer, wherever it is asked, and then ends the whole
process. So nobody else asks, and who needs to know looks at what was heard last.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from sensebatch.contract import Raised
from sensebatch.executor.guard import guarded

LOOK_S = 5.0
"""Seconds between two questions."""
FRESH_S = 10.0
"""Seconds that the answer to a new question is waited for."""
LOST_S = 30.0
"""Seconds without an answer after which a cluster is lost; Ray ends the process after 60."""
TICK_S = 0.5


class ClusterWatch:
    """Asks a cluster for its nodes, again and again until it is closed.

    Args:
        ray: The package, connected.
        own_node: The id of the node that this process belongs to.
    """

    def __init__(self, ray: Any, own_node: str) -> None:
        self._ray = ray
        self._own_node = own_node
        self._nodes: Sequence[Mapping[str, Any]] = ray.nodes()
        self._silent_s = 0.0
        self._changed = threading.Condition()
        self._wanted = self._answered = 0
        """Questions that somebody waits for, by number; and the last that is answered."""
        self._is_wanted = threading.Event()
        self._is_closed = threading.Event()
        # They may wait for an answer when the process ends.
        for call in (self._ask, self._count):
            threading.Thread(target=call, name="ray-watch", daemon=True).start()

    @property
    def lost(self) -> str | None:
        """Why the cluster is of no more use, in words; None while it is."""
        if self._silent_s >= LOST_S:
            return f"the Ray cluster has not answered for {LOST_S:.0f} s"
        own = [node for node in self._nodes if node["NodeID"] == self._own_node]
        if own and not own[0]["Alive"]:
            return "Ray has ended on the machine of the run"
        return None

    @property
    def num_gpus(self) -> int:
        """GPUs of all machines that are alive."""
        alive = (node["Resources"] for node in self._nodes if node["Alive"])
        return int(sum(resources.get("GPU", 0) for resources in alive))

    def alive(self) -> set[str]:
        """Returns the ids of the nodes that are alive now; as last heard if nothing is heard."""
        with self._changed:
            self._wanted += 1
            wanted = self._wanted
            self._is_wanted.set()
            patience_s = FRESH_S if self._silent_s < FRESH_S else 0.0
            self._changed.wait_for(lambda: self._answered >= wanted, patience_s)
        return {node["NodeID"] for node in self._nodes if node["Alive"]}

    def close(self) -> None:
        """Ends both threads; one that waits for an answer ends after it."""
        self._is_closed.set()
        self._is_wanted.set()

    def _ask(self) -> None:
        while not self._is_closed.is_set():
            self._is_wanted.clear()
            asked = self._wanted
            nodes = guarded(self._ray.nodes)
            if isinstance(nodes, Raised):
                self._is_closed.wait(TICK_S)
                continue
            with self._changed:
                self._nodes, self._silent_s, self._answered = nodes, 0.0, asked
                self._changed.notify_all()
            self._is_wanted.wait(LOOK_S)

    def _count(self) -> None:
        """Counts the time without an answer, but none while this process is stopped."""
        while not self._is_closed.wait(TICK_S):
            self._silent_s += TICK_S
