"""Makes a network of a checkpoint, its weights wherever they are to be."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.files import Checkpoint, check_tensors
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.engine.lora import Lora
from sensebatch.engine.model.network import Network
from sensebatch.engine.residency import Residency
from sensebatch.engine.weights import FileWeights, SyntheticWeights, WeightSource
from sensebatch.vram import Placement


def open_weights(checkpoint: Checkpoint, lora_path: str | None, dtype: torch.dtype) -> WeightSource:
    """Returns where a checkpoint's weights are read from.

    Raises:
        CheckpointError: A tensor is missing, extra or wrongly shaped, or the LoRA does not fit.
    """
    lora = None
    if lora_path is not None:
        lora = Lora.open(Path(lora_path), expected_tensors(checkpoint.architecture))
    if checkpoint.synthetic:
        return SyntheticWeights(dtype)
    check_tensors(checkpoint)
    return FileWeights(checkpoint, lora)


def load_network(
    arch: Architecture,
    source: WeightSource,
    placement: Placement,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Network, Residency]:
    """Returns a network in evaluation mode, without gradients, and what moves its weights.

    Args:
        arch: The network's shape.
        source: Gives the weights; the checkpoint they are read from has been checked.
        placement: How much of each memory they take.
        device: Where the network computes.
        dtype: What weights are rounded to.

    Raises:
        CheckpointError: A file cannot be read.
    """
    with init_empty_weights():
        network = Network(arch)
    network = network.to(dtype).requires_grad_(False).eval()
    return network, Residency(network, source, placement, device, dtype)
