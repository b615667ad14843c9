"""Which placement of weights and caches fits a budget. Integers only, no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nlargest

from sensebatch.config import MemoryConfig
from sensebatch.errors import ConfigError
from sensebatch.jobs import VramMode
from sensebatch.plan import passes
from sensebatch.plan.batches import Demand
from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import reading_bytes, text_memory, working_bytes
from sensebatch.plan.host import HostMemory, host_working_bytes, prepared_bytes
from sensebatch.plan.load import Load
from sensebatch.plan.passes import RING
from sensebatch.plan.placement import Placement, Placements, Refusal
from sensebatch.plan.weight_bytes import WeightBytes, weight_bytes
from sensebatch.units import GIB

MAX_TRIES = 20
"""How often a budget that an error names is made larger until it would do."""


def place(
    computation: Computation,
    *,
    memory: MemoryConfig,
    loads: Sequence[Load],
    device_free: int | None,
    host_free: int,
    num_workers: int = 1,
) -> Placements:
    """Returns for each group the fastest placement that fits, or the one that was asked for.

    Without a budget or a mode from the user, jobs that do not fit what is free are left out, as
    long as others do fit.

    Args:
        computation: The network, and how it is computed.
        memory: Mode and budgets.
        loads: One for every group of the run.
        device_free: Bytes the device has free; None where the host is the device.
        host_free: Bytes the host has free.
        num_workers: Processes that run the groups on this host at the same time, each on a device
            of its own. They share the host's budget and its copy of the weights.

    Raises:
        ConfigError: It cannot fit; the message says the smallest budget that would.
    """
    budget = memory.vram_budget_bytes
    weights = weight_bytes(computation)
    planner = _Planner(
        computation=computation,
        weights=weights,
        host=HostMemory(
            weights=weights,
            free_bytes=host_free,
            process_bytes=memory.host_budget_bytes,
            is_apart=device_free is not None or budget is not None,
            num_workers=num_workers,
        ),
        limit=device_free if budget is None else budget,
        asked=budget is not None,
    )
    fitting = loads
    refused: tuple[Refusal, ...] = ()
    try:
        options = planner.options(memory.vram_mode, loads or [None])
    except ConfigError:
        fitting, refused = planner.sift(memory.vram_mode, loads)
        if not refused:
            raise
        options = planner.options(memory.vram_mode, fitting)
    try:
        placed = planner.placements(options)
    except _HostBudgetError as error:
        raise planner.with_enough(memory.vram_mode, fitting, error) from None
    return Placements(
        groups={load.group: p for load, p in zip(fitting, placed, strict=False)},
        leanest=min(placed, key=_how_much_stays),
        refused=refused,
    )


def fast_buffers(weights: WeightBytes, *, writes: bool) -> int:
    """Returns how many buffers spare denoising all copies, and decoding too where there is any."""
    images = weights.buffers_for_images(RING)
    return max(images, weights.buffers_for_text(RING)) if writes else images


class _HostBudgetError(ConfigError):
    """The host's budget is too small for what the device leaves.

    Args:
        least: A budget that may do.
        found: The budget.
        name: What people call the group that needs it.
    """

    def __init__(self, least: int, found: int, name: str) -> None:
        super().__init__(
            f"max_memory: expected cpu to be at least {_enough(least)} for {name}, found "
            f"{found / GIB:.2f} GiB"
        )
        self.least, self.name = least, name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """One way to run a group: a mode, a batch, and what they take of the device."""

    mode: VramMode
    load: Load | None
    """With the jobs of a batch; None for weights without jobs."""
    most_jobs: int | None = None
    """Most jobs that fit in one batch; None where as many as were wanted do."""
    num_buffers: int | None
    """See `Placement`."""
    tokens_per_pass: int
    device_bytes: int
    text_batches: int = 1
    """See `Placement`."""
    text_bytes: int | None = None
    """See `Placement`."""

    @property
    def streams(self) -> bool:
        """Whether blocks pass through the device, and prefixes may wait beside it."""
        return self.num_buffers is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planner:
    """Weighs the options of groups against the memory of device and host."""

    computation: Computation
    weights: WeightBytes
    host: HostMemory
    limit: int | None
    """Device memory; None for any amount."""
    asked: bool
    """Whether the limit is a budget that was asked for."""

    def sift(
        self, mode: VramMode, loads: Sequence[Load]
    ) -> tuple[Sequence[Load], tuple[Refusal, ...]]:
        """Returns the loads without the jobs that do not fit, and those jobs.

        Nothing is left out where none fits: that is an error of the run.
        """
        if mode is not VramMode.AUTO or self.asked:
            return loads, ()
        fitting: list[Load] = []
        refused: list[Refusal] = []
        for load in loads:
            # Nothing can be left out where it is not said what the jobs take.
            rest, of_group = (load, []) if not load.demands else self._without_too_large(load)
            refused += of_group
            fitting += [] if rest is None else [rest]
        return (fitting, tuple(refused)) if fitting else (loads, ())

    def _without_too_large(self, load: Load) -> tuple[Load | None, list[Refusal]]:
        """Returns a load without jobs that do not fit, and those jobs."""
        refused: dict[Demand, Refusal] = {}

        def refuse(demand: Demand, needed: int) -> None:
            name = _name(load)
            if len(load.demands) > 1:
                name += f" with up to {demand.prompt_tokens:,} tokens of prompt"
            refused[demand] = Refusal(
                group=load.group,
                demand=demand,
                num_jobs=dict(load.demands)[demand],
                needed_bytes=needed,
                message=self._too_large(needed, name),
            )

        rest: Load | None = load
        if self._needed(load) > self._free:
            needs = [(self._needed(load.of_job(demand)), demand) for demand, _ in load.demands]
            for needed, demand in needs:
                if needed > self._free:
                    refuse(demand, needed)
            rest = load.without(refused)
        # One job's prompt and another one's text may not fit together, although each job does.
        while rest is not None and (needed := self._needed(rest)) > self._free:
            refuse(
                max((need, demand) for need, demand in needs if demand not in refused)[1], needed
            )
            rest = load.without(refused)
        return rest, list(refused.values())

    def _needed(self, load: Load) -> int:
        return self._alone(load).device_bytes

    def _alone(self, load: Load) -> _Option:
        """Returns the option that takes the least: of one job, with little of the weights."""
        mode = VramMode.FULL if self.limit is None else VramMode.LOW
        return self._option(replace(load, batch_size=1), mode)

    @property
    def _free(self) -> int:
        """Memory for weights and jobs: the device's, or the host's where that is the device."""
        if self.limit is not None:
            return self.limit
        return self.host.free_bytes // self.host.num_workers

    def _too_large(self, needed: int, name: str) -> str:
        what = "vram_budget" if self.asked else "free device memory"
        hint = ""
        if self.limit is None:
            what, hint = "free host memory", "; vram_mode full tries it all the same"
        return (
            f"{what}: expected at least {_enough(needed)} for {name}, found "
            f"{self._free / GIB:.2f} GiB{hint}"
        )

    def options(self, mode: VramMode, loads: Sequence[Load | None]) -> list[tuple[_Option, str]]:
        """Returns the option of each load and why; None stands for weights without jobs.

        Raises:
            ConfigError: One cannot fit.
        """
        if mode is not VramMode.AUTO:
            if self.limit is not None:
                self._check(mode, loads)
            return [(self._largest(load, mode), f"asked for vram_mode {mode}") for load in loads]
        if self.limit is None:
            self._check(VramMode.FULL, loads)
            reason = "the host is the device"
            return [(self._largest(load, VramMode.FULL), reason) for load in loads]
        whole = [self._whole(load) for load in loads]
        if all(self._fits(option) for option in whole):
            return [(option, f"all weights fit {self._what(self.limit)}") for option in whole]
        self._check(VramMode.LOW, loads)
        streamed = [self._streamed(load, self.limit) for load in loads]
        if self._missing_host([option for option, _ in streamed]) is not None:
            # In smaller batches there may be room for all weights, none of which the host keeps.
            small = [self._largest(load, VramMode.FULL) for load in loads]
            if all(map(self._fits, small)) and self._missing_host(small) is None:
                what = self._what(self.limit)
                reason = f"in smaller batches all weights fit {what}; the host's budget holds none"
                return [(option, reason) for option in small]
        return streamed

    def with_enough(
        self, mode: VramMode, loads: Sequence[Load], error: _HostBudgetError
    ) -> _HostBudgetError:
        """Returns an error with a budget that would do: with more memory, batches may grow."""
        found = self.host.process_bytes or 0
        for _ in range(MAX_TRIES):
            enough = -(-math.ceil(error.least / GIB * 100) * GIB // 100)
            more = replace(self, host=replace(self.host, process_bytes=enough))
            missing = more._missing_host([o for o, _ in more.options(mode, loads or [None])])
            if missing is None:
                break
            error = _HostBudgetError(missing.least, found, missing.name)
        return error

    def _missing_host(self, options: Sequence[_Option]) -> _HostBudgetError | None:
        """Returns what is wrong with the host's budget; None where it is enough."""
        budget = self.host.process_bytes
        if budget is None:
            return None
        working = self._expected_working(options)
        most = max(working)
        demanding = options[working.index(most)]
        least = self.host.least_bytes(most, streams=demanding.streams)
        if budget >= least or not (self.host.is_apart or demanding.streams):
            return None
        return _HostBudgetError(least, budget, _name(demanding.load))

    def placements(self, options: Sequence[tuple[_Option, str]]) -> list[Placement]:
        """Returns placements with what is left of the host for blocks, the same for all groups.

        Raises:
            ConfigError: The host's budget is too small.
        """
        working = self._expected_working([option for option, _ in options])
        most = max(working)
        missing = self._missing_host([option for option, _ in options])
        if missing is not None:
            raise missing
        # Also where all weights stay on the device, until memory runs out there.
        blocks = self.host.block_bytes(most)
        ahead = [self._ahead(option) for option, _ in options]
        following = [reading for reading, _ in ahead[1:]] + [0]
        return [
            Placement(
                mode=option.mode,
                num_buffers=option.num_buffers,
                embed_on_device=not option.streams,
                tokens_per_pass=option.tokens_per_pass,
                batch_size=option.most_jobs,
                text_batches=option.text_batches,
                text_bytes=option.text_bytes,
                park_caches=option.streams,
                host_block_bytes=blocks,
                reading_bytes=reading,
                room_bytes=room,
                ahead_bytes=_read_ahead_bytes(option, reading, room, following=after),
                device_bytes=option.device_bytes,
                host_bytes=self.host.peak_bytes(own, blocks, streams=option.streams),
                reason=reason,
            )
            for (option, reason), own, (reading, room), after in zip(
                options, working, ahead, following, strict=True
            )
        ]

    def _ahead(self, option: _Option) -> tuple[int, int | None]:
        """Returns what reading a batch's prompts ahead takes, and the room for another one's.

        Prompts are read ahead only where their weights are on the device anyway.
        """
        if option.streams or option.load is None:
            return 0, None
        room = self._free - option.device_bytes if option.load.image_tokens else None
        return reading_bytes(self.computation, option.load), room

    def _check(self, mode: VramMode, loads: Sequence[Load | None]) -> None:
        """Raises where a job alone does not fit a mode."""
        options = [self._option(load and replace(load, batch_size=1), mode) for load in loads]
        least = max(options, key=lambda option: option.device_bytes)
        if least.device_bytes > self._free:
            message = self._too_large(least.device_bytes, _name(least.load))
            if self.limit is not None and mode is not VramMode.LOW:
                message += "; vram_mode low needs less"
            raise ConfigError(message)

    def _fits(self, option: _Option, spare: int = 0) -> bool:
        return option.device_bytes + spare <= self._free

    def _what(self, limit: int) -> str:
        return f"{'a budget of' if self.asked else 'free device memory of'} {limit / GIB:.1f} GiB"

    def _whole(self, load: Load | None) -> _Option:
        """Returns a group's option with all weights on the device, which may not fit.

        Its batch is no smaller than a pass; where text is written, no smaller than half of the
        jobs that could be decoded together.
        """
        least = 1
        if load is not None:
            half = -(-load.batch_size // 2)
            least = half if load.text_tokens else load.jobs_per_pass(passes.TOKENS_PER_PASS)
        return self._largest(load, VramMode.FULL, least)

    def _streamed(self, load: Load | None, limit: int) -> tuple[_Option, str]:
        """Returns a group's option under a limit: what its jobs leave over holds weights.

        Where text is written, the batch is so large that the weights for it stay, if that can be:
        otherwise every token would wait for them. Else smaller batches come before the passes of
        `low`, as long as two jobs can share one.
        """
        lean = None
        if load is not None and load.text_tokens:
            spare = (fast_buffers(self.weights, writes=True) - RING) * self.weights.kept_block
            lean = self._largest(load, VramMode.BALANCED, spare=spare)
            lean = lean if self._fits(lean, spare) else None
        if lean is None:
            lean = self._largest(load, VramMode.BALANCED, least=2)
        if not self._fits(lean):
            lean = self._largest(load, VramMode.LOW)
        extra = (limit - lean.device_bytes) // self.weights.kept_block
        # Buffers for every block would hold no more than those for all but one.
        extra = min(extra, self.weights.num_generation + self.weights.num_understanding - RING - 1)
        kept = self.weights.layers_kept(RING + extra, RING)
        layers = self.weights.num_generation
        option = replace(
            lean,
            mode=VramMode.FAST if kept == layers else lean.mode,
            num_buffers=RING + extra,
            device_bytes=lean.device_bytes + extra * self.weights.kept_block,
        )
        stays = "all" if kept == layers else f"{kept} of {layers}"
        held = f"{self._what(limit)} holds {stays} generation layers"
        return self._writing_together(option, limit), f"{held}, the others are streamed"

    def _writing_together(self, option: _Option, limit: int) -> _Option:
        """Returns an option with as many batches written together as memory is likely to allow.

        Only where weights for text would be streamed. They are then streamed once for all of these
        batches, and what their caches leave of the limit holds some of the weights.
        """
        load, weights = option.load, self.weights
        assert option.num_buffers is not None
        if load is None or not load.writes_first:
            return option
        if option.num_buffers >= weights.buffers_for_text(RING):
            return option
        text = text_memory(self.computation, load)
        missing = weights.buffers_for_text(RING) - RING
        for count in range(min(load.num_batches, passes.MAX_TEXT_BATCHES), 0, -1):
            fixed = weights.rest + weights.buffers(RING, 0) + text.shared + count * text.of_step
            together = replace(option, text_batches=count, text_bytes=limit - fixed)
            needed = max(count * text.of_likely, text.of_batch)
            if needed <= limit - fixed and self._host_holds(together):
                wanted = fixed + count * text.of_batch + missing * weights.kept_block
                device = max(option.device_bytes, min(limit, wanted))
                return replace(together, device_bytes=device)
        return option

    def _largest(
        self, load: Load | None, mode: VramMode, least: int = 1, *, spare: int = 0
    ) -> _Option:
        """Returns a mode's option with the largest batch that fits.

        Args:
            load: The group's.
            mode: Not auto.
            least: A batch of so many jobs or fewer is taken even if it does not fit the device.
            spare: Bytes of the device that are to be left.
        """
        if load is None:
            return self._option(None, mode)
        sizes = _batch_sizes(load)
        for size in sizes:
            option = self._option(replace(load, batch_size=size), mode)
            fits = self._fits(option, spare) or size <= least
            if fits and self._host_holds(option):
                break
        if size == sizes[0] and size <= load.batch_size:
            return option
        fitting = replace(load, batch_size=min(size, load.batch_size))
        return self._option(fitting, mode, None if size == sizes[0] else size)

    def _option(self, load: Load | None, mode: VramMode, most_jobs: int | None = None) -> _Option:
        """Returns what a mode other than auto means for a group."""
        weights = self.weights
        num_buffers: int | None = RING
        if mode is VramMode.FULL:
            num_buffers = None
        elif mode is VramMode.FAST:
            num_buffers = fast_buffers(weights, writes=load is not None and load.text_tokens > 0)
        tokens = passes.TOKENS_PER_PASS
        if mode is VramMode.LOW:
            tokens = passes.LOW_TOKENS_PER_PASS
        if num_buffers is None:
            device = weights.blocks + weights.embeddings
        else:
            device = weights.buffers(RING, num_buffers - RING)
        parked = num_buffers is not None
        working = working_bytes(self.computation, load, tokens, parked=parked)
        return _Option(
            mode=mode,
            load=load,
            most_jobs=most_jobs,
            num_buffers=num_buffers,
            tokens_per_pass=tokens,
            device_bytes=device + weights.rest + working,
        )

    def _host_holds(self, option: _Option) -> bool:
        # Whichever jobs are left when a run is resumed, its batches must be as large as before.
        working = self._host_working(option) + _prepared(option)
        return self.host.holds(working, streams=option.streams)

    def _expected_working(self, options: Sequence[_Option]) -> list[int]:
        """Returns what each group takes of the host, with what may be prepared meanwhile.

        After the only batch of a group comes one of another, which may be smaller. A larger one
        counts where its own group does.
        """
        prepared = [_prepared(option) for option in options]
        largest, runner_up = nlargest(2, [*prepared, 0, 0])
        found = []
        for option, own in zip(options, prepared, strict=True):
            following = runner_up if own == largest else largest
            if option.load is None or not option.load.fills_one_batch:
                following = max(following, own)
            found.append(self._host_working(option) + min(own, following))
        return found

    def _host_working(self, option: _Option) -> int:
        if option.load is None:
            return 0
        return host_working_bytes(
            self.computation,
            option.load,
            option.tokens_per_pass,
            parked=option.streams,
            text_batches=option.text_batches,
            text_waits=option.text_bytes is not None,
        )


def _read_ahead_bytes(option: _Option, own: int, room: int | None, *, following: int) -> int:
    """Returns what is read ahead beside a group's batches: one of its own, or of the next group."""
    if option.load is None or room is None:
        return 0
    expected = (following, 0 if option.load.fills_one_batch else own)
    return max((each for each in expected if each <= room), default=0)


def _prepared(option: _Option) -> int:
    return 0 if option.load is None else prepared_bytes(option.load)


def _batch_sizes(load: Load) -> list[int]:
    """Returns the sizes to try: as many jobs as are wanted, half of them, and so on to one.

    A resumed run must cut its batches as before, so sizes start from what is wanted, however much
    is left to be run. A size is left out only if the next one holds all jobs there are.
    """
    sizes = [load.wanted_jobs or load.batch_size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    while len(sizes) > 1 and sizes[1] >= load.batch_size:
        sizes.pop(0)
    return sizes


def _enough(num_bytes: int) -> str:
    """Returns an amount that is enough if it is typed."""
    return f"{math.ceil(num_bytes / GIB * 100) / 100:.2f} GiB"


def _name(load: Load | None) -> str:
    """Returns what people call a group."""
    if load is None:
        return "the weights"
    return str(load.group)


def _how_much_stays(placement: Placement) -> tuple[int, int]:
    """Orders placements by the weights that stay on the device, then by what jobs leave."""
    buffers = placement.num_buffers
    return sys.maxsize if buffers is None else buffers, -placement.device_bytes
