"""What a checkpoint's model card says of its licence. Others wrote it, so it is read in bounds."""

from __future__ import annotations

from pathlib import Path

from sensebatch.bounded import MAX_SHOWN, read_file
from sensebatch.yaml_values import YamlTextError, load_yaml

CARD = "README.md"
"""The file that the Hub takes for a model card; YAML between two fences opens it."""
MAX_CARD_BYTES = 2**20

_FENCE = "---"


def model_license(folder: Path) -> str | None:
    """Returns the licence that a checkpoint's model card names; None where it names none.

    Args:
        folder: The checkpoint's. A card that cannot be read is as none: no image depends on it.
    """
    try:
        text = read_file(folder / CARD, MAX_CARD_BYTES).decode("utf-8-sig")
        head = load_yaml(_between_fences(text)).value
    except (OSError, ValueError, YamlTextError):
        return None
    if not isinstance(head, dict):
        return None
    said, name = head.get("license"), head.get("license_name")
    # The Hub has names for some licences; all others are `other` and a name of their own.
    found = name if said == "other" and name else said
    words = [str(word) for word in (found if isinstance(found, list) else [found]) if word]
    return ", ".join(words)[:MAX_SHOWN] or None


def _between_fences(text: str) -> str:
    first, *lines = text.splitlines() or [""]
    if first.rstrip() != _FENCE:
        return ""
    end = next((number for number, line in enumerate(lines) if line.rstrip() == _FENCE), 0)
    return "\n".join(lines[:end])
