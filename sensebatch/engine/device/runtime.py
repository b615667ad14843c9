"""Which attention, kernels and precision a run uses: the words of the settings made definite."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.device.choice import check_word
from sensebatch.engine.model.attention import (
    Attention,
    cudnn,
    flash,
    flash_module,
    sdpa,
    shared,
    torch_runs,
)
from sensebatch.errors import ConfigError
from sensebatch.jobs import Precision
from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.plan.computation import is_tileable
from sensebatch.plan.load import Load
from sensebatch.plan.precision import check_device, check_dtype

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
BACKENDS: dict[str, Attention] = {"cudnn": cudnn, "flash": flash, "sdpa": sdpa}
CUDNN_LEAST_CAPABILITY = (9, 0)
"""From here on `auto` takes cuDNN: on an H200 it attends 4096 queries to 4416 keys at 612 TFLOP/s,
torch's FlashAttention 2 at 346 (torch 2.11, CUDA 13.0, 32 heads of 128 channels, bfloat16)."""


def check_precision(precision: Precision | None, device: str, dtype: str) -> None:
    """Makes sure that quantised matrices can be multiplied, before anything is loaded.

    Args:
        precision: None for weights in the dtype.
        device: As `choice.resolve_runtime` returns it.
        dtype: The activations' dtype, by name.

    Raises:
        ConfigError: They cannot.
    """
    if precision is None or precision.stored is None:
        return
    capability: tuple[int, int] | None = None
    name = device
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} of {'.'.join(map(str, capability))}"
    check_device(precision, capability, name)
    check_dtype(precision, dtype)


def resolve_attention(backend: str, device: str, dtype: str, ranking: Sequence[str] = ()) -> str:
    """Returns the attention backend by name: `cudnn`, `flash` or `sdpa`.

    `auto` takes the fastest by measurement. Without one it takes cuDNN on GPUs where it is likely
    to be that, else flash-attn where it is installed and can be used, else torch's own choice. A
    backend that is named never falls back.

    Args:
        backend: The word of the settings.
        device: As `choice.resolve_runtime` returns it.
        dtype: Likewise.
        ranking: Backends as they were measured on the device, the fastest first.

    Raises:
        ConfigError: A word that is not known, or a backend that cannot be used.
    """
    check_word("attn_backend", backend, ("auto", *BACKENDS))
    if backend == "auto":
        is_new = device == "cuda" and torch.cuda.get_device_capability() >= CUDNN_LEAST_CAPABILITY
        order = (*ranking, *(("cudnn", "flash") if is_new else ("flash",)))
        # Another version may have measured others.
        known = (name for name in order if name in BACKENDS)
        return next((name for name in known if _obstacle(name, device, dtype) is None), "sdpa")
    obstacle = _obstacle(backend, device, dtype)
    if obstacle:
        raise ConfigError(f"attn_backend: expected {backend} to be usable: {obstacle}")
    return backend


def fastest_attention(speeds: AttentionSpeeds, loads: Sequence[Load], dtype: str) -> str:
    """Returns the backend that `auto` stands for on the current GPU, whose speeds may be known.

    Args:
        speeds: Of the GPU that was measured last, perhaps another one.
        loads: One for each group of the run.
        dtype: By name.
    """
    is_this = (speeds.gpu, speeds.torch) == (torch.cuda.get_device_name(), torch.__version__)
    return resolve_attention("auto", "cuda", dtype, speeds.ranking(loads) if is_this else ())


def new_attention(backend: str, device: str, *, fused: bool) -> Attention:
    """Returns how one run or image attends.

    Args:
        backend: As `resolve_attention` returns it; attends long runs of image tokens.
        device: As `choice.resolve_runtime` returns it.
        fused: As `resolve_fused` returns it; whether kernels attend the rest.
    """
    if device != "cuda":
        return BACKENDS[backend]
    if not fused:
        return shared(BACKENDS[backend], torch_runs)
    from sensebatch.engine.model.attention_kernels import attend_run

    return shared(BACKENDS[backend], attend_run)


def _obstacle(backend: str, device: str, dtype: str) -> str | None:
    """Returns why a backend cannot be used; None where it can."""
    if backend == "sdpa":
        return None
    if device != "cuda" and dtype != "float32":
        return "it needs a CUDA device"
    if device != "cuda" or dtype == "float32":
        return f"it needs a CUDA device and half precision, found {device} and {dtype}"
    if backend == "cudnn":
        found = torch.backends.cudnn.is_available()
        return None if found else "torch was built without cuDNN"
    return None if flash_module() else "the flash-attn package is not installed"


def resolve_fused(wanted: bool, device: str, arch: Architecture) -> bool:
    """Returns whether chains of small operations are compiled to one kernel each.

    That needs a CUDA device, Triton, and heads whose numbers and sizes are powers of two.
    """
    if not wanted or device != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return is_tileable(arch)
