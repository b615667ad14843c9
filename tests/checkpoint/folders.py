"""Writes small checkpoint folders of zeros for the tests beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sensebatch.checkpoint.tensors import expected_tensors
from tests.golden_data import golden_architecture, golden_config


def zeros() -> dict[str, np.ndarray]:
    """The tensors of the golden model with the smallest head, float16."""
    specs = expected_tensors(golden_architecture("dense_pixel"))
    return {name: np.zeros(spec.shape, dtype=np.float16) for name, spec in specs.items()}


def write_folder(
    folder: Path, tensors: Mapping[str, np.ndarray] | None = None, *, num_shards: int = 1
) -> Path:
    """Writes config.json and the tensors, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden_config("dense_pixel")))
    tensors = zeros() if tensors is None else tensors
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
