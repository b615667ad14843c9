"""What a run's jobs take beside the weights: caches, passes of prompts and pictures, decoding.

Knows shapes and bytes, not torch, and counts in integers. The formulas follow the network's code
line by line where it needs the most: a change there that takes more memory must change them here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sensebatch.checkpoint.architecture import FM_HEAD_HIDDEN, Architecture
from sensebatch.jobs import GroupKey, Task
from sensebatch.plan.passes import (
    ATTENTION_SPLITS,
    GROWTH_TOKENS,
    MAX_PREFILL_TOKENS,
    ROOM_SPARE,
    ROWS,
    pictures_per_part,
    pictures_per_pass,
    prefixes_wait,
)
from sensebatch.plan.weight_bytes import SCALE_BYTES
from sensebatch.resolutions import TOKEN_NUMBERS
from sensebatch.units import MIB

WORKSPACE_BYTES = 224 * MIB
"""Of the matrix and attention libraries, and what the allocator rounds up."""


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
    """Most tokens of pictures that are cached before the last is drawn (interleave): all others
    are read back, and `<img>` begins the last; see `story_tokens`."""
    wanted_jobs: int | None = None
    """Most jobs in a batch by the settings, where there are fewer; None for `batch_size`."""
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


def story_tokens(image_tokens: int, num_pictures: int) -> int:
    """Returns the tokens of an interleave job's pictures before its last one is drawn.

    Each has `<img>` in front; behind those that are read back comes `</img>`.
    """
    return (num_pictures - 1) * (image_tokens + 2) + 1


def quantising_bytes(arch: Architecture, precision: str | None, *, fused: bool = False) -> int:
    """Returns what quantising the activations of a pass takes for a moment.

    Nothing on top with kernels that quantise: float8 numbers take the place of wider ones, and
    those together are more than the product that is added to the residual.
    """
    if precision is None or fused:
        return 0
    widest = max(arch.hidden_size, arch.num_heads * arch.head_dim, arch.intermediate_size)
    return ROWS * widest * (SCALE_BYTES + 1)


def cache_bytes(arch: Architecture, tokens: int, item_bytes: int) -> int:
    """Returns the bytes of the keys and values of cached tokens in all layers."""
    return arch.num_layers * 2 * tokens * arch.num_kv_heads * arch.head_dim * item_bytes


def _half_numbers(arch: Architecture, rows: int, *, fused: bool) -> tuple[int, int]:
    """Returns the numbers that the two halves of a layer need for a moment for so many tokens.

    Args:
        arch: The network's shape.
        rows: Tokens.
        fused: Whether chains of small operations are kernels, which keep nothing in between.
    """
    hidden, query = arch.hidden_size, arch.num_heads * arch.head_dim
    key = arch.num_kv_heads * arch.head_dim
    if fused:
        product = query + 2 * key
        return rows * (product + max(hidden, product)), rows * max(
            hidden + 2 * arch.intermediate_size, 3 * arch.intermediate_size
        )
    return rows * (hidden + 6 * query + 2 * key), rows * (hidden + 3 * arch.intermediate_size)


def _prompt_pass_bytes(
    arch: Architecture,
    tokens: int,
    longest: int,
    item_bytes: int,
    *,
    fused: bool,
    padded: bool = False,
) -> int:
    """Returns what a pass of prompt tokens needs beside their caches.

    Args:
        arch: The network's shape.
        tokens: Of the pass.
        longest: Keys of its longest sequence.
        item_bytes: Of a number.
        fused: See `_half_numbers`.
        padded: Whether text may attend to keys before it, with idle queries in front.
    """
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    project, finish = _half_numbers(arch, min(tokens, ROWS), fused=fused)
    projected = tokens * (query + 2 * key)
    attended = tokens * query
    run = 2 * longest if padded else min(tokens, longest)
    # Values of one part are a view of what was projected before the heads were normed.
    attend = projected + attended + 2 * longest * key + run * query
    held = (arch.hidden_size + 2 * arch.head_dim) * tokens
    project += projected if tokens > ROWS else 0
    return item_bytes * (held + max(project, attend, attended + finish))


def _picture_pass_bytes(
    arch: Architecture,
    jobs: int,
    pictures: int,
    image_tokens: int,
    prefix: int,
    item_bytes: int,
    *,
    fused: bool,
) -> int:
    """Returns what a denoising pass needs beside the caches.

    Args:
        arch: The network's shape.
        jobs: Of the pass.
        pictures: Evaluations of the pass, one picture each.
        image_tokens: Of a picture.
        prefix: Of the longest one.
        item_bytes: Of a number.
        fused: See `_half_numbers`.
    """
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    part = min(pictures_per_part(image_tokens), pictures) * image_tokens
    project, finish = _half_numbers(arch, min(part, ROWS), fused=fused)
    attended = part * query
    held = (arch.hidden_size + 2 * arch.head_dim) * pictures * image_tokens
    attended_to = 2 * (image_tokens + prefix) * key
    attend = part * (2 * query + 3 * key) + 2 * attended
    network = item_bytes * (held + attended_to + max(project, attend, attended + finish))
    head = item_bytes * (held + part * (FM_HEAD_HIDDEN + max(FM_HEAD_HIDDEN, TOKEN_NUMBERS)))
    # Each job's picture is embedded once, a part at a time; a part's outputs live on into the next.
    seen = min(pictures_per_part(image_tokens), jobs)
    before = seen * image_tokens * arch.hidden_size if seen < jobs else 0
    embed = item_bytes * (held + before) + _patch_bytes(arch, seen * image_tokens)
    return max(network, head + 4 * TOKEN_NUMBERS * pictures * image_tokens, embed)


def _patch_bytes(arch: Architecture, tokens: int) -> int:
    """Returns what embedding the patches of so many tokens takes for a moment.

    Pixels are float32, and so is the rotation: its input, where that is not the embedding itself,
    and its output twice, in halves and joined. All in all it is as much in half precision.
    """
    patches = 4 * tokens
    return 4 * TOKEN_NUMBERS * tokens + 4 * 4 * arch.vision_hidden_size * patches


def denoise_bytes(
    arch: Architecture,
    load: Load,
    jobs: int,
    item_bytes: int,
    *,
    cached_jobs: int | None = None,
    fused: bool = False,
) -> int:
    """Returns what drawing the pictures of some jobs together takes, weights not counted.

    Args:
        arch: The network's shape.
        load: Their group.
        jobs: How many share the pass.
        item_bytes: Of a number.
        cached_jobs: How many have their prefixes on the device; only theirs if None.
        fused: Whether chains of small operations are kernels.
    """
    tokens = load.group.resolution.image_tokens
    branches = len(load.group.branches)
    prefix = load.prefix_tokens
    longest = load.prompt_tokens + load.text_tokens + load.drawn_tokens
    caches = cache_bytes(arch, (cached_jobs or jobs) * prefix, item_bytes)
    state = 4 * TOKEN_NUMBERS * tokens * jobs
    velocities = velocity_bytes(tokens, jobs, branches)
    patch_rotary = 2 * 4 * 4 * tokens * arch.vision_hidden_size // 2
    network = _picture_pass_bytes(
        arch, jobs, jobs * branches, tokens, longest, item_bytes, fused=fused
    )
    return caches + state + patch_rotary + max(network, velocities)


def velocity_bytes(image_tokens: int, jobs: int, branches: int) -> int:
    """Returns what velocities of a step take beside the state, once the network has predicted.

    Those of all evaluations, where the predictions were, those of all jobs, and what the guidance
    of one job takes for a moment.
    """
    pictures = jobs * branches + jobs + (branches if branches > 1 else 0)
    return 4 * TOKEN_NUMBERS * image_tokens * pictures


def prompt_bytes(
    arch: Architecture,
    load: Load,
    item_bytes: int,
    *,
    parked: bool,
    fused: bool = False,
    precision: str | None = None,
) -> int:
    """Returns what prompts and decoding of a batch take, weights not counted.

    Args:
        arch: The network's shape.
        load: The batch's group.
        item_bytes: Of a number.
        parked: Whether prompts that are done wait in host memory.
        fused: Whether chains of small operations are kernels.
        precision: See `quantising_bytes`.
    """
    branches = sum(branch != "uncond" for branch in load.group.branches)
    prompts = branches * load.batch_size
    # The system turn has gone through a pass of its own.
    new = load.prompt_tokens - load.system_tokens
    tokens = max(min(new * prompts, MAX_PREFILL_TOKENS), new, load.system_tokens)
    cached = load.prompt_tokens * prompts
    if parked:
        cached = min(cached, max(MAX_PREFILL_TOKENS, load.prompt_tokens))
    logits = load.batch_size * arch.vocab_size * 2 * item_bytes
    reading = (
        _embedded_bytes(arch, load, item_bytes)
        + cache_bytes(arch, cached + load.system_tokens, item_bytes)
        + _prompt_pass_bytes(
            arch,
            tokens,
            load.prompt_tokens,
            item_bytes,
            fused=fused,
            padded=load.system_tokens > 0 or load.group.task is not Task.T2I,
        )
        + logits
    )
    if not load.text_tokens:
        return reading
    text = text_bytes(arch, load, item_bytes, parked=parked, fused=fused, precision=precision)
    return max(reading, text + logits)


def _embedded_bytes(arch: Architecture, load: Load, item_bytes: int) -> int:
    """Returns what the input pictures of a batch take, embedded, until all prompts are read."""
    if load.group.task is Task.T2I:
        return 0
    tokens = load.prompt_tokens - load.system_tokens
    return load.batch_size * tokens * arch.hidden_size * item_bytes


def decodes_fast(arch: Architecture, precision: str | None, *, fused: bool) -> bool:
    """Returns whether kernels decode text, which know dense layers of unquantised weights only."""
    moe = arch.understanding_moe
    return fused and precision != "fp8-all" and (moe is None or not any(moe.sparse_layers))


def text_bytes(
    arch: Architecture,
    load: Load,
    item_bytes: int,
    *,
    parked: bool,
    fused: bool,
    precision: str | None = None,
) -> int:
    """Returns what a batch takes when its jobs have decoded all their text; see `prompt_bytes`.

    Caches grow layer by layer, so that only one layer is there twice. Memory for text is counted
    as if all of it came, whatever steps it is taken in.
    """
    branches = sum(branch != "uncond" for branch in load.group.branches)
    longest = load.prompt_tokens + load.text_tokens + load.drawn_tokens
    fast = decodes_fast(arch, precision, fused=fused)
    of_text = longest + (ROOM_SPARE if fast else GROWTH_TOKENS)
    # Pictures are read back into every branch; behind a thought only one cache is grown.
    others = load.prefix_tokens - longest if load.drawn_tokens or not parked else 0
    others += GROWTH_TOKENS if load.drawn_tokens and branches > 1 else 0
    kept = 0 if parked else load.system_tokens
    cached = load.batch_size * (of_text + others) + kept
    caches = cache_bytes(arch, cached, item_bytes)
    # Kernels want all caches in one room, which are then parted again.
    grown = load.batch_size if fast else 1
    twice = cache_bytes(arch, grown * of_text, item_bytes) // arch.num_layers
    text_pass = _prompt_pass_bytes(arch, load.batch_size, longest, item_bytes, fused=fused)
    if fast:
        # Partial results of attention, and cosines and sines of every position as they are made.
        rows = load.batch_size * arch.num_heads * ATTENTION_SPLITS
        text_pass += 4 * rows * (arch.head_dim + 2) + 16 * longest * arch.head_dim
    if not load.drawn_tokens:
        return caches + max(twice, text_pass)
    picture = load.group.resolution.image_tokens + 1
    if load.drawn_tokens <= picture:
        return caches + max(twice, text_pass)
    tokens = max(min(picture * branches * load.batch_size, MAX_PREFILL_TOKENS), picture)
    read_back = _prompt_pass_bytes(arch, tokens, longest, item_bytes, fused=fused)
    return caches + twice + max(text_pass, read_back)


def jobs_per_pass(load: Load, tokens_per_pass: int) -> int:
    """Returns how many jobs of a group are drawn together."""
    most = pictures_per_pass(load.group.resolution.image_tokens, tokens_per_pass)
    return min(most, load.batch_size)


def host_working_bytes(
    arch: Architecture, load: Load, tokens_per_pass: int, item_bytes: int, *, parked: bool
) -> int:
    """Returns what a group takes of host memory beside weights and the program.

    These are prefixes that wait; noise and input pictures of a batch and of the one that is made
    ready behind it; what the sampler left of two passes; and pixels on their way to the disk.
    """
    jobs = jobs_per_pass(load, tokens_per_pass)
    picture = TOKEN_NUMBERS * load.group.resolution.image_tokens
    inputs = TOKEN_NUMBERS * load.prompt_tokens
    drawn = picture + TOKEN_NUMBERS * load.drawn_tokens
    pictures = load.batch_size * (2 * 4 * (picture + inputs) + 2 * drawn) + jobs * 2 * 4 * picture
    if not parked or not prefixes_wait(load.batch_size, jobs):
        return pictures
    return pictures + cache_bytes(arch, load.prefix_tokens * load.batch_size, item_bytes)


def working_bytes(
    arch: Architecture,
    loads: Iterable[Load],
    tokens_per_pass: int,
    item_bytes: int,
    *,
    parked: bool,
    precision: str | None = None,
    fused: bool = False,
) -> int:
    """Returns the most that any group needs beside the weights.

    Args:
        arch: The network's shape.
        loads: Of the groups.
        tokens_per_pass: Most image tokens of a denoising pass.
        item_bytes: Of a number.
        parked: Whether prefixes wait in host memory where they are not needed together.
        precision: See `quantising_bytes`.
        fused: See `_half_numbers`.
    """
    most = 0
    for load in loads:
        jobs = jobs_per_pass(load, tokens_per_pass)
        waits = parked and prefixes_wait(load.batch_size, jobs)
        cached = jobs if waits else load.batch_size
        drawing = denoise_bytes(arch, load, jobs, item_bytes, cached_jobs=cached, fused=fused)
        # Kept for the next batch, on the device if this one or one before is drawn in one pass.
        drawing += cache_bytes(arch, load.system_tokens, item_bytes)
        prompts = prompt_bytes(
            arch, load, item_bytes, parked=waits, fused=fused, precision=precision
        )
        # A batch of one pass, whose prefixes stay: the last one, or a part of one that was split.
        last = replace(load, batch_size=jobs)
        least = prompt_bytes(arch, last, item_bytes, parked=False, fused=fused, precision=precision)
        most = max(most, drawing, prompts, least)
    return WORKSPACE_BYTES + quantising_bytes(arch, precision, fused=fused) + most
