"""Which device and dtype a run uses: the words of the settings made definite.

Does not import torch while the answer is certain without it: that import takes most of the time
of a run that finds nothing to do.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import sys
from pathlib import Path

from sensebatch.config import ModelConfig
from sensebatch.errors import ConfigError

DTYPE_NAMES = ("bfloat16", "float16", "float32")
SAFE_ATTENTION = ("auto", "sdpa")
"""Backends that every device can use."""
DRIVER_SIGNS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/nvmap")
"""What the kernel shows where it has a driver for NVIDIA GPUs: of a PC, under Windows, of Tegra."""
NO_DEVICE = 100
"""CUDA's error code for a machine without a GPU, or with all of them hidden."""


def check_word(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Makes sure that a setting is one of its words.

    Raises:
        ConfigError: It is not.
    """
    if value not in allowed:
        raise ConfigError(f"{field}: expected {', '.join(allowed)}, found {value!r}")


def resolve_runtime(model: ModelConfig) -> tuple[str, str]:
    """Returns device (`cuda` or `cpu`) and dtype by name.

    Raises:
        ConfigError: An unknown word, a GPU asked for where there is none, or a precision or an
            attention backend that the device or the dtype does not allow.
    """
    check_word("device", model.device, ("auto", "cuda", "cpu"))
    check_word("dtype", model.dtype, ("auto", *DTYPE_NAMES))
    device = model.device
    if device != "cpu":
        has_cuda = cuda_is_available()
        if device == "cuda" and not has_cuda:
            raise ConfigError("device: expected a CUDA device that torch can use, found none")
        device = "cuda" if has_cuda else "cpu"
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if model.quantised is not None or model.attn_backend not in SAFE_ATTENTION:
        from sensebatch.engine.device.runtime import check_precision, resolve_attention

        check_precision(model.quantised, device, dtype)
        resolve_attention(model.attn_backend, device, dtype)
    return device, dtype


def cuda_is_available() -> bool:
    """Returns what `torch.cuda.is_available` returns."""
    if "torch" not in sys.modules:
        known = _known_without_torch()
        if known is not None:
            return known
    import torch

    return torch.cuda.is_available()


def _known_without_torch() -> bool | None:
    """Returns whether torch can use a CUDA device; None where only torch can say."""
    platforms = _platforms_of_torch()
    if platforms is None or platforms["hip"] or platforms["rocm"]:
        return None
    if platforms["cuda"] is None:
        return False
    if sys.platform != "linux":
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        # Torch might still find the driver's library in a folder of its own.
        return None if any(map(_exists, DRIVER_SIGNS)) else False
    return _ask_driver(driver, built_for=platforms["cuda"])


def _exists(path: str) -> bool:
    return Path(path).exists()


def _platforms_of_torch() -> dict[str, str | None] | None:
    """Returns what torch was built for, read from its files; None where they do not say."""
    try:
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).with_name("version.py").read_text())
    except (AssertionError, ImportError, OSError, ValueError, SyntaxError):
        return None
    found: dict[str, str | None] = {"hip": None, "rocm": None}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = getattr(node, "value", None)
        if targets and isinstance(value, ast.Constant) and value.value in (None, str(value.value)):
            found |= {t.id: value.value for t in targets if isinstance(t, ast.Name)}
    return found if "cuda" in found else None


def _ask_driver(driver: ctypes.CDLL, *, built_for: str) -> bool | None:
    """Returns whether the driver has a GPU and is new enough for a build of torch.

    None where the driver fails in another way, or is older than the build's version of CUDA:
    CUDA may bridge small differences.
    """
    error = driver.cuInit(0)
    if error:
        return False if error == NO_DEVICE else None
    count, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or driver.cuDriverGetVersion(
        ctypes.byref(version)
    ):
        return None
    if count.value == 0:
        return False
    major, _, minor = built_for.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return None
    return True if version.value >= 1000 * int(major) + 10 * int(minor) else None
