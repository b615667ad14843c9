"""Sparse blocks by kernels against the experts one by one, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from sensebatch.checkpoint.architecture import A3B, Architecture, Moe, parse_architecture
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import Operations, choose_operations
from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import denoise_bytes
from sensebatch.tasks import Task
from tests.engine.memory.test_estimates import (
    LEAST,
    MOST,
    attend_without_kernel,
    drawn_bytes,
    square_load,
)
from tests.golden_data import relative_error

pytest.importorskip("triton", reason="Triton has no build for this platform")

from sensebatch.engine.model import attention_kernels, decode_kernels, expert_kernels, kernels
from sensebatch.engine.model.expert_kernels import TILES, fitting, route, tiles_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DESCRIPTORS = find_spec("triton.tools.tensor_descriptor")
ROUNDING = 1e-5
HALF_ROUNDING = 1e-3
WIDTH = 32


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def make_moe(experts: int, choices: int, inner: int = 16, *, normalise: bool = True) -> Moe:
    return Moe(
        num_experts=experts,
        num_experts_per_tok=choices,
        intermediate_size=inner,
        norm_topk_prob=normalise,
        sparse_layers=(True,),
    )


def matrices(moe: Moe) -> tuple[Tensor, Tensor]:
    inner = moe.intermediate_size
    return (
        noise(moe.num_experts, 2 * inner, WIDTH) / WIDTH**0.5,
        noise(moe.num_experts, WIDTH, inner) / inner**0.5,
    )


def both(moe: Moe, logits: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the output of a block by kernels and by torch."""
    x, residual = noise(len(logits), WIDTH), noise(len(logits), WIDTH)
    weights = matrices(moe)
    by_kernels, by_torch = (
        operations.add_experts(residual.clone(), x, logits, weights, moe, in_place=in_place)
        for operations in (choose_operations(fused=True), Operations())
    )
    return by_kernels, by_torch


@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "inner", "normalise"),
    [
        (1, 4, 2, 16, True),
        (70, 4, 2, 48, True),
        (33, 6, 3, 16, False),
        (40, 8, 1, 32, True),
        (3, 130, 8, 16, True),
    ],
)
def test_kernels_add_the_experts_that_each_token_goes_to(
    tokens: int, experts: int, choices: int, inner: int, normalise: bool
) -> None:
    moe = make_moe(experts, choices, inner, normalise=normalise)
    for in_place in (False, True):
        by_kernels, by_torch = both(moe, noise(tokens, experts), in_place=in_place)
        assert relative_error(by_kernels.cpu(), by_torch.cpu()) < ROUNDING


@pytest.mark.parametrize("least", TILES)
def test_every_tile_is_right_with_experts_that_no_token_goes_to(least: int) -> None:
    """All tokens go to the same two, so that one has more rows than a tile and others none."""
    moe = make_moe(4, 2)
    tokens = max(least * moe.num_experts // moe.num_experts_per_tok, 20)
    assert tiles_for(tokens * 2, 4) == TILES[least]
    logits = torch.tensor([[1.0, -9.0, 2.0, -9.0]], device=DEVICE).expand(tokens, -1)
    by_kernels, by_torch = both(moe, logits.contiguous())
    assert relative_error(by_kernels.cpu(), by_torch.cpu()) < ROUNDING


@pytest.mark.skipif(DESCRIPTORS is None, reason="this Triton has no descriptors")
def test_weights_that_the_device_copies_itself_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float16, because descriptors are for numbers of two bytes."""
    moe, tokens = make_moe(4, 2, 48), 140
    weights = (noise(4, 96, WIDTH).half() / WIDTH**0.5, noise(4, WIDTH, 48).half() / 48**0.5)
    x, logits = noise(tokens, WIDTH).half(), noise(tokens, 4)
    found = []
    for has in (True, False):
        monkeypatch.setattr(expert_kernels, "has_descriptors", lambda _, has=has: has)
        add = choose_operations(fused=True).add_experts
        found.append(add(x, x, logits, weights, moe, in_place=False))
    assert torch.equal(*found) or DEVICE == "cpu"
    assert relative_error(*(out.cpu() for out in found)) < HALF_ROUNDING


def test_weights_of_experts_without_tokens_are_not_read() -> None:
    moe = make_moe(4, 2)
    weights = matrices(moe)
    for weight in weights:
        weight[[1, 3]] = float("nan")
    logits = torch.tensor([[1.0, -9.0, 2.0, -9.0]], device=DEVICE).repeat(5, 1)
    x = noise(5, WIDTH)
    out = choose_operations(fused=True).add_experts(x, x, logits, weights, moe, in_place=False)
    assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="numpy, which interprets kernels, sums rows unlike")
def test_a_tokens_bytes_do_not_depend_on_its_neighbours() -> None:
    """Others go to other experts, so that the token's row is another one of another tile."""
    moe, tokens = make_moe(4, 2), 40
    weights, x, logits = matrices(moe), noise(tokens, WIDTH), noise(tokens, 4)
    add = choose_operations(fused=True).add_experts
    out = add(x, x, logits, weights, moe, in_place=False)
    mine = slice(25, 31)
    for _ in range(3):
        others, other_logits = noise(tokens, WIDTH), noise(tokens, 4)
        others[mine], other_logits[mine] = x[mine], logits[mine]
        again = add(others, others, other_logits, weights, moe, in_place=False)
        assert torch.equal(again[mine], out[mine])


def expected_order(chosen: list[list[int]], experts: int) -> list[int]:
    choices = len(chosen[0])
    pairs = [
        (expert, t * choices + c) for t, row in enumerate(chosen) for c, expert in enumerate(row)
    ]
    return [pair for expert in range(experts) for found, pair in pairs if found == expert]


def test_pairs_are_sorted_by_expert_and_token() -> None:
    tokens, experts = 3 * expert_kernels.BLOCK_TOKENS + 5, 6
    logits = noise(tokens, experts)
    routes = route(logits, choices=2, normalise=True)
    chosen = logits.topk(2).indices.tolist()
    assert routes.order_P.tolist() == expected_order(chosen, experts)
    counts = torch.bincount(torch.tensor(chosen).flatten(), minlength=experts)
    assert routes.ends_X.tolist() == counts.cumsum(0).tolist()


def test_equal_experts_are_chosen_in_order() -> None:
    routes = route(torch.zeros(2, 6, device=DEVICE), choices=3, normalise=True)
    assert routes.order_P.tolist() == expected_order([[0, 1, 2]] * 2, 6)
    assert routes.weights_TC.tolist() == [[pytest.approx(1 / 3)] * 3] * 2


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_logits_that_are_no_numbers_go_to_experts_that_there_are() -> None:
    routes = route(torch.full((5, 6), float("nan"), device=DEVICE), choices=2, normalise=True)
    assert sorted(routes.order_P.tolist()) == list(range(10))
    assert routes.ends_X.tolist()[-1] == 10
    assert routes.weights_TC.isnan().all()


@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("shared", [101_376, 232_448])
def test_tiles_fit_what_a_program_may_have(item_bytes: int, shared: int) -> None:
    for tiles in TILES.values():
        for best, count in ((tiles.gate_up, 2), (tiles.down, 1)):
            tile = fitting(best, matrices=count, item_bytes=item_bytes, shared_bytes=shared)
            weights = count * tile.columns
            assert tile.stages * (tile.rows + weights) * tile.block * item_bytes < shared
            assert tile.block >= decode_kernels.LEAST_ROWS
            assert fitting(best, matrices=count, item_bytes=2, shared_bytes=232_448) == best


class Unlaunched:
    """Stands in for a kernel, so that tensors without memory go through a network."""

    def __getitem__(self, _: object) -> Callable[..., None]:
        return lambda *_args, **_options: None


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention_kernels, kernels, expert_kernels):
        for name, value in list(vars(module).items()):
            if name.startswith("_") and hasattr(value, "__getitem__") and hasattr(value, "fn"):
                monkeypatch.setattr(module, name, Unlaunched())


def shallow(config: Mapping[str, Any], **sizes: int) -> Architecture:
    """Returns the shape of the sparse model with two layers and a small vocabulary."""
    sizes = {"num_hidden_layers": 2, "vocab_size": 512, **sizes}
    return parse_architecture({**config, "llm_config": {**config["llm_config"], **sizes}})


@pytest.mark.slow
@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize(("side", "jobs"), [(512, 3), (2048, 1)])
def test_drawing_by_kernels_takes_what_is_expected(side: int, jobs: int) -> None:
    """Shapes alone are computed, so that they may be those of the model."""
    arch = shallow(A3B)
    with torch.device("meta"):
        network = Network(arch, choose_operations(fused=True)).requires_grad_(False).eval()
    measured = drawn_bytes(network, attend_without_kernel, Task.T2I, side, jobs, 300)
    computation = Computation(arch=arch, item_bytes=4, fused=True)
    expected = denoise_bytes(computation, square_load(Task.T2I, side, jobs, 300), jobs)
    assert LEAST <= expected / measured <= MOST, (expected, measured)


@pytest.mark.slow
def test_drawing_by_one_expert_after_the_other_takes_what_is_expected() -> None:
    """All tokens go to the same experts, which takes the most."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    arch = shallow(A3B, **sizes, num_experts=16, gen_num_experts=8, moe_intermediate_size=64)
    arch = replace(arch, vision_hidden_size=16)
    network = Network(arch).requires_grad_(False).eval()
    for parameter in network.parameters():
        parameter.zero_()
    measured = drawn_bytes(network, sdpa, Task.T2I, 1024, 1, 64)
    computation = Computation(arch=arch, item_bytes=4)
    expected = denoise_bytes(computation, square_load(Task.T2I, 1024, 1, 64), 1)
    assert LEAST <= expected / measured <= MOST, (expected, measured)
