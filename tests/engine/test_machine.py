"""What is said of a machine is true of this one."""

from __future__ import annotations

import pytest
import torch

from sensebatch.engine.machine import copy_speed, gemm_speed, look_at_machine


def test_a_machine_without_a_gpu_has_no_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine = look_at_machine()
    assert machine.gpu is None
    assert machine.torch == torch.__version__
    assert (
        machine.flash_obstacle == "it needs a CUDA device and half precision, found cpu and "
        "bfloat16"
    )


def test_speeds_can_be_measured_on_any_device() -> None:
    cpu = torch.device("cpu")
    assert copy_speed(cpu, 1 << 10, 0.01, pin=False) > 0
    assert gemm_speed(cpu, 16, 0.01) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_described_and_measured() -> None:
    gpu = look_at_machine().gpu
    assert gpu is not None
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.pageable_bytes_per_s > 0
    assert gpu.pinned_bytes_per_s > 0
    assert gpu.gemm_flop_per_s > 0
