"""What a run's jobs take of the device besides weights: caches, passes over prompts and images.

Knows shapes and bytes, not torch, and counts in integers. The formulas follow the network's code
line by line where it needs the most: a change there that takes more memory must change them here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.checkpoint.heads import head_of
from sensebatch.jobs import Drawing, Solver
from sensebatch.plan.computation import Computation
from sensebatch.plan.load import Load
from sensebatch.plan.passes import (
    ATTENTION_SPLITS,
    GROWTH_TOKENS,
    LIKELY_TEXT,
    MAX_PREFILL_TOKENS,
    ROOM_SPARE,
    ROWS,
    RUN_SCORES,
    SEGMENT_BYTES,
    SHARED_SEGMENT_BYTES,
    SPLIT_QUERIES,
    head_parts,
    images_per_part,
    middle_layers,
    prefixes_wait,
    reserved_bytes,
)
from sensebatch.plan.weight_bytes import SCALE_BYTES
from sensebatch.resolutions import PATCH_PIXELS, TOKEN_NUMBERS, Resolution
from sensebatch.units import MIB

WORKSPACE_BYTES = 224 * MIB
"""What the matrix and attention libraries take, and what the allocator rounds up. On a CPU, the
mask of a run of text: `RUN_SCORES` as bytes, and again as numbers."""
TEXT_WORKSPACE_BYTES = 96 * MIB
"""The same while text is decoded beside streamed weights: little is allocated, and a library
multiplies only by the vocabulary head."""
ROUTER_WORKSPACE_BYTES = 32 * MIB
"""What a library takes that multiplies by the router of a sparse block while that is recorded."""
HOLES = 16
"""Caches that grow image by image leave about one part in so many of their bytes unused: holes
that are too small for the larger ones that follow."""
SMALL_BYTES = MIB
"""Torch's allocator keeps memory of smaller tensors apart: no larger one ever gets it."""
SPLIT_BYTES = 4
"""Size of a number in the partial results of attention."""


def working_bytes(
    computation: Computation, load: Load | None, tokens_per_pass: int, *, parked: bool
) -> int:
    """Returns the most that a group needs besides the weights.

    Args:
        computation: The network, and how it is computed.
        load: The group's; None for weights without jobs.
        tokens_per_pass: Most image tokens of a denoising pass.
        parked: Whether prefixes wait in host memory where they are not needed together.
    """
    always = WORKSPACE_BYTES + quantising_bytes(computation)
    if load is None:
        return always
    jobs = load.jobs_per_pass(tokens_per_pass)
    waits = parked and prefixes_wait(load.batch_size, jobs)
    drawing = denoise_bytes(computation, load, jobs, cached_jobs=jobs if waits else load.batch_size)
    # The system turn is kept for the next batch: on the device, if this batch or an earlier one is
    # drawn in one pass.
    drawing += cache_bytes(computation, load.system_tokens)
    drawing += _left_bytes(computation, load, jobs, parked=waits)
    prompts = prompt_bytes(computation, load, parked=waits)
    # A batch of one pass, whose prefixes stay: the last one, or a part of one that was split.
    last = load if load.batch_size == jobs else replace(load, batch_size=jobs)
    if waits or last is not load:
        prompts = max(prompts, prompt_bytes(computation, last, parked=False))
    return always + max(drawing, prompts)


def _left_bytes(computation: Computation, load: Load, jobs: int, *, parked: bool) -> int:
    """Returns what the caches of short prompts leave reserved when images are drawn.

    They have moved to host memory, or to one room for text. Of what they leave, which larger
    tensors never get, only the caches of a pass make use, if they are small as well.
    """
    moves = parked or (load.text_tokens > 0 and decodes_fast(computation))
    if not moves or not _is_small(computation, load.prompt_tokens):
        return 0
    left = _read_tokens(load, parked=parked)
    if parked and _is_small(computation, load.longest_tokens):
        left -= jobs * load.prefix_tokens
    return cache_bytes(computation, max(left, 0))


def _is_small(computation: Computation, tokens: int) -> bool:
    """Returns whether a layer's cache of so many tokens is a small tensor."""
    return cache_bytes(computation, tokens) // computation.arch.num_layers < SMALL_BYTES


def _read_tokens(load: Load, *, parked: bool) -> int:
    """Returns the cached tokens of a batch's prompts that are on the device once they are read."""
    tokens = load.prompt_tokens * load.num_growing * load.batch_size
    return min(tokens, max(MAX_PREFILL_TOKENS, load.prompt_tokens)) if parked else tokens


def cache_bytes(computation: Computation, tokens: int) -> int:
    """Returns the bytes of the keys and values of cached tokens in all layers."""
    arch = computation.arch
    width = arch.num_kv_heads * arch.head_dim * computation.item_bytes
    return arch.num_layers * 2 * tokens * width


def quantising_bytes(computation: Computation) -> int:
    """Returns what quantising the activations of a pass takes for a moment.

    Kernels that quantise take nothing on top: 8-bit numbers replace wider ones, and the two
    together are more than the product that is added to the residual. Without them, the sums of
    torch's int8 product take no more afterwards than quantising did before.
    """
    if computation.precision is None or computation.fused:
        return 0
    arch = computation.arch
    widest = max(arch.hidden_size, arch.num_heads * arch.head_dim, arch.intermediate_size)
    return ROWS * widest * (SCALE_BYTES + 1)


def denoise_bytes(
    computation: Computation, load: Load, jobs: int, *, cached_jobs: int | None = None
) -> int:
    """Returns what drawing the images of some jobs together takes.

    Args:
        computation: The network, and how it is computed.
        load: The jobs' group.
        jobs: How many share the pass.
        cached_jobs: How many have their prefixes on the device; only those of the pass if None.
    """
    drawing = load.group.drawing
    if drawing is None:
        return 0
    tokens, branches = load.image_tokens, len(drawing.branches)
    caches = cache_bytes(computation, (cached_jobs or jobs) * load.prefix_tokens)
    state = 4 * TOKEN_NUMBERS * tokens * jobs * (1 + kept_per_image(drawing))
    state += middle_bytes(computation, drawing, tokens * jobs * branches)
    patch_rotary = 2 * 4 * 4 * tokens * computation.arch.vision_hidden_size // 2
    velocities = velocity_bytes(tokens, jobs, branches)
    network = _image_pass_bytes(computation, load, drawing, jobs)
    return caches + state + patch_rotary + max(network, velocities)


def kept_per_image(drawing: Drawing) -> int:
    """Returns how many tensors of an image's size are kept for it from step to step, besides it."""
    of_solver = 0 if drawing.solver is Solver.EULER else 1
    of_guidance = 1 if drawing.guidance_stride > 1 and len(drawing.branches) > 1 else 0
    return of_solver + of_guidance


def middle_bytes(computation: Computation, drawing: Drawing, tokens: int) -> int:
    """Returns the bytes of what the middle layers added, which are kept from step to step.

    Args:
        computation: The network, and how it is computed.
        drawing: Says whether they are.
        tokens: Of all evaluations of a step.
    """
    arch = computation.arch
    if drawing.layer_stride == 1 or not middle_layers(arch.num_layers):
        return 0
    return tokens * arch.hidden_size * computation.item_bytes


def velocity_bytes(image_tokens: int, jobs: int, branches: int) -> int:
    """Returns what the velocities of a step take once the network has predicted.

    These are those of all evaluations, in place of the predictions, those of all jobs, and what
    the guidance of one job takes for a moment.
    """
    images = jobs * branches + jobs + (branches if branches > 1 else 0)
    return 4 * TOKEN_NUMBERS * image_tokens * images


def prompt_bytes(computation: Computation, load: Load, *, parked: bool) -> int:
    """Returns what reading the prompts of a batch and decoding its text takes.

    Args:
        computation: The network, and how it is computed.
        load: The batch's group.
        parked: Whether prompts that have been read wait in host memory.
    """
    logits = load.batch_size * computation.arch.vocab_size * 2 * computation.item_bytes
    reading = reading_bytes(computation, load, parked=parked) + logits
    if not load.text_tokens:
        return reading
    return max(reading, text_bytes(computation, load, parked=parked) + logits)


def reading_bytes(computation: Computation, load: Load, *, parked: bool = False) -> int:
    """Returns what reading the prompts of a batch takes, without logits; see `prompt_bytes`."""
    prompts = load.num_growing * load.batch_size
    # The system turn has gone through a pass of its own.
    new = load.prompt_tokens - load.system_tokens
    tokens = max(min(new * prompts, MAX_PREFILL_TOKENS), new, load.system_tokens)
    cached = _read_tokens(load, parked=parked)
    is_padded = load.system_tokens > 0 or load.group.task.spec.takes_images
    return (
        _embedded_bytes(computation, load)
        + cache_bytes(computation, cached + load.system_tokens)
        + _prompt_pass_bytes(computation, tokens, load.prompt_tokens, padded=is_padded)
    )


def text_bytes(computation: Computation, load: Load, *, parked: bool) -> int:
    """Returns what a batch takes when its jobs have decoded all their text; see `prompt_bytes`.

    Caches grow layer by layer, so that only one layer is there twice. Memory for text is counted
    as if all of it were written, whatever steps it is taken in.
    """
    arch, longest = computation.arch, load.longest_tokens
    fast = decodes_fast(computation)
    of_text = longest + (ROOM_SPARE if fast else GROWTH_TOKENS)
    # Images are read back into every branch; after a thought only one cache is grown.
    others = load.prefix_tokens - longest if load.drawn_tokens or not parked else 0
    others += GROWTH_TOKENS if load.drawn_tokens and load.num_growing > 1 else 0
    kept = 0 if parked else load.system_tokens
    caches = cache_bytes(computation, load.batch_size * (of_text + others) + kept)
    # Kernels want all caches in one room, which are then parted again.
    grown = load.batch_size if fast else 1
    twice = cache_bytes(computation, grown * of_text) // arch.num_layers
    text_pass = _prompt_pass_bytes(computation, load.batch_size, longest)
    if fast:
        # Cosines and sines of every position as they are made.
        text_pass += 16 * longest * arch.head_dim
    image = load.image_tokens + 1
    if load.drawn_tokens <= image:
        return caches + max(twice, text_pass)
    tokens = max(min(image * load.num_growing * load.batch_size, MAX_PREFILL_TOKENS), image)
    read_back = _prompt_pass_bytes(computation, tokens, longest)
    return caches + caches // HOLES + twice + max(text_pass, read_back)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMemory:
    """What decoding takes of the device where everything else of the jobs waits in host memory."""

    of_batch: int
    """Caches of a batch whose jobs have written all they may."""
    of_likely: int
    """Caches of a batch whose jobs have written as much as is likely."""
    of_step: int
    """What a step of a batch comes to: logits."""
    shared: int
    """What batches that are decoded together take besides that, however many they are."""


def text_memory(computation: Computation, load: Load) -> TextMemory:
    """Returns what decoding the texts of batches takes; see `text_bytes`."""
    arch, longest, jobs = computation.arch, load.longest_tokens, load.batch_size
    fast = decodes_fast(computation)
    spare = ROOM_SPARE + (0 if fast else GROWTH_TOKENS)

    def of_layer(tokens: int) -> int:
        together = (jobs if fast else 1) * (tokens + spare)
        return reserved_bytes(cache_bytes(computation, together) // arch.num_layers)

    rooms = arch.num_layers * (1 if fast else jobs)
    likely = longest - load.text_tokens + -(-load.text_tokens // LIKELY_TEXT)
    text_pass = _prompt_pass_bytes(computation, jobs, longest)
    if fast:
        text_pass += 16 * longest * arch.head_dim + recorded_bytes(computation, jobs, longest)
    return TextMemory(
        of_batch=rooms * of_layer(longest),
        of_likely=rooms * of_layer(likely),
        of_step=jobs * arch.vocab_size * 2 * computation.item_bytes,
        shared=TEXT_WORKSPACE_BYTES + quantising_bytes(computation) + of_layer(longest) + text_pass,
    )


def recorded_bytes(computation: Computation, jobs: int, longest: int) -> int:
    """Returns what torch reserves for layers of text that are recorded as graphs.

    It keeps the temporaries of a layer apart from all else, once for all layers and batches.

    Args:
        computation: The network, and how it is computed.
        jobs: Jobs of a batch.
        longest: Keys of its longest sequence.
    """
    temporaries = _prompt_pass_bytes(computation, jobs, longest)
    segments = -(-temporaries // SHARED_SEGMENT_BYTES) * SHARED_SEGMENT_BYTES + 2 * SEGMENT_BYTES
    moe = computation.arch.understanding_moe
    return segments + (ROUTER_WORKSPACE_BYTES if moe is not None and any(moe.sparse_layers) else 0)


def decodes_fast(computation: Computation) -> bool:
    """Returns whether kernels decode text."""
    return computation.fused


def _embedded_bytes(computation: Computation, load: Load) -> int:
    """Returns what the embedded input images of a batch take until all prompts are read."""
    if not load.group.task.spec.takes_images:
        return 0
    tokens = load.prompt_tokens - load.system_tokens
    return load.batch_size * tokens * computation.arch.hidden_size * computation.item_bytes


def _half_numbers(computation: Computation, rows: int, moe: Moe | None) -> tuple[int, int]:
    """Returns the numbers that each half of a layer needs for a moment for so many tokens."""
    arch = computation.arch
    hidden, query = arch.hidden_size, arch.num_heads * arch.head_dim
    key = arch.num_kv_heads * arch.head_dim
    if not computation.fused:
        project, dense = hidden + 6 * query + 2 * key, hidden + 3 * arch.intermediate_size
    else:
        # Kernels keep nothing in between.
        product = query + 2 * key
        project = product + max(hidden, product)
        dense = max(hidden + 2 * arch.intermediate_size, 3 * arch.intermediate_size)
    if moe is None or not any(moe.sparse_layers):
        finish = dense
    else:
        sparse = _sparse_numbers(computation, moe)
        finish = sparse if all(moe.sparse_layers) else max(sparse, dense)
    return rows * project, rows * finish


def _sparse_numbers(computation: Computation, moe: Moe) -> int:
    """Returns the numbers that a sparse block needs for a moment for each token."""
    hidden, inner = computation.arch.hidden_size, moe.intermediate_size
    choices, experts = moe.num_experts_per_tok, moe.num_experts
    if not computation.fused:
        # One expert after the other, here as if all tokens went to it.
        wide = computation.wide(experts) + computation.wide(choices)
        return 2 * hidden + experts + wide + choices + max(3 * hidden, 2 * hidden + 4 * inner)
    # Its input, the router's product, three numbers a choice, and all choices' parts.
    routes = experts + 3 * computation.wide(choices)
    return hidden + routes + choices * (inner + hidden)


def _prompt_pass_bytes(
    computation: Computation, tokens: int, longest: int, *, padded: bool = False
) -> int:
    """Returns what a pass of prompt tokens needs besides their caches.

    Args:
        computation: The network, and how it is computed.
        tokens: All tokens of the pass.
        longest: Keys of its longest sequence.
        padded: Whether text may attend to keys before it, which without kernels takes idle
            queries. Later runs of long text always do.
    """
    arch = computation.arch
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    project, finish = _half_numbers(computation, min(tokens, ROWS), arch.understanding_moe)
    projected, attended = tokens * (query + 2 * key), tokens * query
    padded |= min(tokens, longest) * longest > RUN_SCORES
    run = 2 * longest if padded and not computation.fused else min(tokens, longest)
    # The values of one part are a view of what was projected before the heads were normed.
    attend = projected + attended + 2 * longest * key + run * query
    if computation.fused:
        splits = min(tokens, SPLIT_QUERIES) * arch.num_heads * ATTENTION_SPLITS
        attend += SPLIT_BYTES * splits * (arch.head_dim + 2) // computation.item_bytes
    held = (arch.hidden_size + 2 * arch.head_dim) * tokens
    project += projected if tokens > ROWS else 0
    return computation.item_bytes * (held + max(project, attend, attended + finish))


def _image_pass_bytes(computation: Computation, load: Load, drawing: Drawing, jobs: int) -> int:
    """Returns what a denoising pass needs besides the caches.

    Args:
        computation: The network, and how it is computed.
        load: The group's.
        drawing: The group's; each of a job's guidance branches sees one image.
        jobs: Jobs of the pass.
    """
    arch, item_bytes = computation.arch, computation.item_bytes
    evaluations = jobs * len(drawing.branches)
    image, prefix = load.image_tokens, load.longest_tokens
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    part = min(images_per_part(image), evaluations) * image
    project, finish = _half_numbers(computation, min(part, ROWS), arch.generation_moe)
    attended = part * query
    held = (arch.hidden_size + 2 * arch.head_dim) * evaluations * image
    attended_to = 2 * (image + prefix) * key
    attend = part * (2 * query + 3 * key) + 2 * attended
    network = item_bytes * (held + attended_to + max(project, attend, attended + finish))
    head = item_bytes * (held + head_numbers(arch, drawing.resolution, part // image))
    # Each job's image is embedded once, a part at a time; a part's outputs outlive the next part.
    seen = min(images_per_part(image), jobs)
    before = seen * image * arch.hidden_size if seen < jobs else 0
    embed = item_bytes * (held + before) + _patch_bytes(arch, seen * image)
    return max(network, head + 4 * TOKEN_NUMBERS * evaluations * image, embed)


def head_numbers(arch: Architecture, size: Resolution, images: int) -> int:
    """Returns the numbers that predicting some images of one size takes for a moment."""
    head = head_of(arch)
    rows, columns = size.height // PATCH_PIXELS, size.width // PATCH_PIXELS
    seen = rows
    parts = [] if head.reach is None else head_parts(rows, columns, head.reach)
    if len(parts) > 1:
        seen = max(around.stop - around.start for _, around in parts)
    # Predictions of a part are put together with those of the others.
    whole = TOKEN_NUMBERS * rows if len(parts) > 1 else 0
    return images * columns * (whole + seen * head.working_numbers(arch))


def _patch_bytes(arch: Architecture, tokens: int) -> int:
    """Returns what embedding the patches of so many tokens takes for a moment.

    Pixels are float32, and so is the rotation: its input, where that is not the embedding itself,
    and its output twice, in halves and joined. In half precision the sum is the same.
    """
    patches = 4 * tokens
    return 4 * TOKEN_NUMBERS * tokens + 4 * 4 * arch.vision_hidden_size * patches
