"""The table of docs/settings.md, from the dataclasses of settings and the text under their fields.

`python -m tests.documented_settings` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from sensebatch.cli import options
from sensebatch.config import (
    ExecutionConfig,
    InputConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
)
from sensebatch.resolutions import PixelLimits
from tests.store.documented import field_texts

DOCS = Path(__file__).parents[1] / "docs" / "settings.md"
SECTIONS = {
    "model": ModelConfig,
    "memory": MemoryConfig,
    "inputs": InputConfig,
    "output": OutputConfig,
    "execution": ExecutionConfig,
    "pixel_limits": PixelLimits,
}
START = "| Setting | Default | Flag | Meaning |\n| --- | --- | --- | --- |\n"
BUDGETS = {
    "memory.vram_budget_bytes": "`--vram-budget`, `--max-memory 0=`",
    "memory.host_budget_bytes": "`--max-memory cpu=`",
}


def table() -> str:
    """Returns the settings of a run, without those of tasks, as a Markdown table."""
    return START + "".join(f"| {' | '.join(row)} |\n" for row in _rows())


def written(document: str) -> str:
    """Returns the document with its table as the settings are declared."""
    start = document.index(START)
    end = document.index("\n\n", start) + 1
    return document[:start] + table() + document[end:]


def _rows() -> Iterator[tuple[str, str, str, str]]:
    flags = _flags()
    for section, kind in SECTIONS.items():
        texts = field_texts(kind)
        for field in fields(kind):
            place = f"{section}.{field.name}"
            flag = BUDGETS.get(place) or flags.get(place, "")
            meaning = re.sub(r"\bNone\b", "null", texts[field.name])
            yield f"`{place}`", f"`{_shown(field.default)}`", flag, meaning


def _flags() -> dict[str, str]:
    """Returns the flag of each setting that has one, by its place."""
    groups = [kind for kind in vars(options).values() if hasattr(kind, "places")]
    return {
        place: f"`--{name.replace('_', '-')}`"
        for kind in groups
        for name, place in kind.places().items()
    }


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


if __name__ == "__main__":
    DOCS.write_text(written(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
