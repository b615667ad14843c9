"""A t2i or edit batch that was interrupted between passes loses one pass, not the batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from sensebatch.contract import Drawn, KeptImage, Progress
from sensebatch.engine.memory.shelf import Shelf
from sensebatch.engine.runner import PassLimits, Runner
from sensebatch.engine.tasks import single_image
from sensebatch.engine.tasks.denoise import denoise
from sensebatch.engine.tasks.single_image import run_single_image
from sensebatch.engine.tasks.state import PreparedJob
from sensebatch.errors import StorageFullError
from sensebatch.jobs import Failure, JobResult
from tests.engine.golden_model import KeptImages, infer, succeeded
from tests.engine.test_batches import fresh, jobs_of

pytestmark = pytest.mark.slow

PATIENCE_S = 60.0


@dataclass
class Batch:
    """Three jobs that are drawn in some passes, as often as asked."""

    runner: Runner
    jobs: list[PreparedJob]
    drawn: list[tuple[int, int]] = field(default_factory=list)
    """(index, number of jobs) of every pass that went through the network."""

    def run(self, kept: KeptImages) -> list[JobResult | Failure]:
        self.drawn.clear()
        self.runner.num_denoise_steps = 0
        self.runner.num_kept_images = 0
        with infer():
            return run_single_image(self.runner, fresh(self.jobs), kept=kept.load(), channel=kept)

    @property
    def num_steps(self) -> int:
        return self.jobs[0].job.sampling.num_steps


def make_batch(
    monkeypatch: pytest.MonkeyPatch, name: str = "t2i_cfg4_none", *, a_pass: int = 1
) -> Batch:
    runner, jobs = jobs_of("dense_fm", name)
    tokens = jobs[0].job.resolution.image_tokens
    monkeypatch.setattr(runner, "limits", PassLimits(image_tokens=a_pass * tokens))
    batch = Batch(runner, jobs)

    def watched(runner: Runner, drawings: Sequence[Any], *args: Any, **options: Any) -> object:
        batch.drawn.append((options["place"][0], len(drawings)))
        return denoise(runner, drawings, *args, **options)

    monkeypatch.setattr(single_image, "denoise", watched)
    return batch


def outputs(results: Sequence[JobResult | Failure]) -> list[tuple[bytes, str | None, int]]:
    return [(r.images[0].tobytes(), r.text, r.think_tokens) for r in succeeded(results)]


@pytest.mark.parametrize("name", ["t2i_cfg4_none", "t2i_think_max", "edit_2img_cfg4_img2"])
@pytest.mark.parametrize(("a_pass", "sizes"), [(1, [1, 1, 1]), (2, [2, 1])])
def test_a_resumed_batch_draws_only_what_is_missing_and_ends_in_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, name: str, a_pass: int, sizes: list[int]
) -> None:
    batch, whole = make_batch(monkeypatch, name, a_pass=a_pass), KeptImages(3)
    expected = batch.run(whole)
    assert batch.drawn == list(enumerate(sizes))
    assert batch.runner.num_kept_images == 0
    num_kept = sum(sizes[:-1])
    assert [len(images) for images in whole.images] == [1] * num_kept + [0] * (3 - num_kept)
    for index in range(num_kept):
        (kept,) = whole.images[index]
        # Neither clamped nor quantised, and what the file is made of.
        assert kept.image.dtype == np.float32
        assert not np.array_equal(kept.image, kept.image.clip(-1, 1))
    for num_passes in range(1, len(sizes)):
        some = KeptImages(3)
        some.images[: sum(sizes[:num_passes])] = whole.images[: sum(sizes[:num_passes])]
        resumed = batch.run(some)
        assert batch.drawn == list(enumerate(sizes))[num_passes:]
        assert batch.runner.num_denoise_steps == batch.num_steps * (len(sizes) - num_passes)
        assert batch.runner.num_kept_images == sum(sizes[:num_passes])
        assert outputs(resumed) == outputs(expected)


def test_a_batch_of_one_pass_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, kept = make_batch(monkeypatch, a_pass=3), KeptImages(3)
    batch.run(kept)
    assert batch.drawn == [(0, 3)]
    assert kept.images == [[], [], []]


def test_a_batch_whose_images_are_all_kept_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, kept = make_batch(monkeypatch), KeptImages(3)
    expected = batch.run(kept)
    half = Batch(batch.runner, batch.jobs[:2], batch.drawn)
    taken = KeptImages(2)
    taken.images = kept.images[:2]
    assert outputs(half.run(taken)) == outputs(expected[:2])
    assert batch.drawn == []


@pytest.mark.parametrize("tokens", [(), (1, 2, 3)])
def test_an_image_after_another_thought_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tokens: tuple[int, ...]
) -> None:
    batch, kept = make_batch(monkeypatch, "t2i_think_max"), KeptImages(3)
    expected = batch.run(kept)
    (right,) = kept.images[0]
    assert len(right.tokens) == expected[0].think_tokens > 0
    kept.images[0] = [KeptImage(image=right.image * 0, tokens=tokens)]
    assert outputs(batch.run(kept)) == outputs(expected)
    assert batch.drawn == [(0, 1), (2, 1)]
    # Kept again after the right one, and then used.
    assert [one.tokens for one in kept.images[0]] == [tokens, right.tokens]
    assert outputs(batch.run(kept)) == outputs(expected)
    assert batch.drawn == [(2, 1)]


def test_a_pass_of_which_one_image_is_missing_is_drawn_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, kept = make_batch(monkeypatch, a_pass=2), KeptImages(3)
    expected = batch.run(kept)
    kept.images[0] = []
    (other,) = kept.images[1]
    # Kept in another composition, say; what was drawn here counts from then on.
    kept.images[1] = [replace(other, image=-other.image)]
    assert outputs(batch.run(kept)) == outputs(expected)
    assert batch.drawn == [(0, 2), (1, 1)]
    assert batch.runner.num_kept_images == 0
    assert outputs(batch.run(kept)) == outputs(expected)
    assert batch.drawn == [(1, 1)]


class FullDisk(KeptImages):
    """Has no room for an image."""

    def keep(self, drawn: Drawn) -> None:  # noqa: ARG002
        raise StorageFullError("no room left on the disk")


@pytest.mark.parametrize("a_pass", [1, 2])
def test_what_the_saving_thread_raises_is_the_error_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, a_pass: int
) -> None:
    batch = make_batch(monkeypatch, a_pass=a_pass)
    with pytest.raises(StorageFullError, match="no room left"):
        batch.run(FullDisk(3))
    # The pass after the failed save was drawn meanwhile, and no other.
    assert batch.drawn == [(0, a_pass), (1, 1)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("keeper")]


class Waiting(KeptImages):
    """Saves an image only once the next pass is drawn."""

    def __init__(self, num_jobs: int) -> None:
        super().__init__(num_jobs)
        self.drawn = threading.Semaphore(0)
        self.saving = 0

    def keep(self, drawn: Drawn) -> None:
        self.saving += 1
        assert self.saving == 1, "one save at a time"
        assert self.drawn.acquire(timeout=60), "the next pass waits for the save"
        super().keep(drawn)
        self.saving -= 1


def test_the_next_pass_is_drawn_while_images_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, kept = make_batch(monkeypatch), Waiting(3)

    def reported(progress: Progress) -> None:
        number, step = divmod(progress.step, batch.num_steps)
        if number > 1 and step == 0:
            kept.drawn.release()

    monkeypatch.setattr(batch.runner, "progress", reported)
    batch.run(kept)
    assert [len(images) for images in kept.images] == [1, 1, 0]


def test_an_error_while_an_image_is_saved_leaves_it_saved_and_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, kept = make_batch(monkeypatch), KeptImages(3)

    def fails(progress: Progress) -> None:
        if progress.step > batch.num_steps:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch.runner, "progress", fails)
    with pytest.raises(torch.OutOfMemoryError):
        batch.run(kept)
    assert [len(images) for images in kept.images] == [1, 0, 0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("keeper")]


def test_a_pass_with_an_image_that_is_not_finite_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, kept = make_batch(monkeypatch, a_pass=2), KeptImages(3)
    predict = batch.runner.network.predict_image

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        x = predict(*args, **options)
        x[:2] = float("nan")
        return x

    batch.runner.network.predict_image = poisoned
    try:
        results = batch.run(kept)
    finally:
        del batch.runner.network.predict_image
    assert [isinstance(result, Failure) for result in results] == [True, False, True]
    assert kept.images == [[], [], []]


def test_progress_counts_the_passes_that_were_drawn_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, kept = make_batch(monkeypatch), KeptImages(3)
    seen: list[Progress] = []
    monkeypatch.setattr(batch.runner, "progress", seen.append)
    all_steps = 3 * batch.num_steps
    batch.run(kept)
    assert [one.step for one in seen] == list(range(1, all_steps + 1))
    assert {one.num_steps for one in seen} == {all_steps}
    seen.clear()
    batch.run(kept)
    assert [one.step for one in seen] == list(range(2 * batch.num_steps + 1, all_steps + 1))


def test_images_that_lie_in_two_places_in_turn_are_whole_when_they_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Writing(KeptImages):
        """Reads what it is given while the next pass is drawn, as a disk does."""

        def keep(self, drawn: Drawn) -> None:
            may_go_on.wait(PATIENCE_S)
            super().keep([(i, replace(kept, image=kept.image.copy())) for i, kept in drawn])

    may_go_on = threading.Event()
    batch, whole, written = make_batch(monkeypatch), KeptImages(3), Writing(3)
    expected = batch.run(whole)
    copied: list[torch.Tensor] = []
    shelf = Shelf(pin=False)

    def copy(images: torch.Tensor) -> torch.Tensor:
        copied.append(shelf.copy(images))
        if len(copied) == 2:
            # The first is still being written.
            may_go_on.set()
        return copied[-1]

    batch.runner.copy_images = copy
    assert outputs(batch.run(written)) == outputs(expected)
    assert len(copied) == 2
    for kept, known in zip(written.images, whole.images, strict=True):
        assert [k.image.tobytes() for k in kept] == [k.image.tobytes() for k in known]
