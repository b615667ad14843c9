"""Groups of images that look alike, by hashes alone and by the jobs that made them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sensebatch.dataset.duplicates import group_hashes, near_duplicates
from sensebatch.dataset.records import open_dataset
from sensebatch.dataset.selection import Selection
from sensebatch.store import writer
from sensebatch.store.acceptance import Verdict
from sensebatch.tasks import Task
from tests.executor.fakes import make_input, make_job, run_folder
from tests.store.test_acceptance import CONFIG, Judge, series


def rows(*values: int) -> list[list[str]]:
    return [[f"{value:016x}"] for value in values]


def test_first_of_each_group_stands_for_it() -> None:
    # The third is near the second, and too far from the first.
    hashes = rows(0b0, 0b111, 0b111111, 0xF0, 0b1)
    assert group_hashes(hashes, 3) == [0, 0, 2, 3, 0]
    assert group_hashes(hashes, 1) == [0, 1, 2, 3, 0]
    assert group_hashes(hashes, 0) == [0, 1, 2, 3, 4]
    assert group_hashes(rows(5, 5, 6), 0) == [0, 0, 2]


def test_every_image_of_a_story_counts() -> None:
    hashes = [["0" * 16, "f" * 16], ["0" * 15 + "1", "f" * 16], ["0" * 16, "0" * 16]]
    assert group_hashes(hashes, 1) == [0, 0, 2]


@pytest.mark.parametrize("has_counter", [True, False])
def test_groups_are_those_of_every_pair_compared(
    has_counter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_counter:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    rng = np.random.default_rng(1)
    values = [int(value) for value in rng.integers(0, 2**64, 60, dtype=np.uint64)]
    values += [value ^ (1 << int(rng.integers(64))) for value in values]
    values += [2**64 - 1, 0]
    expected: list[int] = []
    for index, value in enumerate(values):
        firsts = (i for i in range(index) if expected[i] == i)
        near = (i for i in firsts if (values[i] ^ value).bit_count() <= 20)
        expected.append(next(near, index))
    assert group_hashes(rows(*values), 20) == expected
    assert len(set(expected)) < len(values) // 2 + 2


def test_jobs_are_compared_with_those_of_their_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "phash", lambda _: "0" * 16)
    one, other = make_input("one"), make_input("other")
    run_folder(
        tmp_path,
        [
            make_job("a"),
            make_job("b"),
            make_job("e1", Task.EDIT, images=(one,)),
            make_job("e2", Task.EDIT, images=(other,)),
            make_job("e3", Task.EDIT, images=(one,), prompt="otherwise"),
            make_job("fails", prompt="fails"),
        ],
    )
    with open_dataset(tmp_path) as dataset:
        assert near_duplicates(dataset.records()) == {
            "a": "a",
            "b": "a",
            "e1": "e1",
            "e2": "e2",
            "e3": "e1",
        }
        kept = [record.id for record in dataset.records(Selection(dedupe=6))]
        assert kept == ["a", "e1", "e2", "fails"]
        left_out: list[str] = []
        dataset.records(Selection(dedupe=6), look_alikes=left_out)
        assert sorted(left_out) == ["b", "e3"]
        # What is left out otherwise stands for nothing.
        kept = [record.id for record in dataset.records(Selection(dedupe=6, where="id <> 'a'"))]
        assert kept == ["b", "e1", "e2", "fails"]


def test_a_rejected_try_does_not_stand_for_an_accepted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "phash", lambda _: "0" * 16)
    run_folder(tmp_path, series("dog"), CONFIG, engine=Judge())
    with open_dataset(tmp_path) as dataset:
        known = {record.id: record.verdict for record in dataset.records() if record.verdict}
        assert next(iter(known.values())) is Verdict.REJECTED
        kept = {record.id for record in dataset.records(Selection(dedupe=6))} & known.keys()
    assert [known[job_id] for job_id in kept] == [Verdict.ACCEPTED]
