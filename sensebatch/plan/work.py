"""What passes through the network compute and read, and the least seconds that takes. No torch.

Counts matrix products, attention, and the weights and caches that they read from the device's
memory, each at the highest speed the machine was measured to reach. Everything else (norms,
launches, sampling) is left out, so a pass takes longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.checkpoint.heads import head_of
from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
from sensebatch.jobs import Stored
from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.plan.computation import Computation
from sensebatch.plan.weight_bytes import is_quantised, may_be_quantised

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
    quantised_flop_per_s: Mapping[Stored, float] = field(default_factory=dict)
    """Products of quantised tokens and weights, counted likewise, as far as they were measured."""


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
    stored: Stored | None = None
    """What some of the weights are quantised to."""
    quantised_flop: int = 0
    """The part of `gemm_flop` that these are multiplied in."""

    def seconds(self, speeds: Speeds) -> float:
        """Returns the least time: products, then attention, each by the slower of its limits."""
        computed = (self.gemm_flop - self.quantised_flop) / speeds.gemm_flop_per_s
        if self.stored is not None:
            computed += self.quantised_flop / speeds.quantised_flop_per_s[self.stored]
        products = max(computed, self.weight_bytes / speeds.memory_bytes_per_s)
        attention = max(
            self.attention_flop / speeds.attention_flop_per_s,
            self.cache_bytes / speeds.memory_bytes_per_s,
        )
        return products + attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many weights a token meets, all layers of an expert taken together."""

    understanding_matrices: int
    """What each token is multiplied with; of sparse blocks, only the experts it is sent to."""
    generation_matrices: int
    understanding_quantisable: int
    """The part of it that precisions quantise."""
    generation_quantisable: int
    vocabulary_head: int
    image_token: int
    """What each token of an image is multiplied with before the layers, once for all branches."""
    evaluation_token: int
    """What it is multiplied with after them, once for each branch."""


def network_sizes(arch: Architecture) -> Sizes:
    """Returns the sizes of a network's matrices.

    It goes through every tensor, so it is called once for a run and not once for a group.
    """
    matrices = dict.fromkeys(TensorGroup, 0)
    quantisable = dict.fromkeys(TensorGroup, 0)
    specs = expected_tensors(arch)
    for name, spec in specs.items():
        if spec.layer is not None:
            matrices[spec.group] += 0 if len(spec.shape) == 1 else spec.num_elements
            chosen = may_be_quantised(arch, name, spec)
            quantisable[spec.group] += spec.num_elements if chosen else 0
    for group, moe in (
        (TensorGroup.UNDERSTANDING, arch.understanding_moe),
        (TensorGroup.GENERATION, arch.generation_moe),
    ):
        if moe is not None:
            unused = moe.num_experts - moe.num_experts_per_tok
            matrices[group] -= sum(moe.sparse_layers) * unused * expert_size(arch, moe)
    # The embedders of timestep and noise scale see no tokens.
    embedder = "fm_modules.vision_model_mot_gen.embeddings."
    patches = specs[f"{embedder}patch_embedding.weight"].num_elements
    return Sizes(
        understanding_matrices=matrices[TensorGroup.UNDERSTANDING],
        generation_matrices=matrices[TensorGroup.GENERATION],
        understanding_quantisable=quantisable[TensorGroup.UNDERSTANDING],
        generation_quantisable=quantisable[TensorGroup.GENERATION],
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
    others = _other_experts(computation.arch, computation.arch.understanding_moe, tokens)
    read = sizes.understanding_matrices + others + head
    stored, quantised = _quantised(
        computation, TensorGroup.UNDERSTANDING, sizes.understanding_quantisable
    )
    return Work(
        gemm_flop=2 * (tokens * sizes.understanding_matrices + logits * head),
        attention_flop=attention_flop,
        weight_bytes=_read_bytes(computation, read, quantised),
        cache_bytes=cache_bytes,
        stored=stored,
        quantised_flop=2 * tokens * quantised,
    )


def denoising_work(
    computation: Computation,
    sizes: Sizes,
    *,
    tokens: int,
    images: int,
    prefixes: Sequence[int],
    share: float = 1.0,
) -> Work:
    """Returns what one denoising step of some images takes.

    Args:
        computation: The network, and how it is computed.
        sizes: What `network_sizes` returns.
        tokens: Tokens of one image.
        images: How many.
        prefixes: Cached tokens that each evaluation (a job's guidance branch) sees.
        share: Of the layers that the step evaluates.
    """
    evaluations = len(prefixes)
    keys = sum(prefixes) + evaluations * tokens
    attention_flop, cache_bytes = _attention(computation, tokens * keys, keys)
    of_token = round(share * sizes.generation_matrices) + sizes.evaluation_token
    moe = computation.arch.generation_moe
    others = round(share * _other_experts(computation.arch, moe, evaluations * tokens))
    read = of_token + others + sizes.image_token
    stored, quantised = _quantised(
        computation, TensorGroup.GENERATION, round(share * sizes.generation_quantisable)
    )
    return Work(
        gemm_flop=2 * tokens * (evaluations * of_token + images * sizes.image_token),
        attention_flop=round(share * attention_flop),
        weight_bytes=_read_bytes(computation, read, quantised),
        cache_bytes=round(share * cache_bytes),
        stored=stored,
        quantised_flop=2 * tokens * evaluations * quantised,
    )


def _quantised(
    computation: Computation, group: TensorGroup, quantisable: int
) -> tuple[Stored | None, int]:
    """Returns what an expert's weights are quantised to, and how many are."""
    if computation.precision is None or not is_quantised(computation, group):
        return None, 0
    return computation.precision.stored, quantisable


def _read_bytes(computation: Computation, weights: int, quantised: int) -> int:
    """Returns the bytes of weights of which some are quantised; a number of 8 bits is one."""
    return weights * computation.item_bytes - quantised * (computation.item_bytes - 1)


def _other_experts(arch: Architecture, moe: Moe | None, tokens: int) -> int:
    """Returns the weights of experts that tokens go to besides those of one of them.

    They choose evenly, as routers are trained to let them.
    """
    if moe is None:
        return 0
    missed = (1 - moe.num_experts_per_tok / moe.num_experts) ** tokens
    others = moe.num_experts * (1 - missed) - moe.num_experts_per_tok
    return round(sum(moe.sparse_layers) * others * expert_size(arch, moe))


def expert_size(arch: Architecture, moe: Moe) -> int:
    """Returns the weights of one expert of a sparse block."""
    return 3 * arch.hidden_size * moe.intermediate_size


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
