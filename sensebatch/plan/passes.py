"""How much goes through the network at a time, and how many buffers carry its weights.

What computes and what counts memory agree on it here.
"""

from __future__ import annotations

from collections.abc import Sequence

ROWS = 4096
"""Tokens that go through half a layer at a time, so that its temporaries do not grow with the
batch. Matrix products of this many rows already run at full speed."""
TOKENS_PER_PASS = 8192
"""Image tokens in one denoising pass: enough that a layer is copied while it is computed."""
LOW_TOKENS_PER_PASS = ROWS
"""The same under `low`: the temporaries of this many tokens are needed however small a pass is."""
MAX_PREFILL_TOKENS = 9216
"""Tokens of prompts in one pass; a longer prompt has a pass to itself. Two prompts with an image
of 2048x2048 share one, and so share weights that may have to be streamed for it."""
ROOM_TOKENS = 1024
"""Tokens that decoding makes room for at a time after what is cached."""
TEXT_ROOM_TOKENS = 64
"""The same where several batches decode together: what their caches do not take yet holds weights
that would otherwise be streamed at every token."""
MAX_TEXT_BATCHES = 16
"""Most batches whose texts are decoded together."""
LIKELY_TEXT = 3
"""Texts are planned to be decoded together as if each had one in so many of its tokens; those for
which there is no room then wait."""
GROWTH_TOKENS = 128
"""A cache that must grow for a single token grows by this many."""
LONG_RUN = 1024
"""Queries of an image from which on the backend attends. So many occupy a GPU without splitting
the keys, and are worth the 40 ms for which cuDNN plans each new number of keys."""
RUN_SCORES = 1 << 24
"""Most scores (queries by keys) of a run of text that attends at once: a mask of so many is small,
and on a CPU they take less than a second, after which a stop is heeded."""
ATTENTION_SPLITS = 16
"""Programs that share the keys of one key/value head, so that few queries occupy the GPU."""
SPLIT_QUERIES = 64
"""Queries of a run up to which its keys are shared by `ATTENTION_SPLITS` programs as well."""
FEW_KEYS = 512
"""Keys of such a run up to which it attends together with other runs, and shares nothing."""
ROOM_SPARE = 16
"""Places after that room: for what is written after sequences that have ended, and for the few
tokens that lead over from text to an image."""
RING = 2
"""Buffers that blocks pass through: one is computed with while the next is filled."""
PACKING_CHUNK = 1 << 24
"""Numbers of a packed block that are unpacked at a time."""
PACKED_SHARE = 0.755
"""The part of its bytes that a packed block is planned to take: 3/4 and some exceptions."""
NUM_PACKED = 2
"""Host buffers that blocks are read into before they are packed: one is filled while another one is
packed."""
MAX_EXCEPTION_BYTES = 6 << 20
"""Exceptions of a packed block; one with more of them stays as it is."""
PAGE_BYTES = 16 << 20
"""Host memory for prefixes that wait comes in pages of so many bytes."""
NUM_STAGING = 2
"""Host buffers that blocks are read ahead into from the checkpoint's files."""


def middle_layers(num_layers: int) -> range:
    """Returns the layers that a step leaves out where `layer_stride` has it use them again.

    A sixth of the layers at either end follow the noisy image and the timestep at every step.
    """
    ends = max(num_layers // 6, 1)
    return range(ends, max(num_layers - ends, ends))


def images_per_part(image_tokens: int) -> int:
    """Returns how many images go through half a layer together; see `ROWS`."""
    return max(ROWS // image_tokens, 1)


def evaluation_parts(images: Sequence[int], image_tokens: int) -> list[slice]:
    """Returns the evaluations of a denoising step in parts of at most `images_per_part`.

    Images that fill a part keep their evaluations to themselves. So the rows of a matrix product,
    and with them its roundings, do not depend on how many images share the pass, even where
    guidance rests for some of them.

    Args:
        images: Which image of the pass each evaluation is of, in order.
        image_tokens: Tokens of an image.
    """
    size = images_per_part(image_tokens)
    parts: list[slice] = []
    start = 0
    for end in range(1, len(images) + 1):
        if (
            end == len(images)
            or end - start == size
            or images[end] // size != images[start] // size
        ):
            parts.append(slice(start, end))
            start = end
    return parts


def head_parts(rows: int, columns: int, reach: int) -> list[tuple[slice, slice]]:
    """Returns which rows of an image's tokens a head predicts at a time, and which it sees for it.

    Args:
        rows: Of tokens, in an image.
        columns: Tokens of a row.
        reach: Rows on either side that a prediction depends on.
    """
    size = max(ROWS // columns, 1)
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return [(p, slice(max(p.start - reach, 0), min(p.stop + reach, rows))) for p in parts]


def images_per_pass(image_tokens: int, tokens_per_pass: int) -> int:
    """Returns how many jobs' images are drawn together at most.

    A pass that holds more than one part is made of whole parts. Matrix products then have the same
    rows whatever the limit, and so the same rounding errors.

    Args:
        image_tokens: Tokens of an image.
        tokens_per_pass: Most tokens of a pass; one image always fits.
    """
    fitting = max(tokens_per_pass // image_tokens, 1)
    part = images_per_part(image_tokens)
    return fitting if fitting < part else fitting - fitting % part


def prefixes_wait(batch_size: int, jobs: int) -> bool:
    """Returns whether prefixes of a batch leave the device until their pass, where they may.

    The prefixes of a batch that is drawn in one pass are all needed on the device together.

    Args:
        batch_size: Jobs of the batch.
        jobs: How many could share a pass.
    """
    return jobs < batch_size


SEGMENT_BYTES = 2 << 20
"""Torch takes device memory for large tensors by so much at a time."""
LARGE_BYTES = 10 << 20
"""Tensors from this size on get memory of their own."""
SHARED_SEGMENT_BYTES = 20 << 20
"""Those below it, but for very small ones, share memory that torch takes by so much at a time."""


def reserved_bytes(num_bytes: int) -> int:
    """Returns what torch reserves for a tensor that has memory of its own."""
    return num_bytes if num_bytes < LARGE_BYTES else -(-num_bytes // SEGMENT_BYTES) * SEGMENT_BYTES


def packed_chunk_bytes(num_numbers: int) -> int:
    """Returns the bytes of a packed chunk: a byte and a half for each number."""
    return num_numbers + num_numbers // 2


def unpacking_bytes() -> int:
    """Returns the device memory that packed blocks pass through."""
    return 2 * packed_chunk_bytes(PACKING_CHUNK) + MAX_EXCEPTION_BYTES
