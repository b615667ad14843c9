"""The time arithmetic counts what the network computes, operation by operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import Operations
from sensebatch.engine.model.quantized import NUMBERS, QuantisedLinear
from sensebatch.engine.model.transformer import Expert
from sensebatch.engine.prompts import Prompt
from sensebatch.engine.runner import Extension, Runner
from sensebatch.jobs import Precision, Stored
from sensebatch.plan.computation import Computation
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.plan.work import Work, denoising_work, network_sizes, understanding_work
from sensebatch.resolutions import Resolution
from tests.engine.golden_model import build_network
from tests.golden_data import CONFIGS, ByteTokenizer, golden_architecture

ITEM_BYTES = 4


class CountingAttention:
    """Torch's attention, and how many queries by visible keys it was asked for."""

    def __init__(self) -> None:
        self.pairs = 0
        self.key_bytes = 0

    def __call__(self, q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
        queries, keys = q_QHE.shape[0], k_LKE.shape[0]
        hidden = queries * (queries - 1) // 2 if causal else 0
        self.pairs += queries * keys - hidden
        self.key_bytes += k_LKE.nbytes + v_LKE.nbytes
        return sdpa(q_QHE, k_LKE, v_LKE, causal)


def product_flop(compute: Callable[[], object]) -> int:
    """Returns the operations of matrix products and convolutions, attention left out."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compute()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(
        flop for operation, flop in by_operation.items() if "attention" not in str(operation)
    )


def check_attention(work: Work, counted: CountingAttention, config: str) -> None:
    arch = golden_architecture(config)
    assert work.attention_flop == 4 * arch.num_heads * arch.head_dim * counted.pairs
    assert work.cache_bytes == counted.key_bytes


def grown(runner: Runner, lengths: list[int]) -> list[KVCache]:
    """Returns caches of prompts of these lengths."""
    extensions = [runner.new_extension(Prompt(token_ids=(1,) * length)) for length in lengths]
    with torch.no_grad():
        runner.extend(extensions)
    return [extension.cache for extension in extensions]


@pytest.mark.parametrize("config", CONFIGS)
def test_prompts_after_a_prefix_are_counted_exactly(config: str) -> None:
    attention = CountingAttention()
    runner = Runner(network=build_network(config), tokenizer=ByteTokenizer(), attention=attention)
    caches = grown(runner, [3, 20])
    attention.pairs = attention.key_bytes = 0
    extensions = [
        Extension(cache=cache, prompt=Prompt(token_ids=(1,) * new))
        for cache, new in zip(caches, (7, 1), strict=True)
    ]
    flop = product_flop(lambda: runner.choose(runner.extend(extensions)))
    arch = golden_architecture(config)
    computation = Computation(arch=arch, item_bytes=ITEM_BYTES)
    work = understanding_work(computation, network_sizes(arch), [(7, 3), (1, 20)], logits=2)
    assert work.gemm_flop == flop
    check_attention(work, attention, config)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_denoising_step_is_counted_exactly(config: str) -> None:
    network, attention = build_network(config), CountingAttention()
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=attention)
    caches = grown(runner, [9, 4, 2])
    attention.pairs = attention.key_bytes = 0
    size = Resolution(height=64, width=96)
    flop = product_flop(
        lambda: network.predict_image(
            torch.zeros(2, size.image_tokens, 3072),
            torch.zeros(network.arch.hidden_size),
            caches,
            network.image_positions(caches, size),
            attention,
            [0, 0, 1],
        )
    )
    arch = golden_architecture(config)
    sizes, tokens = network_sizes(arch), size.image_tokens
    computation = Computation(arch=arch, item_bytes=ITEM_BYTES)
    work = denoising_work(computation, sizes, tokens=tokens, images=2, prefixes=[9, 4, 2])
    assert work.gemm_flop == flop
    check_attention(work, attention, config)


@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "moe"])
def test_dense_layers_are_multiplied_with_all_their_matrices(config: str) -> None:
    network = build_network(config)
    arch = golden_architecture(config)
    sizes, stored = network_sizes(arch), weight_bytes(Computation(arch=arch, item_bytes=1))
    for expert, weights, matrices in (
        (network.understanding, stored.understanding_layers, sizes.understanding_matrices),
        (network.generation, stored.generation_layers, sizes.generation_matrices),
    ):
        layers = list(expert.layers.parameters())
        norms = [parameter for parameter in layers if max(parameter.shape) == parameter.numel()]
        halves = [parameter for parameter in layers if parameter.shape[0] == 2]
        assert weights == sum(parameter.numel() for parameter in layers)
        small = sum(parameter.numel() for parameter in [*norms, *halves])
        assert matrices == weights - small


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT8_ALL])
def test_products_of_8_bits_are_those_of_quantised_layers(
    config: str, precision: Precision
) -> None:
    arch = golden_architecture(config)
    with torch.device("meta"):
        network = Network(arch, Operations())
    network.generation.quantise(NUMBERS[Stored.INT8])
    if precision is Precision.INT8_ALL:
        network.understanding.quantise(NUMBERS[Stored.INT8])
    plain = Computation(arch=arch, item_bytes=ITEM_BYTES)
    quantised = Computation(arch=arch, item_bytes=ITEM_BYTES, precision=precision)
    sizes = network_sizes(arch)

    def works(computation: Computation) -> list[Work]:
        return [
            understanding_work(computation, sizes, [(7, 3)]),
            denoising_work(computation, sizes, tokens=7, images=1, prefixes=[3]),
        ]

    experts = (network.understanding, network.generation)
    for expert, before, after in zip(experts, works(plain), works(quantised), strict=True):
        weights = _quantised_weights(expert)
        assert before.quantised_flop == 0
        assert after.quantised_flop == 2 * 7 * weights
        assert after.gemm_flop == before.gemm_flop
        assert before.weight_bytes - after.weight_bytes == (ITEM_BYTES - 1) * weights


def _quantised_weights(expert: Expert) -> int:
    layers = (layer for layer in expert.modules() if isinstance(layer, QuantisedLinear))
    return sum(layer.weight.numel() for layer in layers)
