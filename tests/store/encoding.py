"""What writing PNG files costs, beside Pillow's defaults: CPU time and size of each in one run.

    python -m tests.store.encoding PHOTO... --side 512 --side 1024

It prints what `docs/measurements.md` quotes. Photographs are cut square and scaled, as they are and
with grain of one level, which is closer to what a model draws; beside them stand noise, which is
what synthetic weights draw, and flat colours.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from sensebatch.config import OutputConfig
from sensebatch.store.images import encode_image
from sensebatch.store.phash import phash

REPEATS = 3
"""Times that each is done, in turns; the fastest counts."""


def by_default(pixels: np.ndarray) -> bytes:
    """Returns a PNG as Pillow writes it by default."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def by_sensebatch(pixels: np.ndarray) -> bytes:
    """Returns a PNG as runs write it, without metadata."""
    return encode_image(pixels, OutputConfig(embed_metadata=False), {})


def with_grain(pixels: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 1, pixels.shape)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def flat(side: int) -> np.ndarray:
    """Returns discs of one colour each, with smooth edges."""
    image = Image.new("RGB", (4 * side, 4 * side), "ivory")
    draw = ImageDraw.Draw(image)
    for number, colour in enumerate(("crimson", "teal", "navy", "gold")):
        left, top = side * (number % 2 * 2 + 0.3), side * (number // 2 * 2 + 0.3)
        draw.ellipse((left, top, left + 1.4 * side, top + 1.4 * side), fill=colour)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def images(photos: Sequence[Path], side: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and pixels of what is encoded."""
    for path in photos:
        with Image.open(path) as image:
            pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (side, side)))
        yield path.stem, pixels
        yield f"{path.stem}, grain", with_grain(pixels)
    yield "noise", np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    yield "flat colours", flat(side)


def fastest(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Returns the CPU milliseconds of each call."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, found in zip(calls, taken, strict=True):
            start = time.process_time()
            call()
            found.append((time.process_time() - start) * 1000)
    return [min(found) for found in taken]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument("--side", type=int, action="append")
    options = parser.parse_args()
    print("| image | side | default ms | ms | times | default KiB | KiB | size | hash ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for side in options.side or [1024]:
        for name, pixels in images(options.photos, side):
            before, after = len(by_default(pixels)), len(by_sensebatch(pixels))
            calls = [
                lambda pixels=pixels: by_default(pixels),
                lambda pixels=pixels: by_sensebatch(pixels),
                lambda pixels=pixels: phash(pixels),
            ]
            default, chosen, hashed = fastest(calls)
            print(
                f"| {name} | {side} | {default:.0f} | {chosen:.0f} | {default / chosen:.1f} | "
                f"{before >> 10} | {after >> 10} | {after / before:.2f} | {hashed:.1f} |"
            )


if __name__ == "__main__":
    main()
