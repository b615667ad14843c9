"""Finds the steps that suit a checkpoint and prompts: the runs of `sensebatch calibrate`.

Half of the jobs are drawn converged while their velocities are recorded, which says where steps
are worth most; the other half is drawn with what was found, with every preset, and
decides. All images come from two ordinary runs, which resume as every run does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sensebatch.calibrate.search import best_timesteps
from sensebatch.calibrate.trace import TracingBackend, read_trace
from sensebatch.config import NEUTRAL, PRESETS, SCHEDULE_SETTINGS, RunConfig, converged_timesteps
from sensebatch.errors import ConfigError
from sensebatch.jobs import Job, Quality, Solver
from sensebatch.loading import Backend, TorchBackend
from sensebatch.report.distance import psnr, ssim
from sensebatch.session import Request
from sensebatch.store.finished import FinishedJob, finished_jobs
from sensebatch.tasks import Output, Task

AS_IT_IS = "as it is"
"""The variant with the steps that the jobs themselves ask for."""
_RECORDED, _JUDGED = "converged", "judged"
LAYER_STRIDE = 3
"""The stride for which timesteps are found, besides those of steps that evaluate every layer."""

RunJobs = Callable[[Request, Backend], bool]
"""Runs what is missing in a folder; returns whether all of it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is drawn."""

    max_jobs: int = 8
    """Jobs of each task, half of which decide."""
    num_steps: tuple[int, ...] = (25, 16)
    """Numbers of steps to find the timesteps of."""
    converged_steps: int = 128
    """Steps of a converged image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to take steps, measured on the images that decide."""

    name: str
    settings: Mapping[str, Any]
    """Among `config.SCHEDULE_SETTINGS`."""
    evaluations: int
    """How often the network is evaluated for one image; without the middle layers it counts as a
    third."""
    steps: float
    """Steps of every layer that take as long."""
    psnr_db: float
    """Mean over the images, to the converged ones."""
    ssim: float
    """Likewise."""
    image_s: float
    """Seconds for each image, prompts included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Searched:
    """Steps whose timesteps are found."""

    name: str
    num_steps: int
    solver: Solver = Solver.EULER
    layer_stride: int = 1

    def settings(self, timesteps: tuple[float, ...]) -> dict[str, Any]:
        """Returns them as settings, with these timesteps."""
        strides = {"layer_stride": self.layer_stride}
        return {"solver": self.solver, **_explicit(timesteps), **strides}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a task."""

    task: Task
    num_judged: int
    """Images that decided."""
    variants: tuple[Variant, ...]
    sheet: tuple[tuple[Image.Image, str], ...]
    """The first job that decided, drawn in every way, converged first."""

    @property
    def base(self) -> Variant:
        """The steps that the jobs themselves ask for."""
        return next(variant for variant in self.variants if variant.name == AS_IT_IS)

    def best(self, num_steps: int) -> Variant:
        """Returns the variant that comes nearest to converged images and takes no longer than so
        many steps of every layer."""
        allowed = [variant for variant in self.variants if variant.steps <= num_steps]
        return max(allowed, key=lambda variant: variant.psnr_db)


def chosen_jobs(jobs: Sequence[Job], scale: Scale) -> dict[Task, list[Job]]:
    """Returns the jobs to calibrate with, by task: those of the size that most jobs have.

    Jobs that start from images of other jobs are left out, since those would have to be drawn
    first, and tries count as jobs like any other.

    Raises:
        ConfigError: No task that makes one image has two jobs of one size.
    """
    chosen = {}
    for task in Task:
        if task.spec.output is not Output.IMAGE:
            continue
        by_size: dict[Any, list[Job]] = {}
        for job in jobs:
            if job.task is task and not job.level:
                by_size.setdefault((job.resolution, job.think), []).append(job)
        largest = max(by_size.values(), key=len, default=[])
        if len(largest) >= 2:
            chosen[task] = largest[: scale.max_jobs]
    if not chosen:
        raise ConfigError(
            "manifest: expected at least two t2i or two edit jobs of one size, to find the steps "
            "with one half and judge them by the other, found none"
        )
    return chosen


class Calibration:
    """Draws, searches and judges.

    Args:
        folder: Receives the runs.
        config: Model and memory.
        scale: How much is drawn.
        run_jobs: Runs what is missing in a folder.
        backend: Computes; torch if None.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        scale: Scale,
        *,
        run_jobs: RunJobs,
        backend: Backend | None = None,
    ) -> None:
        self._folder = folder
        self._config = config
        self._scale = scale
        self._run_jobs = run_jobs
        self._backend = TorchBackend() if backend is None else backend

    def calibrate(self, jobs: Sequence[Job]) -> list[Verdict] | None:
        """Returns a verdict for each task; None if a run was stopped or some of its jobs failed.

        Args:
            jobs: Those of a manifest.

        Raises:
            ConfigError: There are too few of them.
        """
        chosen = chosen_jobs(jobs, self._scale)
        converged = self._converged
        fitted = {task: of_task[0::2] for task, of_task in chosen.items()}
        judged = {task: of_task[1::2] for task, of_task in chosen.items()}
        for task, of_task in fitted.items():
            root = self._folder / _RECORDED / task
            backend = TracingBackend(self._backend, root / "velocities")
            if not self._run(root, [_variant(job, "", converged) for job in of_task], backend):
                return None
        ways = {task: self._ways(task, of_task) for task, of_task in fitted.items()}
        root = self._folder / _JUDGED
        all_jobs = [
            _variant(job, name, settings)
            for task, of_task in judged.items()
            for name, settings in {_RECORDED: converged, **ways[task]}.items()
            for job in of_task
        ]
        if not self._run(root, all_jobs, self._backend):
            return None
        finished = {done.job.id: done for done in finished_jobs(root)}
        return [_verdict(task, judged[task], ways[task], finished) for task in chosen]

    def _ways(self, task: Task, jobs: Sequence[Job]) -> dict[str, Mapping[str, Any]]:
        """Returns every way to take steps that is judged, by name, as the record of jobs says."""
        ways = _known_ways(jobs)
        folder = self._folder / _RECORDED / task / "velocities"
        timesteps = converged_timesteps(self._scale.converged_steps)
        trace = read_trace(folder, timesteps, [job.id for job in jobs])
        for searched in self._searched(jobs[0]):
            timesteps = best_timesteps(trace, searched.num_steps, searched.solver)
            ways[searched.name] = searched.settings(timesteps)
        return ways

    def _searched(self, job: Job) -> list[_Searched]:
        """Returns what timesteps are found for."""
        found = []
        for steps in self._scale.num_steps:
            found += [
                _Searched(name=f"found, {solver}, {steps}", num_steps=steps, solver=solver)
                for solver in (Solver.EULER, Solver.AB2)
            ]
            more = _most_steps(job, steps)
            if more > steps:
                name = f"found, euler, {more}, layers {LAYER_STRIDE}"
                layers = _Searched(name=name, num_steps=more, layer_stride=LAYER_STRIDE)
                found.append(layers)
        return found

    @property
    def _converged(self) -> Mapping[str, Any]:
        """The steps of converged images."""
        steps = converged_timesteps(self._scale.converged_steps)
        return {"solver": Solver.AB2, **_explicit(steps)}

    def evaluations(self, jobs: Sequence[Job]) -> dict[Task, int]:
        """Returns how often the network is evaluated for the jobs of each task.

        Args:
            jobs: Those of a manifest.

        Raises:
            ConfigError: There are too few of them.
        """
        found = {}
        for task, of_task in chosen_jobs(jobs, self._scale).items():
            each = [*_known_ways(of_task).values()]
            for searched in self._searched(of_task[0]):
                # Whatever they will be: their number decides.
                steps = searched.num_steps
                each.append(searched.settings(tuple(step / steps for step in range(1, steps))))
            converged = [_evaluations(_variant(job, "", self._converged)) for job in of_task]
            judged = of_task[1::2]
            others = [_evaluations(_variant(job, "", way)) for job in judged for way in each]
            found[task] = sum(converged) + sum(others)
        return found

    def _run(self, root: Path, jobs: Sequence[Job], backend: Backend) -> bool:
        request = Request(
            root=root, config=self._config, sources=("calibration",), jobs=lambda: iter(jobs)
        )
        return self._run_jobs(request, backend)


def _known_ways(jobs: Sequence[Job]) -> dict[str, Mapping[str, Any]]:
    """Returns the ways to take steps that there are without a search, by name."""
    ways: dict[str, Mapping[str, Any]] = {AS_IT_IS: _steps_of(jobs[0])}
    for quality in (Quality.EXACT, Quality.HIGH, Quality.FAST):
        ways[f"quality {quality}"] = {**NEUTRAL, **PRESETS[quality]}
    return ways


def _explicit(timesteps: tuple[float, ...]) -> dict[str, Any]:
    return {
        **NEUTRAL,
        "timesteps": timesteps,
        "num_steps": len(timesteps) + 1,
        "timestep_shift": 1.0,
    }


def _steps_of(job: Job) -> dict[str, Any]:
    return {name: getattr(job.sampling, name) for name in SCHEDULE_SETTINGS}


def _variant(job: Job, name: str, settings: Mapping[str, Any]) -> Job:
    """Returns a job with other steps, under an id of its own."""
    return replace(
        job,
        id=_variant_id(job, name),
        sampling=replace(job.sampling, **settings),
        matrix={},
        attempt_at=None,
    )


def _variant_id(job: Job, name: str) -> str:
    slug = name.replace(", ", "-").replace(" ", "-")
    return f"{job.id}--{slug}" if slug else job.id


def _verdict(
    task: Task,
    jobs: Sequence[Job],
    ways: Mapping[str, Mapping[str, Any]],
    finished: Mapping[str, FinishedJob],
) -> Verdict:
    """Measures every way on the images that decide."""

    def images(name: str) -> list[Image.Image]:
        return [finished[_variant_id(job, name)].open_images()[0] for job in jobs]

    converged = images(_RECORDED)
    truth = [np.asarray(image) for image in converged]
    sheet, variants = [(converged[0], "converged")], []
    for name, settings in ways.items():
        drawn = images(name)
        pairs = [(np.asarray(one), other) for one, other in zip(drawn, truth, strict=True)]
        variant = Variant(
            name=name,
            settings=settings,
            evaluations=_evaluations(_variant(jobs[0], name, settings)),
            steps=_whole_steps(_variant(jobs[0], name, settings)),
            psnr_db=float(np.mean([psnr(*pair) for pair in pairs])),
            ssim=float(np.mean([ssim(*pair) for pair in pairs])),
            image_s=_image_seconds([finished[_variant_id(job, name)] for job in jobs]),
        )
        variants.append(variant)
        caption = f"{name}: {variant.evaluations} evaluations, {variant.psnr_db:.1f} dB"
        sheet.append((drawn[0], caption))
    return Verdict(task=task, num_judged=len(jobs), variants=tuple(variants), sheet=tuple(sheet))


def _evaluations(job: Job) -> int:
    assert job.drawing is not None
    return round(job.drawing.cost)


def _whole_steps(job: Job) -> float:
    """Returns how many steps of every layer take as long as the job's."""
    assert job.drawing is not None
    return job.drawing.cost / len(job.drawing.branches)


def _most_steps(job: Job, num_steps: int) -> int:
    """Returns how many steps with `LAYER_STRIDE` take no longer than so many of every layer."""

    def takes(steps: int) -> float:
        settings = {**NEUTRAL, "num_steps": steps, "layer_stride": LAYER_STRIDE}
        return _whole_steps(_variant(job, "", settings))

    # No more than three times as many fit.
    return max(n for n in range(1, 3 * num_steps + 1) if takes(n) <= num_steps)


def _image_seconds(done: Sequence[FinishedJob]) -> float:
    """Returns the seconds of some jobs' batches by the images of these batches."""
    batches = {
        (done.row["session"], done.row["batch_id"], done.row["started_at"]): done.row
        for done in done
    }
    seconds = sum(row["total_s"] for row in batches.values())
    return seconds / sum(row["batch_size"] for row in batches.values())
