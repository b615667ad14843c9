"""What the products of 8-bit numbers need of a device and of the dtype. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from sensebatch.config import ModelConfig
from sensebatch.errors import ConfigError
from sensebatch.jobs import Precision, Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """What products of 8-bit numbers need."""

    capability: tuple[int, int]
    """The compute capability of the first CUDA devices that have them."""
    generations: str
    """The names of these and of newer ones."""
    on_cpu: bool
    """Whether a CPU computes them as well."""
    dtype: str | None
    """The dtype that activations must have; None for any."""


NEEDED = {
    Stored.FLOAT8: Needed(
        capability=(8, 9),
        generations="Ada, Hopper, Blackwell",
        on_cpu=False,
        dtype="bfloat16",
    ),
    Stored.INT8: Needed(
        capability=(8, 0),
        generations="Ampere, Ada, Hopper, Blackwell",
        on_cpu=True,
        dtype=None,
    ),
}


def check_settings(model: ModelConfig) -> None:
    """Refuses a precision that no device has with the model's settings, whatever this machine has.

    Raises:
        ConfigError: A run would refuse it as well.
    """
    if model.quantised is None:
        return
    if model.device == "cpu":
        check_device(model.quantised, None, "cpu")
    if model.dtype != "auto":
        check_dtype(model.quantised, model.dtype)


def check_device(precision: Precision, capability: tuple[int, int] | None, name: str) -> None:
    """Makes sure that a device has the products of a precision.

    Args:
        precision: How matrices are stored.
        capability: The compute capability of a CUDA device; None for a CPU.
        name: What to call the device.

    Raises:
        ConfigError: It has not.
    """
    if precision.stored is None or _multiplies(precision, capability):
        return
    needed = NEEDED[precision.stored]
    others = [p for p in Precision if _multiplies(p, capability)]
    raise ConfigError(
        f"precision: {precision} needs a CUDA device of compute capability "
        f"{'.'.join(map(str, needed.capability))} or newer ({needed.generations}), found "
        f"{name}; usable there: {', '.join(others)}"
    )


def check_dtype(precision: Precision, dtype: str) -> None:
    """Makes sure that a precision's products take activations of a dtype.

    Raises:
        ConfigError: They do not.
    """
    needed = None if precision.stored is None else NEEDED[precision.stored].dtype
    if needed is not None and dtype != needed:
        raise ConfigError(f"precision: {precision} needs dtype {needed}, found {dtype}")


def _multiplies(precision: Precision, capability: tuple[int, int] | None) -> bool:
    if precision.stored is None:
        return True
    needed = NEEDED[precision.stored]
    return needed.on_cpu if capability is None else capability >= needed.capability
