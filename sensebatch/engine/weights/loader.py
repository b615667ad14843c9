"""Makes the network of a checkpoint, with its weights where a placement has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.files import Checkpoint, check_tensors
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.engine.decoding import decoding_operations
from sensebatch.engine.device.memory import empty_cache, translated_out_of_memory
from sensebatch.engine.memory.shared import SharedBuffers
from sensebatch.engine.model.attention import Attention
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import choose_operations
from sensebatch.engine.model.quantized import NUMBERS, Numbers
from sensebatch.engine.weights.lora import Lora
from sensebatch.engine.weights.residency import Residency
from sensebatch.engine.weights.sources import (
    FileWeights,
    StoppableWeights,
    SyntheticWeights,
    WeightSource,
)
from sensebatch.engine.weights.tensor_files import FILE_DTYPES
from sensebatch.jobs import Precision
from sensebatch.plan.computation import Computation
from sensebatch.plan.load import Load
from sensebatch.plan.passes import LONG_RUN
from sensebatch.plan.placement import Placement


def open_weights(checkpoint: Checkpoint, lora_path: str | None, dtype: torch.dtype) -> WeightSource:
    """Returns where a checkpoint's weights are read from.

    Raises:
        CheckpointError: A tensor is missing, extra or wrongly shaped, or the LoRA does not fit.
    """
    lora = None
    if lora_path is not None:
        lora = Lora.open(Path(lora_path), expected_tensors(checkpoint.architecture))
    if checkpoint.synthetic:
        return SyntheticWeights(dtype, lora, wide_tensors(checkpoint))
    check_tensors(checkpoint)
    return FileWeights(checkpoint, lora)


def wide_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Returns the names of the tensors that a checkpoint holds in float32."""
    found = checkpoint.tensors.items()
    return frozenset(name for name, tensor in found if FILE_DTYPES[tensor.dtype] == torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLoader:
    """Makes a checkpoint's network, each time its weights have to be placed."""

    arch: Architecture
    """The network's shape."""
    source: WeightSource
    """Supplies the weights of a checkpoint that has been checked."""
    device: torch.device
    """The device that the network computes on."""
    dtype: torch.dtype
    """The dtype that weights are rounded to."""
    fused: bool = False
    """Whether chains of small operations are one kernel each."""
    precision: Precision | None = None
    """Precision of quantised linear layers; None if there are none."""
    share: str | None = None
    """The key under which other processes share weights in host memory; None if none does."""

    @property
    def computation(self) -> Computation:
        """The network as the arithmetic of memory and time knows it."""
        return Computation(
            arch=self.arch,
            item_bytes=self.dtype.itemsize,
            precision=self.precision,
            fused=self.fused,
            packs=self.fused and self.dtype == torch.bfloat16,
        )

    def load(
        self, placement: Placement, stop: Callable[[], bool] = lambda: False
    ) -> tuple[Network, Residency]:
        """Returns the network, for inference only, and what moves its weights.

        Args:
            placement: How much of each memory the weights take.
            stop: Whether to stop loading.

        Raises:
            StoppedError: The load was stopped.
            CheckpointError: A file cannot be read.
            DeviceError: The device unpacks other weights than were packed.
            OutOfMemoryError: The device or the host has less memory than planned.
        """
        network = self.new_network()
        shared = None if self.share is None else SharedBuffers(self.share, stop)
        source = StoppableWeights(self.source, stop)
        with translated_out_of_memory(f"the weights did not fit {self.device}"):
            residency = Residency(
                network, source, placement, self.device, shared, packs=self.computation.packs
            )
        source.loaded()
        return network, residency

    def new_network(self) -> Network:
        """Returns the network without weights."""
        with init_empty_weights():
            network = Network(self.arch, choose_operations(fused=self.fused))
        network = network.to(self.dtype).requires_grad_(False).eval()
        drawing, text = self.numbers
        if drawing is not None:
            network.generation.quantise(drawing)
        if text is not None:
            network.understanding.quantise(text)
        return network

    @property
    def numbers(self) -> tuple[Numbers | None, Numbers | None]:
        """What the generation expert and the understanding expert are quantised to, if they are."""
        if self.precision is None or self.precision.stored is None:
            return None, None
        drawing, text = self.precision.stored, self.precision.stored_for_text
        return NUMBERS[drawing], None if text is None else NUMBERS[text]


def warm_up(
    loader: NetworkLoader, attention: Attention, loads: Sequence[Load] = ()
) -> float | None:
    """Compiles the kernels that a network will use, before its weights take the memory.

    Also loads the attention library, whose first use takes a second.

    Args:
        loader: Makes the network.
        attention: How a run or image attends.
        loads: The loads of every group of the run.

    Returns:
        The seconds that it took; None if nothing is compiled.
    """
    if not loader.fused:
        return None
    start = time.perf_counter()
    arch, network = loader.arch, loader.new_network()
    with torch.inference_mode():
        numbers, numbers_of_text = loader.numbers
        network.operations.warm_up(arch, loader.dtype, loader.device, numbers)
        q_THE = torch.zeros(
            LONG_RUN,
            arch.num_heads,
            arch.head_dim,
            dtype=loader.dtype,
            device=loader.device,
        )
        k_TKE = q_THE[:, : arch.num_kv_heads].contiguous()
        attention(q_THE, k_TKE, k_TKE, False)
        decoding = decoding_operations(network)
        if decoding is not None:
            writers = [load.batch_size for load in loads if load.text_tokens]
            # A job may end up alone, because its batch is split or it is tried again.
            counts = {1, *writers} if writers else set()
            for count in sorted(n for n in counts if n <= decoding.max_sequences):
                decoding.warm_up(arch, loader.dtype, loader.device, count, numbers_of_text)
    del q_THE, k_TKE
    empty_cache(loader.device)
    torch.cuda.synchronize(loader.device)
    return time.perf_counter() - start
