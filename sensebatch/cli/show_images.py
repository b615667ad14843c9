"""`sensebatch show`: prints the prompt and the settings that an image carries."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sensebatch.cli.paths import path

_FIRST = ("id", "task", "prompt", "seed", "size")
_INDENT = 4


def show(
    images: Annotated[
        list[Path],
        typer.Argument(parser=path, help="PNG, WebP or JPEG images of a run.", metavar="IMAGE..."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list, with an object for each image.")
    ] = False,
) -> None:
    """Print the prompt, the seed and the settings in an image's metadata.

    The settings are in the file, so the image may be anywhere. A long prompt is cut in JPEG and
    WebP.
    """
    from sensebatch.cli import messages
    from sensebatch.store.images import metadata_of

    found = [(image, metadata_of(image)) for image in images]
    if as_json:
        messages.show(json.dumps([{"file": str(image), **values} for image, values in found]))
        return
    for image, values in found:
        lines = "\n".join(_lines(values))
        if sys.stdout is not None and sys.stdout.isatty():
            lines = "\n".join(messages.fitted(lines))
        messages.show(f"{image}\n{lines}")


def _lines(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each value that there is, those that people look for first."""
    from sensebatch.bounded import escaped

    sampling = values.get("sampling")
    flat = {**values, **(sampling if isinstance(sampling, dict) else {})}
    flat.pop("sampling", None)
    if "width" in flat and "height" in flat:
        flat["size"] = f"{flat.pop('width')}x{flat.pop('height')}"
    names = [*(name for name in _FIRST if name in flat), *(n for n in flat if n not in _FIRST)]
    width = max(map(len, names), default=0)
    for name in names:
        value = flat[name]
        if value is None or value == []:
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield f"  {escaped(name):<{width}}  {escaped(text)}"
