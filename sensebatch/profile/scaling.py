"""Times the same jobs on one GPU and on several: a developer's tool.

    python -m sensebatch.profile.scaling outputs/scaling --workers 1,2 --mode full --mode balanced

Makes each run in a process of its own, reads what its log says, and watches the memory and the
processor time of all processes that belong to it. What each of them held at the run's peak is in
NAME.memory.md beside its folder. `--workers 0` stands for a run in one process,
without Ray; `--cpu` gives the workers no GPU. Rows of earlier calls with the same folder stay.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

import sensebatch
from sensebatch.profile.host_memory import (
    WORKER,
    ProcessMemory,
    look,
    memory_table,
    shared_weights,
)
from sensebatch.profile.suites import (
    Case,
    Scale,
    Suite,
    suite_cases,
    write_manifest,
)
from sensebatch.report.timeline import Batch, timeline
from sensebatch.resolutions import Resolution
from sensebatch.store.columns import arrow_schema
from sensebatch.store.files import unused, write_atomic
from sensebatch.store.log import read_log
from sensebatch.store.run_dir import RunDir
from sensebatch.units import GIB

PARQUET_NAME = "scaling.parquet"
PLOT_NAME = "scaling.png"
LOOK_S = 0.5
"""Seconds between two looks at the processor time of the driver."""
MEMORY_S = 3.0
"""Seconds between two looks at memory, for which the system walks every page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of a run; figures are None where it did not get so far."""

    jobs: str
    """`t2i`, or `night` for a mixed manifest."""
    workers: int
    """0 for a run in one process."""
    vram_mode: str
    killed: bool
    """Whether a worker was killed on the way."""
    exit_code: int
    model: str
    device: str | None = None
    width: int
    height: int
    num_steps: int
    cfg_scale: float
    num_jobs: int
    images: int | None = None
    load_s: float | None = None
    """Seconds to load the model, of the slowest worker."""
    first_batch_s: tuple[float, ...] = ()
    """From the start of the command to the first denoising step, of each worker."""
    elapsed_s: float | None = None
    """From the start of the first batch to the end of the last one on any GPU."""
    images_per_s: float | None = None
    idle_share: tuple[float, ...] = ()
    """The part of that in which each worker had no batch."""
    wait_share: float | None = None
    """The part in which the GPUs waited between two batches."""
    tail_s: float | None = None
    """From the moment the first worker had nothing left to the end."""
    host_bytes: int | None = None
    """Most memory of all processes together, shared pages counted once."""
    worker_bytes: int | None = None
    """The same of the workers alone."""
    shared_bytes: int | None = None
    """How much of both is the copy of the weights that workers share."""
    driver_cpu_share: float | None = None
    """Processor time of the driver by `elapsed_s`; 1 is a core."""
    sha256: str | None = None
    """The hash of the hashes of all images, by job."""
    torch_version: str | None = None
    sensebatch_version: str
    started_at: datetime
    command: str

    @property
    def besides_bytes(self) -> int | None:
        """What all processes took besides the copy of the weights that workers share."""
        if self.host_bytes is None or self.shared_bytes is None:
            return None
        return self.host_bytes - self.shared_bytes


SCHEMA = arrow_schema(Row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run."""

    case: Case
    scale: Scale
    workers: int
    vram_mode: str
    on_cpu: bool
    kill: bool

    @property
    def options(self) -> list[str]:
        """What is typed for it."""
        words = ["--model", self.scale.model, "--vram-mode", self.vram_mode]
        words += ["--device", "cpu"] if self.on_cpu else []
        if self.workers and self.on_cpu:
            words += ["--workers", str(self.workers)]
        elif self.workers:
            words += ["--gpus", ",".join(map(str, range(self.workers)))]
        return words


class Watch:
    """Looks at a run's processes until it ends.

    Args:
        process: The run's own.
        images: Where its images appear.
        kill_after: A worker is killed once there are so many of them; None kills none.
    """

    def __init__(self, process: subprocess.Popen[bytes], images: Path, kill_after: int | None):
        self._process = process
        self._images = images
        self._kill_after = kill_after
        self.cpu: list[tuple[float, float]] = []
        """Seconds since the epoch, and the driver's processor time until then."""
        self.peak: list[ProcessMemory] = []
        """What each process held when all together held the most."""
        self.worker_bytes = 0
        self.killed = False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Waits until the run has ended."""
        self._thread.join()

    def cpu_seconds(self, start: float, end: float) -> float | None:
        """Returns the driver's processor time between two moments, as far as it was seen."""
        seen = [(at, used) for at, used in self.cpu if start <= at <= end]
        if len(seen) < 2:
            return None
        (first, before), (last, after) = seen[0], seen[-1]
        return (after - before) / (last - first) * (end - start)

    def _look(self) -> None:
        driver = psutil.Process(self._process.pid)
        memory_at = 0.0
        while self._process.poll() is None:
            with suppress(psutil.Error, OSError):
                times = driver.cpu_times()
                self.cpu.append((time.time(), times.user + times.system))
                if time.monotonic() >= memory_at:
                    self._measure(driver)
                    memory_at = time.monotonic() + MEMORY_S
                self._kill(driver)
            time.sleep(LOOK_S)

    def _measure(self, driver: psutil.Process) -> None:
        found = look([driver, *driver.children(recursive=True)])
        if _share(found) > self.host_bytes:
            self.peak = found
        workers = (process for process in found if process.is_worker)
        self.worker_bytes = max(self.worker_bytes, _share(workers))

    @property
    def host_bytes(self) -> int:
        """Most memory of all processes together."""
        return _share(self.peak)

    def _kill(self, driver: psutil.Process) -> None:
        if self.killed or self._kill_after is None:
            return
        if sum(path.is_file() for path in self._images.rglob("*")) >= self._kill_after:
            # None where the last worker has ended meanwhile.
            for worker in filter(_is_worker, driver.children(recursive=True)):
                os.kill(worker.pid, signal.SIGKILL)
                self.killed = True
                return


def _is_worker(process: psutil.Process) -> bool:
    return any(word.startswith(WORKER) for word in process.cmdline()[:1])


def _share(processes: Iterable[ProcessMemory]) -> int:
    return sum(process.pss_bytes for process in processes)


def run_trial(trial: Trial, folder: Path) -> tuple[Row, str]:
    """Makes a run; returns what became of it, and a table of what its processes held at most."""
    case = trial.case
    manifest = write_manifest(case, trial.scale, folder / "manifests")
    name = f"{case.what}-{trial.vram_mode}-{trial.workers}{'-killed' if trial.kill else ''}"
    root = unused(folder / name)
    words = ["run", str(manifest), *trial.options, "--output-dir", str(root), "--json"]
    row = _begun(trial, shlex.join(["sensebatch", *words]))
    with root.with_name(f"{root.name}.stderr.txt").open("wb") as said:
        command = [sys.executable, "-m", "sensebatch", *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        watch = Watch(process, RunDir(root).images, case.num_jobs // 4 if trial.kill else None)
        row = replace(row, exit_code=process.wait())
        watch.end()
    memory = memory_table(watch.peak)
    root.with_name(f"{root.name}.memory.md").write_text(f"{memory}\n")
    log = RunDir(root).log
    row = replace(row, killed=watch.killed)
    return with_figures(row, read_log(log), watch) if log.exists() else row, memory


def _begun(trial: Trial, command: str) -> Row:
    case, scale = trial.case, trial.scale
    return Row(
        jobs="night" if case.parts else "t2i",
        workers=trial.workers,
        vram_mode=trial.vram_mode,
        killed=False,
        exit_code=0,
        model=scale.model,
        width=case.resolution.width,
        height=case.resolution.height,
        num_steps=scale.num_steps,
        cfg_scale=scale.cfg_scale,
        num_jobs=case.num_jobs,
        sensebatch_version=sensebatch.__version__,
        started_at=datetime.now(UTC),
        command=command,
    )


def with_figures(row: Row, log: pa.Table, watch: Watch) -> Row:
    """Returns a row with the figures of a run's log, and of who watched it."""
    batches = timeline(log)
    if not batches:
        return row
    start = min(batch.start_s for batch in batches)
    end = max(_end(batch) for batch in batches)
    own = {w: [b for b in batches if b.worker == w] for w in sorted({b.worker for b in batches})}
    begun_at = pc.min(log["started_at"]).as_py().replace(tzinfo=UTC)
    zero = begun_at.timestamp() - start
    launched = zero - row.started_at.timestamp()
    cpu = watch.cpu_seconds(zero + start, zero + end)
    elapsed = end - start
    images = sum(batch.images for batch in batches)
    waited = [batch.wait_s for batch in batches if batch.wait_s is not None]
    first = log.slice(0, 1).to_pylist()[0]
    return replace(
        row,
        device=first["device"],
        torch_version=first["torch_version"],
        images=images,
        load_s=pc.max(log["load_s"]).as_py(),
        first_batch_s=tuple(
            launched + mine[0].start_s + mine[0].prefill_s + mine[0].think_s
            for mine in own.values()
        ),
        elapsed_s=elapsed,
        images_per_s=images / elapsed,
        idle_share=tuple(
            1 - sum(batch.total_s for batch in mine) / elapsed for mine in own.values()
        ),
        wait_share=sum(waited) / (sum(waited) + sum(batch.total_s for batch in batches)),
        tail_s=end - min(_end(mine[-1]) for mine in own.values()),
        host_bytes=watch.host_bytes,
        worker_bytes=watch.worker_bytes,
        shared_bytes=shared_weights(watch.peak),
        driver_cpu_share=None if cpu is None else cpu / elapsed,
        sha256=images_hash(log),
    )


def _end(batch: Batch) -> float:
    return batch.start_s + batch.total_s


def images_hash(log: pa.Table) -> str:
    """Returns one hash of the images of all jobs that are done."""
    rows = log.filter(pc.field("status") == "done").to_pylist()
    images = sorted((row["job_id"], row["image_sha256"]) for row in rows)
    return hashlib.sha256(repr(images).encode()).hexdigest()


def format_rows(rows: Sequence[Row]) -> str:
    """Returns a Markdown table; speeds and bytes are compared with the fewest workers'."""
    names = "jobs, mode, workers, images/s, times, same bytes, idle %, waited %, tail s"
    names += ", first step s, host GiB, besides shared weights, workers GiB, driver cores"
    titles = names.split(", ")
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * 2}{' ---: |' * (len(titles) - 2)}"]
    for row in rows:
        base = baseline(row, rows)
        cells = [
            f"{row.jobs} {row.width}x{row.height}",
            row.vram_mode,
            f"{row.workers or 'in process'}{', one killed' if row.killed else ''}",
            _figure(row.images_per_s, 3),
            _ratio(row.images_per_s, base.images_per_s),
            "yes" if row.sha256 == base.sha256 and row.exit_code == 0 else "NO",
            ", ".join(f"{100 * share:.1f}" for share in row.idle_share),
            _figure(row.wait_share and 100 * row.wait_share, 2),
            _figure(row.tail_s, 1),
            ", ".join(f"{seconds:.1f}" for seconds in row.first_batch_s),
            _figure(row.host_bytes and row.host_bytes / GIB, 2),
            _figure(row.besides_bytes and row.besides_bytes / GIB, 2),
            _figure(row.worker_bytes and row.worker_bytes / GIB, 2),
            _figure(row.driver_cpu_share, 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def baseline(row: Row, rows: Sequence[Row]) -> Row:
    """Returns the run of the same jobs with the fewest workers that are processes of their own.

    A run in one process stands for them where there is no other.
    """
    same = ("jobs", "model", "device", "width", "height", "num_steps", "cfg_scale", "num_jobs")
    found = [
        other
        for other in rows
        if other.vram_mode == row.vram_mode
        and all(getattr(other, name) == getattr(row, name) for name in same)
    ]
    return min(found, key=lambda other: (other.workers == 0, other.workers))


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.3f}"


def read_rows(folder: Path) -> list[Row]:
    """Returns the rows of earlier calls."""
    path = folder / PARQUET_NAME
    if not path.exists():
        return []
    names = {column.name for column in fields(Row)}
    return [
        Row(**{name: value for name, value in row.items() if name in names})
        for row in pq.read_table(path).to_pylist()
    ]


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Replaces the rows of a folder."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), sink)
    write_atomic(folder / PARQUET_NAME, sink.getvalue().to_pybytes())


def plot(folder: Path, rows: Sequence[Row]) -> None:
    """Draws speed against workers, if matplotlib is installed: a line for each kind of run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in speeds(rows).items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    most = max((row.workers for row in rows), default=1)
    axes.plot([1, most], [1, most], color="grey", linestyle=":", label="as many times")
    axes.set_xticks(range(1, most + 1))
    axes.set_xlabel("workers")
    axes.set_ylabel("images a second, by those of one worker")
    axes.legend()
    figure.savefig(folder / PLOT_NAME, dpi=150)


def speeds(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Returns (workers, images a second by those of one) for jobs that several numbers have run."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        base = baseline(row, rows)
        if row.images_per_s and base.images_per_s and base.workers == 1 and not row.killed:
            name = f"{row.jobs} {row.width}x{row.height}, {row.vram_mode}"
            lines.setdefault(name, {})[row.workers] = row.images_per_s / base.images_per_s
    return {
        name: sorted((workers, times) for workers, times in line.items() if workers)
        for name, line in lines.items()
    }


def trials(
    case: Case, scale: Scale, workers: Sequence[int], modes: Sequence[str], **options: Any
) -> list[Trial]:
    """Returns a run for each mode and number of workers."""
    return [
        Trial(case=case, scale=scale, workers=count, vram_mode=mode, **options)
        for mode in modes
        for count in workers
    ]


def main(
    folder: Annotated[Path, typer.Argument(help="Where runs and figures go.")],
    workers: Annotated[str, typer.Option(help="Numbers of workers; 0 is one process.")] = "0,1,2",
    mode: Annotated[list[str] | None, typer.Option(help="Memory modes.")] = None,
    jobs: Annotated[int, typer.Option(help="Jobs of a run.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 16,
    side: Annotated[int, typer.Option(help="Pixels of a side.")] = 2048,
    cfg_scale: Annotated[float, typer.Option(help="Guidance; 1 for none.")] = 4.0,
    model: Annotated[str, typer.Option(help="As for `sensebatch run`.")] = "synthetic:8b",
    night: Annotated[bool, typer.Option(help="40 mixed jobs in place of t2i.")] = False,
    text_tokens: Annotated[int, typer.Option(help="Of a thought, with --night.")] = 60,
    kill: Annotated[bool, typer.Option(help="Kill a worker after a quarter.")] = False,
    cpu: Annotated[bool, typer.Option(help="Workers without a GPU.")] = False,
) -> None:
    """Prints how a run's speed grows with its workers."""
    size = Resolution(height=side, width=side)
    scale = Scale(
        model=model,
        num_steps=steps,
        num_jobs=jobs,
        resolution=size,
        cfg_scale=cfg_scale,
        text_tokens=text_tokens,
    )
    (case, *_) = suite_cases(Suite.NIGHT if night else Suite.MODES, scale)
    counts = [int(word) for word in workers.split(",")]
    folder.mkdir(parents=True, exist_ok=True)
    for trial in trials(case, scale, counts, mode or ["full"], on_cpu=cpu, kill=kill):
        row, memory = run_trial(trial, folder)
        rows = [*read_rows(folder), row]
        write_rows(folder, rows)
        print(format_rows(rows).splitlines()[-1], memory, sep="\n\n", end="\n\n", flush=True)
    rows = read_rows(folder)
    plot(folder, rows)
    print(format_rows(rows))
    raise typer.Exit(int(any(row.exit_code for row in rows)))


if __name__ == "__main__":
    typer.run(main)
