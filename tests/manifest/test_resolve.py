"""A job arrives with every default filled in and every size worked out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sensebatch.config import RunConfig, default_config
from sensebatch.errors import ManifestError, Problem
from sensebatch.jobs import CfgNorm, Job, job_key
from sensebatch.manifest.read import read_manifest
from sensebatch.manifest.resolve import MAX_WARNED_SIZES
from sensebatch.resolutions import BUCKETS_T2I, Resolution
from sensebatch.tasks import Task
from tests.executor.fakes import IDENTITY
from tests.manifest.conftest import ReadRows, WriteJsonl

Official = Callable[..., Job]


@pytest.fixture
def official(write_jsonl: WriteJsonl) -> Official:
    """Reads one row with the defaults of an official checkpoint."""

    def read(**row: Any) -> Job:
        (job,) = read_manifest(write_jsonl({"prompt": "x", **row}), default_config("some/model"))
        return job

    return read


def size(job: Job) -> str:
    return str(job.resolution)


def test_a_silent_row_gets_the_task_defaults(official: Official, draw_input: Any) -> None:
    config = default_config("some/model")
    for row in ({}, {"image": draw_input()}, {"task": "interleave"}):
        job = official(**row)
        defaults = config.tasks[job.task]
        assert job.sampling == defaults.sampling
        assert (job.seed, job.think) == (defaults.seed, defaults.think)
    assert size(official()) == "2048x2048"
    assert size(official(task="interleave")) == "2048x1152"
    assert official(task="interleave").think is True


def test_defaults_come_from_the_configuration(config: RunConfig, write_jsonl: WriteJsonl) -> None:
    t2i = config.tasks[Task.T2I]
    changed = replace(t2i, seed=7, sampling=replace(t2i.sampling, num_steps=3))
    config = replace(config, tasks={**config.tasks, Task.T2I: changed})
    (job,) = read_manifest(write_jsonl({"prompt": "x"}), config)
    assert (job.seed, job.sampling.num_steps) == (7, 3)


def test_what_a_row_says_wins(official: Official) -> None:
    job = official(
        seed=1,
        think=True,
        num_steps=2,
        cfg_scale=3,
        cfg_norm="cfg_zero_star",
        cfg_interval=[0.25, 0.5],
        timestep_shift=1,
        max_think_tokens=5,
        system_prompt="Be brief.",
        tags=["a"],
        metadata={"k": None},
    )
    sampling = job.sampling
    assert (job.seed, job.think, job.system_prompt) == (1, True, "Be brief.")
    assert (sampling.num_steps, sampling.cfg_scale, sampling.timestep_shift) == (2, 3.0, 1.0)
    assert sampling.cfg_norm is CfgNorm.CFG_ZERO_STAR
    assert (sampling.cfg_interval, sampling.max_think_tokens) == ((0.25, 0.5), 5)
    assert job.metadata == {"k": None, "tags": ["a"]}


def test_a_ratio_means_the_bucket_of_the_task(official: Official) -> None:
    assert size(official(resolution="16:9")) == "2720x1536"
    assert size(official(resolution="16:9", task="interleave")) == "2048x1152"
    assert size(official(resolution="640x480")) == "640x480"
    assert size(official(width=640, height=480)) == "640x480"


def test_an_edit_follows_its_first_input_after_the_first_resize(
    official: Official, draw_input: Any
) -> None:
    image = draw_input(size=(640, 480))
    job = official(image=image)
    assert job.input_max_pixels == 2048 * 2048
    assert size(job) == "2336x1760"
    assert size(official(image=image, target_pixels=1024 * 1024)) == "1152x864"
    assert size(official(image=image, input_max_pixels=None)) == "2368x1792"
    assert official(image=image, input_max_pixels=None).input_max_pixels is None
    assert official(image=image, input_max_pixels="none").input_max_pixels is None
    assert official(image=image, input_max_pixels="262144").input_max_pixels == 262144
    assert official(image=[image] * 3, input_max_pixels="auto").input_max_pixels == 2796202
    assert size(official(image=image, width=64, height=96)) == "64x96"
    assert size(official(image=image, resolution="1:1")) == "2048x2048"


def test_interleave_follows_its_first_input(official: Official, draw_input: Any) -> None:
    image = draw_input(size=(1920, 1080))
    job = official(image=image, task="interleave")
    assert (size(job), job.input_max_pixels) == ("1920x1088", None)
    assert size(official(image=image, task="interleave", resolution="1:1")) == "1536x1536"


def test_an_input_image_is_described_as_stored(
    official: Official, draw_input: Any, tmp_path: Path
) -> None:
    (image,) = official(image=draw_input(size=(70, 50))).images
    assert (image.width, image.height, image.member) == (70, 50, None)
    assert Path(image.path) == tmp_path / "in.png"


def test_marks_up_to_the_number_of_images_are_allowed(official: Official, draw_input: Any) -> None:
    job = official(prompt="<image> and <image>", images=[draw_input(), draw_input("b.png")])
    assert [Path(image.path).name for image in job.images] == ["in.png", "b.png"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((256, 256), "256x256"),
        ((320, 192), "320x192"),
        ((192, 320), "192x320"),
        ((4032, 3024), "288x224"),
        ((200, 140), "288x192"),
        ((1000, 310), "384x128"),
    ],
)
@pytest.mark.parametrize("task", ["edit", "interleave"])
def test_a_size_that_follows_an_input_is_one_that_the_embedded_model_knows(
    read_rows: ReadRows, draw_input: Any, given: tuple[int, int], expected: str, task: str
) -> None:
    (job,) = read_rows({"prompt": "x", "task": task, "image": draw_input(size=given)})
    assert size(job) == expected


def test_a_size_that_a_row_asks_for_does_not_snap(read_rows: ReadRows, draw_input: Any) -> None:
    image = draw_input(size=(320, 192))
    (by_pixels,) = read_rows({"prompt": "x", "image": image, "target_pixels": 512 * 512})
    (by_sides,) = read_rows({"prompt": "x", "image": image, "width": 64, "height": 32})
    assert (size(by_pixels), size(by_sides)) == ("672x416", "64x32")


def test_a_size_outside_the_buckets_is_warned_of_once(write_jsonl: WriteJsonl) -> None:
    warnings: list[Problem] = []
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "width": 640, "height": 480},
        {"prompt": "b", "width": 640, "height": 480},
        {"prompt": "c", "width": 2048, "height": 2048},
        {"prompt": "d", "resolution": "1:1"},
    ]
    path = write_jsonl(*rows)
    jobs = list(read_manifest(path, default_config("some/model"), warn=warnings.append))
    assert len(jobs) == 4
    (warning,) = warnings
    assert (warning.row, warning.field) == ("line 1", "resolution")
    assert warning.message.startswith("640x480 is not one of the t2i sizes")


def test_a_thousand_sizes_are_not_a_thousand_warnings(write_jsonl: WriteJsonl) -> None:
    warnings: list[Problem] = []
    sizes = [{"prompt": "a", "width": 32 * n, "height": 96} for n in range(3, 40)]
    path = write_jsonl(*sizes)
    assert len(list(read_manifest(path, default_config("some/model"), warn=warnings.append))) == 37
    messages = [warning.message for warning in warnings]
    assert len(messages) == MAX_WARNED_SIZES
    # The sizes to choose from are said once.
    assert [message for message in messages if "2720x1536" in message] == messages[:1]
    assert messages[-1].endswith("; further sizes like it are not reported")


def test_equal_settings_are_one_object(read_rows: ReadRows) -> None:
    first, second = read_rows({"prompt": "a", "num_steps": 3}, {"prompt": "b", "num_steps": 3})
    assert first.sampling is second.sampling


def test_buckets_of_tiny_apply_to_tiny(read_rows: ReadRows) -> None:
    (job,) = read_rows({"prompt": "a", "resolution": "1:1"})
    assert job.resolution == Resolution(width=256, height=256) != BUCKETS_T2I["1:1"]


def turned(tmp_path: Path) -> str:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=exif)
    return "turned.jpg"


def test_images_are_upright_unless_the_row_or_the_settings_want_them_as_stored(
    tmp_path: Path, write_jsonl: WriteJsonl, config: RunConfig
) -> None:
    image = turned(tmp_path)
    path = write_jsonl(
        {"prompt": "a", "image": image}, {"prompt": "a", "image": image, "raw_inputs": True}
    )
    upright, stored = (job.images[0] for job in read_manifest(path, config))
    assert (upright.width, upright.height, upright.corrections) == (32, 64, "orientation")
    assert (stored.width, stored.height, stored.corrections) == (64, 32, "")
    edit = replace(config.tasks[Task.EDIT], raw_inputs=True)
    raw = replace(config, tasks={**config.tasks, Task.EDIT: edit})
    (job,) = read_manifest(write_jsonl({"prompt": "x", "image": "turned.jpg"}), raw)
    assert job.images[0] == stored


def test_only_jobs_whose_pixels_change_have_another_key(
    tmp_path: Path, write_jsonl: WriteJsonl, config: RunConfig
) -> None:
    Image.new("RGB", (64, 32)).save(tmp_path / "plain.png")
    rows = [
        {"prompt": "x", "image": image, "raw_inputs": raw, "width": 64, "height": 64}
        for image in ("plain.png", turned(tmp_path))
        for raw in (False, True)
    ]
    path = write_jsonl(*({**row, "id": f"j{i}"} for i, row in enumerate(rows)))
    jobs = read_manifest(path, config)
    plain, plain_raw, upright, stored = (job_key(replace(job, id=""), IDENTITY) for job in jobs)
    assert plain == plain_raw
    assert upright != stored


def test_the_bound_on_pixels_is_a_setting(
    tmp_path: Path, write_jsonl: WriteJsonl, config: RunConfig
) -> None:
    Image.new("RGB", (64, 32)).save(tmp_path / "in.png")
    small = replace(config, inputs=replace(config.inputs, max_pixels=1000))
    with pytest.raises(ManifestError, match="expected at most 1,000 pixels, found 64x32"):
        list(read_manifest(write_jsonl({"prompt": "x", "image": "in.png"}), small))
