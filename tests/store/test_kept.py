from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sensebatch.contract import KeptImage
from sensebatch.jobs import Batch, group_key
from sensebatch.store.kept import KeptImages
from sensebatch.tasks import Task
from tests.executor.fakes import SMALL as SIZE
from tests.executor.fakes import drawn_image, make_job


def batch_of(*names: str) -> Batch:
    jobs = tuple(make_job(name, Task.INTERLEAVE) for name in names)
    keys = tuple(f"key of {name}" for name in names)
    return Batch(id="0" * 16, group=group_key(jobs[0]), jobs=jobs, keys=keys)


def _all(*_: str) -> bool:
    return True


def image_of(*parts: Any) -> KeptImage:
    image = drawn_image(SIZE, *parts)
    image[0, 0, :4] = [np.float32("nan"), -0.0, 1e-45, np.inf]
    return KeptImage(image=image, tokens=(1, 2**40, len(parts)))


def same(found: Sequence[Sequence[KeptImage]], expected: Sequence[Sequence[KeptImage]]) -> bool:
    def plain(
        images: Sequence[Sequence[KeptImage]],
    ) -> list[list[object]]:
        return [[(one.image.tobytes(), one.tokens) for one in own] for own in images]

    return plain(found) == plain(expected)


def test_images_come_back_to_the_bit(tmp_path: Path) -> None:
    store, batch = KeptImages(tmp_path / "c"), batch_of("a", "b")
    a0, a1, b0 = image_of("a"), image_of("a", 1), image_of("b")
    kept = store.of_batch(1, batch)
    assert same(kept.load(), [[], []])
    kept.save([(0, a0), (1, b0)])
    kept.save([(0, a1)])
    assert same(store.of_batch(1, batch).load(), [[a0, a1], [b0]])


def test_damaged_file_is_ignored_with_what_follows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, batch = KeptImages(tmp_path / "c"), batch_of("a")
    kept = store.of_batch(1, batch)
    for number in range(3):
        kept.save([(0, image_of(number))])
    path = tmp_path / "c/1/0001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        again = store.of_batch(1, batch)
        assert same(again.load(), [[image_of(0)]])
    assert "0001.safetensors: damaged" in caplog.text
    again.save([(0, image_of("new"))])
    assert same(store.of_batch(1, batch).load(), [[image_of(0), image_of("new")]])


def test_any_flipped_byte_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, batch = KeptImages(tmp_path / "c"), batch_of("a")
    store.of_batch(1, batch).save([(0, image_of("a"))])
    path = tmp_path / "c/1/0000.safetensors"
    whole = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        for offset in range(0, len(whole), 97):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
            caplog.clear()
            found = store.of_batch(1, batch).load()
            # A flip that leaves the file as one of an earlier version changes no image.
            assert same(found, [[image_of("a")]]) or (
                found == [[]] and "drawn again" in caplog.text
            )
    # The images are most of the file, so they were hit.
    assert image_of("a").image.nbytes > len(whole) / 2


def test_flipped_byte_of_an_image_or_its_text_costs_that_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, batch = KeptImages(tmp_path / "c"), batch_of("a")
    path = tmp_path / "c/1/0001.safetensors"
    for place in (-1, -200):
        kept = store.of_batch(1, batch)
        kept.load()
        kept.save([(0, image_of(0))])
        kept.save([(0, image_of(1))])
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        with caplog.at_level(logging.WARNING):
            assert same(store.of_batch(1, batch).load(), [[image_of(0)]])
        assert "0001.safetensors: damaged" in caplog.text
        assert "expected the checksum" in caplog.text
        store.discard(1, lambda *_: True)
        caplog.clear()


def test_file_of_a_version_without_checksums_is_accepted(tmp_path: Path) -> None:
    store, batch = KeptImages(tmp_path / "c"), batch_of("a")
    store.of_batch(1, batch).save([(0, image_of("a"))])
    path = tmp_path / "c/1/0000.safetensors"
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    del metadata["crc32"]
    save_file(tensors, path, metadata)
    assert same(store.of_batch(1, batch).load(), [[image_of("a")]])


def test_job_in_another_batch_takes_its_images_along(tmp_path: Path) -> None:
    store = KeptImages(tmp_path / "c")
    old = store.of_batch(1, batch_of("a", "b"))
    old.save([(0, image_of("a")), (1, image_of("b"))])
    old.save([(1, image_of("b", 1))])
    new = store.of_batch(2, batch_of("b", "c"))
    expected = [[image_of("b"), image_of("b", 1)], []]
    assert same(new.load(), expected)
    store.discard(1, lambda *_: True)
    assert same(store.of_batch(2, batch_of("b", "c")).load(), expected)


def test_images_are_counted_once_and_only_those_that_can_be_used(tmp_path: Path) -> None:
    store = KeptImages(tmp_path / "c")
    assert store.num_images(_all) == 0
    old = store.of_batch(1, batch_of("a", "b"))
    old.save([(0, image_of("a")), (1, image_of("b"))])
    old.save([(1, image_of("b", 1))])
    assert store.num_images(_all) == 3
    new = store.of_batch(2, batch_of("b", "c"))
    new.load()
    new.save([(1, image_of("c"))])
    assert store.num_images(_all) == 4
    assert store.num_images(lambda job_id, key: (job_id, key) == ("b", "key of b")) == 2
    # Drawn again, because others of its pass were not kept.
    new.save([(1, image_of("c"))])
    assert store.num_images(_all) == 4
    for folder in (1, 2):
        (tmp_path / f"c/{folder}/0000.safetensors").write_bytes(b"damaged")
    assert store.num_images(_all) == 0


def test_changed_job_takes_nothing_along(tmp_path: Path) -> None:
    store = KeptImages(tmp_path / "c")
    store.of_batch(1, batch_of("a")).save([(0, image_of("a"))])
    changed = Batch(
        id="1" * 16, group=batch_of("a").group, jobs=batch_of("a").jobs, keys=("another",)
    )
    assert store.of_batch(2, changed).load() == [[]]


def test_commit_discards_its_own_and_what_nobody_needs(tmp_path: Path) -> None:
    store = KeptImages(tmp_path / "c")
    for seq, name in enumerate("abc"):
        store.of_batch(seq, batch_of(name)).save([(0, image_of(name))])
    store.discard(0, lambda seq, ids: seq == 1 and ids == ["b"])
    assert [folder.name for folder in (tmp_path / "c").iterdir()] == ["1"]


def test_a_round_is_a_file_that_safetensors_reads_whole(tmp_path: Path) -> None:
    images = [replace(image_of(number), tokens=tuple(range(number))) for number in range(3)]
    kept = KeptImages(tmp_path).of_batch(1, batch_of("a", "b", "c"))
    kept.save(list(enumerate(images)))
    found = load_file(tmp_path / "1" / "0000.safetensors")
    for number, image in enumerate(images):
        assert found[f"image.{number}"].dtype == np.float32
        assert found[f"image.{number}"].tobytes() == image.image.tobytes()
        assert found[f"tokens.{number}"].tolist() == list(image.tokens)
    assert len(found) == 6
