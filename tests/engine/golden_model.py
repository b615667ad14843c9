"""The golden models as loaded networks, and golden cases as jobs."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from sensebatch.config import default_config
from sensebatch.contract import Channel, Drawn, KeptImage
from sensebatch.engine.model.attention import Attention, sdpa
from sensebatch.engine.model.kv_cache import KVCache, Span
from sensebatch.engine.model.lockstep import Pass
from sensebatch.engine.model.network import ImagePositions, Network
from sensebatch.engine.model.operations import choose_operations
from sensebatch.engine.model.patchify import image_to_tokens
from sensebatch.engine.model.state_dict_adapter import checkpoint_slots
from sensebatch.engine.preprocess import Patches
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.flow_matching import velocity_from_image
from sensebatch.engine.tasks.single_image import begin, draw
from sensebatch.engine.tasks.state import PreparedJob, prepare_job
from sensebatch.jobs import CfgNorm, Failure, Job, JobResult, Sampling, Source
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from tests.golden_data import ByteTokenizer, Case, golden_architecture, load_case, rule_weights

TASKS = {
    "t2i": Task.T2I,
    "think": Task.T2I,
    "edit": Task.EDIT,
    "edit_think": Task.EDIT,
    "interleave": Task.INTERLEAVE,
    "ask": Task.ASK,
}


def build_network(
    config: str, edits: Sequence[dict[str, Any]] = (), *, fused: bool = False
) -> Network:
    """Returns a golden model in float32, with a case's weight edits."""
    return _cached_network(config, json.dumps(list(edits)), fused)


@functools.lru_cache(maxsize=32)
def _cached_network(config: str, edits: str, fused: bool) -> Network:
    arch = golden_architecture(config)
    network = Network(arch, choose_operations(fused=fused)).requires_grad_(False).eval()
    fill(network, rule_weights(config, json.loads(edits)))
    return network


def fill(network: Network, weights: dict[str, torch.Tensor]) -> None:
    """Copies checkpoint tensors into a network, straight from the table of names."""
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    for name, slots in checkpoint_slots(network.arch).items():
        for slot in slots:
            rows = slice(None) if slot.rows is None else slice(*slot.rows)
            slot.view(parameters).copy_(weights[name][rows])


def build_runner(case: Case, *, fused: bool = False) -> Runner:
    """Returns a runner of the case's model."""
    network = build_network(case.config, case.weight_edits, fused=fused)
    return Runner(network=network, tokenizer=ByteTokenizer(), attention=_attention(fused))


def watch_logits(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Returns a list to which the logits of every choice are added."""
    seen: list[torch.Tensor] = []
    through = runner.network.lm_head.through

    def watched(hidden_SD: torch.Tensor) -> Pass[torch.Tensor]:
        seen.append((yield from through(hidden_SD)))
        return seen[-1]

    monkeypatch.setattr(runner.network.lm_head, "through", watched)
    return seen


def _attention(fused: bool) -> Attention:
    if not fused:
        return sdpa
    from sensebatch.engine.model.attention_kernels import attend_run

    return attend_run


def case_resolutions(case: Case) -> list[Resolution]:
    """Returns the size of each image of a case; the last holds for all that follow."""
    sizes = case.params["image_size"]
    pairs = sizes if isinstance(sizes[0], list) else [sizes]
    return [Resolution(height=height, width=width) for width, height in pairs]


def build_job(case: Case, system: str) -> PreparedJob:
    """Returns the job of a case of a task, its input images already patches."""
    params, task = case.params, TASKS[case.kind]
    if task.spec.drawing is None:
        sampling = replace(
            default_config().tasks[task].sampling, max_new_tokens=params["max_new_tokens"]
        )
        return _prepared(case, sampling, system, prompt=params["question"], resolution=None)
    sampling = Sampling(
        num_steps=params["num_steps"],
        timestep_shift=params["timestep_shift"],
        cfg_scale=params["cfg_scale"],
        img_cfg_scale=params.get("img_cfg_scale", 1.0),
        cfg_norm=CfgNorm(params.get("cfg_norm", "none")),
        cfg_interval=tuple(params.get("cfg_interval", (0, 1))),
        max_think_tokens=params.get("max_think_tokens", 1024),
        max_images=10,
        max_new_tokens=params.get("max_new_tokens", 8192),
    )
    size = case_resolutions(case)[0]
    return _prepared(case, sampling, system, prompt=params["prompt"], resolution=size)


def _prepared(
    case: Case, sampling: Sampling, system: str, *, prompt: str, resolution: Resolution | None
) -> PreparedJob:
    job = Job(
        id=case.name,
        task=TASKS[case.kind],
        prompt=prompt,
        resolution=resolution,
        seed=case.params.get("seed", 42),
        think=case.params.get("think_mode", False),
        sampling=sampling,
        source=Source(file="golden", row=case.name),
    )
    return prepare_job(
        golden_architecture(case.config),
        ByteTokenizer(),
        job,
        system_prompt=system,
        images=case_patches(case) if "pixel_values" in case else (),
    )


def case_patches(case: Case) -> list[Patches]:
    """Returns the stored input images of a case."""
    grids = [tuple(grid) for grid in case.tensor("grid_hw").tolist()]
    rows = case.tensor("pixel_values").split([height * width for height, width in grids])
    return [Patches(rows_PD=part, grid_hw=grid) for part, grid in zip(rows, grids, strict=True)]


def draw_together(
    runner: Runner, jobs: Sequence[PreparedJob]
) -> tuple[torch.Tensor, list[Sequence[int] | None]]:
    """Returns the exact images of t2i or edit jobs, drawn in one pass, and their thoughts."""
    running, thoughts = begin(runner, jobs)
    return draw(runner, running), thoughts


class KeptImages(Channel):
    """The kept images of one batch, in memory."""

    def __init__(self, num_jobs: int) -> None:
        self.images: list[list[KeptImage]] = [[] for _ in range(num_jobs)]

    def load(self) -> list[list[KeptImage]]:
        return [list(kept) for kept in self.images]

    def keep(self, drawn: Drawn) -> None:
        for index, image in drawn:
            self.images[index].append(image)


def succeeded(results: Sequence[JobResult | Failure]) -> list[JobResult]:
    """Returns results of which none is a failure."""
    found = [result for result in results if isinstance(result, JobResult)]
    assert len(found) == len(results), results
    return found


def prefill_text(runner: Runner, case: Case) -> tuple[KVCache, torch.Tensor]:
    """Returns a cache of a case's text, and the outputs of its tokens."""
    ids = case.tensor("input_ids")
    indexes = case.tensor("indexes")
    network = runner.network
    cache = network.new_cache()
    segments = ((0, len(ids), False),)
    spans = [Span(cache=cache, num_tokens=len(ids), segments=segments)]
    hidden = network.understand(network.embed_tokens(ids), indexes, spans, sdpa)
    cache.advance(len(ids), int(indexes[0].max()) + 1)
    return cache, hidden


class Step(NamedTuple):
    """What one evaluation of a golden image is made of."""

    z_JNx: torch.Tensor
    t: float
    cache: KVCache
    positions: ImagePositions
    condition_D: torch.Tensor

    def velocity(self, x_JNx: torch.Tensor) -> torch.Tensor:
        """Returns the velocity towards a predicted image."""
        return velocity_from_image(x_JNx, self.z_JNx, self.t)


def golden_step(runner: Runner, case: Case) -> Step:
    """Returns the evaluation of a `gen_step` case, its prefix cached by a runner of its model."""
    network, image = runner.network, case.tensor("z_image")
    cache, _ = prefill_text(runner, load_case(case.config, "prefix_text"))
    t, size = float(case.params["t"]), Resolution(height=image.shape[-2], width=image.shape[-1])
    condition = network.condition(torch.tensor([t]), float(case.params["noise_scale"]))[0]
    positions = network.image_positions([cache], size)
    return Step(image_to_tokens(image), t, cache, positions, condition)


def predict(runner: Runner, step: Step) -> torch.Tensor:
    """Returns the image that the network predicts in a step."""
    return runner.network.predict_image(
        step.z_JNx, step.condition_D, [step.cache], step.positions, runner.attention
    )


def infer() -> torch.inference_mode:
    """Returns the mode the engine runs in."""
    return torch.inference_mode()
