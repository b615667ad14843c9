"""Steps without the middle layers: what they compute, and that they load none of these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sensebatch.config import default_config
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.transformer import Middle
from sensebatch.engine.runner import PassLimits, Runner
from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.engine.tasks.denoise import Canvas, denoise
from sensebatch.jobs import Drawing, Sampling
from sensebatch.plan.footprint import denoise_bytes
from sensebatch.plan.load import Load
from sensebatch.plan.passes import middle_layers
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from tests.engine.drawings import drawing_of
from tests.engine.golden_model import infer
from tests.engine.memory.test_estimates import (
    attend_without_kernel,
    computation_of,
    make_load,
    small_architecture,
)
from tests.engine.memory.tracker import LiveBytes
from tests.golden_data import ByteTokenizer

SIZE = Resolution(height=64, width=96)
GUIDED = replace(default_config("8b").tasks[Task.T2I].sampling, cfg_scale=3.0)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(1)
    network = Network(replace(small_architecture(64), num_layers=5)).requires_grad_(False).eval()
    for parameter in network.parameters():
        parameter.normal_(std=0.2)
    return network


def _draw(network: Network, jobs: list[tuple[int, Sampling]], **steps: int) -> Tensor:
    """Returns the images of jobs, given as their seed and settings, drawn together."""
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=sdpa)
    canvases = []
    for seed, sampling in jobs:
        guidance = Guidance(Task.T2I, sampling)
        caches = {branch: network.new_cache() for branch in guidance.branches}
        noise = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(seed))
        canvases.append(Canvas(guidance=guidance, caches=caches, noise=noise))
    drawing = drawing_of(canvases[0].guidance, SIZE, timestep_shift=1.0, **steps)
    with infer():
        return denoise(runner, canvases, drawing=drawing)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, range(1, 1)), (2, range(1, 1)), (3, range(1, 2)), (6, range(1, 5)), (42, range(7, 35))],
)
def test_a_sixth_of_the_layers_at_either_end_is_evaluated_at_every_step(
    num_layers: int, expected: range
) -> None:
    assert middle_layers(num_layers) == expected


def test_a_step_adds_what_the_middle_layers_added_before(network: Network) -> None:
    cache, middle = network.new_cache(), Middle()
    positions = network.image_positions([cache], SIZE)
    z, other = torch.randn(2, 1, SIZE.image_tokens, 3072, generator=torch.Generator())
    condition = network.condition(torch.tensor([0.3]), 1.0)[0]

    def predict(z_JNx: Tensor) -> Tensor:
        with infer():
            return network.predict_image(z_JNx, condition, [cache], positions, sdpa, middle=middle)

    whole = predict(z)
    middle.again = [0]
    torch.testing.assert_close(predict(z), whole)
    expected = _without_middle(network, other, condition, middle)
    torch.testing.assert_close(predict(other), expected)
    middle.again = None
    assert not torch.allclose(predict(other), expected, atol=1e-2)


def _without_middle(network: Network, z: Tensor, condition: Tensor, middle: Middle) -> Tensor:
    """Returns the prediction of a network of the outer layers that adds a tensor in between."""
    short = Network(replace(network.arch, num_layers=2)).requires_grad_(False).eval()
    outer = {
        name.replace(".layers.4.", ".layers.1."): value
        for name, value in network.state_dict().items()
        if not re.search(r"layers\.[123]\.", name)
    }
    short.load_state_dict(outer)
    own = short.generation.lend
    inputs: list[Tensor] = []

    @contextmanager
    def lend(index: int) -> Iterator[nn.Module]:
        if index == 1:
            # What the first layer left is in the memory of its input.
            assert middle.kept_TD is not None
            inputs[0].add_(middle.kept_TD)
        with own(index) as layer:
            yield layer

    short.generation.lend = lend
    short.generation.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    cache = short.new_cache()
    with infer():
        return short.predict_image(
            z, condition, [cache], short.image_positions([cache], SIZE), sdpa
        )


def test_a_step_without_the_middle_layers_loads_none_of_them(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[int] = []
    own = network.generation.lend

    def lend(index: int) -> object:
        lent.append(index)
        return own(index)

    monkeypatch.setattr(network.generation, "lend", lend)
    _draw(network, [(1, GUIDED)], num_steps=6, layer_stride=3)
    whole, short = [0, 1, 2, 3, 4], [0, 4]
    assert lent == [*whole, *whole, *short, *short, *whole, *whole]


def test_an_image_does_not_depend_on_where_guidance_rests_for_its_neighbours(
    network: Network,
) -> None:
    resting = replace(GUIDED, cfg_interval=(0.3, 0.7), guidance_stride=2)
    jobs = [(1, GUIDED), (2, resting), (3, replace(GUIDED, cfg_scale=2.0))]
    steps = {"num_steps": 9, "layer_stride": 3}
    together = _draw(network, jobs, **steps)
    for image, job in zip(together, jobs, strict=True):
        torch.testing.assert_close(_draw(network, [job], **steps)[0], image, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, _draw(network, jobs, num_steps=9), atol=1e-2)


def test_more_whole_steps_come_nearer_to_the_drawing_of_every_layer(network: Network) -> None:
    exact = _draw(network, [(4, GUIDED)], num_steps=24)
    far, near = (
        (_draw(network, [(4, GUIDED)], num_steps=24, layer_stride=stride) - exact).abs().mean()
        for stride in (8, 2)
    )
    assert 0 < near < far


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_kept_takes_the_memory_that_is_planned(jobs: int) -> None:
    """Shapes alone are computed, so that the sizes may be those of real networks."""
    size = Resolution(height=1024, width=1024)
    with torch.device("meta"):
        arch = replace(small_architecture(4096), vision_hidden_size=1024, num_layers=3)
        network = Network(arch).requires_grad_(False).eval()
    limits = PassLimits(image_tokens=1 << 20)
    measured, planned = {}, {}
    for stride in (1, 2):
        runner = Runner(
            network=network,
            tokenizer=ByteTokenizer(),
            attention=attend_without_kernel,
            limits=limits,
        )
        guidance = Guidance(Task.T2I, GUIDED)
        load = make_load(Task.T2I, size, jobs, 8)
        drawing = drawing_of(guidance, size, num_steps=4, layer_stride=stride)
        planned[stride] = _planned(network, load, drawing, jobs)
        with infer(), LiveBytes() as live:
            caches = {branch: network.new_cache() for branch in guidance.branches}
            noise = torch.zeros(3, 1024, 1024, device=network.device)
            canvas = Canvas(guidance=guidance, caches=caches, noise=noise)
            live.peak = live.now
            denoise(runner, [canvas] * jobs, drawing=drawing)
            measured[stride] = live.peak
    kept = 2 * jobs * size.image_tokens * 4096 * 4
    assert planned[2] - planned[1] == kept
    assert measured[2] - measured[1] == pytest.approx(kept, rel=0.01)


def _planned(network: Network, load: Load, drawing: Drawing, jobs: int) -> int:
    group = replace(load.group, drawing=drawing)
    return denoise_bytes(computation_of(network), replace(load, group=group), jobs)
