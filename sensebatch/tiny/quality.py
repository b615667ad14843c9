"""How near fewer evaluations come to the converged image: `python -m sensebatch.tiny.quality`.

Draws held-out examples with every solver and schedule at several numbers of steps, and measures how
far each image is from the one that the same flow converges to, and how often the checker finds it
right. Presets are chosen on some examples (`--first 5000`) and reported on others.
docs/quality.md has the figures.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

from sensebatch.config import PRESETS, TINY_MODEL, converged_timesteps
from sensebatch.contract import Engine
from sensebatch.jobs import Quality, Solver
from sensebatch.report.distance import psnr, ssim
from sensebatch.tiny.evaluate import (
    BATCH_SIZE,
    answer_examples,
    example_job,
    held_out_examples,
    open_engine,
    run_config,
)
from sensebatch.tiny.scores import Answer, score

RIGHT = {"t2i": "exact", "edit": "both", "interleave": "content"}
"""The score of each kind that says whether a whole answer is right."""
Z_95 = 1.96
"""Standard deviations from a mean to the ends of its 95 % confidence interval."""
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
    "euler, shift 1, layers 2": {
        "solver": Solver.EULER,
        "timestep_shift": 1.0,
        "layer_stride": 2,
    },
    "euler, shift 1, layers 3": {
        "solver": Solver.EULER,
        "timestep_shift": 1.0,
        "layer_stride": 3,
    },
}
"""The ways to take steps, each measured at every number of them."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one way to take steps came to."""

    kind: str
    """`t2i`, `edit` or `interleave`."""
    cfg_scale: float
    method: str
    num_steps: int
    evaluations: float
    """How often the network is evaluated for each image; without the middle layers it counts as a
    third."""
    psnrs_db: tuple[float | None, ...]
    """Distance of each example to the converged one, mean over its images. None for a story that
    was told in other words, and where no images are converged."""
    ssims: tuple[float | None, ...]
    """Likewise."""
    rights: tuple[bool, ...]
    """Whether the checker finds the whole answer right, of each example."""

    @property
    def right(self) -> float:
        """The share of the examples that are right."""
        return sum(self.rights) / len(self.rights)


Interval = tuple[float, float]
"""A mean, and how far the ends of its 95 % confidence interval are from it."""


def mean(values: Sequence[float | None]) -> Interval:
    """Returns the mean of some figures; NaN if there are none."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return math.nan, math.nan
    spread = float(known.std(ddof=1)) if len(known) > 1 else math.inf
    return float(known.mean()), Z_95 * spread / math.sqrt(len(known))


def difference(first: Sequence[float | None], second: Sequence[float | None]) -> Interval:
    """Returns the mean difference of pairs of the same examples."""
    pairs = zip(first, second, strict=True)
    return mean([None if a is None or b is None else a - b for a, b in pairs])


def share_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Returns the difference of two shares of the same examples.

    Source: Agresti and Min, Simple improved confidence intervals for comparing matched
    proportions, 2005: half a case more in each of the four cells, so that no interval is empty.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True)) + 0.5
    only_second = sum(b and not a for a, b in zip(first, second, strict=True)) + 0.5
    count, found = len(first) + 2, only_first - only_second
    variance = only_first + only_second - found**2 / count
    return found / count, Z_95 * math.sqrt(variance) / count


class Measurement:
    """Draws one kind of examples under one guidance scale.

    Args:
        engine: The checkpoint, loaded.
        kind: A key of `RIGHT`.
        cfg_scale: Guidance towards the prompt.
        count: Examples.
        first: Number of the first example.
        converged_steps: Steps of the images that all others are compared with; 0 for no distances.
        device: Where the engine computes.
        batch_size: The most examples drawn together.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        kind: str,
        cfg_scale: float,
        count: int,
        first: int,
        converged_steps: int,
        device: str,
        batch_size: int,
    ) -> None:
        self._engine = engine
        self._kind = kind
        self._cfg_scale = cfg_scale
        self._device = device
        self._batch_size = batch_size
        self._examples = held_out_examples(kind, count, first=first, square=True)
        self._converged: list[Answer] | list[None] = [None] * count
        if converged_steps:
            steps = converged_timesteps(converged_steps)
            self._converged = self._answers(
                {
                    "timesteps": steps,
                    "num_steps": len(steps) + 1,
                    "timestep_shift": 1.0,
                    "solver": Solver.AB2,
                }
            )

    def _answers(self, settings: Mapping[str, Any]) -> list[Answer]:
        sampling = {"cfg_scale": self._cfg_scale, **settings}
        config = run_config(device=self._device, sampling=sampling)
        return answer_examples(self._engine, self._examples, config, self._batch_size)

    def _evaluations(self, settings: Mapping[str, Any]) -> float:
        config = run_config(
            device=self._device, sampling={"cfg_scale": self._cfg_scale, **settings}
        )
        (example, *_) = self._examples
        drawing = example_job(example, 0, config.tasks[example.task].sampling).drawing
        assert drawing is not None
        return drawing.cost

    def point(self, method: str, settings: Mapping[str, Any]) -> Point:
        """Returns what a way to take steps comes to.

        Args:
            method: Its name.
            settings: Among `config.SCHEDULE_SETTINGS`.
        """
        answers = self._answers(settings)
        rights = [
            score(self._kind, [example], [answer]).rate(RIGHT[self._kind]) == 1
            for example, answer in zip(self._examples, answers, strict=True)
        ]
        return Point(
            kind=self._kind,
            cfg_scale=self._cfg_scale,
            method=method,
            num_steps=settings["num_steps"],
            evaluations=self._evaluations(settings),
            psnrs_db=self._distances(psnr, answers),
            ssims=self._distances(ssim, answers),
            rights=tuple(rights),
        )

    def _distances(
        self, distance: Callable[[np.ndarray, np.ndarray], float], answers: Sequence[Answer]
    ) -> tuple[float | None, ...]:
        return tuple(
            None
            if other is None or answer.text != other.text
            else round(float(np.mean([*map(distance, answer.images, other.images)])), 5)
            for answer, other in zip(answers, self._converged, strict=True)
        )


def ways(
    num_steps: Sequence[int], methods: Sequence[str] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (name, settings) of every way to take steps: the presets, then the methods.

    Args:
        num_steps: At which the methods are measured; none for the presets alone.
        methods: Which; all if there are none.
    """
    for quality, settings in PRESETS.items():
        yield f"quality {quality}", settings
    for method in methods or METHODS:
        for steps in num_steps:
            yield method, {**METHODS[method], "num_steps": steps}


def table(points: Sequence[Point]) -> str:
    """Returns the points as a Markdown table."""
    lines = [
        "| kind | guidance | method | steps | evaluations | PSNR dB | SSIM | right |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {p.kind} | {p.cfg_scale:g} | {p.method} | {p.num_steps} | {p.evaluations:.0f} "
        f"| {mean(p.psnrs_db)[0]:.1f} | {mean(p.ssims)[0]:.4f} | {100 * p.right:.1f} % |"
        for p in points
    ]
    return "\n".join(lines) + "\n"


def verdicts(points: Sequence[Point]) -> str:
    """Returns the presets beside the published sampler as a Markdown table."""
    lines = [
        "| kind | guidance | preset | compared | PSNR dB | beside exact | SSIM beside exact "
        "| right | beside exact, points |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    exact = {(p.kind, p.cfg_scale): p for p in points if p.method == f"quality {Quality.EXACT}"}
    for p in points:
        if p.method.startswith("quality "):
            other = exact[p.kind, p.cfg_scale]
            compared = sum(value is not None for value in p.psnrs_db)
            points_apart = tuple(100 * value for value in share_difference(p.rights, other.rights))
            cells = [
                _with_margin(mean(p.psnrs_db), 1),
                _with_margin(difference(p.psnrs_db, other.psnrs_db), 1),
                _with_margin(difference(p.ssims, other.ssims), 4),
                f"{100 * p.right:.1f} % of {len(p.rights)}",
                _with_margin((points_apart[0], points_apart[1]), 1),
            ]
            name = p.method.removeprefix("quality ")
            lines.append(
                f"| {p.kind} | {p.cfg_scale:g} | {name} | {compared} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def _with_margin(found: Interval, digits: int) -> str:
    return f"{found[0]:.{digits}f} ± {found[1]:.{digits}f}"


def draw_curves(points: Sequence[Point], path: Path) -> None:
    """Draws the distance by evaluations, a panel for each kind and guidance scale."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot: matplotlib is not installed (pip install "sensebatch[profile]")')
        return
    kinds = list(dict.fromkeys(point.kind for point in points))
    scales = sorted({point.cfg_scale for point in points})
    figure = Figure(figsize=(4.2 * len(scales), 3.2 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(scales), squeeze=False, sharex=True)
    for row, kind in zip(axes, kinds, strict=True):
        for panel, scale in zip(row, scales, strict=True):
            own = [point for point in points if (point.kind, point.cfg_scale) == (kind, scale)]
            for method in dict.fromkeys(p.method for p in own if p.method in METHODS):
                line = [point for point in own if point.method == method]
                x, y = [p.evaluations for p in line], [mean(p.psnrs_db)[0] for p in line]
                panel.plot(x, y, marker="o", markersize=3, linewidth=1, label=method)
            exact = next(point for point in own if point.method == "quality exact")
            panel.axhline(mean(exact.psnrs_db)[0], color="black", linewidth=0.8, linestyle="--")
            panel.set_title(f"{kind}, guidance {scale:g}", fontsize=9)
            panel.tick_params(labelsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("evaluations of the network an image", fontsize=8)
    for row in axes:
        row[0].set_ylabel("PSNR to the converged image, dB", fontsize=8)
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def main(
    out: Annotated[Path, typer.Option(help="Folder for quality.json, .md and .png.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, or tiny.")] = TINY_MODEL,
    count: Annotated[int, typer.Option(min=1, help="Examples of each kind.")] = 48,
    first: Annotated[int, typer.Option(help="Number of the first example.")] = 20_000,
    converged_steps: Annotated[
        int, typer.Option(help="Steps of the converged images; 0 to count right answers alone.")
    ] = 200,
    kinds: Annotated[str, typer.Option(help="Which, with commas between them.")] = ",".join(RIGHT),
    num_steps: Annotated[
        str, typer.Option(help="Which, likewise; empty for the presets alone.")
    ] = ",".join(map(str, NUM_STEPS)),
    guidance: Annotated[str, typer.Option(help="Which scales, likewise.")] = ",".join(
        map("{:g}".format, GUIDANCE)
    ),
    method: Annotated[
        list[str] | None, typer.Option(help="Only this one; repeat the option for more.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Examples drawn together.")] = BATCH_SIZE,
) -> None:
    """Measures how near every way to take steps comes to the converged image."""
    names = _known("kinds", kinds.split(","), RIGHT)
    methods = _known("method", method or [], METHODS)
    steps = _numbers("num-steps", num_steps.split(",") if num_steps else [], int, least=1)
    scales = _numbers("guidance", guidance.split(","), float, least=0)
    config = run_config(device=device, sampling={})
    engine = open_engine(model, replace(config, model=replace(config.model, dtype=dtype)))
    out.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    for kind, scale in itertools.product(names, scales):
        measurement = Measurement(
            engine,
            kind=kind,
            cfg_scale=scale,
            count=count,
            first=first,
            converged_steps=converged_steps,
            device=device,
            batch_size=batch_size,
        )
        for name, settings in ways(steps, methods):
            points.append(measurement.point(name, settings))
            print(table(points[-1:]).splitlines()[-1], flush=True)
            # What there is so far: a run may be stopped.
            write(points, out)
    print(verdicts(points), end="", flush=True)
    if converged_steps and steps:
        draw_curves(points, out / "quality.png")


def _known(option: str, names: list[str], known: Iterable[str]) -> list[str]:
    """Returns names; raises BadParameter for one that there is not."""
    if (unknown := next((name for name in names if name not in known), None)) is not None:
        words = ", ".join(map(repr, known))
        raise typer.BadParameter(f"--{option}: expected one of {words}, found {unknown!r}")
    return names


def _numbers(
    option: str, words: Sequence[str], kind: Callable[[str], Number], *, least: int
) -> list[Number]:
    """Returns words as numbers; raises BadParameter for what is none, or is too small."""
    try:
        numbers = [kind(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) < len(words) or not all(least <= number < math.inf for number in numbers):
        found = ",".join(words)
        raise typer.BadParameter(
            f"--{option}: expected numbers from {least} on with commas between them, "
            f"found {found!r}"
        )
    return numbers


def write(points: Sequence[Point], out: Path) -> None:
    """Writes points, with every example's figures, and their tables."""
    content = json.dumps([asdict(point) for point in points])
    (out / "quality.json").write_text(content + "\n", encoding="utf-8")
    text = f"{table(points)}\n{verdicts(points)}"
    (out / "quality.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
