"""How much goes through the network at a time; what computes and what counts memory agree on it."""

from __future__ import annotations

from collections.abc import Sequence

ROWS = 4096
"""Tokens that go through the halves of a layer at a time, so that what they need for a moment
does not grow with the batch. Matrix products of this many rows already run at full speed."""
MAX_PREFILL_TOKENS = 9216
"""Tokens of prompts in one pass; a longer prompt has a pass of its own. Two prompts with a picture
of 2048x2048 share one, and with it the weights, which may have to be streamed for it."""
ROOM_TOKENS = 1024
"""Tokens that decoding makes room for at a time behind what is cached."""
GROWTH_TOKENS = 128
"""A cache that must grow for a single token grows by this many."""
ATTENTION_SPLITS = 16
"""Programs that share the cached tokens of one key/value head while a token is decoded."""
ROOM_SPARE = 16
"""Places behind that room: for what is written behind sequences that have ended, and for the few
tokens that lead over from text to a picture."""


def pictures_per_part(image_tokens: int) -> int:
    """Returns how many pictures go through the halves of a layer together; see `ROWS`."""
    return max(ROWS // image_tokens, 1)


def evaluation_parts(images: Sequence[int], image_tokens: int) -> list[slice]:
    """Returns the evaluations of a denoising step in parts of at most `pictures_per_part`.

    Images that fill a part keep their evaluations to themselves. So the rows of a matrix product,
    and with them its roundings, do not depend on how many images share the pass, even where
    guidance rests for some of them.

    Args:
        images: Which image of the pass each evaluation is of, in order.
        image_tokens: Of an image.
    """
    size = pictures_per_part(image_tokens)
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


def pictures_per_pass(image_tokens: int, tokens_per_pass: int) -> int:
    """Returns how many jobs' pictures are drawn together at most.

    As many as fill parts, if it is more than one: then the products of matrices are of the same
    rows whatever the limit, and so are their roundings.

    Args:
        image_tokens: Of a picture.
        tokens_per_pass: Limit for all of a pass; one picture always is.
    """
    fitting = max(tokens_per_pass // image_tokens, 1)
    part = pictures_per_part(image_tokens)
    return fitting if fitting < part else fitting - fitting % part


def prefixes_wait(batch_size: int, jobs: int) -> bool:
    """Returns whether prefixes of a batch leave the device until their pass, where they may.

    Those of a batch that is drawn in one pass are needed there together.

    Args:
        batch_size: Jobs of the batch.
        jobs: How many could share a pass.
    """
    return jobs < batch_size
