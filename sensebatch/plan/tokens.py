"""How many tokens a job's prompt has, estimated from above without a tokenizer."""

from __future__ import annotations

import re

from sensebatch.jobs import Job
from sensebatch.resolutions import PATCH_PIXELS, PixelLimits

SYSTEM_PROMPT_BYTES = 4096
"""The longest system prompt expected where the checkpoint's is not known."""
BYTES_PER_TOKEN = 3
"""A token of ordinary ASCII text has at least this many bytes."""
LAYOUT_TOKENS = 32
"""Special tokens and words of the chat layout around a prompt."""
IMAGE_LAYOUT_TOKENS = 8
"""The same around an input image."""
_RARE = re.compile(
    "[^\u0000-\u07ff\u2000-\u206f\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]+"
)
"""Neither an alphabet that UTF-8 writes in two bytes, nor punctuation, nor Chinese, Japanese or
Korean."""


def text_tokens(text: str) -> int:
    """Returns an upper estimate of the tokens of a text as people write it.

    A digit is a token. A character of the scripts that tokenizers are trained on most is one token
    at most; one of another script may be a token for each of its bytes.
    """
    digits = sum(map(text.count, "0123456789"))
    plain = len(text) if text.isascii() else len(text.encode("ascii", "ignore"))
    rare = [] if text.isascii() else _RARE.findall(text)
    known = len(text) - plain - sum(map(len, rare))
    others = -(-(plain - digits) // BYTES_PER_TOKEN)
    return digits + others + known + sum(len(run.encode()) for run in rare)


def prompt_tokens(job: Job) -> int:
    """Returns an upper estimate of a job's prompt, with its own system prompt and its images."""
    text = text_tokens(job.system_prompt or "") + text_tokens(job.prompt) + LAYOUT_TOKENS
    for question, answer in job.history:
        text += text_tokens(question) + text_tokens(answer) + LAYOUT_TOKENS
    fewest, most = PixelLimits().model_pixels(1, draws=job.task.spec.drawing is not None)
    images = 0
    for image in job.images:
        pixels = job.input_max_pixels or image.height * image.width
        pixels = min(max(pixels, fewest), most)
        images += pixels // PATCH_PIXELS**2 + IMAGE_LAYOUT_TOKENS
    return text + images


def system_tokens(num_bytes: int) -> int:
    """Returns about as many tokens as a system prompt of this many bytes has."""
    return num_bytes // BYTES_PER_TOKEN
