"""What passes through the network compute and read, and the least seconds that takes. No torch.

Counts matrix products, attention, and the weights and caches that they read from the device's
memory, each at the highest speed the machine was measured to reach. Everything else (norms,
launches, sampling) is left out, so a pass takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.heads import head_of
from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.plan.computation import Computation

MEASURED_ITEM_BYTES = 2
"""Speeds are measured with numbers of this many bytes."""
PATCHES = 4
"""Patches of a token."""


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
class Machine:
    """The GPU that a plan is made for."""

    free_bytes: int
    """Free memory of the GPU."""
    speeds: Speeds
    attention: AttentionSpeeds | None = None
    """What its attention backends were measured to reach; None where they were not."""


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
        """Returns the least time: products, then attention, each by the slower of its limits."""
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
    """How many weights a token meets, all layers of an expert taken together."""

    understanding: int
    """Weights of its layers: what is copied where all of them are streamed."""
    generation: int
    understanding_matrices: int
    """What each token is multiplied with; of sparse blocks, only the experts it is sent to."""
    generation_matrices: int
    vocabulary_head: int
    image_token: int
    """What each token of an image is multiplied with before the layers, once for all branches."""
    evaluation_token: int
    """What it is multiplied with after them, once for each branch."""


def network_sizes(arch: Architecture) -> Sizes:
    """Returns the sizes of a network's matrices.

    It goes through every tensor, so it is called once for a run and not once for a group.
    """
    weights = dict.fromkeys(TensorGroup, 0)
    matrices = dict.fromkeys(TensorGroup, 0)
    specs = expected_tensors(arch)
    for spec in specs.values():
        if spec.layer is not None:
            weights[spec.group] += spec.num_elements
            matrices[spec.group] += 0 if len(spec.shape) == 1 else spec.num_elements
    for group, moe in (
        (TensorGroup.UNDERSTANDING, arch.understanding_moe),
        (TensorGroup.GENERATION, arch.generation_moe),
    ):
        if moe is not None:
            unused = moe.num_experts - moe.num_experts_per_tok
            of_expert = 3 * arch.hidden_size * moe.intermediate_size
            matrices[group] -= sum(moe.sparse_layers) * unused * of_expert
    # The embedders of timestep and noise scale see no tokens.
    embedder = "fm_modules.vision_model_mot_gen.embeddings."
    patches = specs[f"{embedder}patch_embedding.weight"].num_elements
    return Sizes(
        understanding=weights[TensorGroup.UNDERSTANDING],
        generation=weights[TensorGroup.GENERATION],
        understanding_matrices=matrices[TensorGroup.UNDERSTANDING],
        generation_matrices=matrices[TensorGroup.GENERATION],
        vocabulary_head=arch.vocab_size * arch.hidden_size,
        image_token=PATCHES * patches + specs[f"{embedder}dense_embedding.weight"].num_elements,
        evaluation_token=sum(
            layer.rows_per_token * specs[f"fm_modules.{layer.tensor}.weight"].num_elements
            for layer in head_of(arch).layers
        ),
    )


def understanding_work(
    computation: Computation,
    sizes: Sizes,
    spans: Sequence[tuple[int, int]],
    *,
    logits: int = 0,
) -> Work:
    """Returns what a pass of the understanding expert takes.

    Args:
        computation: The network, and how it is computed.
        sizes: What `network_sizes` returns.
        spans: (new tokens, tokens cached before) of each sequence. A token is taken to see those
            before it and itself; that tokens of an image also see later ones is left out.
        logits: Sequences whose next token is chosen.
    """
    tokens = sum(new for new, _ in spans)
    pairs = sum(new * cached + new * (new + 1) // 2 for new, cached in spans)
    keys = sum(new + cached for new, cached in spans)
    attention_flop, cache_bytes = _attention(computation, pairs, keys)
    head = sizes.vocabulary_head if logits else 0
    return Work(
        gemm_flop=2 * (tokens * sizes.understanding_matrices + logits * head),
        attention_flop=attention_flop,
        weight_bytes=(sizes.understanding_matrices + head) * computation.item_bytes,
        cache_bytes=cache_bytes,
    )


def denoising_work(
    computation: Computation,
    sizes: Sizes,
    *,
    tokens: int,
    images: int,
    prefixes: Sequence[int],
) -> Work:
    """Returns what one denoising step of some images takes.

    Args:
        computation: The network, and how it is computed.
        sizes: What `network_sizes` returns.
        tokens: Tokens of one image.
        images: How many.
        prefixes: Cached tokens that each evaluation (a job's guidance branch) sees.
    """
    evaluations = len(prefixes)
    keys = sum(prefixes) + evaluations * tokens
    attention_flop, cache_bytes = _attention(computation, tokens * keys, keys)
    of_token = sizes.generation_matrices + sizes.evaluation_token
    return Work(
        gemm_flop=2 * tokens * (evaluations * of_token + images * sizes.image_token),
        attention_flop=attention_flop,
        weight_bytes=(of_token + sizes.image_token) * computation.item_bytes,
        cache_bytes=cache_bytes,
    )


def _attention(computation: Computation, pairs: int, keys: int) -> tuple[int, int]:
    """Returns the operations and bytes of attention in all layers.

    Args:
        computation: The network, and how it is computed.
        pairs: Queries by the keys that each sees, over all sequences.
        keys: Those of all sequences.
    """
    arch = computation.arch
    flop = 4 * arch.num_layers * arch.num_heads * arch.head_dim * pairs
    width = 2 * arch.num_kv_heads * arch.head_dim * computation.item_bytes
    return flop, arch.num_layers * width * keys
