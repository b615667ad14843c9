"""Compiles every kernel of the 8B model and of the sparse one for a GPU that need not be there.

Arguments: compute capability, and the most shared memory that a program may have there. Prints a
JSON object: the shared memory of each kernel that was compiled, in bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.engine.model import (
    attention_kernels,
    decode_kernels,
    expert_kernels,
    int8_kernels,
)
from sensebatch.engine.model.quantized import NUMBERS
from sensebatch.engine.model.triton_operations import TritonOperations
from sensebatch.jobs import Stored

CAPABILITY, SHARED_BYTES = map(int, sys.argv[1:])
found: dict[str, int] = {}


class Absent:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def compiled(self: JITFunction, grid: object) -> Callable[..., None]:
    """Stands in for a launch."""

    def compile_only(*args: Any, **options: Any) -> None:
        kernel = self.run(*args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        found[self.__name__] = max(found.get(self.__name__, 0), kernel.metadata.shared)

    return compile_only


driver.set_active(Absent())
JITFunction.__getitem__ = compiled
for module in (decode_kernels, expert_kernels, int8_kernels):
    vars(module)["shared_bytes"] = lambda _: SHARED_BYTES
vars(expert_kernels)["has_descriptors"] = lambda _: CAPABILITY >= 90
arch, nowhere = open_checkpoint("synthetic:8b").architecture, torch.device("meta")
stored = (Stored.INT8, Stored.FLOAT8) if CAPABILITY >= 89 else (Stored.INT8,)
for kind in stored:
    TritonOperations().warm_up(arch, torch.bfloat16, nowhere, NUMBERS[kind])
for dtype in (torch.bfloat16, torch.float32):
    attention_kernels.warm_up_runs(arch, dtype, nowhere)
for num_sequences in (1, 16, decode_kernels.MAX_SEQUENCES):
    decode_kernels.warm_up(arch, torch.bfloat16, nowhere, num_sequences)
for kind in stored:
    decode_kernels.warm_up(
        arch, torch.bfloat16, nowhere, decode_kernels.MAX_SEQUENCES, NUMBERS[kind]
    )
expert_kernels.warm_up(open_checkpoint("synthetic:a3b").architecture, torch.bfloat16, nowhere)
print(json.dumps(found))
