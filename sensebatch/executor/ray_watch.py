"""Whether a Ray cluster still answers, and which machines it has; asks in a thread of its own.

Ray waits a minute for a cluster that does not answer, wherever it is asked, and then ends the whole
process. So nobody else asks, and who needs to know looks at what was heard last.

It ends the process at once if large messages are sent or fetched after Ray has ended on this
machine, of which the cluster knows some seconds later. So there is a line to it that nothing is
said on, whose end is seen immediately.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    """Asks a cluster for its nodes, repeatedly until it is closed.

    Args:
        ray: The package, connected.
        own_node: The id of the node that this process belongs to.
    """

    def __init__(self, ray: Any, own_node: str) -> None:
        self._ray = ray
        self._own_node = own_node
        self._nodes: Sequence[Mapping[str, Any]] = ray.nodes()
        self._line = _line_to(self._own_node_table().get("RayletSocketName", ""))
        self._silent_s = 0.0
        self._changed = threading.Condition()
        self._wanted = self._answered = 0
        """Questions that somebody waits for, by number; and the last that is answered."""
        self._is_wanted = threading.Event()
        self._is_closed = threading.Event()
        # They may wait for an answer when the process ends.
        self._threads = [
            threading.Thread(target=call, name="ray-watch", daemon=True)
            for call in (self._ask, self._count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def lost(self) -> str | None:
        """Why the cluster is of no more use, in words; None while it is."""
        if self._silent_s >= LOST_S:
            return f"the Ray cluster has not answered for {LOST_S:.0f} s"
        if self.has_ended_here or not self._own_node_table().get("Alive", True):
            return "Ray has ended on the machine of the run"
        return None

    @property
    def has_ended_here(self) -> bool:
        """Whether Ray has ended on this machine, where that can be seen."""
        return self._line is not None and _has_ended(self._line)

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
        """Ends both threads; one that waits long for an answer ends after it."""
        self._is_closed.set()
        self._is_wanted.set()
        for thread in self._threads:
            thread.join(TICK_S)
        if self._line is not None:
            self._line.close()

    def _own_node_table(self) -> Mapping[str, Any]:
        """Returns what was heard last of the node that this process belongs to."""
        own = (node for node in self._nodes if node["NodeID"] == self._own_node)
        return next(own, {})

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


def _line_to(path: str) -> socket.socket | None:
    """Returns a connection to Ray's process on this machine; None where it cannot be had.

    Args:
        path: The socket that the process listens at; on another machine if Ray is reached from
            outside a cluster.
    """
    if not hasattr(socket, "AF_UNIX") or not hasattr(select, "poll"):
        return None
    line = socket.socket(socket.AF_UNIX)
    with suppress(OSError):
        line.connect(path)
        return line
    line.close()
    return None


def _has_ended(line: socket.socket) -> bool:
    """Returns whether the other end of a line is closed, as the system does where it was killed."""
    poll = select.poll()
    poll.register(line, 0)
    return bool(poll.poll(0))
