"""A run on a Ray cluster of three nodes on this machine, of which pieces are killed while it works.

    python -m tests.executor.ray_trials FOLDER --kills 50

Workers are killed with SIGKILL at random moments, then a node is killed, one is added, and the
driver is killed and started again. In the end every file and every row must be as in a run
without workers. The engine is the fake one, whose images depend on the batch that they are drawn
in, so a batch that comes out in another composition is seen. It takes minutes, and is no test of
CI.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from sensebatch.config import WorkersConfig
from sensebatch.contract import Engine
from sensebatch.executor import roster
from sensebatch.executor.ray_actor import Recipe
from sensebatch.executor.ray_workers import RayCrew
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import Job, group_key
from sensebatch.tasks import Task
from tests.executor.crews import run_crew
from tests.executor.fakes import (
    FakeEngine,
    Recorder,
    make_config,
    make_input,
    make_job,
    outcome,
    run_worker,
)

CONFIG = make_config(max_batch_size=4)
NUM_WORKERS = 4


class SlowEngine(FakeEngine):
    """A fake engine that takes a moment for each step."""

    def __init__(self, step_s: float) -> None:
        super().__init__(a_pass=1)
        self.on_step = partial(time.sleep, step_s)


def open_slow(step_s: float, gpu: str | None, share: object) -> Engine:
    """Returns the engine of a worker."""
    assert gpu is None
    assert share is None
    return SlowEngine(step_s)


def trial_jobs(num_jobs: int) -> list[Job]:
    """Returns jobs of all tasks, among them some that fail."""
    jobs = [make_job(f"t{i}", seed=i) for i in range(num_jobs)]
    jobs += [make_job(f"story{i}", Task.INTERLEAVE, seed=i) for i in range(num_jobs // 10)]
    jobs += [
        make_job(f"edit{i}", Task.EDIT, images=(make_input(f"in{i}"),), seed=i)
        for i in range(num_jobs // 10)
    ]
    jobs += [make_job(f"fails{i}", prompt="this one fails", seed=i) for i in range(3)]
    return [*jobs, make_job("poison", prompt="poison")]


class Shown(Recorder):
    """Prints the notes."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def worker_changed(self, *_: object) -> None:
        pass


def drive(root: Path, address: str, num_jobs: int, step_s: float) -> None:
    """The driver's process: one run on the cluster."""
    # Workers are killed while they start as well, and come back at once.
    roster.MAX_FAILED_STARTS, roster.LONGEST_PAUSE_S = 1000, 1.0
    jobs = trial_jobs(num_jobs)
    recipe = Recipe(
        open_engine=partial(open_slow, step_s),
        output=CONFIG.output,
        groups=tuple(dict.fromkeys(group_key(job) for job in jobs)),
        environment={},
        version=sys.modules["sensebatch"].__version__,
        share="trial",
    )
    workers = WorkersConfig(count=NUM_WORKERS, cluster=address)
    run_crew(root, jobs, CONFIG, RayCrew(workers, recipe, uses_gpu=False), seen=Shown())


def actors() -> list[psutil.Process]:
    """Returns the processes of the trial's workers."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::RayWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Trial:
    """Kills what a run consists of, and looks at what it comes to.

    Args:
        folder: Where the runs' folders are made.
        num_jobs: Jobs of the run.
        step_s: Seconds of a step of the engine.
    """

    def __init__(self, folder: Path, num_jobs: int, step_s: float) -> None:
        from ray.cluster_utils import Cluster

        self._root, self._num_jobs, self._step_s = folder / "cluster", num_jobs, step_s
        self._within = folder / "within"
        self._random = random.Random(7)
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "num_gpus": 0},
        )
        self._nodes = [self._add() for _ in range(3)]
        self.driver = self._start()

    def _add(self) -> Any:
        return self._cluster.add_node(
            num_cpus=2, num_gpus=0, object_store_memory=80 << 20, include_dashboard=False
        )

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", __spec__.name, str(self._root.parent), "--driver"]
        settings = ["--jobs", str(self._num_jobs), "--step", str(self._step_s)]
        return subprocess.Popen([*command, self._cluster.address, *settings])

    def kill_workers(self, count: int) -> int:
        """Kills workers at random moments; returns how many."""
        killed = 0
        while killed < count and self.driver.poll() is None:
            time.sleep(self._random.uniform(0.2, 1.5))
            found = actors()
            if not found:
                continue
            try:
                self._random.choice(found).send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
            killed += 1
        return killed

    def lose_node(self) -> None:
        """Kills a node with all that is on it, and adds another one a moment later."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)
        time.sleep(3)
        self._nodes.append(self._add())

    def kill_driver(self) -> float:
        """Kills the driver; returns the seconds until its workers have ended. Starts another."""
        self.driver.kill()
        self.driver.wait()
        start = time.monotonic()
        while actors():
            time.sleep(0.05)
        seconds = time.monotonic() - start
        self.driver = self._start()
        return seconds

    def finish(self) -> None:
        """Waits for the end, and holds the outcome against that of a run without workers."""
        assert self.driver.wait() == 0
        self._cluster.shutdown()
        run_worker(
            self._within,
            trial_jobs(self._num_jobs),
            CONFIG,
            worker=EngineWorker(FakeEngine(a_pass=1)),
        )
        (files, rows), (own_files, own_rows) = outcome(self._root), outcome(self._within)
        assert files.keys() == own_files.keys()
        different = [name for name in files if files[name] != own_files[name]]
        known = {"worker", "node"}
        told = [{k: v for k, v in row.items() if k not in known} for row in rows]
        expected = [{k: v for k, v in row.items() if k not in known} for row in own_rows]
        assert told == expected or different, "rows differ"
        workers = sorted({row["worker"] for row in rows})
        print(f"{len(rows)} rows by workers {workers}; {len(different)} files differ: {different}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=600)
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--driver", help="Address of the cluster; used by the trial itself.")
    args = parser.parse_args()
    if args.driver is not None:
        drive(args.folder / "cluster", args.driver, args.jobs, args.step)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    trial = Trial(args.folder, args.jobs, args.step)
    print(f"killed {trial.kill_workers(args.kills)} workers")
    if trial.driver.poll() is None:
        trial.lose_node()
        print("killed a node, added one")
    if trial.driver.poll() is None:
        print(f"killed the driver; its workers were gone after {trial.kill_driver():.1f} s")
    trial.finish()


if __name__ == "__main__":
    main()
