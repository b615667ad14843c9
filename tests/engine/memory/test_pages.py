"""Prefixes that wait in host memory come back as they went, in memory that is made once."""

from __future__ import annotations

import pytest
import torch

from sensebatch.engine.memory import pages as pages_module
from sensebatch.engine.memory.pages import Pages
from sensebatch.engine.model.kv_cache import KVCache, SharedRoom
from sensebatch.engine.runner import PassLimits
from sensebatch.errors import OutOfMemoryError
from tests.engine.golden_model import build_runner
from tests.engine.weights.test_residency import CASES, run_case
from tests.golden_data import load_case

CPU = torch.device("cpu")
LAYERS, HEADS, DIM = 3, 2, 4


def write(cache: KVCache, layer: int, new: torch.Tensor) -> None:
    """Writes keys and values after the cached ones."""
    for half, part in zip(cache.upto(layer, new.shape[1]), new, strict=True):
        half[cache.length :] = part


def filled(length: int, room: int = 0, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    cache = KVCache(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype=dtype, device=CPU)
    cache.reserve(length + room)
    for layer in range(LAYERS):
        write(cache, layer, torch.randn(2, length, HEADS, DIM))
    cache.advance(length, length)
    return cache


def content(cache: KVCache) -> list[torch.Tensor]:
    return [part.clone() for layer in range(LAYERS) for part in cache.read(layer)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("page_bytes", [48, 1000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cache_comes_back_as_it_went(page_bytes: int, dtype: torch.dtype) -> None:
    pages = Pages(pin=False, page_bytes=page_bytes)
    cache = filled(7, room=5, dtype=dtype)
    other = filled(3, dtype=dtype)
    expected, of_other = content(cache), content(other)
    for one in (cache, other):
        one.park(pages.take)
    cache.park(pages.take)
    assert same(content(cache.brought()), expected)
    for one in (cache, other):
        one.bring()
    assert same(content(cache), expected)
    assert same(content(other), of_other)
    assert cache.length == 7


def test_a_cache_that_waits_goes_straight_to_a_shared_room() -> None:
    pages = Pages(pin=False, page_bytes=64)
    caches = [filled(5), filled(9)]
    expected = [content(cache) for cache in caches]
    caches[0].park(pages.take)
    SharedRoom(caches, 4)
    for cache, before in zip(caches, expected, strict=True):
        assert same(content(cache), before)
        write(cache, 0, torch.ones(2, 1, HEADS, DIM))
        assert same(content(cache), before)


def test_a_fork_of_a_cache_that_waits_continues_by_itself() -> None:
    pages = Pages(pin=False)
    cache = filled(5)
    expected = content(cache)
    cache.park(pages.take)
    twin = cache.fork()
    twin.bring()
    twin.reserve(1)
    write(twin, 0, torch.ones(2, 1, HEADS, DIM))
    twin.advance(1, 6)
    cache.bring()
    assert same(content(cache), expected)


@pytest.mark.parametrize(("length", "spare"), [(5, 0), (5, 3), (0, 2)])
def test_a_fork_with_room_has_memory_of_its_own(length: int, spare: int) -> None:
    cache = filled(length, room=spare)
    expected = content(cache)
    twin = cache.fork(4)
    memory = [layer.data_ptr() for layer in twin.layers]
    assert same(content(twin), expected)
    twin.reserve(4)
    assert [layer.data_ptr() for layer in twin.layers] == memory
    for layer in range(LAYERS):
        write(twin, layer, torch.ones(2, 4, HEADS, DIM))
        for half in twin.read(layer):
            half.fill_(2)
    assert same(content(cache), expected)


def test_pages_are_free_once_nothing_waits_in_them() -> None:
    pages = Pages(pin=False, page_bytes=64)
    cache = filled(5)
    cache.park(pages.take)
    of_one = pages.num_made
    assert of_one == -(-LAYERS * 2 * 5 * HEADS * DIM * 2 // 64)
    twin = cache.fork()
    cache.bring()
    other = filled(5)
    other.park(pages.take)
    assert pages.num_made == 2 * of_one
    twin.bring()
    del other
    for _ in range(3):
        first, second = filled(5), filled(5)
        first.park(pages.take)
        second.park(pages.take)
        del first, second
    assert pages.num_made == 2 * of_one


def test_pages_that_cannot_be_pinned_are_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise OutOfMemoryError("pinning failed")

    monkeypatch.setattr(pages_module, "PinnedMemory", refuse)
    cache = filled(5)
    expected = content(cache)
    cache.park(Pages(pin=True).take)
    assert same(content(cache.brought()), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), CASES)
def test_images_after_prefixes_that_waited_are_bit_identical(config: str, name: str) -> None:
    case = load_case(config, name)
    expected = run_case(build_runner(case), case)
    runner = build_runner(case)
    pages = Pages(pin=False, page_bytes=4096)
    runner.limits = PassLimits(image_tokens=1, park=pages.take)
    assert same(run_case(runner, case), expected)
    assert pages.num_made > 0


def test_pinning_is_given_up_after_one_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(buffer: torch.Tensor) -> None:
        tried.append(buffer)
        raise OutOfMemoryError("pinning failed")

    monkeypatch.setattr(pages_module, "PinnedMemory", refuse)
    filled(5).park(Pages(pin=True, page_bytes=64).take)
    assert len(tried) == 1


def test_pages_stay_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pinned:
        alive = 0

        def __init__(self, _: torch.Tensor) -> None:
            Pinned.alive += 1

        def __del__(self) -> None:
            Pinned.alive -= 1

    monkeypatch.setattr(pages_module, "PinnedMemory", Pinned)
    pages = Pages(pin=True, page_bytes=64)
    filled(5).park(pages.take)
    assert Pinned.alive == pages.num_made > 1
