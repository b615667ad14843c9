"""Runs the trials of the table of promises, and compares each with its reference.

A process each, started by the caller, so that nothing of one run is left to the next. What the
machine has, the caller says.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.errors import ConfigError
from sensebatch.jobs import VramMode
from sensebatch.manifest.read import read_manifest
from sensebatch.plan.batches import make_plan, plan_entry
from sensebatch.plan.computation import gpu_computation, is_tileable
from sensebatch.plan.device import place
from sensebatch.plan.host import ENOUGH_BYTES
from sensebatch.plan.load import plan_loads
from sensebatch.plan.placement import Placements
from sensebatch.process import last_words
from sensebatch.settings import resolve_settings
from sensebatch.store.run_dir import RunDir
from sensebatch.units import GIB
from sensebatch.verify.child import NOWHERE
from sensebatch.verify.compare import Outcome, compare
from sensebatch.verify.jobs import Scale, write_jobs, write_lora
from sensebatch.verify.promises import Need, Trial

MODES = (VramMode.FULL, VramMode.FAST, VramMode.BALANCED, VramMode.LOW)

Launch = Callable[[Sequence[str], Path], int]
"""(arguments of `verify.child`, file for what it says) -> exit code, negative for a signal's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What decides which trials can be run."""

    has_gpu: bool
    kernels_obstacle: str | None = None
    """Why chains of small operations cannot be compiled to kernels; None where they can."""
    fp8_obstacle: str | None = None
    """Why float8 matrices cannot be multiplied; None where they can."""
    int8_obstacle: str | None = None
    """Why int8 matrices cannot be multiplied; None where they can."""
    free_bytes: int | None = None
    """Free memory of the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a trial."""

    trial: Trial
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """By group of jobs; empty for a reference."""
    skipped: str | None = None
    """Why it says nothing on this machine."""
    error: str | None = None
    """Why it could not be compared although it should."""

    @property
    def holds(self) -> bool | None:
        """Whether the promise holds; None where nothing was compared."""
        if self.error is not None:
            return False
        if not self.outcomes:
            return None
        return all(outcome.equal for outcome in self.outcomes.values())


def verify(
    trials: Sequence[Trial],
    scale: Scale,
    machine: Machine,
    folder: Path,
    *,
    launch: Launch,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Iterator[Verdict]:
    """Yields a verdict for each trial, as soon as there is one; ends early when it is stopped.

    Args:
        trials: In order; a reference comes before what is compared with it.
        scale: The model, and how large the jobs are.
        machine: What can be run.
        folder: Where runs go; not there yet.
        launch: Starts a child.
        say: Receives a line for people before each trial.
        stopped: Whether to start no more.
    """
    manifest = write_jobs(scale, folder)
    planner = _Planner(scale, machine, manifest, folder)
    failed: set[str] = set()
    for number, trial in enumerate(trials, start=1):
        reason = planner.obstacle(trial)
        if reason is None and trial.like in failed:
            reason = f"{trial.like} failed"
        if reason is not None:
            yield Verdict(trial=trial, skipped=reason)
            continue
        say(f"{number} of {len(trials)}: {trial.name}")
        root = folder / trial.name
        error = _run(trial, planner.arguments(trial, root), root, number, launch)
        if stopped():
            return
        if error is not None:
            failed.add(trial.name)
        outcomes = {} if error or trial.like is None else compare(folder / trial.like, root)
        yield Verdict(trial=trial, outcomes=outcomes, error=error)


def _run(
    trial: Trial, arguments: Sequence[str], root: Path, seed: int, launch: Launch
) -> str | None:
    """Runs a trial until it is neither killed nor fails; returns what went wrong."""
    messages = root.with_name(f"{root.name}.stderr.txt")
    # References have the memory to themselves; a budget has no room for pieces.
    words = [str(seed if trial.like and not trial.half_budget else 0)]
    for kill in range(1, trial.kills + 1):
        code = launch([*words, str(RunDir(root).kept_images), *arguments], messages)
        if code == 0 and kill > 1:
            # A real model's stories may have fewer images than kills were wanted.
            return None
        if code != -signal.SIGKILL:
            return f"it was to be killed, and ended with exit code {code}"
    code = launch([*words, NOWHERE, *arguments], messages)
    return None if code == 0 else last_words(messages, code)


class _Planner:
    """Says which trials can be run, and with which options."""

    def __init__(self, scale: Scale, machine: Machine, manifest: Path, folder: Path) -> None:
        self._scale = scale
        self._machine = machine
        self._manifest = manifest
        self._checkpoint = open_checkpoint(scale.model)
        self._lora = folder / "lora.safetensors"
        write_lora(self._checkpoint, self._lora)
        self._fitting = [mode for mode in MODES if self._placements(mode) is not None]
        self._budget = self._half_budget()

    @property
    def _base(self) -> VramMode:
        """The mode of references: the one that keeps the most of those that fit."""
        return self._fitting[0] if self._fitting else VramMode.LOW

    def obstacle(self, trial: Trial) -> str | None:
        """Returns why a trial says nothing here; None where it does."""
        obstacle = self._lacks(trial.needs)
        if obstacle is not None:
            return obstacle
        if trial.half_budget:
            return None if self._budget else "no budget between lets batches stay as large"
        mode = self._mode(trial)
        if mode not in self._fitting:
            return f"--vram-mode {mode} does not fit the memory that is free"
        if trial.like is not None and trial.name == mode == self._base:
            return "it is the reference here, since no mode that keeps more fits"
        return None

    def _lacks(self, need: Need | None) -> str | None:
        """Returns why the machine or the model does not have what a trial needs."""
        machine = self._machine
        if need in (Need.FP8, Need.INT8):
            return machine.fp8_obstacle if need is Need.FP8 else machine.int8_obstacle
        if need is Need.KERNELS and not is_tileable(self._checkpoint.architecture):
            return "the kernels' tiles do not fit this model"
        if need is Need.KERNELS:
            return machine.kernels_obstacle
        return None if need is None or machine.has_gpu else "it needs a CUDA device"

    def _mode(self, trial: Trial) -> VramMode:
        return self._base if trial.mode == VramMode.FULL else VramMode(trial.mode)

    def arguments(self, trial: Trial, root: Path) -> list[str]:
        """Returns what is typed after `sensebatch` to run a trial."""
        words = ["run", str(self._manifest), "--model", self._scale.model, *trial.options]
        if trial.half_budget:
            words += ["--vram-budget", f"{self._budget}GiB"]
        else:
            words += ["--vram-mode", self._mode(trial)]
        words += ["--lora-path", str(self._lora)] if trial.with_lora else []
        return [*words, "--output-dir", str(root)]

    def _placements(self, mode: VramMode, budget: int | None = None) -> Placements | None:
        """Returns what is placed where with a mode or a budget; None where it does not fit."""
        flags: dict[str, object] = {"model.model": self._scale.model, "memory.vram_mode": mode}
        if budget is not None:
            flags["memory.vram_budget_bytes"] = budget
        config = resolve_settings(flags=flags)
        entries = (plan_entry(job) for job in read_manifest(self._manifest, config))
        loads = plan_loads(make_plan(entries, config.memory), system_prompt_bytes=0)
        try:
            return place(
                gpu_computation(self._checkpoint.architecture, config.model),
                memory=config.memory,
                loads=loads,
                device_free=self._machine.free_bytes,
                host_free=ENOUGH_BYTES,
            )
        except ConfigError:
            return None

    def _half_budget(self) -> int | None:
        """Returns GiB that keep about half of the weights, with batches as large as without."""
        full, least = self._placements(VramMode.FULL), self._placements(VramMode.BALANCED)
        if full is None or least is None:
            return None
        half = (full.device_bytes + least.device_bytes) // (2 * GIB)
        for budget in range(max(half, 1), full.device_bytes // GIB):
            between = self._placements(VramMode.AUTO, budget * GIB)
            if between is not None and _sizes(between) == _sizes(full):
                return budget
        return None


def _sizes(placements: Placements) -> list[int | None]:
    return [placement.batch_size for placement in placements.groups.values()]
