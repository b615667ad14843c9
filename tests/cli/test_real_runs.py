"""The whole program with the embedded checkpoint, in processes that are killed for real."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from tests.executor.fakes import outcome

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
POLL_S = 0.0005

MANIFEST = """
version: 1
name: all-tasks
defaults: {width: 128, height: 128, num_steps: 2, cfg_scale: 4, max_think_tokens: 12}
jobs:
  - {id: dots, prompt: A red circle, seeds: [1, 2, 3]}
  - {id: planned, prompt: Two blue squares, think: true}
  - {id: edits, task: edit, prompt: Make it blue, image: in.png, seeds: [1, 2], img_cfg_scale: 2}
  - id: stories
    task: interleave
    prompt: Show in three steps how to draw a house
    seeds: [1, 2]
    max_images: 3
    max_new_tokens: 96
  - {id: continued, task: interleave, prompt: <image> What comes next?, image: in.png, think: true,
     max_images: 2, max_new_tokens: 64}
"""

PASSES = """
version: 1
name: passes
defaults: {width: 128, height: 128, num_steps: 8, cfg_scale: 4, max_think_tokens: 12}
jobs:
  - {id: planned, prompt: Two blue squares, think: true, seeds: [1, 2, 3, 4]}
"""

MORE_PASSES = PASSES.replace("[1, 2, 3, 4]", str([*range(1, 13)]))

Moment = Callable[[Path], bool]


@dataclass
class Program:
    """Starts the program; see `fork_server`."""

    server: subprocess.Popen[str]

    def run(
        self,
        *args: str | Path,
        kill_at: Callable[[], bool] | None = None,
        by: signal.Signals = signal.SIGKILL,
    ) -> int:
        """Runs a command line, sends it a signal if asked to, and returns its exit status."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps([str(arg) for arg in args]), file=self.server.stdin, flush=True)
        pid = int(self.server.stdout.readline())
        if kill_at is not None:
            while not kill_at() and not _has_ended(pid):
                time.sleep(POLL_S)
            with suppress(ProcessLookupError):
                os.kill(pid, by)
        return int(self.server.stdout.readline())


def _has_ended(pid: int) -> bool:
    """Returns whether a process is over; its parent may not have asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@contextmanager
def _started(*options: str) -> Iterator[Program]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cli.fork_server", *options],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield Program(server)


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with _started() as program:
        yield program


@pytest.fixture(scope="module")
def one_by_one() -> Iterator[Program]:
    """The program, except that `low` draws even small images one by one."""
    with _started("alone") as program:
        yield program


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all-tasks")
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(folder / "in.png")
    path = folder / "all-tasks.yaml"
    path.write_text(MANIFEST, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uninterrupted(program: Program, manifest: Path) -> Path:
    root = manifest.parent / "uninterrupted"
    assert program.run("run", manifest, "--output-dir", root) == 0
    return root


def _made(root: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Returns the files of a run, and its log without what measures or names the run."""
    files, rows = outcome(root)
    measured = ("_s", "_bytes", "vram_mode")
    return files, [
        {name: value for name, value in row.items() if not name.endswith(measured)} for row in rows
    ]


def _is_past(end: float) -> bool:
    return time.monotonic() > end


def _file_count(pattern: str, count: int) -> Moment:
    return lambda root: len(list(root.glob(pattern))) >= count


MOMENTS: dict[str, Moment] = {
    "a batch is recorded": _file_count("state.db-wal", 1),
    "the first image is in place": _file_count("images/dots*.png", 1),
    "all images of a batch are in place": _file_count("images/dots*.png", 3),
    "a think text is in place": _file_count("text/planned.txt", 1),
    "an edit is in place": _file_count("images/edits*.png", 1),
    "the first round is kept": _file_count("checkpoints/*/0000.safetensors", 1),
    "the second round is kept": _file_count("checkpoints/*/0001.safetensors", 1),
    "an interleave image is in place": _file_count("images/stories*/*.png", 1),
}


def test_sigkill_at_any_moment_leaves_a_run_that_resumes_to_the_same_bytes(
    program: Program, manifest: Path, uninterrupted: Path
) -> None:
    """All tasks, the real network; killed at chosen moments first, then at random ones."""
    root = manifest.parent / "killed"
    killed = [
        name
        for name, moment in MOMENTS.items()
        if program.run("run", manifest, "--output-dir", root, kill_at=partial(moment, root)) < 0
    ]
    assert len(killed) >= len(MOMENTS) // 2, killed
    choice = random.Random(11)
    others = [manifest.parent / "killed-0", manifest.parent / "killed-1"]
    for folder in others * 3:
        end = time.monotonic() + choice.uniform(0.3, 3.0)
        program.run("run", manifest, "--output-dir", folder, kill_at=partial(_is_past, end))
    whole_files, whole_rows = _made(uninterrupted)
    assert sum(name.startswith("images/stories") for name in whole_files) >= 4
    for folder in (root, *others):
        assert program.run("run", manifest, "--output-dir", folder) == 0
        files, rows = _made(folder)
        assert rows == whole_rows
        assert files == whole_files


def _kept_jobs(root: Path) -> list[list[int]]:
    """Returns which jobs of the one batch under way each file of checkpoints is of."""
    found = []
    for path in sorted(root.glob("checkpoints/*/*.safetensors")):
        with safe_open(path, framework="np") as file:
            found.append(json.loads(file.metadata()["composition"])["indexes"])
    return found


def test_sigkill_between_passes_loses_no_finished_pass(one_by_one: Program, tmp_path: Path) -> None:
    """Four passes of one job each, killed after each of the first three; each is drawn once."""
    manifest = tmp_path / "passes.yaml"
    manifest.write_text(PASSES, encoding="utf-8")
    command = ("run", manifest, "--vram-mode", "low", "--output-dir")
    assert one_by_one.run(*command, tmp_path / "whole") == 0
    root = tmp_path / "killed"
    for number in range(3):
        moment = _file_count(f"checkpoints/*/{number:04d}.safetensors", 1)
        assert one_by_one.run(*command, root, kill_at=partial(moment, root)) < 0
        kept = _kept_jobs(root)
        assert len(kept) > number
        assert kept == [[index] for index in range(len(kept))]
    assert one_by_one.run(*command, root) == 0
    assert _made(root) == _made(tmp_path / "whole")
    assert not list((root / "checkpoints").iterdir())


def test_first_signal_ends_a_run_between_passes_and_loses_none(
    one_by_one: Program, tmp_path: Path
) -> None:
    """Twelve passes of one job each; stopped in the second, and again after the next one."""
    manifest = tmp_path / "passes.yaml"
    manifest.write_text(MORE_PASSES, encoding="utf-8")
    command = ("run", manifest, "--vram-mode", "low", "--output-dir")
    root, kept = tmp_path / "stopped", _kept_jobs(tmp_path / "stopped")
    for number in (signal.SIGINT, signal.SIGTERM):
        moment = partial(_file_count(f"checkpoints/*/{len(kept):04d}.safetensors", 1), root)
        assert one_by_one.run(*command, root, kill_at=moment, by=number) == 75
        before, kept = kept, _kept_jobs(root)
        assert len(kept) > len(before)
        # Each pass once, so that none was drawn again.
        assert kept == [[index] for index in range(len(kept))]
        assert outcome(root) == ({}, [])
    assert one_by_one.run(*command, root) == 0
    assert one_by_one.run(*command, tmp_path / "whole") == 0
    assert _made(root) == _made(tmp_path / "whole")
    assert not list((root / "checkpoints").iterdir())


def test_a_run_made_twice_is_the_same_bytes(
    program: Program, manifest: Path, uninterrupted: Path
) -> None:
    again = manifest.parent / "again"
    assert program.run("run", manifest, "--output-dir", again) == 0
    assert _made(again) == _made(uninterrupted)


@pytest.mark.parametrize("mode", ["full", "fast", "balanced", "low"])
def test_memory_modes_make_the_same_bytes(
    program: Program, manifest: Path, uninterrupted: Path, mode: str
) -> None:
    root = manifest.parent / mode
    assert program.run("run", manifest, "--output-dir", root, "--vram-mode", mode) == 0
    assert _made(root) == _made(uninterrupted)
