"""The speeds that `sensebatch doctor` measured, kept for `sensebatch plan`: a file for one GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sensebatch.bounded import shown
from sensebatch.errors import ConfigError
from sensebatch.jobs import Stored
from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.plan.work import Machine, Speeds
from sensebatch.store.files import write_atomic

FILE_NAME = "speeds.json"

_Measured = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MachineSpeeds(BaseModel):
    """A GPU as it was measured."""

    model_config = ConfigDict(frozen=True)

    gpu: str
    """Its name."""
    torch: str
    """The version it was measured with."""
    measured_at: str
    """UTC, ISO 8601."""
    free_bytes: Annotated[int, Field(gt=0)]
    """Free memory of the GPU."""
    total_bytes: Annotated[int, Field(gt=0)]
    copy_bytes_per_s: _Measured
    gemm_flop_per_s: _Measured
    attention_flop_per_s: _Measured
    memory_bytes_per_s: _Measured
    attention: dict[str, dict[Annotated[int, Field(gt=0)], _Measured]] = {}
    """What attention backends reach, by the number of an image's tokens."""
    quantised_flop_per_s: dict[Stored, _Measured] = {}
    """Products of 8-bit numbers; none where they were not measured."""

    @property
    def attention_speeds(self) -> AttentionSpeeds | None:
        """What a run wants to know of it; None where no backend was measured."""
        if not self.attention:
            return None
        return AttentionSpeeds(gpu=self.gpu, torch=self.torch, flop_per_s=self.attention)

    @property
    def machine(self) -> Machine:
        """What a plan wants to know of it."""
        speeds = Speeds(
            copy_bytes_per_s=self.copy_bytes_per_s,
            gemm_flop_per_s=self.gemm_flop_per_s,
            attention_flop_per_s=self.attention_flop_per_s,
            memory_bytes_per_s=self.memory_bytes_per_s,
            quantised_flop_per_s=self.quantised_flop_per_s,
        )
        return Machine(free_bytes=self.free_bytes, speeds=speeds, attention=self.attention_speeds)


def speeds_path() -> Path:
    """Returns where speeds are kept: in SENSEBATCH_CACHE, or in the user's cache folder.

    Raises:
        ConfigError: It is in a home folder that nobody knows, as in a container whose user has no
            name.
    """
    own = os.environ.get("SENSEBATCH_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser() / FILE_NAME
        folder = Path(caches) if caches else Path.home() / ".cache"
    except RuntimeError:
        seen = f"SENSEBATCH_CACHE={shown(own)}" if own else "no HOME and no SENSEBATCH_CACHE"
        raise ConfigError(f"speeds: expected a folder to keep them in, found {seen}") from None
    return folder / "sensebatch" / FILE_NAME


def write_speeds(speeds: MachineSpeeds) -> Path:
    """Writes speeds over those kept before, and returns where they are.

    Raises:
        ConfigError: It is not known where they are kept.
        OSError: The folder cannot be made.
        RunFolderError: The folder cannot be written.
        StorageFullError: The disk is full.
    """
    path = speeds_path()
    write_atomic(path, f"{speeds.model_dump_json(indent=2)}\n".encode())
    return path


def read_speeds() -> tuple[MachineSpeeds | None, str | None]:
    """Returns the kept speeds, or what is wrong with a file that cannot be used."""
    try:
        path = speeds_path()
    except ConfigError as error:
        return None, str(error)
    try:
        return MachineSpeeds.model_validate_json(path.read_bytes()), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else _first_mistake(error)
        return None, f"{path}: {reason}; sensebatch doctor writes it again"


def _first_mistake(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])
