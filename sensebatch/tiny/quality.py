"""How near fewer evaluations come to the converged image: `python -m sensebatch.tiny.quality`.

Draws held-out examples with every solver and schedule at several numbers of steps, and measures how
far each image is from the one that the same flow converges to, and how often the checker finds it
right. docs/quality.md has the figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sensebatch.config import PRESETS, TINY_MODEL, converged_timesteps
from sensebatch.contract import Engine
from sensebatch.jobs import Solver
from sensebatch.report.distance import psnr, ssim
from sensebatch.tiny.evaluate import (
    answer_examples,
    example_job,
    held_out_examples,
    open_engine,
    run_config,
)
from sensebatch.tiny.scores import Answer, score

RIGHT = {"t2i": "exact", "edit": "both", "interleave": "content"}
"""The score of each kind that says whether a whole answer is right."""
GUIDANCE = (2.0, 4.0, 7.0)
NUM_STEPS = (8, 12, 16, 20, 25, 33, 50)
METHODS: Mapping[str, Mapping[str, Any]] = {
    "euler, shift 3": {"solver": Solver.EULER, "timestep_shift": 3.0},
    "euler, shift 1": {"solver": Solver.EULER, "timestep_shift": 1.0},
    "ab2, shift 3": {"solver": Solver.AB2, "timestep_shift": 3.0},
    "ab2, shift 1": {"solver": Solver.AB2, "timestep_shift": 1.0},
    "dpm2m, shift 3": {"solver": Solver.DPM2M, "timestep_shift": 3.0},
    "dpm2m, shift 1": {"solver": Solver.DPM2M, "timestep_shift": 1.0},
    "ab2, shift 1, stride 2": {
        "solver": Solver.AB2,
        "timestep_shift": 1.0,
        "guidance_stride": 2,
    },
}
"""The ways to take steps, each measured at every number of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one way to take steps came to."""

    kind: str
    """`t2i`, `edit` or `interleave`."""
    cfg_scale: float
    method: str
    num_steps: int
    evaluations: int
    """Of the network, for each image."""
    psnr_db: float
    """Mean over images, to the converged image."""
    ssim: float
    """Likewise."""
    right: float
    """Share of whole answers that the checker finds right."""
    compared: int
    """Images that were compared. Stories that were told in other words are left out."""


class Measurement:
    """Draws one kind of examples under one guidance scale.

    Args:
        engine: The checkpoint, loaded.
        kind: A key of `RIGHT`.
        cfg_scale: Guidance towards the prompt.
        count: Examples.
        converged_steps: Steps of the images that all others are compared with.
        device: Where the engine computes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        kind: str,
        cfg_scale: float,
        count: int,
        converged_steps: int,
        device: str,
    ) -> None:
        self._engine = engine
        self._kind = kind
        self._cfg_scale = cfg_scale
        self._device = device
        # Settings are chosen on these; reported scores are of others.
        self._examples = held_out_examples(kind, count, first=5000, square=True)
        steps = converged_timesteps(converged_steps)
        self._converged = self._answers(
            {"timesteps": steps, "num_steps": len(steps) + 1, "timestep_shift": 1.0}
        )

    def _answers(self, settings: Mapping[str, Any]) -> list[Answer]:
        sampling = {"cfg_scale": self._cfg_scale, **settings}
        config = run_config(device=self._device, sampling=sampling)
        return answer_examples(self._engine, self._examples, config)

    def _evaluations(self, settings: Mapping[str, Any]) -> int:
        config = run_config(
            device=self._device, sampling={"cfg_scale": self._cfg_scale, **settings}
        )
        (example, *_) = self._examples
        drawing = example_job(example, 0, config.tasks[example.task].sampling).drawing
        assert drawing is not None
        return drawing.num_evaluations

    def point(self, method: str, settings: Mapping[str, Any]) -> Point:
        """Returns what a way to take steps comes to.

        Args:
            method: Its name.
            settings: Among `config.SCHEDULE_SETTINGS`.
        """
        answers = self._answers(settings)
        pairs = [
            (image, converged)
            for answer, other in zip(answers, self._converged, strict=True)
            if answer.text == other.text
            for image, converged in zip(answer.images, other.images, strict=True)
        ]
        scores = score(self._kind, self._examples, answers)
        return Point(
            kind=self._kind,
            cfg_scale=self._cfg_scale,
            method=method,
            num_steps=settings["num_steps"],
            evaluations=self._evaluations(settings),
            psnr_db=float(np.mean([psnr(*pair) for pair in pairs])),
            ssim=float(np.mean([ssim(*pair) for pair in pairs])),
            right=scores.rate(RIGHT[self._kind]),
            compared=len(pairs),
        )


def ways(num_steps: Sequence[int]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (name, settings) of every way to take steps: the methods, then the presets."""
    for method, settings in METHODS.items():
        for steps in num_steps:
            yield method, {**settings, "num_steps": steps}
    for quality, settings in PRESETS.items():
        yield f"quality {quality}", settings


def table(points: Sequence[Point]) -> str:
    """Returns the points as a Markdown table."""
    lines = [
        "| kind | guidance | method | steps | evaluations | PSNR dB | SSIM | right |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {p.kind} | {p.cfg_scale:g} | {p.method} | {p.num_steps} | {p.evaluations} "
        f"| {p.psnr_db:.1f} | {p.ssim:.4f} | {100 * p.right:.1f} % |"
        for p in points
    ]
    return "\n".join(lines) + "\n"


def plot(points: Sequence[Point], path: Path) -> None:
    """Draws the distance by evaluations, a panel for each kind and guidance scale."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(point.kind for point in points))
    scales = sorted({point.cfg_scale for point in points})
    figure = Figure(figsize=(4.2 * len(scales), 3.2 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(scales), squeeze=False, sharex=True)
    for row, kind in zip(axes, kinds, strict=True):
        for panel, scale in zip(row, scales, strict=True):
            own = [point for point in points if (point.kind, point.cfg_scale) == (kind, scale)]
            for method in METHODS:
                line = [point for point in own if point.method == method]
                x, y = [p.evaluations for p in line], [p.psnr_db for p in line]
                panel.plot(x, y, marker="o", markersize=3, linewidth=1, label=method)
            exact = next(point for point in own if point.method == "quality exact")
            panel.axhline(exact.psnr_db, color="black", linewidth=0.8, linestyle="--")
            panel.set_title(f"{kind}, guidance {scale:g}", fontsize=9)
            panel.tick_params(labelsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("evaluations of the network an image", fontsize=8)
    for row in axes:
        row[0].set_ylabel("PSNR to the converged image, dB", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(
    out: Annotated[Path, typer.Option(help="Folder for quality.json, .md and .png.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, or tiny.")] = TINY_MODEL,
    count: Annotated[int, typer.Option(help="Examples of each kind.")] = 48,
    converged_steps: Annotated[int, typer.Option(help="Steps of the converged images.")] = 400,
    kinds: Annotated[str, typer.Option(help="Which, with commas between them.")] = ",".join(RIGHT),
    num_steps: Annotated[str, typer.Option(help="Which, likewise.")] = ",".join(
        map(str, NUM_STEPS)
    ),
    guidance: Annotated[str, typer.Option(help="Which scales, likewise.")] = ",".join(
        map("{:g}".format, GUIDANCE)
    ),
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Measures how near every way to take steps comes to the converged image."""
    engine = open_engine(model, run_config(device=device, sampling={}))
    out.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    for kind in kinds.split(","):
        for scale in map(float, guidance.split(",")):
            measurement = Measurement(
                engine,
                kind=kind,
                cfg_scale=scale,
                count=count,
                converged_steps=converged_steps,
                device=device,
            )
            for method, settings in ways([int(steps) for steps in num_steps.split(",")]):
                points.append(measurement.point(method, settings))
                print(table(points[-1:]).splitlines()[-1], flush=True)
            # What there is so far: a run may be stopped.
            content = json.dumps([asdict(point) for point in points], indent=1)
            (out / "quality.json").write_text(content + "\n", encoding="utf-8")
            (out / "quality.md").write_text(table(points), encoding="utf-8")
    try:
        plot(points, out / "quality.png")
    except ImportError:
        print('no plot: matplotlib is not installed (pip install "sensebatch[profile]")')


if __name__ == "__main__":
    typer.run(main)
