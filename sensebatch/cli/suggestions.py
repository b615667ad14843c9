"""Which option somebody means who typed one that a command does not have."""

from __future__ import annotations

import difflib
from collections.abc import Collection

_ALIKE = 0.8
"""How similar two names must be, from 0 to 1, for one to be a typo of the other."""

_INSTEAD = {
    **dict.fromkeys(
        ("out", "outdir", "out-dir", "output", "output-path", "save-dir", "save-path", "folder"),
        ("output", "output-dir"),
    ),
    **dict.fromkeys(("name", "filename", "output-name"), ("stem",)),
    **dict.fromkeys(("format", "image-type"), ("image-format",)),
    **dict.fromkeys(("quality",), ("image-quality",)),
    **dict.fromkeys(("checkpoint", "ckpt", "model-name", "model-id", "weights"), ("model",)),
    **dict.fromkeys(("lora", "adapter"), ("lora-path",)),
    **dict.fromkeys(("gpu", "cuda", "cpu"), ("device",)),
    **dict.fromkeys(("fp8", "int8", "quantize", "quantization"), ("precision",)),
    **dict.fromkeys(("vram", "gpu-memory", "max-vram"), ("vram-budget",)),
    **dict.fromkeys(("batch", "batch-size", "bs"), ("max-batch-size",)),
    **dict.fromkeys(("retries", "attempts", "max-retries"), ("max-attempts",)),
    **dict.fromkeys(("retry",), ("retry-failed",)),
    **dict.fromkeys(("steps", "num-inference-steps"), ("num-steps", "steps")),
    **dict.fromkeys(("cfg", "guidance", "guidance-scale"), ("cfg-scale",)),
    **dict.fromkeys(("size", "aspect-ratio", "ratio"), ("resolution", "size")),
    **dict.fromkeys(("text", "caption", "instruction"), ("prompt",)),
    **dict.fromkeys(("input", "input-image", "image-path", "images"), ("image",)),
    **dict.fromkeys(("thinking", "reasoning"), ("think",)),
    **dict.fromkeys(("manifest", "file", "prompts"), ("jsonl",)),
}
"""Our options by the names that other tools use; the first one that a command has is meant."""

_ADVICE = {
    "negative-prompt": "there are no negative prompts: say what to show, not what to leave out",
    **dict.fromkeys(("resume", "continue"), "the same command resumes a run"),
}
"""What helps where there is no option."""


def advice(option: str, known: Collection[str], fields: Collection[str]) -> str:
    """Returns what to type in place of an unknown option; empty if nobody knows.

    Args:
        option: As it was typed, with its dashes.
        known: The command's options, with their dashes.
        fields: Names that belong into the command's manifest; empty if it reads none.
    """
    name = option.lstrip("-").replace("_", "-").lower()
    names = (name, *_INSTEAD.get(name, ()))
    for other in names:
        if f"--{other}" in known:
            return f"did you mean --{other}?"
    if name in _ADVICE:
        return _ADVICE[name]
    options = {known_name.lstrip("-"): f"did you mean {known_name}?" for known_name in known}
    in_manifest = {
        field.replace("_", "-"): f"{field} is a field of the manifest's jobs" for field in fields
    }
    said = in_manifest | options
    for other in names:
        if other in said:
            return said[other]
    close = difflib.get_close_matches(name, list(said), n=1, cutoff=_ALIKE)
    return said[close[0]] if close else ""
