"""The same bytes each time on a GPU, with memory in disorder; whole runs: `doctor --verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sensebatch.checkpoint.architecture import (
    OFFICIAL_8B,
    HeadKind,
    Moe,
    parse_architecture,
)
from sensebatch.engine.device.fragments import fragment
from sensebatch.engine.device.runtime import new_attention, resolve_attention
from sensebatch.engine.model.attention import Attention
from sensebatch.engine.model.kv_cache import KVCache, prefix_table
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import choose_operations
from sensebatch.engine.model.patchify import HEAD_MODULES
from sensebatch.engine.model.quantized import NUMBERS, quantise_rows
from sensebatch.engine.model.transformer import SparseMlp
from sensebatch.engine.prompts import Grid, ImageSpan, Prompt
from sensebatch.engine.runner import Runner
from sensebatch.jobs import Stored
from tests.golden_data import ByteTokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROUNDS = 14
CUDA = torch.device("cuda")
LARGE = parse_architecture(OFFICIAL_8B)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).bfloat16()


def attention(fused: bool) -> Attention:
    return new_attention(resolve_attention("auto", "cuda", "bfloat16"), "cuda", fused=fused)


def results(compute: Callable[[], Tensor]) -> set[bytes]:
    """Returns the different results of a computation, repeated among other fragments of memory."""
    found = set()
    for seed in range(ROUNDS):
        held = fragment(seed)
        found.add(compute().float().cpu().numpy().tobytes())
        del held
        if seed % 3 == 0:
            torch.cuda.empty_cache()
    return found


def prefix(length: int) -> KVCache:
    """Returns a cache of one layer."""
    cache = KVCache(
        num_layers=1,
        num_kv_heads=LARGE.num_kv_heads,
        head_dim=LARGE.head_dim,
        dtype=torch.bfloat16,
        device=CUDA,
    )
    cache.reserve(length)
    for part in cache.upto(0, length):
        part.copy_(noise(*part.shape))
    cache.advance(length, length)
    return cache


@pytest.mark.parametrize("side", [16, 12])
def test_small_images_attend_at_once_as_they_do_alone(side: int) -> None:
    from sensebatch.engine.model.triton_operations import RunOperations

    tokens, caches = side * side, [prefix(length) for length in (300, 17, 1, 90)]
    caches += [caches[0]] * 12
    q = noise(len(caches) * tokens, LARGE.num_heads, LARGE.head_dim)
    k, v = noise(2, len(q), LARGE.num_kv_heads, LARGE.head_dim)
    table = prefix_table(caches)[0]
    alone = [
        RunOperations().of_images(q[rows], (k[rows], v[rows]), table[image : image + 1])
        for image in range(len(caches))
        for rows in [slice(image * tokens, (image + 1) * tokens)]
    ]
    (found,) = results(lambda: RunOperations().of_images(q, (k, v), table))
    assert found == torch.cat(alone).float().cpu().numpy().tobytes()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [
        *((1, 261, True), (1, 4101, True), (7, 4107, True), (70, 4140, True), (300, 300, True)),
        *((256, 556, False), (1024, 1344, False), (4096, 4416, False)),
    ],
)
def test_attention_gives_one_result(fused: bool, queries: int, keys: int, causal: bool) -> None:
    attend = attention(fused)
    q = noise(queries, LARGE.num_heads, LARGE.head_dim)
    k, v = (noise(keys, LARGE.num_kv_heads, LARGE.head_dim) for _ in range(2))
    # A number that lies close to two roundings shows what others hide; so, many more of them.
    for turn in range(5):
        turned = q.roll(turn, -1)

        def attended(q: Tensor = turned) -> Tensor:
            return attend(q.clone(), k.clone(), v.clone(), causal)

        assert len(results(attended)) == 1


def small(fused: bool) -> Network:
    """Returns a network with the heads of the 8B model and few channels."""
    arch = replace(LARGE, hidden_size=512, intermediate_size=1024, num_layers=8, vocab_size=512)
    network = Network(arch, choose_operations(fused=fused)).requires_grad_(False).eval()
    network = network.to(CUDA, torch.bfloat16)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(1)
    return network


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("rows", "after"), [(64, 7), (64, 1), (16, 1), (16, 40)])
def test_a_prompt_with_text_after_an_image_gives_one_result(
    fused: bool, rows: int, after: int
) -> None:
    """What edits and stories read; it gave up to 9 results in 12 times."""
    network = small(fused)
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=attention(fused))
    tokens = rows * rows
    prompt = Prompt(
        token_ids=(5, 6, 7, 8, *[9] * tokens, *range(10, 10 + after)),
        images=(ImageSpan(4, Grid(rows, rows)),),
    )
    embeds = noise(tokens, network.arch.hidden_size)

    def read() -> Tensor:
        return runner.extend([runner.new_extension(prompt, (embeds,))])

    assert len(results(read)) == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("tokens", "experts"), [(1, 128), (16, 128), (300, 128), (1024, 32)])
def test_sparse_blocks_give_one_result(fused: bool, tokens: int, experts: int) -> None:
    width, inner = 1024, 256
    moe = Moe(
        num_experts=experts,
        num_experts_per_tok=8,
        intermediate_size=inner,
        norm_topk_prob=True,
        sparse_layers=(True,),
    )
    block = SparseMlp(width, moe, choose_operations(fused=fused)).to(CUDA, torch.bfloat16)
    for parameter in block.requires_grad_(False).parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5)
    x = noise(tokens, width)
    assert len(results(lambda: block.add_to(x.clone(), x.clone(), in_place=True))) == 1


@pytest.mark.parametrize("tokens", [1, 17, 512, 513, 4096])
def test_int8_products_are_torchs_and_those_of_a_token_alone(tokens: int) -> None:
    """Their sums are exact, so kernels and tiles change nothing."""
    numbers = NUMBERS[Stored.INT8]
    weight8, scale = quantise_rows(noise(1536, 1024), numbers)
    rows, scales = quantise_rows(noise(tokens, 1024), numbers)
    residual = noise(tokens, 1536)

    def total(fused: bool, first: int = 0) -> Tensor:
        operations = choose_operations(fused=fused)
        given = rows[first:].contiguous(), scales[first:].contiguous()
        return operations.scaled_product(
            given, weight8, scale[:, 0].contiguous(), torch.float32, residual[first:].float()
        )

    assert len(results(lambda: total(True))) == 1
    assert torch.equal(total(True, tokens - 1), total(True)[-1:])
    torch.testing.assert_close(total(True), total(False), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", list(HeadKind))
@pytest.mark.parametrize(("side", "images"), [(512, 4), (1024, 3), (2048, 1), (4096, 1)])
def test_image_heads_give_one_result(kind: HeadKind, side: int, images: int) -> None:
    arch = replace(LARGE, head=kind)
    head = HEAD_MODULES[kind](arch).to(CUDA, torch.bfloat16).requires_grad_(False)
    x_BND = noise(images, (side // 32) ** 2, arch.hidden_size)
    assert len(results(lambda: head(x_BND.clone(), side, side))) == 1
