"""What is promised of a run's bytes: one row for each run, and the run whose files it must equal.

Knows no files and no machine. Runs are compared only where equality is promised (docs/memory.md):
batches of another composition, another precision, a LoRA or `--no-compile` have a reference of
their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from sensebatch.errors import ConfigError


class Need(Enum):
    """What a machine must have for a run to say anything."""

    GPU = auto()
    KERNELS = auto()
    FP8 = auto()
    INT8 = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of the jobs."""

    name: str
    what: str
    """The promise, or what the reference is, in a few words."""
    like: str | None = None
    """The trial whose files this one's must equal; None for a reference."""
    mode: str = "full"
    """The `--vram-mode`; `full` stands for the most that fits."""
    options: tuple[str, ...] = ()
    """Further options, as they are typed."""
    with_lora: bool = False
    half_budget: bool = False
    """Whether the GPU's budget is halfway between the least and that of all weights."""
    kills: int = 0
    """How often the run is killed and started again."""
    needs: Need | None = None


_ALONE = ("--max-batch-size", "1")
_FP8 = ("--precision", "fp8")
_INT8 = ("--precision", "int8-all")
_PLAIN = ("--no-compile",)

TRIALS = (
    Trial(name="full", what="`--vram-mode full`"),
    Trial(name="again", like="full", what="the same run again"),
    Trial(name="fast", like="full", what="`--vram-mode fast`", mode="fast"),
    Trial(name="balanced", like="full", what="`--vram-mode balanced`", mode="balanced"),
    Trial(name="low", like="full", what="`--vram-mode low`", mode="low"),
    Trial(
        name="budget",
        like="full",
        what="`--vram-budget` for half of the weights",
        mode="auto",
        half_budget=True,
        needs=Need.GPU,
    ),
    Trial(name="killed", like="full", what="killed twice with `kill -9`, and resumed", kills=2),
    Trial(
        name="killed-balanced",
        like="full",
        what="killed twice in `balanced`, and resumed",
        mode="balanced",
        kills=2,
    ),
    Trial(name="alone", what="`--max-batch-size 1`", options=_ALONE),
    Trial(
        name="alone-low",
        like="alone",
        what="`--max-batch-size 1` in `low`",
        mode="low",
        options=_ALONE,
    ),
    Trial(name="lora", what="a LoRA", with_lora=True),
    Trial(
        name="lora-balanced",
        like="lora",
        what="a LoRA in `balanced`",
        mode="balanced",
        with_lora=True,
    ),
    Trial(name="fp8", what="`--precision fp8`", options=_FP8, needs=Need.FP8),
    Trial(
        name="fp8-balanced",
        like="fp8",
        what="`--precision fp8` in `balanced`",
        mode="balanced",
        options=_FP8,
        needs=Need.FP8,
    ),
    Trial(
        name="fp8-killed",
        like="fp8",
        what="`--precision fp8`, killed twice and resumed",
        options=_FP8,
        kills=2,
        needs=Need.FP8,
    ),
    Trial(name="int8", what="`--precision int8-all`", options=_INT8, needs=Need.INT8),
    Trial(
        name="int8-balanced",
        like="int8",
        what="`--precision int8-all` in `balanced`",
        mode="balanced",
        options=_INT8,
        needs=Need.INT8,
    ),
    Trial(name="plain", what="`--no-compile`", options=_PLAIN, needs=Need.KERNELS),
    Trial(
        name="plain-again",
        like="plain",
        what="`--no-compile` again",
        options=_PLAIN,
        needs=Need.KERNELS,
    ),
)
"""In the order they are run; a reference comes before what is compared with it."""


def chosen_trials(only: Sequence[str]) -> tuple[Trial, ...]:
    """Returns the trials of these names with their references; all if no name is given.

    Raises:
        ConfigError: No trial has that name.
    """
    by_name = {trial.name: trial for trial in TRIALS}
    wanted: set[str] = set()
    for name in only:
        if name not in by_name:
            raise ConfigError(f"--only: expected one of {', '.join(by_name)}, found {name!r}")
        wanted |= {name, by_name[name].like or name}
    return tuple(trial for trial in TRIALS if not only or trial.name in wanted)
