"""Measures how a checkpoint judges its own drawings: `python -m sensebatch.tiny.judge MODEL`.

Held-out prompts are drawn well, in few steps, or in place of others; the checker says which
drawings match their prompts, and the checkpoint is asked the same.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from sensebatch.config import RunConfig
from sensebatch.contract import Engine
from sensebatch.jobs import InputImage, Job, Source
from sensebatch.tasks import Task
from sensebatch.tiny.evaluate import example_job, open_engine, run_config, run_jobs
from sensebatch.tiny.world.captions import describe_scene
from sensebatch.tiny.world.checker import read_image
from sensebatch.tiny.world.draw import draw_uint8
from sensebatch.tiny.world.examples import Example, text_to_image
from sensebatch.tiny.world.questions import JUDGEMENTS, spoil
from sensebatch.tiny.world.scene import Scene, Split, sample_resolution

FEW_STEPS = (1, 2, 3)
STRONG_GUIDANCE = 7.0
"""Guidance at which the embedded checkpoint makes mistakes of its own."""
STRONG = f"guidance {STRONG_GUIDANCE:g}"
CHOICES = ("yes", "no")
SEED = 77
"""Begins the numbers of the examples, so that they are not those of other scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A drawing and the prompt that it is judged by."""

    kind: str
    """How it was drawn, such as `8 steps` or `wrong prompt`; `clean, ...` if by the world."""
    prompt: str
    scene: Scene
    """What the prompt asks for."""
    image: np.ndarray
    """uint8 `[height, width, 3]`."""

    @property
    def matches(self) -> bool:
        """Whether the checker sees exactly what was asked for."""
        reading = read_image(self.image)
        return reading.shows(self.scene) and reading.background == self.scene.background


def drawn_cases(engine: Engine, config: RunConfig, count: int) -> list[Case]:
    """Returns drawings of an engine: of `count` prompts each way, and clean images of the same."""
    asked = [_example(number) for number in range(count)]
    rng = np.random.default_rng((SEED, count))
    wrong = [spoil(rng, example.images[0]) for example in asked]
    others = [
        replace(example, prompt=describe_scene(rng, scene), answer=(scene,))
        for example, scene in zip(asked, wrong, strict=True)
    ]
    own = config.tasks[Task.T2I].sampling.num_steps
    given = config.tasks[Task.T2I].sampling
    strong = replace(given, cfg_scale=STRONG_GUIDANCE)
    ways = [(f"{own} steps", asked, given), ("wrong prompt", others, given)]
    ways += [(f"{steps} steps", asked, replace(given, num_steps=steps)) for steps in FEW_STEPS]
    ways += [(STRONG, asked, strong)]
    cases = []
    for kind, drawn, sampling in ways:
        jobs = [example_job(example, number, sampling) for number, example in enumerate(drawn)]
        for example, made in zip(asked, run_jobs(engine, jobs, [()] * count), strict=True):
            cases.append(_case(kind, example, made.images[0]))
    for example, scene in zip(asked, wrong, strict=True):
        cases.append(_case("clean, right", example, draw_uint8(example.images[0])))
        cases.append(_case("clean, wrong", example, draw_uint8(scene)))
    return cases


def _example(number: int) -> Example:
    rng = np.random.default_rng((SEED, number))
    return text_to_image(rng, Split.HELD_OUT, sample_resolution(rng), think=False)


def _case(kind: str, example: Example, image: np.ndarray) -> Case:
    return Case(kind=kind, prompt=example.prompt, scene=example.images[0], image=image)


def chances(engine: Engine, config: RunConfig, cases: Sequence[Case]) -> list[float]:
    """Returns the probability of yes among yes and no that an engine gives each case."""
    sampling = replace(config.tasks[Task.ASK].sampling, choices=CHOICES)
    jobs, inputs = [], []
    for number, case in enumerate(cases):
        buffer = io.BytesIO()
        Image.fromarray(case.image).save(buffer, "PNG")
        height, width, _ = case.image.shape
        seen = InputImage(path=f"{number}.png", sha256="", height=height, width=width)
        jobs.append(
            Job(
                id=str(number),
                task=Task.ASK,
                prompt=JUDGEMENTS[0].format(case.prompt),
                images=(seen,),
                resolution=None,
                seed=0,
                think=False,
                sampling=sampling,
                source=Source(file="judge", row=str(number)),
            )
        )
        inputs.append([buffer.getvalue()])
    scores = [result.choice_log_probabilities for result in run_jobs(engine, jobs, inputs)]
    return [float(1 / (1 + np.exp(no - yes))) for yes, no in scores]


def auroc(right: Sequence[float], wrong: Sequence[float]) -> float | None:
    """Returns how often a right case has the higher score than a wrong one; ties count half."""
    if not right or not wrong:
        return None
    a, b = np.array(right)[:, None], np.array(wrong)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def judge(engine: Engine, config: RunConfig, count: int) -> dict[str, Any]:
    """Returns how well an engine judges drawings: its own, spoiled ones, and clean images."""
    cases = drawn_cases(engine, config, count)
    found = [
        (case.kind, case.matches, chance)
        for case, chance in zip(cases, chances(engine, config, cases), strict=True)
    ]

    def summary(kinds: Sequence[str]) -> dict[str, Any]:
        own = [(matches, chance) for kind, matches, chance in found if kind in kinds]
        right = [chance for matches, chance in own if matches]
        wrong = [chance for matches, chance in own if not matches]
        accepted = [matches for matches, chance in own if chance >= 0.5]
        return {
            "right": len(right),
            "wrong": len(wrong),
            "right_of_all": _rounded(len(right) / len(own)),
            "right_of_accepted": _rounded(np.mean(accepted) if accepted else None),
            "auroc": _rounded(auroc(right, wrong)),
            "agrees": _rounded(np.mean([matches == (c >= 0.5) for matches, c in own])),
            "mean_of_right": _rounded(np.mean(right) if right else None),
            "mean_of_wrong": _rounded(np.mean(wrong) if wrong else None),
            "yes_to_right": _rounded(np.mean(np.array(right) >= 0.5) if right else None),
            "yes_to_wrong": _rounded(np.mean(np.array(wrong) >= 0.5) if wrong else None),
        }

    kinds = list(dict.fromkeys(case.kind for case in cases))
    clean = [kind for kind in kinds if kind.startswith("clean")]
    drawn = [kind for kind in kinds if kind not in clean]
    few = [kind for kind in drawn if kind.partition(" ")[0] in map(str, FEW_STEPS)]
    return {
        "all drawings": summary(drawn),
        "few steps": summary(few),
        "clean": summary(clean),
        "own mistakes": summary([kind for kind in drawn if kind != "wrong prompt"]),
        **{kind: summary([kind]) for kind in drawn},
    }


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or tiny.")],
    out: Annotated[Path, typer.Option(help="File for the figures, JSON.")],
    count: Annotated[int, typer.Option(help="Held-out prompts drawn in each way.")] = 500,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Measures a checkpoint as the judge of its own drawings, in float32."""
    config = run_config(device=device, sampling={})
    figures = judge(open_engine(model, config), config, count)
    for kind, values in figures.items():
        print(f"{kind}: {values}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
