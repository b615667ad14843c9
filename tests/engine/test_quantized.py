"""Quantised matrices: how far they are off, and what a network of them makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.checkpoint.architecture import OFFICIAL_8B, parse_architecture
from sensebatch.checkpoint.tensors import expected_tensors, head_part_rows
from sensebatch.config import ModelConfig
from sensebatch.engine.device.choice import resolve_runtime
from sensebatch.engine.device.runtime import check_precision
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import Operations
from sensebatch.engine.model.quantized import NUMBERS, Numbers, QuantisedLinear, quantise_rows
from sensebatch.engine.model.state_dict_adapter import checkpoint_slots
from sensebatch.engine.runner import Runner
from sensebatch.engine.weights.loader import NetworkLoader
from sensebatch.engine.weights.lora import Lora
from sensebatch.engine.weights.residency import Residency
from sensebatch.engine.weights.sources import SyntheticWeights
from sensebatch.errors import ConfigError
from sensebatch.jobs import QUANTISED, Precision, Stored
from sensebatch.plan.computation import Computation
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.units import GIB
from tests.checkpoint.lora_files import lora_tensors, write
from tests.engine.golden_model import build_runner, golden_step, infer, predict
from tests.engine.weights.test_residency import RuleWeights, make_placement, run_case
from tests.golden_data import (
    ByteTokenizer,
    case_ids,
    golden_architecture,
    load_case,
    relative_error,
    rule_weights,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FLOAT8, INT8 = NUMBERS[Stored.FLOAT8], NUMBERS[Stored.INT8]
BOTH = pytest.mark.parametrize("numbers", [FLOAT8, INT8], ids=[*NUMBERS])


def load_quantised(
    config: str,
    precision: Precision | None,
    num_buffers: int | None = None,
    host_budget_bytes: int | None = None,
    edits: Sequence[dict[str, Any]] = (),
) -> tuple[Network, Residency]:
    loader = NetworkLoader(
        arch=golden_architecture(config),
        source=RuleWeights(rule_weights(config, edits)),
        device=CPU,
        dtype=torch.float32,
        precision=precision,
    )
    return loader.load(make_placement(num_buffers, False, host_budget_bytes))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    stored=st.sampled_from(Stored),
)
def test_a_quantised_number_is_off_by_no_more_than_is_said(
    seed: int, exponent: int, dtype: torch.dtype, stored: Stored
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(7, 33, generator=generator) * 2.0**exponent).to(dtype)
    quantised, scale = quantise_rows(x, NUMBERS[stored])
    assert quantised.dtype == NUMBERS[stored].dtype
    assert scale.shape == (7, 1)
    found = quantised.float() * scale
    error = (found - x.float()).abs()
    limits = {
        Stored.FLOAT8: torch.maximum(x.float().abs() / 16, scale * 2.0**-10),
        Stored.INT8: scale / 2,
    }
    assert (error <= limits[stored] * 1.001).all()
    assert (quantised.float().abs().amax(1) == NUMBERS[stored].largest).all()


@BOTH
def test_rows_of_zeros_stay_zeros(numbers: Numbers) -> None:
    quantised, scale = quantise_rows(torch.zeros(2, 5), numbers)
    assert torch.equal(quantised.float() * scale, torch.zeros(2, 5))


@BOTH
def test_rows_are_quantised_whatever_is_beside_them(numbers: Numbers) -> None:
    x = torch.randn(9, 64)
    whole, scales = quantise_rows(x, numbers)
    for row in range(9):
        alone, scale = quantise_rows(x[row : row + 1], numbers)
        assert torch.equal(alone.float(), whole[row : row + 1].float())
        assert torch.equal(scale, scales[row : row + 1])


@pytest.mark.parametrize(
    ("numbers", "least", "most"),
    # In float8 each factor is off by up to 1 in 16, at random: about 1 in 37 for each product. In
    # int8 it is off by up to half a part in 127 of the largest of its row, which is about three
    # times as large as most.
    [(FLOAT8, 0.01, 0.05), (INT8, 0.002, 0.02)],
    ids=[*NUMBERS],
)
def test_a_quantised_layer_is_close_to_the_layer_it_stands_for(
    numbers: Numbers, least: float, most: float
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(50, 256)
    layer = quantised_layer(weight, numbers)
    found = layer(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert least < relative_error(found.float(), x @ weight.t()) < most
    residual = torch.randn(50, 96)
    for in_place in (False, True):
        kept = residual.clone()
        total = layer.add_product(kept, x, in_place=in_place)
        assert torch.equal(total, residual + layer(x))
        assert torch.equal(kept, total if in_place else residual)


def quantised_layer(weight: torch.Tensor, numbers: Numbers) -> QuantisedLinear:
    layer = QuantisedLinear(weight.shape[1], weight.shape[0], numbers, CPU, Operations())
    quantised, scales = quantise_rows(weight, numbers)
    layer.weight.copy_(quantised)
    layer.scale.copy_(scales[:, 0])
    return layer


def test_the_sums_of_int8_products_are_exact_whatever_is_beside_a_token() -> None:
    """Float32 does not have them: of so many columns they go beyond 2^24."""
    torch.manual_seed(0)
    x = torch.randint(100, 128, (40, 3000), dtype=torch.int8)
    weight = torch.randint(-127, 128, (24, 3000), dtype=torch.int8)
    weight[0] = 127
    sums = x.double() @ weight.double().t()
    assert sums.max() > 2**25
    ones = torch.ones(24)
    found = INT8.product((x, torch.ones(40, 1)), weight, ones, torch.float64)
    assert torch.equal(found, sums.float().double())
    for row in (0, 39):
        alone = INT8.product((x[row : row + 1], torch.ones(1, 1)), weight, ones, torch.float64)
        assert torch.equal(alone, found[row : row + 1])


def test_each_token_of_an_int8_product_has_its_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tokens are multiplied in parts."""
    x, scales = quantise_rows(torch.randn(40, 96), INT8)
    weight, of_weight = quantise_rows(torch.randn(24, 96), INT8)
    whole = INT8.product((x, scales), weight, of_weight[:, 0], torch.float32)
    monkeypatch.setattr("sensebatch.engine.model.quantized.PLAIN_ROWS", 16)
    parts = INT8.product((x, scales), weight, of_weight[:, 0], torch.float32)
    assert torch.equal(parts, whole)
    assert relative_error(whole, (x * scales) @ (weight * of_weight).t()) < 1e-6


def mean_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square of the difference over that of what is expected."""
    difference = actual.reshape(expected.shape) - expected
    return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())


# Not the sparse model: where two experts are nearly as likely, any rounding may exchange them.
@pytest.mark.parametrize(
    ("config", "name"), [case for case in case_ids("gen_step") if case[0] != "moe"]
)
@pytest.mark.parametrize(
    ("precision", "limit"),
    # Weights at random: a trained network is off by less.
    [
        (Precision.FP8, 0.08),
        (Precision.FP8_ALL, 0.1),
        (Precision.INT8, 0.02),
        (Precision.INT8_ALL, 0.03),
    ],
)
def test_one_velocity_stays_close_to_the_reference(
    config: str, name: str, precision: Precision, limit: float
) -> None:
    case = load_case(config, name)
    network, residency = load_quantised(config, precision)
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=sdpa, weights=residency)
    with infer():
        step = golden_step(runner, case)
        v = step.velocity(predict(runner, step))
    assert 0 < mean_error(v, case.tensor("v_pred")) < limit


@pytest.mark.parametrize(
    ("config", "name"),
    [("dense_fm", "t2i_think_end"), ("dense_fm", "il_img_think"), ("moe", "t2i_think_end")],
)
@pytest.mark.parametrize("precision", QUANTISED)
def test_quantised_images_are_bit_identical_wherever_the_weights_are(
    config: str, name: str, precision: Precision
) -> None:
    case = load_case(config, name)
    expected = None
    for num_buffers, budget in ((None, None), (2, None), (3, 0), (4, 300_000), (6, None)):
        network, residency = load_quantised(
            config, precision, num_buffers, budget, case.weight_edits
        )
        runner = Runner(
            network=network, tokenizer=ByteTokenizer(), attention=sdpa, weights=residency
        )
        # Twice: the second batch meets what the first has left in the buffers.
        for _ in range(2):
            found = run_case(runner, case)
            expected = found if expected is None else expected
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    plain = run_case(build_runner(case), case)
    assert expected is not None
    same = (torch.equal(a, b) for a, b in zip(plain, expected, strict=False))
    assert not all(same), "nothing was quantised"


def test_a_lora_is_merged_before_weights_are_quantised(tmp_path: Path) -> None:
    case, arch = load_case("common", "lora_plain"), golden_architecture("dense_fm")
    lora = Lora.open(
        write(tmp_path / "lora.safetensors", lora_tensors(case)), expected_tensors(arch)
    )
    source = SyntheticWeights(torch.float32, lora)
    loader = NetworkLoader(
        arch=arch,
        source=source,
        device=CPU,
        dtype=torch.float32,
        precision=Precision.INT8_ALL,
    )
    network, _ = loader.load(make_placement(None, False, None))
    for name in case.params["weight_names"].values():
        merged = torch.empty(expected_tensors(arch)[name].shape)
        source.read_into(name, None, merged)
        (slot,) = checkpoint_slots(arch)[name]
        expert, _, layer, parameter = slot.parameter.split(".", 3)
        owner = network.understanding if expert == "understanding" else network.generation
        with owner.lend(int(layer)) as module:
            found = slot.view({slot.parameter: module.get_parameter(parameter)})
        assert torch.equal(found, quantise_rows(merged, INT8)[0])
        SyntheticWeights(torch.float32).read_into(name, None, merged)
        assert not torch.equal(found, quantise_rows(merged, INT8)[0])


@pytest.mark.parametrize("config", ["dense_fm", "dense_pixel", "moe"])
@pytest.mark.parametrize("precision", [None, *QUANTISED])
def test_the_arithmetic_counts_the_bytes_that_are_made(
    config: str, precision: Precision | None
) -> None:
    arch = golden_architecture(config)
    network, residency = load_quantised(config, precision, num_buffers=2)
    expected = weight_bytes(Computation(arch=arch, item_bytes=4, precision=precision))
    parts = len(head_part_rows(arch))
    num_blocks = 2 * arch.num_layers + parts
    assert num_blocks == expected.num_generation + expected.num_understanding
    made = _bytes_of_blocks(network)
    assert made == expected.blocks
    # In host memory every tensor begins at a multiple of 256 bytes.
    assert expected.blocks <= residency.host_bytes <= expected.blocks + num_blocks * 12 * 256


def _bytes_of_blocks(network: Network) -> int:
    modules = [network.understanding.layers, network.generation.layers, network.lm_head.parts]
    return sum(p.nbytes for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    "precisions",
    [(Precision.FP8, Precision.FP8_ALL), (Precision.INT8, Precision.INT8_ALL)],
)
def test_8_bits_halve_the_generation_expert_of_the_8b_model(
    precisions: tuple[Precision, Precision],
) -> None:
    official = parse_architecture(OFFICIAL_8B)
    plain, fp8, both = (
        weight_bytes(Computation(arch=official, item_bytes=2, precision=precision))
        for precision in (None, *precisions)
    )
    assert plain.kept_block * 42 / GIB == pytest.approx(15.09, abs=0.01)
    assert fp8.kept_block * 42 / GIB == pytest.approx(7.55, abs=0.01)
    assert fp8.block == plain.block
    assert fp8.kept_block == both.kept_block
    assert plain.blocks - fp8.blocks == fp8.blocks - both.blocks


def test_float8_is_refused_where_it_cannot_be_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = r"precision: fp8 needs a CUDA device of compute capability 8\.9 or newer .*"
    with pytest.raises(
        ConfigError, match=needed + "found cpu; usable there: auto, int8, int8-all$"
    ):
        resolve_runtime(ModelConfig(precision=Precision.FP8, device="cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=needed + r"found A100 of 8\.0"):
        check_precision(Precision.FP8, "cuda", "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_precision(Precision.FP8, "cuda", "bfloat16")
    with pytest.raises(ConfigError, match="fp8-all needs dtype bfloat16, found float16"):
        check_precision(Precision.FP8_ALL, "cuda", "float16")


def test_int8_needs_less_of_a_device_than_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_runtime(ModelConfig(precision=Precision.INT8, device="cpu")) == (
        "cpu",
        "float32",
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for dtype in ("bfloat16", "float16"):
        check_precision(Precision.INT8_ALL, "cuda", dtype)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    message = r"precision: int8-all needs .* 8\.0 or newer .* found T4 of 7\.5; usable there: auto$"
    with pytest.raises(ConfigError, match=message):
        check_precision(Precision.INT8_ALL, "cuda", "float16")
