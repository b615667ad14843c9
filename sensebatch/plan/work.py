"""What passes through the network compute and read, and the least seconds that takes. No torch.

Counts matrix products, attention, and the weights and caches that they read from the device's
memory, each as fast as the machine was measured to do it. Everything else (norms, launches,
sampling) is left out, so a pass takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors

MEASURED_ITEM_BYTES = 2
"""Of the numbers that speeds are measured with."""
PATCHES = 4
"""Patches of a token."""
PIXEL_HEAD_ROWS = {"conv1": 4, "conv2": 16}
"""Places of a token that the convolutional head's kernels go over: its sides are doubled before
each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a machine was measured to reach at most."""

    copy_bytes_per_s: float
    """From pinned host memory to the device."""
    gemm_flop_per_s: float
    """Matrix products; one of [m, k] by [k, n] counts 2 m k n."""
    attention_flop_per_s: float
    """Two products for each query, key and head."""
    memory_bytes_per_s: float
    """Reads of the device's own memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one pass through the network takes."""

    gemm_flop: int
    attention_flop: int
    weight_bytes: int
    """Weights that matrix products read."""
    cache_bytes: int
    """Keys and values that attention reads."""

    def seconds(self, speeds: Speeds) -> float:
        """Returns the least time: products, then attention, each as its slower limit has it."""
        products = max(
            self.gemm_flop / speeds.gemm_flop_per_s, self.weight_bytes / speeds.memory_bytes_per_s
        )
        attention = max(
            self.attention_flop / speeds.attention_flop_per_s,
            self.cache_bytes / speeds.memory_bytes_per_s,
        )
        return products + attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many numbers of weights a token meets, layers of an expert taken together."""

    understanding: int
    """Weights of its layers: what is copied where all of them are streamed."""
    generation: int
    understanding_matrices: int
    """What each token is multiplied with; of sparse blocks, the experts it is sent to."""
    generation_matrices: int
    head: int
    """The vocabulary head's matrix."""
    picture_token: int
    """What each token of a picture is multiplied with before the layers, once for all branches."""
    evaluation_token: int
    """What it is multiplied with behind them, once for each branch."""


def network_sizes(arch: Architecture) -> Sizes:
    """Returns the sizes of a network's matrices."""
    weights = dict.fromkeys(TensorGroup, 0)
    matrices = dict.fromkeys(TensorGroup, 0)
    picture_token = evaluation_token = 0
    for name, spec in expected_tensors(arch).items():
        size = spec.num_elements
        if spec.layer is not None:
            weights[spec.group] += size
            matrices[spec.group] += 0 if len(spec.shape) == 1 else size
        elif spec.group is TensorGroup.GENERATION and len(spec.shape) > 1:
            # The embedders of timestep and noise scale see no tokens, and all steps at once.
            if "fm_head" in name:
                evaluation_token += size * _rows_of_token(name)
            elif "embedder" not in name:
                picture_token += size * _rows_of_token(name)
    for group, moe in (
        (TensorGroup.UNDERSTANDING, arch.understanding_moe),
        (TensorGroup.GENERATION, arch.generation_moe),
    ):
        if moe is not None:
            unused = moe.num_experts - moe.num_experts_per_tok
            of_expert = 3 * arch.hidden_size * moe.intermediate_size
            matrices[group] -= sum(moe.sparse_layers) * unused * of_expert
    return Sizes(
        understanding=weights[TensorGroup.UNDERSTANDING],
        generation=weights[TensorGroup.GENERATION],
        understanding_matrices=matrices[TensorGroup.UNDERSTANDING],
        generation_matrices=matrices[TensorGroup.GENERATION],
        head=arch.vocab_size * arch.hidden_size,
        picture_token=picture_token,
        evaluation_token=evaluation_token,
    )


def _rows_of_token(name: str) -> int:
    """Returns how many rows of a matrix product a token of a picture becomes."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return PATCHES if module == "patch_embedding" else PIXEL_HEAD_ROWS.get(module, 1)


def _attention(arch: Architecture, pairs: int, keys: int, item_bytes: int) -> tuple[int, int]:
    """Returns the operations and bytes of attention in all layers.

    Args:
        arch: The network's shape.
        pairs: Queries by the keys that each sees, over all sequences.
        keys: Of all sequences.
        item_bytes: Of a number.
    """
    flop = 4 * arch.num_layers * arch.num_heads * arch.head_dim * pairs
    return flop, arch.num_layers * 2 * arch.num_kv_heads * arch.head_dim * keys * item_bytes


def understanding_work(
    arch: Architecture,
    sizes: Sizes,
    spans: Sequence[tuple[int, int]],
    item_bytes: int,
    *,
    logits: int = 0,
) -> Work:
    """Returns what a pass of the understanding expert takes.

    Args:
        arch: The network's shape.
        sizes: Of `network_sizes`.
        spans: (new tokens, tokens cached before) of each sequence. A token is taken to see those
            before it and itself; that tokens of a picture also see later ones is left out.
        item_bytes: Of a number.
        logits: Sequences whose next token is chosen.
    """
    tokens = sum(new for new, _ in spans)
    pairs = sum(new * cached + new * (new + 1) // 2 for new, cached in spans)
    attention_flop, cache_bytes = _attention(
        arch, pairs, sum(new + cached for new, cached in spans), item_bytes
    )
    head = sizes.head if logits else 0
    return Work(
        gemm_flop=2 * (tokens * sizes.understanding_matrices + logits * head),
        attention_flop=attention_flop,
        weight_bytes=(sizes.understanding_matrices + head) * item_bytes,
        cache_bytes=cache_bytes,
    )


def denoising_work(
    arch: Architecture,
    sizes: Sizes,
    tokens: int,
    pictures: int,
    prefixes: Sequence[int],
    item_bytes: int,
) -> Work:
    """Returns what one denoising step of some pictures takes.

    Args:
        arch: The network's shape.
        sizes: Of `network_sizes`.
        tokens: Of one picture.
        pictures: How many.
        prefixes: Cached tokens that each evaluation (a job's guidance branch) sees.
        item_bytes: Of a number.
    """
    evaluations = len(prefixes)
    keys = sum(prefixes) + evaluations * tokens
    attention_flop, cache_bytes = _attention(arch, tokens * keys, keys, item_bytes)
    of_token = sizes.generation_matrices + sizes.evaluation_token
    return Work(
        gemm_flop=2 * tokens * (evaluations * of_token + pictures * sizes.picture_token),
        attention_flop=attention_flop,
        weight_bytes=(of_token + sizes.picture_token) * item_bytes,
        cache_bytes=cache_bytes,
    )
