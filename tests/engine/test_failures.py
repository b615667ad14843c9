"""Errors of the device and of the weights that no later batch would survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sensebatch.engine.engine import SenseNovaEngine
from sensebatch.engine.weights.loader import NetworkLoader
from sensebatch.errors import CheckpointError, DeviceError, OutOfMemoryError, RunStoppedError
from tests.engine.test_engine import (
    generate,
    load,
    make_config,
    make_job,
    raising,
    single_images_run,
)

ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def _refuse(*_: Any, **__: Any) -> None:
    raise ILLEGAL


def _full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module")
def engine() -> SenseNovaEngine:
    return load(make_config())


def test_device_that_computes_no_more_is_not_taken_for_a_bad_batch(
    monkeypatch: pytest.MonkeyPatch, engine: SenseNovaEngine
) -> None:
    single_images_run(monkeypatch, raising(ILLEGAL))
    with pytest.raises(torch.AcceleratorError):
        generate(engine, make_job("a"))
    monkeypatch.setattr(torch, "ones", _full)
    with pytest.raises(torch.AcceleratorError):
        generate(engine, make_job("a"))
    monkeypatch.setattr(torch, "ones", _refuse)
    with pytest.raises(DeviceError, match=r"cpu failed .* illegal memory access"):
        generate(engine, make_job("a"))


def test_a_device_that_failed_between_batches_is_noticed_while_weights_are_placed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = load(make_config(vram_mode="balanced"))
    monkeypatch.setattr(engine._residency, "resize", _refuse)
    with pytest.raises(torch.AcceleratorError):
        generate(engine, make_job("a"))
    monkeypatch.setattr(torch, "ones", _refuse)
    with pytest.raises(DeviceError, match=r"cpu failed .* illegal memory access"):
        generate(engine, make_job("a"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_errors_of_the_driver_are_memory_errors(
    monkeypatch: pytest.MonkeyPatch, engine: SenseNovaEngine, words: str
) -> None:
    single_images_run(monkeypatch, raising(RuntimeError(words)))
    with pytest.raises(OutOfMemoryError):
        generate(engine, make_job("a"))


def test_weights_that_can_no_longer_be_read_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, engine: SenseNovaEngine
) -> None:
    single_images_run(monkeypatch, raising(CheckpointError("w: missing")))
    with pytest.raises(RunStoppedError, match="can no longer be read: w: missing"):
        generate(engine, make_job("a"))


def test_room_that_cannot_be_made_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(make_config(vram_mode="full"))
    generate(engine, make_job("a"))
    failure = OutOfMemoryError("the weights did not fit")

    def fails(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(NetworkLoader, "load", fails)
    with pytest.raises(RunStoppedError, match="could not be loaded again"):
        engine.make_room()
