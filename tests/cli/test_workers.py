"""Runs with workers on Ray, as typed: same files, same log, nothing left running."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sensebatch.cli.main import app
from sensebatch.cli.options import ModelOptions, WorkerOptions
from sensebatch.cli.session import settled
from sensebatch.config import WorkersConfig
from sensebatch.errors import ConfigError

pytest.importorskip("ray")
# Each waits for several runs, which have the machine to themselves only where it is idle.
pytestmark = pytest.mark.timeout(900)

MANIFEST = """
version: 1
defaults: {width: 128, height: 128, num_steps: 2}
jobs:
  - {id: ball, task: t2i, prompt: a red circle, n: 16}
  - {id: deep, task: t2i, prompt: a blue square, think: true, n: 2}
  - {id: blue, task: edit, prompt: paint it blue, image: ball.png}
  - {id: tale, task: interleave, prompt: two circles, max_images: 2, max_new_tokens: 24}
"""
PATIENCE_S = 280.0
"""More than anything takes here on a machine that is busy with other work."""
OF_ONE_RUN = {
    *("run", "session", "worker", "queue_s", "load_s", "wait_s", "prefill_s", "think_s"),
    *("denoise_s", "encode_s", "total_s", "step_s", "image_tok_per_s", "text_tok_per_s"),
    *("peak_rss_bytes", "load_peak_rss_bytes", "started_at", "finished_at"),
}
"""Columns of the log that no two runs share."""


def command(manifest: Path, folder: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "sensebatch", "run", str(manifest), "--output-dir", str(folder)),
        *("--max-batch-size", "2", "--max-attempts", "2", *flags),
    ]


def sensebatch(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command with one thread a process, as its promise of equal bytes asks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*args),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        **options,
    )


def made(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Returns the files of a run, and its log without what no two runs share."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for name in ("images", "text")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }
    rows = pq.read_table(folder / "log.parquet").to_pylist()
    told = [{k: v for k, v in row.items() if k not in OF_ONE_RUN} for row in rows]
    return files, sorted(told, key=lambda row: (row["job_id"], row["attempt"]))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores what settled options of workers leave in the environment."""
    monkeypatch.setenv("RAY_RAYLET_PID", "1")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a manifest of all tasks, with an input image."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("manifest")
    Image.new("RGB", (128, 128), "white").save(folder / "ball.png")
    (folder / "jobs.yaml").write_text(MANIFEST)
    return folder / "jobs.yaml"


@pytest.fixture(scope="module")
def within(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run with one engine in its own process."""
    folder = tmp_path_factory.mktemp("within")
    ended = sensebatch(manifest, folder)
    assert ended.returncode == 0, ended.stderr
    return folder


class Started:
    """A run with two workers that is under way.

    Args:
        manifest: What is run.
        folder: The run's.
    """

    def __init__(self, manifest: Path, folder: Path) -> None:
        self._folder = folder
        self.process = subprocess.Popen(
            command(manifest, folder, "--workers", "2", "--json"),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        self._mark = f"sensebatch-ray-{self.pid}-"

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def wait_for_an_image(self) -> None:
        """Returns once the first image is in place."""
        _until(lambda: any((self._folder / "images").glob("*.png")) or self.process.poll())
        assert self.process.poll() is None

    def workers(self) -> list[psutil.Process]:
        """Returns the processes of the workers."""
        return self.of_ray("ray::RayWorker")

    def of_ray(self, name: str) -> list[psutil.Process]:
        """Returns the processes of Ray that have a name in their command line."""
        return [one for one in self._of_ray() if name in " ".join(one.cmdline())]

    def end(self) -> str:
        """Waits for the end of the run and of all that Ray started for it; returns what it said."""
        self.printed, said = self.process.communicate(timeout=PATIENCE_S)
        _until(lambda: not self._of_ray())
        return said

    def _of_ray(self) -> list[psutil.Process]:
        """Returns what runs in the folder that Ray has for this run, and below it."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self._mark in " ".join(process.cmdline()):
                    family = (process, *process.children(recursive=True))
                    found.update({one.pid: one for one in family})
        return [one for one in found.values() if one.is_running()]


def _until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def temp_folders(started: Started) -> list[Path]:
    """Returns the folders of files that Ray has left of a run."""
    base = Path(tempfile.gettempdir())
    return list(base.glob(f"sensebatch-ray-{started.process.pid}-*"))


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_make_the_same_and_leave_nothing(
    manifest: Path, within: Path, tmp_path: Path
) -> None:
    with Started(manifest, tmp_path) as started:
        started.wait_for_an_image()
        unwanted = [started.of_ray(name) for name in ("monitor.py", "dashboard.py")]
        libraries = {Path(one.path).name for one in psutil.Process(started.pid).memory_maps()}
        started.workers()[0].send_signal(signal.SIGKILL)
        said = started.end()
    assert started.process.returncode == 0, said
    assert not any(unwanted)
    assert not [name for name in libraries if name.startswith("libtorch")]
    assert "died and is started again: its process was killed" in said
    assert json.loads(started.printed)["done"] == 20
    assert not temp_folders(started)
    assert made(tmp_path) == made(within)
    workers = pq.read_table(tmp_path / "log.parquet")["worker"].to_pylist()
    assert set(workers) <= {0, 1}


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed_and_one_engine_resumes_it(
    manifest: Path, within: Path, tmp_path: Path
) -> None:
    with Started(manifest, tmp_path) as started:
        started.wait_for_an_image()
        started.process.kill()
        started.end()
    ended = sensebatch(manifest, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert made(tmp_path) == made(within)


@pytest.mark.slow
def test_stop_ends_workers_in_order_and_the_run_is_resumed(
    manifest: Path, within: Path, tmp_path: Path
) -> None:
    with Started(manifest, tmp_path) as started:
        started.wait_for_an_image()
        started.process.send_signal(signal.SIGTERM)
        said = started.end()
    assert started.process.returncode == 75, said
    assert "died" not in said
    ended = sensebatch(manifest, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert made(tmp_path) == made(within)


@pytest.mark.slow
def test_a_run_whose_ray_is_killed_ends_and_is_resumed(
    manifest: Path, within: Path, tmp_path: Path
) -> None:
    with Started(manifest, tmp_path) as started:
        started.wait_for_an_image()
        for process in started.of_ray("raylet/raylet"):
            process.kill()
        said = started.end()
    assert started.process.returncode == 75, said
    assert "Ray has ended on the machine of the run; the same command resumes the run" in said
    ended = sensebatch(manifest, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert made(tmp_path) == made(within)


def refusal(*flags: str) -> str:
    """Returns what is said of options that are refused before anything is started."""
    ended = CliRunner().invoke(app, ["run", "manifests/catalog.yaml", *flags])
    assert isinstance(ended.exception, ConfigError), ended.output
    return str(ended.exception)


def test_options_of_workers_that_contradict_are_refused() -> None:
    assert refusal("--gpus", "0,x") == (
        "--gpus: expected all, or different numbers such as 0,1, found '0,x'"
    )
    assert refusal("--gpus", "0,0").startswith("--gpus: expected all, or different numbers")
    assert refusal("--gpus", "0", "--device", "cpu") == "--gpus: expected no --device cpu beside it"
    assert refusal("--gpus", "0", "--cluster", "auto") == "--gpus: expected no --cluster beside it"
    assert refusal("--gpus", "0,1", "--workers", "3") == (
        "--workers: expected 2, one for each GPU of --gpus, found 3"
    )
    assert refusal("--max-memory", "1=13GiB") == (
        "--max-memory: expected a budget for GPU 0 alone, found one for 1; --gpus runs on several"
    )


def test_ray_that_is_not_installed_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refusal("--workers", "2", "--device", "cpu", "--output-dir", str(tmp_path))
    assert "not installed; install it with: pip install 'sensebatch[cluster]'" in said


def test_budgets_of_gpus_follow_the_numbers_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    model = ModelOptions(max_memory="0=13GiB,1=20GiB,cpu=40GiB")
    workers = settled(WorkerOptions(gpus="1,0").config(model, "auto"))
    assert workers is not None
    assert workers.gpus == ("6", "4")
    assert workers.gpu_budget_bytes == {"4": 13 << 30, "6": 20 << 30}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,4"
    assert model.flags()["memory.vram_budget_bytes"] == 13 << 30


def test_ray_of_the_run_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "-")
        monkeypatch.delenv(name)
    settled(WorkersConfig(count=2))
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    settled(WorkersConfig(count=2))
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_ray_does_not_take_the_end_of_a_shell_for_its_own() -> None:
    settled(WorkersConfig(count=2))
    assert os.environ["RAY_RAYLET_PID"] == str(os.getpid())


@pytest.mark.parametrize("has_token", [True, False])
def test_cluster_is_asked_with_the_token_that_is_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_token: bool
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "-")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    if has_token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    settled(WorkersConfig(cluster="auto"))
    assert os.environ.get("RAY_AUTH_MODE") == ("token" if has_token else None)
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_cluster_is_asked_without_a_token_where_nobody_has_a_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "HOME"):
        monkeypatch.setenv(name, "-")
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    settled(WorkersConfig(cluster="auto"))
    assert "RAY_AUTH_MODE" not in os.environ


def test_one_amount_counts_for_every_gpu() -> None:
    model = ModelOptions(max_memory="0=13GiB")
    workers = WorkerOptions(gpus="all").config(model, "auto")
    assert workers is not None
    assert workers.gpu_budget_bytes == {}
    assert model.flags()["memory.vram_budget_bytes"] == 13 << 30
