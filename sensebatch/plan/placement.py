"""Where weights and caches are while the jobs of a run are computed. Decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sensebatch.jobs import GroupKey, Job, VramMode, group_key
from sensebatch.plan.batches import Demand, demand_of
from sensebatch.plan.load import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where weights and caches are while one group of jobs is run, and how many jobs share what."""

    mode: VramMode
    num_buffers: int | None
    """Device buffers: a ring for blocks of any kind, the others as large as a generation layer.
    None gives every block its own."""
    embed_on_device: bool
    tokens_per_pass: int
    """Most image tokens in one denoising pass; one job always fits."""
    batch_size: int | None = None
    """Most jobs that fit in one batch; None where as many as were planned for do."""
    text_batches: int = 1
    """Most batches whose texts are decoded together, while weights stream."""
    text_bytes: int | None = None
    """Device memory for these texts, and beside them for weights; None where weights have as much
    as while images are drawn."""
    park_caches: bool
    """Whether prefixes of jobs that wait for their pass are in host memory."""
    host_block_bytes: int | None
    """Host memory for blocks; None for as much as they need."""
    reading_bytes: int = 0
    """What reading the prompts of a batch takes of the device where another batch is drawn."""
    room_bytes: int | None = None
    """What the device has left for that while a batch of this group is drawn; None where nothing is
    read ahead."""
    ahead_bytes: int = 0
    """What is expected to be read ahead while a batch of this group is drawn."""
    device_bytes: int
    """Expected peak on the device without that."""
    host_bytes: int
    """Expected peak of the process's resident memory."""
    reason: str
    """Why this placement, for people."""

    @property
    def peak_bytes(self) -> int:
        """Expected peak on the device, with what is read ahead."""
        return self.device_bytes + self.ahead_bytes

    def fitted(self, load: Load) -> Load:
        """Returns the group's load with as many jobs in a batch as fit."""
        if self.batch_size is None or self.batch_size >= load.batch_size:
            return load
        return replace(load, batch_size=self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Jobs of a group that do not fit the memory, however they are run."""

    group: GroupKey
    demand: Demand
    """What each of them takes; jobs that take more do not fit either."""
    num_jobs: int
    needed_bytes: int
    message: str
    """What was expected and what was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placements:
    """The placements of a run. All weights stay on the device for every group, or for none."""

    groups: Mapping[GroupKey, Placement]
    """In the order in which they are run."""
    leanest: Placement
    """The placement of the most demanding group; without groups, that of the weights alone."""
    refused: tuple[Refusal, ...] = ()
    """Jobs that are left out of the groups."""

    @property
    def device_bytes(self) -> int:
        """Expected peak on the device if nothing were read ahead."""
        return max(
            (p.device_bytes for p in self.groups.values()), default=self.leanest.device_bytes
        )

    @property
    def host_bytes(self) -> int:
        """Expected peak of the process's resident memory."""
        return max((p.host_bytes for p in self.groups.values()), default=self.leanest.host_bytes)

    @property
    def first(self) -> Placement:
        """The placement of the group that is run first."""
        return next(iter(self.groups.values()), self.leanest)

    def of(self, group: GroupKey) -> Placement:
        """Returns a group's placement; the leanest for one that was not planned for."""
        return self.groups.get(group, self.leanest)

    @property
    def peak_bytes(self) -> int:
        """Expected peak on the device, with what is read ahead."""
        return max((p.peak_bytes for p in self.groups.values()), default=self.leanest.peak_bytes)

    def reads_ahead(self, running: GroupKey, following: GroupKey) -> bool:
        """Returns whether prompts of one group are read while a batch of another is drawn."""
        room = self.of(running).room_bytes
        return room is not None and self.of(following).reading_bytes <= room

    def fitted(self, loads: Sequence[Load]) -> list[Load]:
        """Returns the loads that are run, with as many jobs in a batch as fit."""
        groups = self.groups
        return [groups[load.group].fitted(load) for load in loads if load.group in groups]

    def refusals(self) -> tuple[str, ...]:
        """Returns a line for each group of which jobs are left out, for people."""
        worst: dict[GroupKey, Refusal] = {}
        counts: Counter[GroupKey] = Counter()
        for refusal in self.refused:
            counts[refusal.group] += refusal.num_jobs
            known = worst.setdefault(refusal.group, refusal)
            if refusal.needed_bytes > known.needed_bytes:
                worst[refusal.group] = refusal
        return tuple(
            f"{counts[group]:,} {'job does' if counts[group] == 1 else 'jobs do'} not fit and "
            f"will fail: {refusal.message}"
            for group, refusal in worst.items()
        )

    def refusal(self, job: Job) -> str | None:
        """Returns why a job does not fit; None if it may."""
        key = group_key(job)
        of_group = [refusal for refusal in self.refused if refusal.group == key]
        if not of_group:
            return None
        demand = demand_of(job)
        return next((r.message for r in of_group if demand.covers(r.demand)), None)

    def replacing(self, group: GroupKey, placement: Placement) -> Placements:
        """Returns the placements with another one for a group."""
        return replace(self, groups={**self.groups, group: placement})
