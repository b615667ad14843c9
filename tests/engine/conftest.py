"""Triton's kernels run on a CPU through its interpreter, if that is said before they are loaded."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
