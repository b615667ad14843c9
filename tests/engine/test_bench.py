"""The tool that times parts: its variants compute what they say, and every row is measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sensebatch.engine import bench
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.quantized import NUMBERS
from sensebatch.engine.runner import Runner
from sensebatch.jobs import QUANTISED, Stored
from sensebatch.plan.work import network_sizes
from tests.engine.golden_model import build_network, infer
from tests.golden_data import ByteTokenizer


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    return _runner("dense_fm", monkeypatch)


def _runner(config: str, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(bench, "LIMIT_ROWS", 8)
    monkeypatch.setattr(bench, "PROMPT_TOKENS", 9)
    return Runner(network=build_network(config), tokenizer=ByteTokenizer(), attention=sdpa)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dense_fm", "moe"])
def test_every_part_is_measured(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _runner(config, monkeypatch)
    with infer():
        measured = dict(bench.rows(runner, bench.SMALL))
    assert len(measured) == 1 + len(NUMBERS) * (1 + 1 + 2) + 6 + 4 + 2 + len(QUANTISED)
    assert all(float(value.split()[0].rstrip("%")) >= 0 for value in measured.values())


@pytest.mark.parametrize("config", ["dense_fm", "moe"])
def test_the_limit_has_the_products_of_every_token(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the plan's arithmetic has them, of two branches and all layers."""
    runner = _runner(config, monkeypatch)
    with infer(), FlopCounterMode(display=False) as counter:
        bench.limit_seconds(runner, numbers=None, steps=1)
    counted = sum(
        flop
        for operation, flop in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation)
    )
    matrices = network_sizes(runner.network.arch).generation_matrices
    once_to_warm_up, branches, flop_a_weight = 2, 2, 2
    assert counted == once_to_warm_up * branches * flop_a_weight * bench.LIMIT_ROWS * matrices


def test_errors_are_those_of_the_paths(runner: Runner) -> None:
    """In float32 nothing is off but 8-bit numbers, by more the more there are of them."""
    with infer():
        errors = bench.errors(runner, 64)
    assert errors["torch's operations"] == errors["as it is run"] == 0
    assert 0.001 < errors["fp8"] < errors["fp8-all"] < 0.2
    assert 0.0002 < errors["int8"] < errors["int8-all"] < errors["fp8"]


def test_a_variant_shares_weights_and_leaves_the_network_as_it_is(runner: Runner) -> None:
    network = runner.network
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    with infer():
        float8 = bench.variant(network, generation=bench.in_numbers(NUMBERS[Stored.FLOAT8]))
        bench.velocity(runner, float8, sdpa, 64)
        plain = bench.variant(network, bench.naive)
        with plain.understanding.lend(0) as layer:
            shared = network.understanding.get_parameter("layers.0.qkv.weight")
            assert layer.get_parameter("qkv.weight").data_ptr() == shared.data_ptr()
    assert all(torch.equal(before[name], value) for name, value in network.named_parameters())
