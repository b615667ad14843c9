"""The catalog, and a mixed manifest of 200 tiny jobs, with 1, 2 and 4 workers and without any.

    python -m tests.cli.worker_trials FOLDER

Every run is a command; files, text and rows of the log must be equal, times, memory and worker
aside. It takes minutes, and is no test of CI.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from tests.cli.test_workers import made, sensebatch

CATALOG = Path("manifests/catalog.yaml")
MIXED = """
version: 1
defaults: {width: 128, height: 128, num_steps: 2, max_images: 2, max_new_tokens: 24}
jobs:
  - {id: ball, task: t2i, prompt: a red circle, n: 80}
  - {id: wide, task: t2i, prompt: a green star, width: 192, height: 128, n: 30}
  - {id: deep, task: t2i, prompt: a blue square, think: true, max_think_tokens: 16, n: 30}
  - {id: blue, task: edit, prompt: paint it blue, image: ball.png, n: 40}
  - {id: tale, task: interleave, prompt: two circles, n: 20}
"""


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    Image.new("RGB", (128, 128), "white").save(folder / "ball.png")
    (folder / "mixed.yaml").write_text(MIXED)
    for manifest in (folder / "mixed.yaml", CATALOG):
        outcomes = {}
        for workers in (0, 1, 2, 4):
            root = folder / f"{manifest.stem}-{workers}"
            flags = ("--workers", str(workers)) if workers else ()
            ended = sensebatch(manifest, root, *flags)
            assert ended.returncode == 0, ended.stderr
            outcomes[workers] = made(root)
            files, rows = outcomes[workers]
            is_equal = outcomes[workers] == outcomes[0]
            print(
                f"{manifest.name} {workers} workers: {len(files)} files, {len(rows)} rows, "
                f"{'equal' if is_equal else 'DIFFERENT'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
