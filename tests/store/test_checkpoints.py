from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensebatch.contract import DrawnImage
from sensebatch.jobs import Batch, Task, group_key
from sensebatch.store.checkpoints import CheckpointStore
from tests.executor.fakes import SMALL as SIZE
from tests.executor.fakes import drawn_image, make_job


def batch_of(*names: str) -> Batch:
    jobs = tuple(make_job(name, Task.INTERLEAVE) for name in names)
    keys = tuple(f"key of {name}" for name in names)
    return Batch(id="0" * 16, group=group_key(jobs[0]), jobs=jobs, keys=keys)


def _all(*_: str) -> bool:
    return True


def picture(*parts: Any) -> DrawnImage:
    image = drawn_image(SIZE, *parts)
    image[0, 0, :4] = [np.float32("nan"), -0.0, 1e-45, np.inf]
    return DrawnImage(image=image, tokens=(1, 2**40, len(parts)))


def same(found: Sequence[Sequence[DrawnImage]], expected: Sequence[Sequence[DrawnImage]]) -> bool:
    def plain(
        pictures: Sequence[Sequence[DrawnImage]],
    ) -> list[list[object]]:
        return [[(one.image.tobytes(), one.tokens) for one in own] for own in pictures]

    return plain(found) == plain(expected)


def test_pictures_come_back_to_the_bit(tmp_path: Path) -> None:
    store, batch = CheckpointStore(tmp_path / "c"), batch_of("a", "b")
    a0, a1, b0 = picture("a"), picture("a", 1), picture("b")
    kept = store.of_batch(1, batch)
    assert same(kept.load(), [[], []])
    kept.save([(0, a0), (1, b0)])
    kept.save([(0, a1)])
    assert same(store.of_batch(1, batch).load(), [[a0, a1], [b0]])


def test_damaged_file_is_ignored_with_what_follows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, batch = CheckpointStore(tmp_path / "c"), batch_of("a")
    kept = store.of_batch(1, batch)
    for number in range(3):
        kept.save([(0, picture(number))])
    path = tmp_path / "c/1/0001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        again = store.of_batch(1, batch)
        assert same(again.load(), [[picture(0)]])
    assert "0001.safetensors: damaged" in caplog.text
    again.save([(0, picture("new"))])
    assert same(store.of_batch(1, batch).load(), [[picture(0), picture("new")]])


def test_job_in_another_batch_takes_its_pictures_along(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    old = store.of_batch(1, batch_of("a", "b"))
    old.save([(0, picture("a")), (1, picture("b"))])
    old.save([(1, picture("b", 1))])
    new = store.of_batch(2, batch_of("b", "c"))
    expected = [[picture("b"), picture("b", 1)], []]
    assert same(new.load(), expected)
    store.discard(1, lambda *_: True)
    assert same(store.of_batch(2, batch_of("b", "c")).load(), expected)


def test_pictures_are_counted_once_and_only_those_that_can_be_used(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    assert store.num_images(_all) == 0
    old = store.of_batch(1, batch_of("a", "b"))
    old.save([(0, picture("a")), (1, picture("b"))])
    old.save([(1, picture("b", 1))])
    assert store.num_images(_all) == 3
    new = store.of_batch(2, batch_of("b", "c"))
    new.load()
    new.save([(1, picture("c"))])
    assert store.num_images(_all) == 4
    assert store.num_images(lambda job_id, key: (job_id, key) == ("b", "key of b")) == 2
    # Drawn again, because others of its pass were not kept.
    new.save([(1, picture("c"))])
    assert store.num_images(_all) == 4
    for folder in (1, 2):
        (tmp_path / f"c/{folder}/0000.safetensors").write_bytes(b"damaged")
    assert store.num_images(_all) == 0


def test_changed_job_takes_nothing_along(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    store.of_batch(1, batch_of("a")).save([(0, picture("a"))])
    changed = Batch(
        id="1" * 16, group=batch_of("a").group, jobs=batch_of("a").jobs, keys=("another",)
    )
    assert store.of_batch(2, changed).load() == [[]]


def test_commit_discards_its_own_and_what_nobody_needs(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    for seq, name in enumerate("abc"):
        store.of_batch(seq, batch_of(name)).save([(0, picture(name))])
    store.discard(0, lambda seq, ids: seq == 1 and ids == ["b"])
    assert [folder.name for folder in (tmp_path / "c").iterdir()] == ["1"]
