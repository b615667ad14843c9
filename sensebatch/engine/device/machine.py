"""What a machine is and how fast it copies, multiplies and attends; measured, not looked up."""

from __future__ import annotations

import importlib.util
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sensebatch
from sensebatch.engine.device.memory import translated_out_of_memory
from sensebatch.engine.device.runtime import BACKENDS, check_precision, resolve_attention
from sensebatch.engine.model.operations import choose_operations
from sensebatch.engine.model.quantized import NUMBERS, quantise_rows
from sensebatch.errors import ConfigError
from sensebatch.jobs import QUANTISED, Precision, Stored
from sensebatch.process import free_memory_bytes

MEASURED_S = 0.2
"""Seconds that each speed is measured for."""
BURST = 8
"""Computations launched together, so that they hide the cost of launching."""
COPY_BYTES = 256 << 20
READ_BYTES = 1 << 30
"""Far more than any cache of a GPU holds."""
GEMM_SIZE = 8192
"""Side of the square matrices; large enough for full speed."""
ATTENTION_SHAPE = (32, 4096, 4416, 128)
"""Heads, queries, keys and head size: one guidance branch of an image of 2048x2048."""
IMAGE_TOKENS = (1024, 4096, 16384)
"""Images of 1024x1024, 2048x2048 and 4096x4096, which backends are compared at."""
ATTENTION_HEADS = (32, 8, 128)
"""Query heads, key/value heads and head size of the 8B model."""
PREFIX_TOKENS = 320
"""Tokens of a prompt before the image."""
ATTENTION_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The device that `device: cuda` takes."""

    name: str
    free_bytes: int
    total_bytes: int
    pinned_bytes_per_s: float
    """Copies from page-locked host memory to the device."""
    pageable_bytes_per_s: float
    gemm_flop_per_s: float
    """bfloat16; a product of n by n matrices counts 2 n^3."""
    quantised_flop_per_s: Mapping[Stored, float]
    """The same of quantised tokens and weights, as far as the GPU multiplies them."""
    attention_flop_per_s: float
    """bfloat16, torch's fastest kernel; two products for each query, key and head."""
    memory_bytes_per_s: float
    """Reads of the device's own memory."""
    attention_backends: Mapping[str, Mapping[int, float]]
    """Operations a second of the backends of a run, by the number of an image's tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What sensebatch would compute with."""

    sensebatch: str
    python: str
    torch: str
    cuda: str | None
    """That torch was built for; None for a build without."""
    flash_obstacle: str | None
    """Why flash-attn cannot be used; None where it can."""
    kernels_obstacle: str | None
    """Why chains of small operations cannot be compiled to kernels; None where they can."""
    fp8_obstacle: str | None
    """Why float8 matrices cannot be multiplied; None where they can."""
    int8_obstacle: str | None
    """Why int8 matrices cannot be multiplied; None where they can."""
    host_free_bytes: int
    host_total_bytes: int
    gpu: Gpu | None


def look_at_machine() -> Machine:
    """Returns what this machine is; takes a few seconds where there is a GPU.

    Raises:
        OutOfMemoryError: The GPU has not even the memory free that measuring takes.
    """
    has_gpu = torch.cuda.is_available()
    host = psutil.virtual_memory()
    return Machine(
        sensebatch=sensebatch.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        flash_obstacle=_flash_obstacle("cuda" if has_gpu else "cpu"),
        kernels_obstacle=_kernels_obstacle(has_gpu),
        fp8_obstacle=_precision_obstacle(Precision.FP8, "cuda" if has_gpu else "cpu"),
        int8_obstacle=_precision_obstacle(Precision.INT8, "cuda" if has_gpu else "cpu"),
        host_free_bytes=free_memory_bytes(),
        host_total_bytes=host.total,
        gpu=_look_at_gpu(torch.device("cuda", torch.cuda.current_device())) if has_gpu else None,
    )


def _flash_obstacle(device: str) -> str | None:
    try:
        resolve_attention("flash", device, "bfloat16")
    except ConfigError as error:
        return str(error).rpartition("usable: ")[2]
    return None


def _kernels_obstacle(has_gpu: bool) -> str | None:
    if not has_gpu:
        return "it needs a CUDA device"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def _precision_obstacle(precision: Precision, device: str) -> str | None:
    try:
        check_precision(precision, device, "bfloat16")
    except ConfigError as error:
        return str(error).partition(": ")[2].partition(";")[0]
    return None


def _look_at_gpu(device: torch.device) -> Gpu:
    name = torch.cuda.get_device_name(device)
    free, total = torch.cuda.mem_get_info(device)
    with translated_out_of_memory(f"{name} has too little memory free to be measured"):
        return Gpu(
            name=name,
            free_bytes=free,
            total_bytes=total,
            pinned_bytes_per_s=copy_speed(device, COPY_BYTES, MEASURED_S, pin=True),
            pageable_bytes_per_s=copy_speed(device, COPY_BYTES, MEASURED_S, pin=False),
            gemm_flop_per_s=gemm_speed(device, GEMM_SIZE, MEASURED_S),
            quantised_flop_per_s=quantised_speeds(device, GEMM_SIZE, MEASURED_S),
            attention_flop_per_s=attention_speed(device, ATTENTION_SHAPE, MEASURED_S),
            memory_bytes_per_s=read_speed(device, READ_BYTES, MEASURED_S),
            attention_backends=backend_speeds(device, IMAGE_TOKENS, MEASURED_S),
        )


def copy_speed(device: torch.device, num_bytes: int, seconds: float, *, pin: bool) -> float:
    """Returns the bytes a second of copies from the host to a device."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pin)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    rounds = _rounds_per_s(device, seconds, lambda: target.copy_(source, non_blocking=pin))
    return num_bytes * rounds


def gemm_speed(device: torch.device, size: int, seconds: float) -> float:
    """Returns the operations a second of a product of square bfloat16 matrices."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    rounds = _rounds_per_s(device, seconds, lambda: torch.matmul(left, right, out=out), BURST)
    return 2 * size**3 * rounds


def quantised_speeds(device: torch.device, size: int, seconds: float) -> dict[Stored, float]:
    """Returns the operations a second of products of square quantised matrices, as runs make them.

    Args:
        device: Where they are multiplied; numbers that it does not multiply are left out.
        size: Side of the matrices.
        seconds: That each is measured for.
    """
    operations = choose_operations(fused=_kernels_obstacle(device.type == "cuda") is None)
    found = {}
    for precision in (Precision.FP8, Precision.INT8):
        stored = QUANTISED[precision].stored
        if _precision_obstacle(precision, device.type) is not None:
            continue
        left, right = (
            quantise_rows(torch.randn(size, size, device=device).bfloat16(), NUMBERS[stored])
            for _ in range(2)
        )
        scale = right[1][:, 0].contiguous()
        once = partial(operations.scaled_product, left, right[0], scale, torch.bfloat16)
        found[stored] = 2 * size**3 * _rounds_per_s(device, seconds, once, BURST)
    return found


def attention_speed(
    device: torch.device, shape: tuple[int, int, int, int], seconds: float
) -> float:
    """Returns the operations a second of torch's fastest attention kernel in bfloat16.

    Args:
        device: Where it runs.
        shape: Heads, queries, keys and head size.
        seconds: That the fastest is measured for; the others get a tenth.

    Raises:
        RuntimeError: There is no kernel for such a shape.
    """
    heads, queries, keys, head_dim = shape
    q, k, v = (
        torch.randn(1, heads, tokens, head_dim, device=device).bfloat16()
        for tokens in (queries, keys, keys)
    )

    def speed(backend: SDPBackend, seconds: float) -> float:
        # A kernel that this device or shape does not have says why in a warning as well.
        with suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")
            rounds = _rounds_per_s(
                device, seconds, lambda: F.scaled_dot_product_attention(q, k, v), BURST
            )
            return 4 * heads * queries * keys * head_dim * rounds
        return 0.0

    fastest = max(ATTENTION_BACKENDS, key=lambda backend: speed(backend, seconds / 10))
    found = speed(fastest, seconds)
    if not found:
        raise RuntimeError(f"torch has no attention kernel for {shape} on {device}")
    return found


def backend_speeds(
    device: torch.device, image_tokens: Sequence[int], seconds: float
) -> dict[str, dict[int, float]]:
    """Returns the operations a second of every attention backend that runs can use, in bfloat16.

    Args:
        device: Where they run.
        image_tokens: Lengths to measure: queries of one image, which attend to a prompt as well.
        seconds: That each is measured for.
    """
    heads, kv_heads, head_dim = ATTENTION_HEADS
    found: dict[str, dict[int, float]] = {}
    for backend, attend in BACKENDS.items():
        for queries in image_tokens:
            keys = queries + PREFIX_TOKENS
            q_QHE = torch.randn(queries, heads, head_dim, device=device).bfloat16()
            k_LKE, v_LKE = (
                torch.randn(keys, kv_heads, head_dim, device=device).bfloat16() for _ in range(2)
            )
            # One that this device does not have, or that does not fit its memory, is left out.
            with suppress(ConfigError, RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resolve_attention(backend, device.type, "bfloat16")
                once = partial(attend, q_QHE, k_LKE, v_LKE, False)
                rounds = _rounds_per_s(device, seconds, once, BURST)
                found.setdefault(backend, {})[queries] = (
                    4 * heads * queries * keys * head_dim * rounds
                )
    return found


def read_speed(device: torch.device, num_bytes: int, seconds: float) -> float:
    """Returns the bytes a second that a device reads of its own memory."""
    source = torch.zeros(num_bytes // 4, device=device)
    rounds = _rounds_per_s(device, seconds, source.sum, BURST)
    return num_bytes * rounds


def _rounds_per_s(
    device: torch.device, seconds: float, once: Callable[[], object], burst: int = 1
) -> float:
    """Returns how often something is done a second, in the fastest of many bursts.

    A limit is asked for, and a GPU is slower for moments: while it wakes, and when it is hot.
    """

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once()
    finish()
    fastest = 0.0
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or not fastest:
        for _ in range(burst):
            once()
        # Waits each time, or launches would run ahead of the clock.
        finish()
        fastest = max(fastest, burst / (time.perf_counter() - start))
    return fastest
