"""Puts a checkpoint's tensors into a network, one at a time, straight to their place."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from sensebatch.checkpoint.files import Checkpoint, check_tensors
from sensebatch.engine.lora import Lora
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.state_dict_adapter import checkpoint_slots, parameters_by_name


def load_network(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    lora: Lora | None = None,
) -> Network:
    """Returns the checkpoint's network, in evaluation mode and without gradients.

    Args:
        checkpoint: Checked strictly before memory is taken for it.
        device: Where weights go.
        dtype: What they are rounded to.
        lora: Merged while loading.

    Raises:
        CheckpointError: A tensor is missing, extra or wrongly shaped.
    """
    check_tensors(checkpoint)
    with init_empty_weights():
        network = Network(checkpoint.architecture)
    network = network.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    parameters = parameters_by_name(network)
    slots = checkpoint_slots(checkpoint.architecture)
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in checkpoint.tensors.items():
        by_file[tensor.file].append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                weight = opened.get_tensor(name)
                if lora is not None:
                    weight = lora.apply(name, weight)
                for slot in slots[name]:
                    slot.view(parameters).copy_(slot.part(weight))
    return network
