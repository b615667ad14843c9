"""LoRA files in every naming that is read, from the golden ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.golden_data import Case

RELEASE_PREFIX = "diffusion_model."
ROLES = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight"}
Tensors = dict[str, torch.Tensor]


def lora_tensors(case: Case) -> Tensors:
    """Returns the tensors of a golden LoRA by their keys."""
    return {
        key: case.tensor(name).reshape(()) if name.endswith("alpha") else case.tensor(name)
        for name, key in case.params["lora_keys"].items()
    }


def write(file: Path, tensors: Tensors) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return file


def write_config(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")


def as_kohya(tensors: Tensors, prefix: str = "lora_unet_") -> Tensors:
    """Returns the same LoRA with its paths in one word."""
    renamed = {}
    for key, tensor in tensors.items():
        path, ending = _cut(key.removeprefix(RELEASE_PREFIX))
        renamed[f"{prefix}{path.replace('.', '_')}{ending}"] = tensor
    return renamed


def as_peft(tensors: Tensors, prefix: str = "base_model.model.") -> Tensors:
    """Returns the same LoRA in PEFT's names, without its alphas."""
    renamed = {}
    for key, tensor in tensors.items():
        path, ending = _cut(key.removeprefix(RELEASE_PREFIX))
        if ending in ROLES:
            renamed[f"{prefix}{path}{ROLES[ending]}"] = tensor
    return renamed


def alphas(tensors: Tensors) -> dict[str, float]:
    """Returns the alpha of each path."""
    bare = {key.removeprefix(RELEASE_PREFIX): tensor for key, tensor in tensors.items()}
    return {
        key.removesuffix(".alpha"): float(tensor)
        for key, tensor in bare.items()
        if key.endswith(".alpha")
    }


def ranks(tensors: Tensors) -> dict[str, int]:
    """Returns the rank of each path."""
    bare = {key.removeprefix(RELEASE_PREFIX): tensor for key, tensor in tensors.items()}
    return {
        key.removesuffix(".lora_down.weight"): tensor.shape[0]
        for key, tensor in bare.items()
        if key.endswith(".lora_down.weight")
    }


def _cut(key: str) -> tuple[str, str]:
    for ending in (*ROLES, ".alpha"):
        if key.endswith(ending):
            return key.removesuffix(ending), ending
    raise AssertionError(key)
