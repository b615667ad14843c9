"""The device is known without torch only where torch would certainly say the same."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sensebatch.config import ModelConfig
from sensebatch.engine.device import choice
from sensebatch.errors import ConfigError

CUDA_BUILD = {"cuda": "13.0", "hip": None, "rocm": None}
IN_A_FRESH_PROCESS = """
import sys
from sensebatch.engine.device.choice import cuda_is_available
known = cuda_is_available()
imported = "torch" in sys.modules
import torch
print(known == torch.cuda.is_available(), imported)
"""


class Driver:
    """A library of a driver that has some GPUs, or fails."""

    def __init__(self, *, gpus: int = 1, version: int = 13000, error: int = 0) -> None:
        self._gpus, self._version, self._error = gpus, version, error

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self._error

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._gpus
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self._version
        return 0


def with_build(
    monkeypatch: pytest.MonkeyPatch,
    build: dict[str, str | None] | None,
    driver: Driver | None = None,
    signs: tuple[str, ...] = (),
) -> None:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError("cannot open shared object file")
        return driver

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(choice, "_platforms_of_torch", lambda: build)
    monkeypatch.setattr(choice, "DRIVER_SIGNS", signs)
    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize(
    ("build", "driver", "known"),
    [
        ({"cuda": None, "hip": None, "rocm": None}, Driver(), False),
        ({"cuda": None, "hip": "6.4", "rocm": None}, None, None),
        ({"cuda": None, "hip": None, "rocm": "7.0"}, None, None),
        (None, Driver(), None),
        (CUDA_BUILD, None, False),
        (CUDA_BUILD, Driver(), True),
        (CUDA_BUILD, Driver(version=13010), True),
        (CUDA_BUILD, Driver(gpus=0), False),
        (CUDA_BUILD, Driver(error=choice.NO_DEVICE), False),
        (CUDA_BUILD, Driver(error=999), None),
        (CUDA_BUILD, Driver(version=12090), None),
        (CUDA_BUILD | {"cuda": "unknown"}, Driver(), None),
    ],
)
def test_only_what_is_certain_is_known_without_torch(
    monkeypatch: pytest.MonkeyPatch,
    build: dict[str, str | None] | None,
    driver: Driver | None,
    known: bool | None,
) -> None:
    with_build(monkeypatch, build, driver)
    assert choice._known_without_torch() is known


def test_a_driver_without_its_library_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_build(monkeypatch, CUDA_BUILD, None, (str(tmp_path / "missing"), str(tmp_path)))
    assert choice._known_without_torch() is None


def test_other_systems_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_build(monkeypatch, CUDA_BUILD, Driver())
    monkeypatch.setattr(sys, "platform", "win32")
    assert choice._known_without_torch() is None


def test_what_torch_was_built_for_is_read_from_its_files() -> None:
    found = choice._platforms_of_torch()
    assert found is not None
    assert found["cuda"] == torch.version.cuda
    assert found["hip"] == torch.version.hip


@pytest.mark.slow
def test_a_fresh_process_says_what_torch_says() -> None:
    """On every machine that runs the tests, with a GPU or without."""
    ended = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split()[0] == "True"
    if torch.version.cuda is None:
        assert ended.stdout.split()[1] == "False"


@pytest.mark.parametrize(
    ("has_cuda", "device", "dtype", "expected"),
    [
        (True, "auto", "auto", ("cuda", "bfloat16")),
        (False, "auto", "auto", ("cpu", "float32")),
        (True, "cpu", "auto", ("cpu", "float32")),
        (True, "cuda", "float16", ("cuda", "float16")),
        (False, "auto", "bfloat16", ("cpu", "bfloat16")),
    ],
)
def test_auto_is_a_gpu_in_half_precision_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
    has_cuda: bool,
    device: str,
    dtype: str,
    expected: tuple[str, str],
) -> None:
    monkeypatch.setattr(choice, "cuda_is_available", lambda: has_cuda)
    assert choice.resolve_runtime(ModelConfig(device=device, dtype=dtype)) == expected


def test_a_gpu_that_is_not_there_and_unknown_words_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "cuda_is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: expected a CUDA device that torch can use"):
        choice.resolve_runtime(ModelConfig(device="cuda"))
    with pytest.raises(ConfigError, match="device: expected auto, cuda, cpu, found 'tpu'"):
        choice.resolve_runtime(ModelConfig(device="tpu"))
    with pytest.raises(ConfigError, match="dtype: expected auto, bfloat16, float16, float32"):
        choice.resolve_runtime(ModelConfig(dtype="int4"))
    with pytest.raises(ConfigError, match="attn_backend: expected auto, "):
        choice.resolve_runtime(ModelConfig(attn_backend="xformers"))
