"""Layers that are streamed are replayed where they are, to the bytes of their launches."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import OFFICIAL_8B, Architecture, Moe, parse_architecture
from sensebatch.engine import graphs
from sensebatch.engine.decoding import FastDecoder
from sensebatch.engine.device.runtime import new_attention, resolve_attention
from sensebatch.engine.graphs import Compute, CudaRecorder, Recorder, Recordings
from sensebatch.engine.memory.pool import Pool
from sensebatch.engine.runner import PassLimits, Runner
from sensebatch.engine.sampling.text import decode_text
from sensebatch.engine.weights.loader import NetworkLoader
from sensebatch.engine.weights.residency import Residency
from sensebatch.engine.weights.sources import SyntheticWeights
from sensebatch.engine.writing import Text
from sensebatch.jobs import Precision
from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import recorded_bytes
from tests.engine.golden_model import infer
from tests.engine.test_texts_together import text_after
from tests.engine.weights.test_residency import make_placement
from tests.golden_data import ByteTokenizer, golden_architecture

pytest.importorskip("triton", reason="Triton has no build for this platform")

HAS_GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(HAS_GPU, reason="needs kernels that are interpreted")
NUM_LAYERS, ROOM, LENGTHS = (8, 4, (21, 34)) if HAS_GPU else (3, 3, (5, 9))
"""Kernels that are interpreted take their time."""
KEPT = (0, 0, 1, 3, 5, 2) if HAS_GPU else (0, 0, 1)
"""Blocks that stay while the texts have each of their rooms. The second of two rooms with as many
finds layers where the first did; an odd number of others makes them change places."""
TEXT_BYTES = 1 << 30
PROMPTS: list[list[tuple[int, ...]]] = [[(5, 9), (7,)], [(3,)]]
"""Those of each batch."""


class StandIn:
    """Computes again what was recorded, if all that a graph would find is where it was."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0
        self.layers: list[weakref.ref[nn.Module]] = []

    def record(self, compute: Compute) -> Compute:
        assert isinstance(compute, partial)
        layer, cache = compute.args
        owner: FastDecoder = compute.func.__self__  # type: ignore[attr-defined]
        decoder, there = weakref.ref(owner), weakref.ref(layer)
        found = addresses(owner, layer, cache)
        self.layers.append(there)
        self.num_recorded += 1

        def replay() -> None:
            one, lent = decoder(), there()
            assert one is not None
            assert lent is not None, "its memory was given back"
            assert addresses(one, lent, cache) == found
            assert any(room[0].data_ptr() == cache[0].data_ptr() for room in rooms(one))
            one._through(lent, cache)
            self.num_replayed += 1

        return replay


def rooms(decoder: FastDecoder) -> list[tuple[Tensor, Tensor]]:
    assert decoder._room is not None
    return [decoder._room.layer(index) for index in range(NUM_LAYERS)]


def addresses(decoder: FastDecoder, layer: nn.Module, cache: Sequence[Tensor]) -> list[int]:
    tensors = [*layer.parameters(), *cache, *decoder._rotary, decoder._x_SD]
    tensors += [decoder._angles_S, decoder._places_S, decoder._lengths_S]
    return [tensor.data_ptr() for tensor in tensors]


def sparse(arch: Architecture) -> Architecture:
    """Returns an architecture with sparse blocks in every other layer of text."""
    moe = Moe(
        num_experts=32 if HAS_GPU else 4,
        num_experts_per_tok=8 if HAS_GPU else 2,
        intermediate_size=256 if HAS_GPU else 64,
        norm_topk_prob=True,
        sparse_layers=tuple(index % 2 == 1 for index in range(arch.num_layers)),
    )
    return replace(arch, understanding_moe=moe)


def streamed_runner(
    arch: Architecture, device: torch.device, dtype: torch.dtype, precision: Precision | None = None
) -> Runner:
    """Returns a runner whose weights pass through a ring, but for those that texts leave room."""
    loader = NetworkLoader(
        arch=arch,
        source=SyntheticWeights(dtype),
        device=device,
        dtype=dtype,
        fused=True,
        precision=precision,
    )
    network, residency = loader.load(make_placement(2))
    backend = resolve_attention("auto", device.type, str(dtype).removeprefix("torch."))
    return Runner(
        network=network,
        tokenizer=ByteTokenizer(),
        attention=new_attention(backend, device.type, fused=True),
        weights=residency,
        limits=PassLimits(text_bytes=TEXT_BYTES),
    )


@pytest.fixture
def sized_rooms(monkeypatch: pytest.MonkeyPatch) -> Callable[[Runner], None]:
    """Returns what gives a runner small rooms, beside which other blocks stay each time."""

    def prepare(runner: Runner) -> None:
        residency = runner._weights
        assert isinstance(residency, Residency)
        of_layer = residency._buffer_bytes(3) - residency._buffer_bytes(2)
        kept = itertools.cycle(KEPT)

        def left(*_: object) -> int:
            return next(kept) * of_layer

        monkeypatch.setattr("sensebatch.engine.writing.left_bytes", left)
        monkeypatch.setattr("sensebatch.plan.passes.TEXT_ROOM_TOKENS", ROOM)
        monkeypatch.setattr("sensebatch.engine.decoding.ROOM_TOKENS", ROOM)
        if not HAS_GPU:
            monkeypatch.setattr("sensebatch.engine.model.attention_kernels.ATTENTION_SPLITS", 2)

    return prepare


def content(text: Text) -> list[Any]:
    cached = [
        tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        for cache in text.caches
        for layer in range(cache.num_layers)
        for tensor in cache.read(layer)
    ]
    return [[decoded.tokens for decoded in text.writing.decoded.values()], cached]


def read(runner: Runner) -> list[Text]:
    with runner.prefilling(decodes=True):
        return [text_after(runner, *batch) for batch in zip(PROMPTS, LENGTHS, strict=True)]


def written(runner: Runner) -> list[list[Any]]:
    """Returns what texts of several batches come to that are written together."""
    texts = read(runner)
    runner.write(texts)
    return [content(text) for text in texts]


def stepped(runner: Runner) -> list[list[Any]]:
    """Returns the same, but each batch is written alone with the blocks that stay anyway."""
    texts = read(runner)
    for text in texts:
        with runner.decoding():
            decode_text(text.writing, runner.text_step(text.caches, text.writing.most_tokens))
    return [content(text) for text in texts]


def use(monkeypatch: pytest.MonkeyPatch, recorder: Recorder | None) -> None:
    monkeypatch.setattr(graphs, "new_recorder", lambda _: recorder)


@pytest.fixture
def _inference() -> Iterator[None]:
    with infer():
        yield


def test_what_is_done_with_a_module_is_recorded_once_until_something_moves() -> None:
    recorder = Mock()
    recordings = Recordings(recorder)
    first, second = nn.Identity(), nn.Identity()
    for module, index in ((first, 0), (first, 0), (first, 1), (second, 0), (first, 1)):
        recordings.run(module, index, recorder.compute(module, index))
    assert recorder.recorded == [(first, 0), (first, 1), (second, 0)]
    assert recorder.computed == [(first, 0), (first, 0), (first, 1), (second, 0), (first, 1)]
    recordings.clear()
    recordings.run(first, 0, recorder.compute(first, 0))
    assert recorder.recorded[3:] == [(first, 0)]


class Mock:
    """Records what it is given, by module and number."""

    def __init__(self) -> None:
        self.recorded: list[tuple[nn.Module, int]] = []
        self.computed: list[tuple[nn.Module, int]] = []

    def record(self, compute: Compute) -> Compute:
        assert isinstance(compute, partial)
        self.recorded.append(compute.args[0])
        return compute

    def compute(self, module: nn.Module, index: int) -> Compute:
        return partial(self.computed.append, (module, index))


def test_a_module_that_is_gone_is_not_replayed() -> None:
    """Another one may come to lie at its address."""
    computed: list[int] = []

    class Numbered:
        num_recorded = 0

        def record(self, _: Compute) -> Compute:
            self.num_recorded += 1
            return partial(computed.append, self.num_recorded)

    recordings = Recordings(Numbered())
    for number in range(1, 6):
        module = nn.Identity()
        there = weakref.ref(module)
        for _ in range(2):
            recordings.run(module, 0, lambda: None)
        assert computed == [number, number]
        computed.clear()
        del module
        assert there() is None


class Capture:
    """A CUDA graph; an error breaks its capture off."""

    def __init__(self) -> None:
        self.is_open = self.is_broken = False

    def capture_begin(self, **_: object) -> None:
        self.is_open = True

    def capture_end(self) -> None:
        self.is_open = False
        if self.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        """Computes nothing."""


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Returns what a recorder captures next, without a device."""
    only = Capture()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: only)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(graphs, "_recording_stream", lambda _: None)
    return only


def test_what_breaks_a_recording_off_is_what_is_raised(capture: Capture) -> None:
    def compute() -> None:
        capture.is_broken = True
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorder = CudaRecorder(torch.device("cuda"))
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(compute)
    assert not capture.is_open
    assert gc.isenabled()


def test_nothing_is_collected_while_a_graph_is_recorded(capture: Capture) -> None:
    """What frees graphs, kernels and pinned memory is not allowed then."""
    freed: list[bool] = []

    class Cycle:
        def __init__(self) -> None:
            self.own = self

        def __del__(self) -> None:
            freed.append(capture.is_open)

    def compute() -> None:
        Cycle()
        # More than the collector waits for.
        assert len([[] for _ in range(100_000)]) > gc.get_threshold()[0]

    recorder = CudaRecorder(torch.device("cuda"))
    recorder.record(compute)
    gc.collect()
    assert freed == [False]
    assert gc.isenabled()


@interpreted
@pytest.mark.slow
@pytest.mark.usefixtures("_inference")
@pytest.mark.parametrize("of", [replace, sparse], ids=["dense", "sparse"])
def test_replayed_layers_write_what_launches_write(
    monkeypatch: pytest.MonkeyPatch,
    sized_rooms: Callable[[Runner], None],
    of: Callable[[Architecture], Architecture],
) -> None:
    arch = of(replace(golden_architecture("dense_fm"), num_layers=NUM_LAYERS))
    runner = streamed_runner(arch, torch.device("cpu"), torch.float32)
    sized_rooms(runner)
    use(monkeypatch, None)
    expected = written(runner)
    recorder = StandIn()
    use(monkeypatch, recorder)
    give = Pool.give
    gc.disable()

    def watched(self: Pool, memory: Tensor) -> None:
        assert not any(layer() for layer in recorder.layers), "recordings keep memory"
        give(self, memory)

    monkeypatch.setattr(Pool, "give", watched)
    try:
        assert written(runner) == expected
    finally:
        gc.enable()
    # A text's first step is launched; a layer comes to lie in at most two places.
    assert recorder.num_replayed == NUM_LAYERS * sum(length - 1 for length in LENGTHS)
    num_rooms = sum(-(-length // ROOM) for length in LENGTHS)
    assert NUM_LAYERS < recorder.num_recorded <= 2 * NUM_LAYERS * num_rooms


@interpreted
@pytest.mark.slow
@pytest.mark.usefixtures("_inference")
def test_a_batch_alone_is_replayed_where_weights_do_not_all_stay(
    monkeypatch: pytest.MonkeyPatch, sized_rooms: Callable[[Runner], None]
) -> None:
    arch = replace(golden_architecture("dense_fm"), num_layers=NUM_LAYERS)
    runner = streamed_runner(arch, torch.device("cpu"), torch.float32)
    sized_rooms(runner)
    use(monkeypatch, None)
    expected = stepped(runner)
    recorder = StandIn()
    use(monkeypatch, recorder)
    assert stepped(runner) == expected
    assert recorder.num_replayed > recorder.num_recorded > 0


LARGE = replace(parse_architecture(OFFICIAL_8B), num_layers=2, vocab_size=512)
NARROW = replace(LARGE, hidden_size=512, intermediate_size=1024, num_layers=NUM_LAYERS)
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("_inference")
@pytest.mark.parametrize(
    ("arch", "precision"),
    [(NARROW, None), (NARROW, Precision.INT8_ALL), (sparse(NARROW), None)],
    ids=["dense", "int8", "sparse"],
)
@pytest.mark.parametrize("write", [written, stepped])
def test_graphs_write_what_launches_write(
    monkeypatch: pytest.MonkeyPatch,
    sized_rooms: Callable[[Runner], None],
    write: Callable[[Runner], list[list[Any]]],
    arch: Architecture,
    precision: Precision | None,
) -> None:
    runner = streamed_runner(arch, torch.device("cuda"), torch.bfloat16, precision)
    sized_rooms(runner)
    recorded: list[int] = []
    record = CudaRecorder.record

    def counted(self: CudaRecorder, compute: Compute) -> Compute:
        recorded.append(id(self))
        return record(self, compute)

    monkeypatch.setattr(CudaRecorder, "record", counted)
    with monkeypatch.context() as launched:
        use(launched, None)
        expected = write(runner)
    assert not recorded
    for _ in range(3):
        assert write(runner) == expected
    # Batches that are written together share a recorder.
    assert len(set(recorded)) <= (3 if write is written else 3 * len(PROMPTS))
    assert len(recorded) > 3 * NUM_LAYERS


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("_inference")
@pytest.mark.parametrize("num_jobs", [1, 16, 64])
@pytest.mark.parametrize("arch", [LARGE, sparse(LARGE)], ids=["dense", "sparse"])
def test_graphs_take_no_more_than_a_plan_counts(
    monkeypatch: pytest.MonkeyPatch, arch: Architecture, num_jobs: int
) -> None:
    runner = streamed_runner(arch, torch.device("cuda"), torch.bfloat16)
    recorder = CudaRecorder(torch.device("cuda"))
    use(monkeypatch, recorder)
    with runner.prefilling(decodes=True):
        text = text_after(runner, [(5, 9)] * num_jobs, 12)
    with runner.decoding():
        decode_text(text.writing, runner.text_step(text.caches, text.writing.most_tokens))
    segments = torch.cuda.memory_snapshot()
    own = [one["total_size"] for one in segments if one["segment_pool_id"] == recorder._pool]
    computation = Computation(arch=arch, item_bytes=2, fused=True)
    assert 0 < sum(own) <= recorded_bytes(computation, num_jobs, 2 + 12)
