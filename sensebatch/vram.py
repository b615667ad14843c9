"""Memory arithmetic: what weights, caches and passes take, and what fits a budget. Integers only.

Knows shapes and bytes, not torch. The formulas follow the network's code line by line where it
needs the most: a change there that takes more memory must change them here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from sensebatch.checkpoint.architecture import FM_HEAD_HIDDEN, Architecture
from sensebatch.config import MemoryConfig
from sensebatch.errors import ConfigError
from sensebatch.jobs import GroupKey
from sensebatch.weights import SCALE_BYTES, WeightBytes, weight_bytes

GIB = 1 << 30
MIB = 1 << 20
ROWS = 4096
"""Tokens that go through the halves of a layer at a time, so that what they need for a moment
does not grow with the batch. Matrix products of this many rows already run at full speed."""
MAX_PREFILL_TOKENS = 8192
"""Tokens of prompts in one pass; a longer prompt has a pass of its own."""
TOKEN_NUMBERS = 32 * 32 * 3
RING = 2
"""Buffers that blocks pass through: one is computed with while the next is filled."""
NUM_STAGING = 2
"""Host buffers that blocks are read ahead into from the checkpoint's files."""
WORKSPACE_BYTES = 128 * MIB
"""Of the matrix and attention libraries, and what the allocator rounds up."""
CUDA_TOKENS_PER_PASS = 8192
"""Image tokens in one denoising pass: enough to hide a layer's copy behind its computation."""
MODES = ("auto", "full", "fast", "balanced", "low")
HOST_SHARE = 0.7
"""Part of the free host memory that weights may take where no budget is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The most demanding job of a group, and how many are in a batch."""

    group: GroupKey
    batch_size: int
    prompt_tokens: int
    """Of one branch's prompt with its input images; an upper estimate."""
    text_tokens: int = 0
    """Most tokens decoded behind it."""
    drawn_tokens: int = 0
    """Most tokens of pictures that are read back into the prompt (interleave)."""
    system_tokens: int = 0
    """Of `prompt_tokens`, the system turn's, which is cached once more for all jobs to begin
    with; an upper estimate for the run's own system prompt."""

    @property
    def prefix_tokens(self) -> int:
        """Cached tokens of one job over all branches when its last picture is drawn."""
        total = 0
        for branch in self.group.branches:
            if branch == "cond":
                total += self.prompt_tokens + self.text_tokens + self.drawn_tokens
            elif branch == "img_cond":
                total += self.prompt_tokens + self.drawn_tokens
        return total


def quantising_bytes(arch: Architecture, precision: str | None) -> int:
    """Returns what quantising the activations of a pass takes for a moment."""
    if precision is None:
        return 0
    widest = max(arch.hidden_size, arch.num_heads * arch.head_dim, arch.intermediate_size)
    return ROWS * widest * (SCALE_BYTES + 1)


def cache_bytes(arch: Architecture, tokens: int, item_bytes: int) -> int:
    """Returns the bytes of the keys and values of cached tokens in all layers."""
    return arch.num_layers * 2 * tokens * arch.num_kv_heads * arch.head_dim * item_bytes


def _half_numbers(arch: Architecture, rows: int) -> tuple[int, int]:
    """Returns the numbers that the two halves of a layer need for a moment for so many tokens."""
    hidden, query = arch.hidden_size, arch.num_heads * arch.head_dim
    key = arch.num_kv_heads * arch.head_dim
    return rows * (hidden + 6 * query + 2 * key), rows * (hidden + 3 * arch.intermediate_size)


def _prompt_pass_bytes(arch: Architecture, tokens: int, longest: int, item_bytes: int) -> int:
    """Returns what a pass of prompt tokens needs beside their caches.

    Args:
        arch: The network's shape.
        tokens: Of the pass.
        longest: Keys of its longest sequence.
        item_bytes: Of a number.
    """
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    project, finish = _half_numbers(arch, min(tokens, ROWS))
    projected = tokens * (query + 2 * key)
    attended = tokens * query
    # Values of one part are a view of what was projected before the heads were normed.
    attend = projected + attended + 2 * longest * key + min(tokens, longest) * query
    held = (arch.hidden_size + 2 * arch.head_dim) * tokens
    project += projected if tokens > ROWS else 0
    return item_bytes * (held + max(project, attend, attended + finish))


def _picture_pass_bytes(
    arch: Architecture, pictures: int, image_tokens: int, prefix: int, item_bytes: int
) -> int:
    """Returns what a denoising pass needs beside the caches.

    Args:
        arch: The network's shape.
        pictures: Evaluations of the pass, one picture each.
        image_tokens: Of a picture.
        prefix: Of the longest one.
        item_bytes: Of a number.
    """
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    part = min(max(ROWS // image_tokens, 1), pictures) * image_tokens
    project, finish = _half_numbers(arch, min(part, ROWS))
    attended = part * query
    held = (arch.hidden_size + 2 * arch.head_dim) * pictures * image_tokens
    held += 2 * (image_tokens + prefix) * key
    attend = part * (2 * query + 3 * key) + 2 * attended
    network = item_bytes * (held + max(project, attend, attended + finish))
    head = item_bytes * (held + 2 * part * FM_HEAD_HIDDEN)
    head += 4 * TOKEN_NUMBERS * (pictures * image_tokens - part)
    return max(network, head)


def denoise_bytes(
    arch: Architecture, load: Load, jobs: int, item_bytes: int, *, cached_jobs: int | None = None
) -> int:
    """Returns what drawing the pictures of some jobs together takes, weights not counted.

    Args:
        arch: The network's shape.
        load: Their group.
        jobs: How many share the pass.
        item_bytes: Of a number.
        cached_jobs: How many have their prefixes on the device; only theirs if None.
    """
    tokens = load.group.resolution.image_tokens
    branches = len(load.group.branches)
    prefix = load.prefix_tokens
    longest = load.prompt_tokens + load.text_tokens + load.drawn_tokens
    caches = cache_bytes(arch, (cached_jobs or jobs) * prefix, item_bytes)
    state = 4 * TOKEN_NUMBERS * tokens * jobs
    # Pictures of all evaluations, velocities of one job, and those of all jobs put together.
    pictures = (jobs + 1) * branches + jobs + max(jobs, 1)
    predicted = 4 * TOKEN_NUMBERS * tokens * pictures
    patch_rotary = 2 * 4 * 4 * tokens * arch.vision_hidden_size // 2
    network = _picture_pass_bytes(arch, jobs * branches, tokens, longest, item_bytes)
    return caches + state + patch_rotary + max(network, predicted)


def prompt_bytes(arch: Architecture, load: Load, item_bytes: int, *, parked: bool) -> int:
    """Returns what prompts and decoding of a batch take, weights not counted.

    Args:
        arch: The network's shape.
        load: The batch's group.
        item_bytes: Of a number.
        parked: Whether prompts that are done wait in host memory.
    """
    branches = sum(branch != "uncond" for branch in load.group.branches)
    total = load.prompt_tokens * branches * load.batch_size
    tokens = max(min(total, MAX_PREFILL_TOKENS), load.prompt_tokens)
    longest = load.prompt_tokens + load.text_tokens + load.drawn_tokens
    cached = load.prefix_tokens * load.batch_size
    if parked and not load.text_tokens:
        cached = min(cached, tokens)
    logits = load.batch_size * arch.vocab_size * 2 * item_bytes
    return (
        cache_bytes(arch, cached + load.system_tokens, item_bytes)
        + _prompt_pass_bytes(arch, tokens, longest, item_bytes)
        + logits
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where weights and caches are, and how many jobs share a pass."""

    mode: str
    num_buffers: int | None
    """Device buffers: a ring for blocks of any kind, the others as large as a generation layer;
    None gives every block its own."""
    embed_on_device: bool
    tokens_per_pass: int
    """Most image tokens in one denoising pass; one job always fits."""
    park_caches: bool
    """Whether prefixes of waiting jobs are kept in host memory."""
    host_budget_bytes: int | None
    """Host memory for weights; None for as much as they need."""
    device_bytes: int
    """Expected peak on the device."""
    host_bytes: int
    """Host memory that weights are expected to take."""
    reason: str
    """Why this one, for the person who reads it."""


def jobs_per_pass(load: Load, tokens_per_pass: int) -> int:
    """Returns how many jobs of a group are drawn together."""
    fitting = max(tokens_per_pass // load.group.resolution.image_tokens, 1)
    return min(fitting, load.batch_size)


def working_bytes(
    arch: Architecture,
    loads: Iterable[Load],
    tokens_per_pass: int,
    item_bytes: int,
    *,
    parked: bool,
    precision: str | None = None,
) -> int:
    """Returns the most that any group needs beside the weights."""
    most = 0
    for load in loads:
        jobs = jobs_per_pass(load, tokens_per_pass)
        cached = jobs if parked else load.batch_size
        drawing = denoise_bytes(arch, load, jobs, item_bytes, cached_jobs=cached)
        # Kept for the next batch; in host memory where prompts wait there.
        drawing += 0 if parked else cache_bytes(arch, load.system_tokens, item_bytes)
        most = max(most, drawing, prompt_bytes(arch, load, item_bytes, parked=parked))
    return WORKSPACE_BYTES + quantising_bytes(arch, precision) + most


def place(
    arch: Architecture,
    memory: MemoryConfig,
    loads: list[Load],
    *,
    item_bytes: int,
    device_free: int | None,
    host_free: int,
    precision: str | None = None,
) -> Placement:
    """Returns the fastest placement that fits, or the one that was asked for.

    Args:
        arch: The network's shape.
        memory: Mode and budgets.
        loads: Of every group of the run.
        item_bytes: Of a number.
        device_free: Bytes the device has free; None where the host is the device.
        host_free: Bytes the host has free.
        precision: `fp8` or `fp8-all` for linear layers in float8.

    Raises:
        ConfigError: It cannot fit; the message says the smallest budget that would.
    """
    if memory.vram_mode not in MODES:
        raise ConfigError(f"vram_mode: expected {', '.join(MODES)}, found {memory.vram_mode!r}")
    host = memory.host_budget_bytes
    host = int(host_free * HOST_SHARE) if host is None else host
    weights = weight_bytes(arch, item_bytes, precision)
    working = partial(working_bytes, arch, loads, item_bytes=item_bytes, precision=precision)
    candidates = _candidates(weights, working, host)
    budget = memory.vram_budget_bytes
    if memory.vram_mode != "auto":
        chosen = candidates[memory.vram_mode]
        reason = f"asked for vram_mode {memory.vram_mode}"
        limit = budget if budget is not None else device_free
        if limit is not None and chosen.device_bytes > limit:
            raise _too_small(candidates, memory.vram_mode, limit)
        return replace(chosen, reason=reason)
    limit = budget if budget is not None else device_free
    if limit is None:
        return replace(candidates["full"], reason="the host is the device")
    return _within(weights, candidates, limit, asked=budget is not None)


def _candidates(
    weights: WeightBytes, working: Callable[..., int], host: int
) -> dict[str, Placement]:
    most = CUDA_TOKENS_PER_PASS
    shapes = {
        "full": (None, True, most),
        "fast": (weights.num_generation + RING, False, most),
        "balanced": (RING, False, most),
        "low": (RING, False, 1),
    }
    return {
        mode: _placement(weights, working, mode, buffers, embed, tokens, host)
        for mode, (buffers, embed, tokens) in shapes.items()
    }


def _placement(
    weights: WeightBytes,
    working: Callable[..., int],
    mode: str,
    num_buffers: int | None,
    embed: bool,
    tokens_per_pass: int,
    host: int,
) -> Placement:
    blocks = weights.blocks if num_buffers is None else weights.buffers(RING, num_buffers - RING)
    device = blocks + weights.rest + (weights.embeddings if embed else 0)
    parked = num_buffers is not None
    staging = NUM_STAGING * weights.block
    if not embed:
        # They are looked up in host memory, whatever is left for blocks.
        host = max(host - weights.embeddings, 0)
    kept = weights.blocks if weights.blocks <= host else max(host - staging, 0) + staging
    return Placement(
        mode=mode,
        num_buffers=num_buffers,
        embed_on_device=embed,
        tokens_per_pass=tokens_per_pass,
        park_caches=parked,
        host_budget_bytes=host,
        device_bytes=device + working(tokens_per_pass, parked=parked),
        host_bytes=0 if num_buffers is None else kept + (0 if embed else weights.embeddings),
        reason="",
    )


def _within(
    weights: WeightBytes,
    candidates: dict[str, Placement],
    limit: int,
    *,
    asked: bool,
) -> Placement:
    """Returns the fastest placement under a limit: what is left over holds weights."""
    what = f"{'a budget of' if asked else 'free device memory of'} {limit / GIB:.1f} GiB"
    if candidates["full"].device_bytes <= limit:
        return replace(candidates["full"], reason=f"all weights fit {what}")
    for base in ("balanced", "low"):
        lean = candidates[base]
        if lean.device_bytes > limit:
            continue
        extra = (limit - lean.device_bytes) // weights.kept_block
        num_buffers = RING + extra
        kept = min(extra, weights.num_generation)
        return replace(
            lean,
            mode="fast" if kept == weights.num_generation else base,
            num_buffers=num_buffers,
            device_bytes=lean.device_bytes + extra * weights.kept_block,
            reason=f"{what} holds {kept} of {weights.num_generation} generation layers; "
            "the others are streamed",
        )
    raise _too_small(candidates, "auto", limit)


def _too_small(candidates: dict[str, Placement], mode: str, limit: int) -> ConfigError:
    asked = candidates["low" if mode == "auto" else mode]
    hint = f"; vram_mode low needs {candidates['low'].device_bytes / GIB:.1f} GiB"
    hint = "" if mode in ("auto", "low") else hint
    return ConfigError(
        f"vram_budget: expected at least {asked.device_bytes / GIB:.1f} GiB for the largest jobs "
        f"of this run, found {limit / GIB:.1f} GiB{hint}"
    )


def leaner(
    arch: Architecture, placement: Placement, item_bytes: int, precision: str | None = None
) -> Placement | None:
    """Returns what to go on with where a placement turned out not to fit; None if nothing is left.

    First fewer weights stay on the device, half of the buffers each time, then jobs are drawn one
    by one.
    """
    weights = weight_bytes(arch, item_bytes, precision)
    embeddings = weights.embeddings if placement.embed_on_device else 0
    if placement.num_buffers is None:
        num_buffers = weights.num_generation + RING
        saved = weights.blocks - weights.buffers(RING, num_buffers - RING) + embeddings
        host = weights.blocks + weights.embeddings
    elif placement.num_buffers > RING:
        num_buffers = max(placement.num_buffers // 2, RING)
        saved = weights.buffers(RING, placement.num_buffers - RING) - weights.buffers(
            RING, num_buffers - RING
        )
        host = placement.host_bytes
    elif placement.tokens_per_pass > 1:
        return replace(
            placement, mode="low", tokens_per_pass=1, reason="memory ran out: one job at a time"
        )
    else:
        return None
    return replace(
        placement,
        mode="fast" if num_buffers >= weights.num_generation + RING else "balanced",
        num_buffers=num_buffers,
        embed_on_device=False,
        park_caches=True,
        device_bytes=placement.device_bytes - saved,
        host_bytes=host,
        reason=f"memory ran out: {num_buffers} blocks of weights stay on the device",
    )
