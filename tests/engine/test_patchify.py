"""The convolutional head goes over large images in parts, which nothing of the image shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sensebatch
from sensebatch.checkpoint.architecture import OFFICIAL_8B, parse_architecture
from sensebatch.checkpoint.heads import PIXEL_REACH
from sensebatch.checkpoint.tokenizer import IMG_START
from sensebatch.engine.model import patchify
from sensebatch.engine.model.patchify import PixelHead, image_to_tokens
from sensebatch.engine.sampling.text import Script
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.jobs import Job
from sensebatch.plan import passes
from sensebatch.plan.passes import head_parts
from sensebatch.resolutions import Resolution
from tests.engine.golden_model import KeptImages, build_job, build_runner, infer
from tests.golden_data import load_case, relative_error

SIZES = [(64, 96), (128, 32), (32, 160)]
"""Height and width of each image of a story."""


def pixel_head() -> PixelHead:
    torch.manual_seed(0)
    arch = replace(parse_architecture(OFFICIAL_8B), hidden_size=64)
    return PixelHead(arch).requires_grad_(False)


@pytest.mark.parametrize(("rows", "columns"), [(12, 8), (8, 16), (3, 70)])
def test_parts_of_an_image_are_what_the_whole_is(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    monkeypatch.setattr(passes, "ROWS", 64)
    head = pixel_head()
    assert len(head_parts(rows, columns, PIXEL_REACH)) > 1
    x_BND = torch.randn(1, rows * columns, 64)
    found = head(x_BND, 32 * rows, 32 * columns)
    whole = head._predict(x_BND.unflatten(1, (rows, columns)))
    assert torch.equal(found, whole)


def naive_head(head: PixelHead, x_BND: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns what the head predicts by sums over each place's neighbours, in float64."""

    def convolve(x_BCHW: torch.Tensor, layer: torch.nn.Conv2d) -> torch.Tensor:
        padded = F.pad(x_BCHW, (1, 1, 1, 1))
        rows, columns = x_BCHW.shape[-2:]
        shifted = [padded[:, :, y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
        weight = layer.weight.double().flatten(2)
        assert layer.bias is not None
        summed = sum(
            torch.einsum("oc,bcyx->boyx", weight[:, :, place], one)
            for place, one in enumerate(shifted)
        )
        return summed + layer.bias.double()[:, None, None]

    x = x_BND.double().transpose(1, 2).unflatten(2, (height // 32, width // 32))
    x = F.gelu(convolve(F.pixel_shuffle(x, 2), head.conv1))
    x = F.pixel_shuffle(convolve(F.pixel_shuffle(x, 2), head.conv2), 8)
    return image_to_tokens(x)


@pytest.mark.slow
def test_a_story_has_images_of_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference cannot draw with this head: stories of other sizes than its own."""
    runner = build_runner(load_case("dense_pixel", "t2i_cfg4_none"))
    head = runner.network.head
    assert isinstance(head, PixelHead)
    forward = head.forward
    seen: list[tuple[int, int]] = []

    def checked(x_BND: torch.Tensor, height: int, width: int) -> torch.Tensor:
        found = forward(x_BND, height, width)
        if (height, width) not in seen:
            assert relative_error(found, naive_head(head, x_BND, height, width)) < 1e-5
            seen.append((height, width))
        return found

    monkeypatch.setattr(head, "forward", checked)
    sizes = [Resolution(height=height, width=width) for height, width in SIZES]
    story = build_job(replace(load_case("dense_fm", "il_text_think"), config="dense_pixel"), "")
    sampling = replace(
        story.job.sampling, num_steps=2, max_images=len(SIZES), max_new_tokens=2 * len(SIZES)
    )
    job = replace(story, job=replace(story.job, sampling=sampling))
    script = Script(word=5, image_start=runner.tokenizer.token_id(IMG_START))
    kept = KeptImages(1)
    with infer():
        run_interleave(runner, [job], kept=(), channel=kept, script=script, resolutions=[sizes])
    images = [drawn.image.shape[1:] for drawn in kept.images[0]]
    assert images == seen == SIZES


@pytest.mark.slow
def test_stories_of_several_sizes_share_a_manifest(tmp_path: Path) -> None:
    """With the embedded checkpoint, which has this head; each is what it is alone."""
    rows = [
        {"id": f"{width}x{height}", "task": "interleave", "prompt": "Show a red circle growing"}
        | {"width": width, "height": height, "num_steps": 2, "max_images": 2, "think": False}
        | {"max_new_tokens": 20}
        for width, height in ((96, 64), (32, 128), (160, 32))
    ]

    def drawn(jobs: Sequence[Job], folder: Path) -> dict[str, list[bytes]]:
        sensebatch.run(jobs, folder, engine=engine)
        return {
            done.job.id: [image.tobytes() for image in done.open_images()]
            for done in sensebatch.finished_jobs(folder)
        }

    jobs = sensebatch.make_jobs(rows)
    with sensebatch.open_engine() as engine:
        together = drawn(jobs, tmp_path / "together")
        alone = [drawn([job], tmp_path / job.id) for job in jobs]
    assert [len(images[0]) for images in together.values()] == [3 * 96 * 64, 3 * 32 * 128, 3 * 5120]
    assert together == alone[0] | alone[1] | alone[2]


def test_a_part_sees_as_much_as_it_depends_on_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing a token changes nothing farther away than a part sees."""
    head, rows = pixel_head(), 9
    x_BND = torch.randn(1, rows, 64)
    before = head(x_BND, 32 * rows, 32)
    x_BND[0, 4] += 1
    changed = (head(x_BND, 32 * rows, 32) != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [4 - PIXEL_REACH, 4, 4 + PIXEL_REACH]
    monkeypatch.setattr(passes, "ROWS", 2)
    monkeypatch.setattr(
        patchify, "head_parts", lambda rows, columns, _: head_parts(rows, columns, 0)
    )
    assert not torch.equal(head(x_BND, 32 * rows, 32), head._predict(x_BND.unflatten(1, (rows, 1))))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 64), (65, 64), (7, 5000), (130, 127)])
def test_parts_cover_every_row_once_and_see_their_neighbours(rows: int, columns: int) -> None:
    parts = head_parts(rows, columns, 1)
    assert [row for part, _ in parts for row in range(part.start, part.stop)] == list(range(rows))
    for part, seen in parts:
        assert (seen.start, seen.stop) == (max(part.start - 1, 0), min(part.stop + 1, rows))
        assert (part.stop - part.start) * columns <= max(passes.ROWS, columns)
