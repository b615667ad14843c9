"""What is said of a machine is true of this one."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch.nn.attention import SDPBackend

from sensebatch.engine.device import machine
from sensebatch.engine.device.machine import (
    attention_speed,
    backend_speeds,
    copy_speed,
    gemm_speed,
    look_at_machine,
    read_speed,
)
from sensebatch.engine.device.runtime import BACKENDS
from sensebatch.errors import OutOfMemoryError
from sensebatch.jobs import Precision, Stored


def test_a_machine_without_a_gpu_has_no_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = look_at_machine()
    assert found.gpu is None
    assert found.torch == torch.__version__
    assert found.flash_obstacle == "it needs a CUDA device"


def test_speeds_can_be_measured_on_any_device() -> None:
    cpu = torch.device("cpu")
    assert copy_speed(cpu, 1 << 10, 0.01, pin=False) > 0
    assert gemm_speed(cpu, 16, 0.01) > 0
    assert attention_speed(cpu, (2, 8, 12, 16), 0.03) > 0
    assert read_speed(cpu, 1 << 10, 0.01) > 0


def test_every_attention_backend_is_measured_that_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "ATTENTION_HEADS", (4, 2, 8))
    monkeypatch.setattr(machine, "PREFIX_TOKENS", 3)
    found = backend_speeds(torch.device("cpu"), (4, 8), 0.001)
    assert {name: list(reached) for name, reached in found.items()} == {"sdpa": [4, 8]}
    assert all(speed > 0 for speed in found["sdpa"].values())

    def full(q: torch.Tensor, *_: object) -> torch.Tensor:
        if q.shape[0] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return q

    # A length that does not fit, or a kernel that fails, costs only itself.
    monkeypatch.setitem(BACKENDS, "sdpa", full)
    assert list(backend_speeds(torch.device("cpu"), (4, 8), 0.001)["sdpa"]) == [4]


def test_no_attention_kernel_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ATTENTION_BACKENDS", (SDPBackend.CUDNN_ATTENTION,))
    with pytest.raises(RuntimeError, match="no attention kernel"):
        attention_speed(torch.device("cpu"), (2, 8, 12, 16), 0.01)


def test_a_gpu_that_is_full_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 2))
    monkeypatch.setattr(machine, "copy_speed", full)
    with pytest.raises(OutOfMemoryError, match="NVIDIA Test has too little memory free"):
        look_at_machine()
    obstacle = machine._precision_obstacle(Precision.FP8, "cuda")
    assert str(obstacle).endswith("found NVIDIA Test of 8.6")
    assert machine._precision_obstacle(Precision.INT8, "cuda") is None


def test_only_numbers_that_are_multiplied_here_are_measured() -> None:
    found = machine.quantised_speeds(torch.device("cpu"), 64, 0.001)
    assert found.keys() == {Stored.INT8}
    assert found[Stored.INT8] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_described_and_measured() -> None:
    gpu = look_at_machine().gpu
    assert gpu is not None
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.pageable_bytes_per_s > 0
    assert gpu.pinned_bytes_per_s > 0
    assert gpu.gemm_flop_per_s > 0
    assert all(speed > 0 for speed in gpu.quantised_flop_per_s.values())
    assert gpu.attention_flop_per_s > 0
    assert len(gpu.attention_backends["sdpa"]) == len(machine.IMAGE_TOKENS)
    assert gpu.memory_bytes_per_s > gpu.pinned_bytes_per_s
