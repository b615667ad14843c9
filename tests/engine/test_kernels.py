"""The kernels against the torch code that they replace, and whole golden jobs through them."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from sensebatch.engine.bench import in_numbers, quantised_network, variant
from sensebatch.engine.decoding import (
    Choose,
    FastDecoder,
    PlainDecoder,
    decoding_operations,
)
from sensebatch.engine.model.attention import attend_each, runs_of, sdpa
from sensebatch.engine.model.kv_cache import (
    GenerationContext,
    KVCache,
    SmallImagesContext,
    Span,
    UnderstandingContext,
    prefix_table,
)
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import Operations, choose_operations, rms_norm
from sensebatch.engine.model.quantized import (
    NUMBERS,
    Numbers,
    Quantised,
    QuantisedLinear,
    quantise_rows,
)
from sensebatch.engine.model.rope import rotate_token_heads, token_rotary
from sensebatch.engine.model.runs import goes_together, table_of_runs
from sensebatch.engine.prompts import Prompt
from sensebatch.engine.sampling.text import Writing, decode_text
from sensebatch.engine.weights.loader import NetworkLoader, warm_up
from sensebatch.jobs import Precision, Stored
from sensebatch.plan.computation import is_tileable
from sensebatch.plan.passes import FEW_KEYS, SPLIT_QUERIES
from tests.engine.golden_model import build_network, build_runner, golden_step, infer, predict
from tests.golden_data import TOLERANCE, case_ids, golden_architecture, load_case, relative_error

pytest.importorskip("triton", reason="Triton has no build for this platform")

from sensebatch.engine.model import (
    attention_kernels,
    decode_kernels,
    descriptors,
    expert_kernels,
    int8_kernels,
    kernels,
    triton_operations,
)
from sensebatch.engine.model.attention_kernels import TILE_KEYS
from sensebatch.engine.model.triton_operations import RunOperations, TritonOperations

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 1e-5
FP8_STEP = 2**-3
"""A number between two of float8 may be rounded to either; they are a part in eight apart."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(actual.cpu(), expected.cpu()) < ROUNDING


def test_norm_of_rows_is_the_layers_norm() -> None:
    x, weight = noise(5, 24), noise(24)
    assert_equal(kernels.rms_norm(x, weight, EPS), rms_norm(x, weight, EPS))
    assert_equal(kernels.rms_norm(x[::2], weight, EPS), rms_norm(x[::2], weight, EPS))


@pytest.mark.parametrize("width", [20, kernels.SWIGLU_BLOCK + 48])
def test_swiglu_is_the_layers_activation(width: int) -> None:
    gate_up = noise(3, 2 * width)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_equal(kernels.swiglu(gate_up), F.silu(gate) * up)


def assert_quantised_alike(found: Quantised, expected: Quantised) -> None:
    (quantised, scales), (numbers, expected_scales) = found, expected
    assert_equal(scales, expected_scales)
    if numbers.dtype == torch.int8:
        # A number between two may become either where it was rounded otherwise before.
        assert quantised.dtype == torch.int8
        difference = (quantised.int() - numbers.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.02
        return
    # Triton's interpreter halves some numbers that float8 rounds up to a power of two.
    share = 1.0 if DEVICE == "cuda" else 0.9
    near = (quantised.float() - numbers.float()).abs() <= FP8_STEP * numbers.float().abs() + 2**-9
    assert near.float().mean() >= share


EIGHT_BITS = pytest.mark.parametrize("numbers", NUMBERS.values(), ids=[*NUMBERS])


@EIGHT_BITS
@pytest.mark.parametrize("normed", [True, False])
def test_rows_are_quantised_as_in_torch(normed: bool, numbers: Numbers) -> None:
    x, norm = noise(5, 240), noise(240)
    found = kernels.quantise_rows(x, numbers, norm if normed else None, EPS)
    expected = quantise_rows(rms_norm(x, norm, EPS) if normed else x, numbers)
    assert_quantised_alike(found, expected)


@EIGHT_BITS
def test_activations_are_quantised_as_in_torch(numbers: Numbers) -> None:
    gate_up = noise(3, 400)
    gate, up = gate_up.chunk(2, dim=-1)
    found = kernels.swiglu_quantised(gate_up, numbers)
    assert_quantised_alike(found, quantise_rows(F.silu(gate) * up, numbers))


SMALL_TILE = int8_kernels.Tile(tokens=32, outputs=16, inputs=64, stages=2, warps=4)


@pytest.mark.parametrize(
    ("tile", "described"), [(None, False), (SMALL_TILE, False), (SMALL_TILE, True)]
)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (77, 128), (33, 96)])
def test_int8_products_are_those_of_torch(
    tokens: int, width: int, tile: int8_kernels.Tile | None, described: bool
) -> None:
    product = partial(int8_kernels.product, tile=tile, described=described)
    numbers = NUMBERS[Stored.INT8]
    x, weight, residual = noise(tokens, width), noise(40, width), noise(tokens, 40)
    rows, (weight8, scale) = quantise_rows(x, numbers), quantise_rows(weight, numbers)
    expected = numbers.product(rows, weight8, scale[:, 0], torch.float32)
    found = product(rows, weight8, scale[:, 0], torch.float32)
    assert_equal(found, expected)
    kept = residual.clone()
    total = product(rows, weight8, scale[:, 0], torch.float32, kept)
    assert total is kept
    assert_equal(total, expected + residual)
    half = product(rows, weight8, scale[:, 0], torch.float16)
    assert torch.equal(half, found.half())


def test_a_quantised_layer_is_the_same_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Mock(wraps=int8_kernels.product)
    monkeypatch.setitem(triton_operations.PRODUCTS, torch.int8, launched)
    numbers, x, residual = NUMBERS[Stored.INT8], noise(9, 64), noise(9, 40)
    weight8, scale = quantise_rows(noise(40, 64), numbers)
    found = []
    for operations in (Operations(), TritonOperations()):
        layer = QuantisedLinear(64, 40, numbers, x.device, operations)
        layer.weight.copy_(weight8)
        layer.scale.copy_(scale[:, 0])
        total = layer.add_product(residual.clone(), x, in_place=True)
        found.append((layer(x), total))
    assert launched.call_count == 2
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("shared", [101_376, 166_912, 232_448, None])
@pytest.mark.parametrize("tokens", [1, int8_kernels.FEW_TOKENS, 4096])
def test_tiles_of_int8_products_fit_what_a_program_may_have(
    tokens: int, shared: int | None
) -> None:
    tile = int8_kernels.choose_tile(tokens, shared)
    assert shared is None or tile.shared_bytes < shared
    best = int8_kernels.choose_tile(tokens, None)
    assert tile == best or shared != 232_448


def test_kernels_do_without_descriptions_where_triton_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the versions that PyTorch 2.6 and 2.7 bring."""

    def fresh(module: ModuleType) -> Any:
        spec = importlib.util.find_spec(module.__name__)
        assert spec is not None
        assert spec.loader is not None
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
        return again

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
        assert fresh(descriptors).TensorDescriptor is None
    monkeypatch.setattr(descriptors, "TensorDescriptor", None)
    assert not fresh(expert_kernels).has_descriptors(torch.device("cuda"))
    alone, numbers = fresh(int8_kernels), NUMBERS[Stored.INT8]
    assert not alone._describes(torch.empty(4096, 4096, dtype=torch.int8, device="meta"))
    rows, (weight8, scale) = (quantise_rows(noise(count, 64), numbers) for count in (5, 40))
    found = alone.product(rows, weight8, scale[:, 0], torch.float32)
    assert_equal(found, numbers.product(rows, weight8, scale[:, 0], torch.float32))


def test_only_kernels_that_will_run_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(kernels, "warm_up", Mock())
    monkeypatch.setattr(int8_kernels, "warm_up", Mock())
    monkeypatch.setattr(decode_kernels, "warm_up", lambda *args: compiled.append(args[3]))
    monkeypatch.setattr(torch.cuda, "synchronize", Mock())
    for arch, precision, expected in (
        (golden_architecture("dense_fm"), None, [1, 64]),
        (golden_architecture("dense_fm"), Precision.FP8, [1, 64]),
        (golden_architecture("dense_fm"), Precision.INT8_ALL, [1, 64]),
        (replace(golden_architecture("dense_fm"), intermediate_size=100), None, []),
        (golden_architecture("moe"), None, [1, 64]),
    ):
        loader = NetworkLoader(
            arch=arch,
            source=Mock(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            fused=True,
            precision=precision,
        )
        loads = [Mock(batch_size=n, text_tokens=300) for n in (64, 100)]
        loads.append(Mock(batch_size=8, text_tokens=0))
        assert warm_up(loader, sdpa, loads) is not None
        assert compiled == expected
        compiled.clear()


def projected(tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    qkv = noise(tokens, (heads + 2 * kv_heads) * dim)
    return qkv, noise(2, dim // 2), noise(2, dim // 2)


def rotary_of(positions: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return token_rotary(
        positions.to(DEVICE), head_dim=dim, theta=5e6, theta_hw=1e4, dtype=torch.float32
    )


def normed_and_rotated(
    x: torch.Tensor, norm: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    return rotate_token_heads(rms_norm(x.unflatten(-1, (2, -1)), norm, EPS).flatten(-2), rotary)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (8, 1, 16)])
def test_heads_are_normed_and_rotated_as_in_the_layer(heads: int, kv_heads: int, dim: int) -> None:
    tokens = 5
    qkv, q_norm, k_norm = projected(tokens, heads, kv_heads, dim)
    rotary = rotary_of(torch.randint(0, 50, (3, tokens)), dim)
    keys, values = noise(tokens, kv_heads, dim), noise(tokens, kv_heads, dim)
    queries = kernels.norm_rotate(qkv, q_norm, k_norm, rotary, eps=EPS, k_TKE=keys, v_TKE=values)
    q, k, v = qkv.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)
    assert_equal(queries, normed_and_rotated(q, q_norm, rotary))
    assert_equal(keys, normed_and_rotated(k, k_norm, rotary))
    assert torch.equal(values, v)


def test_decoded_keys_go_to_their_places_in_the_cache() -> None:
    heads, kv_heads, dim, room = 4, 2, 16, 6
    qkv, q_norm, k_norm = projected(2, heads, kv_heads, dim)
    rotary = rotary_of(torch.arange(9).repeat(3, 1), dim)
    cache = torch.zeros(2, 2, room, kv_heads, dim, device=DEVICE)
    angles, tokens = torch.tensor([7, 3]), torch.tensor([5, 0])
    places = (torch.arange(2) * room + tokens) * kv_heads * dim
    kernels.norm_rotate(
        qkv,
        q_norm,
        k_norm,
        rotary,
        eps=EPS,
        k_TKE=cache[0],
        v_TKE=cache[1],
        rotary_rows_T=angles.to(DEVICE),
        places_T=places.to(DEVICE),
    )
    _, k, v = qkv.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)
    chosen = rotary[0][angles], rotary[1][angles]
    expected = torch.zeros_like(cache)
    expected[0, torch.arange(2), tokens] = normed_and_rotated(k, k_norm, chosen)
    expected[1, torch.arange(2), tokens] = v
    assert_equal(cache, expected)


@pytest.mark.parametrize(("sequences", "height"), [(1, 96), (2, 96), (19, 96), (2, 4160)])
def test_product_of_few_rows_takes_activation_and_residual_along(
    sequences: int, height: int
) -> None:
    x, weight, residual = noise(sequences, 64), noise(height, 64), noise(sequences, height)
    expected = F.linear(x, weight)
    assert_equal(decode_kernels.product(x, weight), expected)
    assert_equal(decode_kernels.product(x, weight, residual=residual), expected + residual)
    gate, up = expected.chunk(2, dim=-1)
    assert_equal(decode_kernels.product(x, weight, swiglu=True), F.silu(gate) * up)


@EIGHT_BITS
@pytest.mark.parametrize(("sequences", "height"), [(1, 96), (19, 96), (2, 4160)])
def test_product_of_few_rows_takes_8_bit_weights_as_they_are(
    sequences: int, height: int, numbers: Numbers
) -> None:
    x, residual = noise(sequences, 64), noise(sequences, height)
    weight8, scale = quantise_rows(noise(height, 64), numbers)
    expected = F.linear(x, weight8.float() * scale)
    quantised = weight8, scale[:, 0]
    assert_equal(decode_kernels.product(x, *quantised), expected)
    assert_equal(decode_kernels.product(x, *quantised, residual=residual), expected + residual)
    gate, up = expected.chunk(2, dim=-1)
    assert_equal(decode_kernels.product(x, *quantised, swiglu=True), F.silu(gate) * up)


SHARED_BYTES = {86: 101_376, 90: 232_448}
"""Most that a program may have, by compute capability."""


@pytest.mark.parametrize(
    ("capability", "item_bytes", "sequences"), [(86, 2, 16), (86, 2, 64), (90, 4, 64)]
)
@pytest.mark.parametrize(("height", "swiglu"), [(4096, False), (6144, False), (12288, True)])
def test_tiles_fit_what_a_program_may_have(
    capability: int, item_bytes: int, sequences: int, height: int, swiglu: bool
) -> None:
    shared = SHARED_BYTES[capability]
    rows, block, stages = decode_kernels.tile(
        height, sequences, swiglu=swiglu, item_bytes=item_bytes, shared_bytes=shared
    )
    weights = rows * (2 if swiglu else 1)
    assert stages * (weights + sequences) * block * item_bytes < shared
    assert min(rows, block) >= decode_kernels.LEAST_ROWS


def test_tiles_are_the_best_ones_on_a_large_gpu() -> None:
    for height, swiglu in ((4096, False), (6144, False), (12288, True)):
        sizes = [
            decode_kernels.tile(height, 64, swiglu=swiglu, item_bytes=2, shared_bytes=limit)
            for limit in (None, SHARED_BYTES[90])
        ]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("capability", [86, 90])
def test_kernels_compile_for_gpus_without_one(tmp_path: Path, capability: int) -> None:
    """What Triton's interpreter lets pass, its compiler may not; nor may a warning reach people."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    arguments = [str(capability), str(SHARED_BYTES[capability])]
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.engine.compile_kernels", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    shared = json.loads(ended.stdout)
    assert shared.keys() == {
        *("_rms_norm", "_swiglu", "_norm_rotate", "_vector_product", "_matrix_product"),
        *("_attend_token", "_attend_run", "_attend_runs", "_combine"),
        *("_rms_norm_quantised", "_swiglu_quantised", "_int8_product"),
        *("_route", "_place", "_gate_up", "_down", "_add_parts"),
        *(("_gate_up_described", "_down_described") if capability >= 90 else ()),
    }
    assert max(shared.values()) <= SHARED_BYTES[capability]


@pytest.mark.parametrize("room", [40, 1500])
def test_a_new_token_attends_to_everything_before_it(room: int) -> None:
    heads, kv_heads, dim = 8, 2, 16
    # What lies after a sequence must not matter.
    cache = torch.full((2, 3, room, kv_heads, dim), float("nan"), device=DEVICE)
    lengths = torch.tensor([0, 17, room - 1])
    for sequence, length in enumerate(lengths.tolist()):
        cache[:, sequence, : length + 1] = noise(2, length + 1, kv_heads, dim)
    queries = noise(3, heads, dim)
    out = attention_kernels.attend_token(queries, cache[0], cache[1], lengths.to(DEVICE))
    for sequence, length in enumerate(lengths.tolist()):
        keys, values = cache[:, sequence, : length + 1].transpose(1, 2).unbind(0)
        expected = F.scaled_dot_product_attention(
            queries[sequence][:, None], keys, values, enable_gqa=True
        )
        assert_equal(out[sequence], expected.flatten())


RUNS = [
    *((1, 1), (1, 65), (1, 1500), (5, 5), (7, 300)),
    *((SPLIT_QUERIES, 200), (SPLIT_QUERIES + 1, SPLIT_QUERIES + 1), (SPLIT_QUERIES + 5, 200)),
]
"""Queries and keys of runs on both sides of where keys are split."""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), RUNS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 16), (2, 2, 32)])
def test_a_run_attends_as_torch_does(
    heads: int, kv_heads: int, dim: int, queries: int, keys: int, causal: bool
) -> None:
    q, room = noise(queries, heads, dim), noise(2, keys + 9, kv_heads, dim)
    # What lies after the keys must not matter.
    room[:, keys:] = float("nan")
    k, v = room[:, :keys]
    out = attention_kernels.attend_run(q, k, v, causal)
    assert_equal(out, sdpa(q, k, v, causal))


def cached(length: int, room: int, kv_heads: int, dim: int) -> KVCache:
    """Returns a cache of one layer; what lies after its tokens must not matter."""
    cache = KVCache(
        num_layers=1,
        num_kv_heads=kv_heads,
        head_dim=dim,
        dtype=torch.float32,
        device=torch.device(DEVICE),
    )
    cache.reserve(room)
    for part in cache.upto(0, room):
        part[:length] = noise(length, kv_heads, dim)
        part[length:] = float("nan")
    cache.advance(length, length)
    return cache


def test_prompts_attend_at_once_as_they_do_alone() -> None:
    heads, kv_heads, dim = 8, 2, 16
    # New tokens, tokens before them, and whether they are an image.
    prompts = [
        *((SPLIT_QUERIES + 1, 0, False), (200, 31, False), (80, 7, True)),
        *((3, 70, False), (1, 0, False), (5, FEW_KEYS, False), (9, 4, True)),
    ]
    q = noise(sum(new for new, _, _ in prompts), heads, dim)
    caches = [cached(new + before, new + before + 5, kv_heads, dim) for new, before, _ in prompts]
    out, expected = torch.full_like(q, float("nan")), torch.full_like(q, float("nan"))
    together, long_rows, row = [], 0, 0
    for (new, before, is_image), cache in zip(prompts, caches, strict=True):
        (run,) = runs_of([(0, new, is_image)], before)
        rows = slice(row, row + new)
        row += new
        if goes_together(run):
            together.append((cache.addresses, rows.start, run))
            attend = attention_kernels.attend_run if new > SPLIT_QUERIES else sdpa
            attend_each(attend, q[rows], *cache.read(0), [run], expected[rows])
            long_rows += new if new > SPLIT_QUERIES else 0
    assert len(together) == len(prompts) - 1
    table = table_of_runs(together, torch.device(DEVICE))
    attention_kernels.attend_runs(
        q, None, table[0], num_tokens=200, num_kv_heads=kv_heads, out_THE=out
    )
    assert torch.equal(out[:long_rows], expected[:long_rows])
    assert torch.equal(out.isnan(), expected.isnan())
    assert_equal(out.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("tokens", [48, 2 * TILE_KEYS])
def test_images_attend_at_once_as_they_do_alone(tokens: int) -> None:
    heads, kv_heads, dim = 8, 2, 16
    lengths = [0, 130, 1]
    caches = [cached(length, length + 3, kv_heads, dim) for length in lengths]
    caches.append(caches[1])
    q = noise(len(caches) * tokens, heads, dim)
    k, v = noise(2, len(caches) * tokens, kv_heads, dim)
    table = prefix_table(caches)[0]
    out = RunOperations().of_images(q, (k, v), table)
    for image, cache in enumerate(caches):
        rows = slice(image * tokens, (image + 1) * tokens)
        alone = RunOperations().of_images(q[rows], (k[rows], v[rows]), table[image : image + 1])
        assert torch.equal(out[rows], alone)
        keys, values = (
            torch.cat(both) for both in zip((k[rows], v[rows]), cache.read(0), strict=True)
        )
        assert_equal(out[rows], sdpa(q[rows], keys, values, False))


def test_prompts_of_a_pass_attend_at_once_as_they_do_one_by_one() -> None:
    heads, kv_heads, dim = 8, 2, 16
    sizes, before = [70, 3, 90], [5, 0, 600]
    total = sum(sizes)
    q, (k, v) = noise(total, heads, dim), noise(2, total, kv_heads, dim)
    caches = [cached(length, length, kv_heads, dim) for length in before]
    found = []
    for operations in (RunOperations(), None):
        spans = [
            Span(cache=cache.fork(), num_tokens=size, segments=[(0, size, False)])
            for cache, size in zip(caches, sizes, strict=True)
        ]
        context = UnderstandingContext(spans, sdpa, operations)
        found.append(context.attend(0, slice(0, total), q, k, v))
    assert_equal(found[0], found[1])


def test_small_images_of_every_part_see_their_own_prefixes() -> None:
    heads, kv_heads, dim, tokens = 8, 2, 16, 48
    caches = [cached(length, length, kv_heads, dim) for length in (7, 1, 90, 20, 33)]
    parts = [slice(0, 2), slice(2, 5)]
    q = noise(len(caches) * tokens, heads, dim)
    k, v = noise(2, len(q), kv_heads, dim)
    contexts = (
        SmallImagesContext(prefix_table(caches), tokens, parts, RunOperations()),
        GenerationContext(caches, tokens, parts, sdpa),
    )
    for part in contexts[0].parts(len(q)):
        found, expected = (
            context.attend(0, part, q[part], k[part], v[part]) for context in contexts
        )
        assert_equal(found, expected)


@EIGHT_BITS
@pytest.mark.parametrize("sequences", [1, 3])
def test_warming_up_runs_every_kernel(sequences: int, numbers: Numbers) -> None:
    arch = golden_architecture("dense_fm")
    TritonOperations().warm_up(arch, torch.float32, torch.device(DEVICE), numbers)
    for chosen in (None, numbers):
        decode_kernels.warm_up(arch, torch.float32, torch.device(DEVICE), sequences, chosen)


def tileable_cases(*kinds: str) -> list[tuple[str, str]]:
    return [ids for ids in case_ids(*kinds) if is_tileable(golden_architecture(ids[0]))]


interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the golden networks are on the CPU")


@interpreted
@pytest.mark.parametrize(("config", "name"), tileable_cases("gen_step"))
def test_fused_networks_predict_the_reference_velocity(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case, fused=True)
    with infer():
        step = golden_step(runner, case)
        v = step.velocity(predict(runner, step))
    assert relative_error(v, case.tensor("v_pred")) < TOLERANCE


def second_for_odd_ones(logits_SV: torch.Tensor, sequences: Sequence[int]) -> list[int]:
    """Returns the most probable token, of every other sequence the one after it."""
    found = zip(logits_SV.topk(2).indices.tolist(), sequences, strict=True)
    return [best[sequence % 2] for best, sequence in found]


@interpreted
@pytest.mark.parametrize(
    ("config", "choose"), [("dense_fm", None), ("dense_fm", second_for_odd_ones), ("moe", None)]
)
def test_decoding_together_in_small_rooms_says_what_each_says_alone(
    monkeypatch: pytest.MonkeyPatch, config: str, choose: Choose | None
) -> None:
    """Sequences end at different lengths, and the buffer is replaced on the way."""
    case = load_case(config, next(name for ids, name in case_ids("think") if ids == config))
    prompts = [(5, 9, 2), (7,) * 6, (3, 1, 4, 1, 5, 9, 2, 6)]
    limits = {0: 4, 1: 2, 2: 7}

    def decode(fused: bool) -> list[list[int]]:
        runner = build_runner(case, fused=fused)
        extensions = [runner.new_extension(Prompt(token_ids=ids)) for ids in prompts]
        caches = [extension.cache for extension in extensions]
        first = dict(enumerate(runner.choose(runner.extend(extensions))))
        step = runner.text_step(caches, max(limits.values()), choose)
        decoded = decode_text(Writing(first, limits, stop_before=frozenset()), step)
        for index, cache in enumerate(caches):
            assert cache.length == len(prompts[index]) + limits[index] == cache.next_t
        following = runner.choose(runner.append_tokens([(cache, [1, 2]) for cache in caches]))
        return [*(decoded[index].tokens for index in limits), following]

    monkeypatch.setattr("sensebatch.engine.decoding.ROOM_TOKENS", 4)
    with infer():
        assert decode(fused=True) == decode(fused=False)


@interpreted
def test_text_is_decoded_with_8_bit_weights_and_tokens_as_they_are() -> None:
    case = load_case("dense_fm", "prefix_text")
    network = build_network("dense_fm", fused=True)
    quantised = quantised_network(network, Precision.INT8_ALL)

    @contextmanager
    def rounded(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Lends a layer of the same weights in float32."""
        twin = copy.deepcopy(layer)
        with quantised_layer(layer) as source:
            for name, linear in source.named_modules():
                if isinstance(linear, QuantisedLinear):
                    weight = linear.weight.float() * linear.scale[:, None]
                    twin.get_parameter(f"{name}.weight").copy_(weight)
        yield twin

    quantised_layer = in_numbers(NUMBERS[Stored.INT8])
    found: list[torch.Tensor] = []

    def choose(logits_SV: torch.Tensor, sequences: Sequence[int]) -> list[int]:
        found.append(logits_SV.clone())
        return [0 for _ in sequences]

    for decoded in (quantised, variant(network, rounded)):
        runner = build_runner(case, fused=True)
        extensions = [runner.new_extension(Prompt(token_ids=ids)) for ids in ((5, 9, 2), (7,))]
        with infer():
            runner.extend(extensions)
            operations = decoding_operations(decoded)
            assert operations is not None
            caches = [extension.cache for extension in extensions]
            decoder = FastDecoder(decoded, operations, caches, 2, as_graph=False, choose=choose)
            decoder.step([(0, 3), (1, 4)])
    assert_equal(*found)


@interpreted
def test_only_fused_networks_decode_fast() -> None:
    for config, fused, expected in (
        ("dense_fm", True, FastDecoder),
        ("dense_fm", False, PlainDecoder),
        ("moe", True, FastDecoder),
        ("moe", False, PlainDecoder),
    ):
        if not is_tileable(golden_architecture(config)):
            continue
        case = load_case(config, "prefix_text")
        runner = build_runner(replace(case, params=case.params), fused=fused)
        extension = runner.new_extension(Prompt(token_ids=(1, 2)))
        with infer():
            runner.extend([extension])
            decoder = runner.text_step([extension.cache], 3).__closure__
        assert decoder is not None
        assert any(isinstance(cell.cell_contents, expected) for cell in decoder)
        assert (build_network(config, fused=fused).operations.decoding is not None) == fused


@interpreted
def test_a_step_is_captured_only_where_its_kernels_have_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A larger room may ask for other kernels, which cannot be loaded while a graph is made."""
    case = load_case("dense_fm", "prefix_text")
    runner = build_runner(case, fused=True)
    extension = runner.new_extension(Prompt(token_ids=(1, 2, 3)))
    eager: list[int] = []
    captured: list[int] = []
    seen = eager

    def watched(q: torch.Tensor, keys: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        seen.append(keys.shape[1])
        return q.flatten(1)

    def product(
        x: torch.Tensor, weight: torch.Tensor, _: None, *, swiglu: bool = False, **__: Any
    ) -> torch.Tensor:
        return x.new_zeros(x.shape[0], weight.shape[0] // (2 if swiglu else 1))

    @contextmanager
    def capture(*_: Any, **__: Any) -> Iterator[None]:
        nonlocal seen
        seen = captured
        yield
        seen = eager

    monkeypatch.setattr(attention_kernels, "attend_token", watched)
    monkeypatch.setattr(decode_kernels, "product", product)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr("sensebatch.engine.decoding.ROOM_TOKENS", 2)
    with infer():
        runner.extend([extension])
        operations = decoding_operations(runner.network)
        assert operations is not None
        decoder = FastDecoder(runner.network, operations, [extension.cache], 4, as_graph=True)
        for _ in range(4):
            decoder.step([(0, 1)])
    assert len(set(captured)) == 2
    assert set(captured) == set(eager)


@pytest.mark.parametrize("sizes", [{"hidden_size": 72}, {"intermediate_size": 100}])
def test_matrices_that_no_tile_fits_are_decoded_plainly(sizes: dict[str, Any]) -> None:
    arch = golden_architecture("dense_fm")
    with torch.device("meta"):
        operations = choose_operations(fused=True)
        assert decoding_operations(Network(arch, operations)) is not None
        assert decoding_operations(Network(replace(arch, **sizes), operations)) is None
