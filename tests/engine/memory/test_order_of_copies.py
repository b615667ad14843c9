"""Blocks on streams that run when they like: what the order leaves open happens sooner or later.

On a CPU every copy is done when its call returns, so nothing else shows a wait that is missing.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from threading import RLock

import pytest
import torch
from torch import Tensor, nn

from sensebatch.engine.memory import lanes
from sensebatch.engine.memory.blocks import Block, layout_of, new_buffer
from sensebatch.engine.memory.host import CPU, HostStore
from sensebatch.engine.memory.lanes import lane_for
from sensebatch.engine.memory.packing import Packed, pack
from sensebatch.engine.memory.pool import Pool
from sensebatch.engine.memory.readers import Readers
from tests.engine.memory.test_blocks import plain_block

pytestmark = pytest.mark.slow

NUM_LAYERS = 6
SIZES = [(1024, 1024, 512), (1024, 512, 1536), (512, 1024, 512), (512, 512, 1024)]
"""Matrices of an understanding layer, a generation layer, and a part of the head."""


@dataclass(eq=False, slots=True)
class Mark:
    """As a CUDA event: a wait is for what was asked for last when it was called."""

    asked: int = 0
    reached: int = 0


class AsItIs(Packed):
    """A block that only counts as packed."""

    def __init__(self, flat: Tensor) -> None:
        object.__setattr__(self, "flat", flat)


class Streams:
    """A computation and the copies beside it, as a device's lane; a seed decides their order."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = RLock()
        self._computation: deque[Callable[[], bool]] = deque()
        self._copies: deque[Callable[[], bool]] = deque()
        self._unpacking: deque[Callable[[], bool]] = deque()
        self._unpacked = Mark()

    def compute(self, work: Callable[[], object]) -> None:
        self._computation.append(partial(self._do, work))
        self._continue()

    def new_mark(self) -> object:
        return Mark()

    def computed(self, mark: object) -> None:
        self._set(self._computation, mark)

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:
        with self._lock:
            self._wait(self._copies, after)
            self._wait(self._copies, self._unpacked)
            self._copies.append(partial(self._do, partial(target.copy_, source)))
            self._set(self._copies, done)
        self._continue()

    def unpack(self, target: Tensor, source: Packed, after: object, done: object) -> None:
        assert isinstance(source, AsItIs)
        arrived = Mark()
        with self._lock:
            self._wait(self._unpacking, after)
            self._set(self._copies, arrived)
            self._wait(self._unpacking, arrived)
            for half in (slice(0, len(target) // 2), slice(len(target) // 2, None)):
                write = partial(target[half].copy_, source.flat[half])
                self._unpacking.append(partial(self._do, write))
            self._set(self._unpacking, done)
            self._set(self._unpacking, self._unpacked)
        self._continue()

    def wait(self, mark: object) -> None:
        self._wait(self._computation, mark)

    def finish(self, mark: object) -> None:
        assert isinstance(mark, Mark)
        with self._lock:
            asked = mark.asked
            while mark.reached < asked:
                assert self._step(self._computation, self._copies, self._unpacking), (
                    "the streams wait for one another"
                )

    def _set(self, stream: deque[Callable[[], bool]], mark: object) -> None:
        assert isinstance(mark, Mark)
        with self._lock:
            mark.asked += 1
            stream.append(partial(self._reach, mark, mark.asked))

    def _do(self, work: Callable[[], object]) -> bool:
        work()
        return True

    def _reach(self, mark: Mark, number: int) -> bool:
        mark.reached = number
        return True

    def _wait(self, stream: deque[Callable[[], bool]], mark: object) -> None:
        assert isinstance(mark, Mark)
        with self._lock:
            asked = mark.asked
            stream.append(lambda: mark.reached >= asked)

    def _step(self, *streams: deque[Callable[[], bool]]) -> bool:
        """Does one thing of the first stream that does not wait; returns whether there was one."""
        for stream in streams:
            if stream and stream[0]():
                stream.popleft()
                return True
        return False

    def _continue(self) -> None:
        with self._lock:
            streams = [self._computation, self._copies, self._unpacking]
            # Often some stand still.
            chosen = self._random.sample(streams, self._random.choice((1, 1, 2, 3)))
            for _ in range(self._random.randrange(6)):
                self._step(*chosen)


def check(weight: Tensor, number: int, wrong: list[int]) -> None:
    if not (weight == number).all():
        wrong.append(number)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("host_budget_bytes", [None, 0, 9 * 1024])
@pytest.mark.parametrize("packed", [False, True])
def test_a_block_is_what_it_is_lent_as_until_it_has_been_computed_with(
    sizes: tuple[int, int, int], host_budget_bytes: int | None, packed: bool
) -> None:
    readers = Readers()
    wrong: list[int] = []
    for seed in range(60):
        go_through_phases(seed, sizes, host_budget_bytes, packed, readers, wrong)
    readers.close()
    assert wrong == []


def go_through_phases(
    seed: int,
    sizes: tuple[int, int, int],
    host_budget_bytes: int | None,
    packed: bool,
    readers: Readers,
    wrong: list[int],
) -> None:
    """Goes through orders as a run has them; some passes break off, some memory is given back."""
    chance, streams = random.Random(seed), Streams(seed)
    understanding, generation = (
        [plain_block(first + number, size) for number in range(NUM_LAYERS)]
        for first, size in zip((1, 50), sizes[:2], strict=True)
    )
    head = [plain_block(100 + number, sizes[2]) for number in range(2)]
    phases: list[tuple[list[Block], bool]] = [
        (understanding, False),
        ([*understanding, *head], False),
        ([*understanding, *head], True),
        (generation, True),
    ]
    host = HostStore(readers, pin=False)
    host.keep([*generation, *understanding, *head], host_budget_bytes, streams)
    for block in [*understanding, *head] if packed else ():
        kept = host._kept.get(block)
        if isinstance(kept, Tensor):
            host._kept[block] = AsItIs(kept)

    def new_memory() -> Tensor:
        return new_buffer(2 * max(sizes) + chance.randrange(10) * sizes[1], CPU)

    memory = new_memory()
    pool = Pool(memory, host, streams)
    for _ in range(8):
        order, keep = chance.choice(phases)
        pool.schedule(order, keep=keep)
        for _ in range(chance.randrange(4 if keep else 2)):
            for block in order[: chance.choice((1, 3, None, None))]:
                with pool.lend(block) as module:
                    weight = module.get_parameter("weight")
                    number = int(block.name.split()[1])
                    streams.compute(partial(check, weight, number, wrong))
        if chance.random() < 0.3:
            pool.release()
            # Whoever has it next.
            streams.compute(partial(memory.fill_, 200))
            streams.compute(partial(check, memory, 200, wrong))
            memory = new_memory()
            pool.give(memory)
    host.close(streams)
    end = streams.new_mark()
    streams.computed(end)
    streams.finish(end)


class Event:
    """As much of a CUDA event as a lane asks for."""

    def __init__(self, **_: object) -> None:
        self.recorded_in: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_in = stream


class Stream:
    """As much of a CUDA stream; what it waits for, in order."""

    def __init__(self) -> None:
        self.waits: list[tuple[Event, Stream | None]] = []

    def wait_event(self, event: Event) -> None:
        self.waits.append((event, event.recorded_in))


def test_a_lane_copies_after_what_it_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Streams` does, which shows why."""
    packing_kernels = pytest.importorskip("sensebatch.engine.memory.packing_kernels")
    copies, unpacking = Stream(), Stream()
    monkeypatch.setattr(lanes, "_streams", lambda _: (copies, unpacking))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    for name in ("unpack_chunk", "restore_exceptions"):
        monkeypatch.setattr(packing_kernels, name, lambda *_: None)
    lane = lanes.CudaLane(CPU)
    numbers = (0.02 * torch.randn(4096)).to(torch.bfloat16).view(torch.uint8)
    packed = pack(numbers, CPU, lambda size: torch.empty(size, dtype=torch.uint8))
    assert packed is not None
    after, done = lane.new_mark(), lane.new_mark()
    lane.copy(numbers.clone(), numbers, after, done)
    lane.unpack(torch.empty_like(numbers), packed, after, done)
    assert (done, unpacking) not in copies.waits
    copies.waits.clear()
    lane.copy(numbers.clone(), numbers, after, lane.new_mark())
    (first, second) = copies.waits
    assert first == (after, None)
    assert second[1] is unpacking


def weight_block(name: str, rows: int) -> Block:
    """Returns a block of a matrix in bfloat16, the same for the same name."""
    with torch.device("meta"):
        module = nn.Linear(4096, rows, bias=False, dtype=torch.bfloat16)

    def fill(flat: Tensor) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        view = layout.views(flat)["weight"]
        view.copy_(0.02 * torch.randn(view.shape, generator=generator))

    layout = layout_of(module)
    return Block(name=name, module=module, layout=layout, parts=(fill,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_packed_blocks_on_a_gpu_leave_those_alone_that_come_after_them(
    num_heads: int, kept: int
) -> None:
    """A sparse model has large blocks for text and small ones for images in the same memory."""
    device, readers = torch.device("cuda"), Readers()
    text = [weight_block(f"text {number}", 16_384) for number in range(4)]
    head = [weight_block(f"head {number}", 8_192) for number in range(num_heads)]
    images = [weight_block(f"images {number}", 4_096) for number in range(6)]
    lane = lane_for(device)
    host = HostStore(readers, pin=True, pack_on=device)
    host.keep([*images, *text, *head], None, lane, packed=frozenset([*text, *head]))
    assert all(isinstance(host._kept[block], Packed) for block in text)
    expected = {}
    for block in [*images, *text, *head]:
        flat = new_buffer(block.layout.num_bytes, CPU)
        block.parts[0](flat)
        expected[block] = block.layout.views(flat)["weight"].to(device)
    size, small = text[0].layout.num_bytes, images[0].layout.num_bytes
    pool = Pool(new_buffer(2 * size + kept * small, device), host, lane)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for order, keep in [(text, False), (images, True), ([*text, *head], True), (images, True)] * 6:
        pool.schedule(order, keep=keep)
        for _ in range(3 if keep else 1):
            for block in order:
                with pool.lend(block) as module:
                    wrong += (module.get_parameter("weight") != expected[block]).sum()
    assert int(wrong) == 0
    pool.release()
    host.close(lane)
    readers.close()
