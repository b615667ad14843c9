"""Where the images of a manifest are looked for, and how that is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from sensebatch.config import RunConfig
from sensebatch.errors import ManifestError, Problem
from sensebatch.manifest.read import read_manifest


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out like the upstream examples; the working directory."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "examples" / "data"
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (64, 32)).save(data / "images" / "first.png")
    return data


def write(folder: Path, *images: str) -> Path:
    path = folder / "samples.jsonl"
    rows = [f'{{"prompt": "{index}", "image": "{image}"}}\n' for index, image in enumerate(images)]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def mistakes(path: Path, config: RunConfig) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        list(read_manifest(path, config))
    return [f"{p.row}: {p.field}: {p.message}" for p in caught.value.problems]


def test_upstream_paths_start_from_the_working_directory_and_that_is_said_once(
    checkout: Path, config: RunConfig
) -> None:
    said: list[Problem] = []
    path = write(checkout, *["examples/data/images/first.png"] * 2)
    first, _ = read_manifest(path, config, warn=said.append)
    assert first.images[0].path == "examples/data/images/first.png"
    assert [problem.message for problem in said] == [
        "found nothing beside the manifest, so examples/data/images/first.png is taken from the "
        "current folder"
    ]


def test_beside_the_manifest_wins_silently(checkout: Path, config: RunConfig) -> None:
    Path("images").mkdir()
    Image.new("RGB", (32, 32)).save("images/first.png")
    said: list[Problem] = []
    (job,) = read_manifest(write(checkout, "images/first.png"), config, warn=said.append)
    assert job.images[0].width == 64
    assert said == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://a.org/b.png", "found 'https://a.org/b.png'; download the image first"),
        ("FILE:///b.png", "found 'FILE:///b.png'; download the image first"),
        ("photos\\\\a.png", "found nothing at 'photos\\\\a.png'; folders are separated by / here"),
        ("a" * 3000, "expected a readable image file at "),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_not_a_path_here_is_named_as_it_is_written(
    checkout: Path, config: RunConfig, image: str, message: str
) -> None:
    (found,) = mistakes(write(checkout, image), config)
    assert message in found


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_path_that_is_not_unicode_is_refused_before_work(
    checkout: Path, config: RunConfig
) -> None:
    folder = checkout / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    assert mistakes(write(folder, "a.png"), config) == [
        "manifest: : expected a path in UTF-8, found bytes that are not"
    ]


def test_a_manifest_that_is_a_pipe_is_not_waited_for(checkout: Path, config: RunConfig) -> None:
    for suffix in ("yaml", "jsonl", "parquet"):
        path = checkout / f"pipe.{suffix}"
        os.mkfifo(path)
        (found,) = mistakes(path, config)
        assert found.endswith("expected a file, found a device or pipe")
