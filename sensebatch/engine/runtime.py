"""Which device, dtype and attention a run uses: the words of the settings made definite."""

from __future__ import annotations

import importlib.util

import torch

from sensebatch.config import ModelConfig
from sensebatch.engine.model.attention import Attention, flash, sdpa
from sensebatch.errors import ConfigError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
BACKENDS: dict[str, Attention] = {"sdpa": sdpa, "flash": flash}


def _check_word(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field}: expected {', '.join(allowed)}, found {value!r}")


def resolve_runtime(model: ModelConfig) -> tuple[str, str]:
    """Returns device (`cuda` or `cpu`) and dtype by name.

    Raises:
        ConfigError: A word that is not known, or a GPU asked for where there is none.
    """
    _check_word("device", model.device, ("auto", "cuda", "cpu"))
    _check_word("dtype", model.dtype, ("auto", *DTYPES))
    has_cuda = torch.cuda.is_available()
    if model.device == "cuda" and not has_cuda:
        raise ConfigError("device: expected a CUDA device that torch can use, found none")
    device = model.device
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype


def resolve_attention(backend: str, device: str, dtype: str) -> str:
    """Returns the attention backend by name: `flash` or `sdpa`.

    `auto` takes flash-attn where it is installed and can be used; `flash` never falls back.

    Raises:
        ConfigError: A word that is not known, or flash-attn asked for where it cannot be used.
    """
    _check_word("attn_backend", backend, ("auto", *BACKENDS))
    if backend == "sdpa":
        return backend
    obstacle = None
    if device != "cuda" or dtype == "float32":
        obstacle = f"it needs a CUDA device and half precision, found {device} and {dtype}"
    elif importlib.util.find_spec("flash_attn") is None:
        obstacle = "the flash-attn package is not installed"
    if backend == "auto":
        return "sdpa" if obstacle else "flash"
    if obstacle:
        raise ConfigError(f"attn_backend: expected flash-attn to be usable: {obstacle}")
    return backend
