"""Triton's descriptions of matrices, from which newer GPUs copy a tile with one instruction.

Triton has them from 3.4 on. PyTorch 2.6 and 2.7 bring earlier versions, with which tiles are loaded
by their pointers on every GPU.
"""

from __future__ import annotations

__all__ = ["TensorDescriptor"]

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None
