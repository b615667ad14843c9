"""What each of several workers did of a run, and how long it had nothing to do. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sensebatch.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Stint:
    """One batch that a worker ran. Seconds."""

    session: int
    worker: int
    node: str | None
    """Name of its host; None in logs that do not say."""
    jobs: int
    images: int
    start_s: float
    """On any clock that all batches of a session share."""
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShare:
    """What one worker did, over all sessions that it took part in."""

    worker: int
    node: str | None
    jobs: int
    images: int
    share: float
    """Its part of all jobs."""
    busy_s: float
    """Seconds that a batch was in its engine."""
    idle_s: float
    """The other seconds, from the first batch of a session to the end of the last, of any
    worker."""

    @property
    def idle_share(self) -> float:
        """Its idle seconds as a part of all."""
        together = self.busy_s + self.idle_s
        return self.idle_s / together if together else 0.0


def worker_shares(stints: Iterable[Stint]) -> tuple[WorkerShare, ...]:
    """Returns what each worker did, by host and number; nothing where there is only one."""
    sessions: dict[int, list[Stint]] = {}
    workers: dict[tuple[str, int], list[Stint]] = {}
    for stint in stints:
        sessions.setdefault(stint.session, []).append(stint)
        workers.setdefault((stint.node or "", stint.worker), []).append(stint)
    if len(workers) < 2:
        return ()
    spans = {session: _span_s(own) for session, own in sessions.items()}
    num_jobs = sum(stint.jobs for own in workers.values() for stint in own)
    shares = []
    for (node, worker), own in sorted(workers.items()):
        busy_s, jobs = sum(stint.busy_s for stint in own), sum(stint.jobs for stint in own)
        span_s = sum(spans[session] for session in {stint.session for stint in own})
        shares.append(
            WorkerShare(
                worker=worker,
                node=node or None,
                jobs=jobs,
                images=sum(stint.images for stint in own),
                share=jobs / num_jobs if num_jobs else 0.0,
                busy_s=busy_s,
                idle_s=max(span_s - busy_s, 0.0),
            )
        )
    return tuple(shares)


def together_s(stints: Iterable[Stint]) -> float:
    """Returns the seconds in which any worker had a batch or waited for one, over all sessions."""
    sessions: dict[int, list[Stint]] = {}
    for stint in stints:
        sessions.setdefault(stint.session, []).append(stint)
    return sum(map(_span_s, sessions.values()))


def _span_s(stints: list[Stint]) -> float:
    """Returns the seconds from the first batch of a session to the end of the last."""
    end_s = max(stint.start_s + stint.busy_s for stint in stints)
    return end_s - min(stint.start_s for stint in stints)


def format_share(share: WorkerShare) -> str:
    """Returns a worker's share as a line, without its name."""
    return f"{counted(share.jobs, 'job')} ({share.share:.1%}), idle {share.idle_share:.1%}"


def share_name(share: WorkerShare) -> str:
    """Returns what people call the worker: its number and its host."""
    return f"worker {share.worker}" + ("" if share.node is None else f" on {share.node}")
