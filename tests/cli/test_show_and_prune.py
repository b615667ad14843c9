"""`show`, `prune` and `hash`: what they print and how they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sensebatch.config import OutputConfig
from tests.cli.conftest import Invoke
from tests.executor.fakes import make_config, make_job, run_folder
from tests.store.test_hashing import without_hashes


@pytest.mark.parametrize(
    ("image_format", "ending"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")]
)
def test_show_prints_what_an_image_says_of_itself(
    invoke: Invoke, image_format: str, ending: str
) -> None:
    config = make_config(output=OutputConfig(image_format=image_format))
    job = make_job("a", prompt="a \x1b[31mred\x1b[0m star\nin the sky", seed=17)
    run_folder(Path("run"), [job], config)
    name = f"run/images/a.{ending}"
    out = invoke("show", name).out
    lines = out.splitlines()
    assert lines[0] == name
    assert lines[3].split(maxsplit=1) == ["prompt", r"a \x1b[31mred\x1b[0m star\nin the sky"]
    assert lines[4].split() == ["seed", "17"]
    assert any(line.split() == ["size", "64x32"] for line in lines)
    assert any(line.split() == ["num_steps", "2"] for line in lines)
    (said,) = invoke("show", name, "--json").json
    assert (said["file"], said["prompt"], said["sampling"]["num_steps"]) == (name, job.prompt, 2)


def test_show_takes_several_images(invoke: Invoke) -> None:
    run_folder(Path("run"), [make_job("a"), make_job("b")])
    out = invoke("show", "run/images/a.png", "run/images/b.png").out
    assert out.count("an image of") == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: None, "cannot be read: No such file or directory"),
        (Path.mkdir, "cannot be read: Is a directory"),
        (lambda path: path.write_text("text"), "expected a PNG, WebP or JPEG image"),
        (lambda path: Image.new("RGB", (8, 8)).save(path), "found one without; it was made with"),
    ],
)
def test_show_says_why_there_is_nothing_to_show(
    invoke: Invoke, make: Callable[[Path], object], said: str
) -> None:
    path = Path("x.png")
    make(path)
    ended = invoke("show", path)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("sensebatch: x.png: ")
    assert said in ended.err


@pytest.fixture
def pruned(invoke: Invoke) -> Path:
    del invoke
    root = Path("run")
    run_folder(root, [make_job(f"t{i}") for i in range(30)])
    run_folder(root, [make_job("t0")])
    return root


def test_prune_lists_before_it_removes(invoke: Invoke, pruned: Path) -> None:
    out = invoke("prune", pruned).out
    assert out.startswith("run: 29 files of 29 jobs no longer in the manifest, ")
    assert "--yes removes them" in out
    assert "  images/t1.png\n" in out
    assert out.endswith("  ... and 9 more; --json lists all\n")
    assert len(list((pruned / "images").iterdir())) == 30
    assert len(invoke("prune", pruned, "--json").json["files"]) == 29
    out = invoke("prune", pruned, "--yes").out
    assert out.startswith("run: removed 29 files of 29 jobs, ")
    assert [path.name for path in (pruned / "images").iterdir()] == ["t0.png"]
    assert invoke("prune", pruned, "--yes").out == "run: no file of a removed job\n"


def test_prune_names_what_it_keeps(invoke: Invoke, pruned: Path) -> None:
    (pruned / "images" / "t3.png").write_bytes(b"mine")
    out = invoke("prune", pruned, "--yes").out
    assert "  images/t3.png: kept, because it has changed since the job made it\n" in out
    assert (pruned / "images" / "t3.png").read_bytes() == b"mine"


def test_hash_ends_with_1_if_an_image_is_missing(invoke: Invoke, pruned: Path) -> None:
    assert invoke("hash", pruned).out == "run: hashed the images of 0 jobs\n"
    without_hashes(pruned)
    (pruned / "images" / "t0.png").unlink()
    ended = invoke("hash", pruned)
    assert (ended.code, "t0: an image is missing or has changed" in ended.out) == (1, True)


@pytest.mark.parametrize("command", ["prune", "hash", "jobs"])
def test_folder_without_a_run_is_refused_and_not_made(invoke: Invoke, command: str) -> None:
    ended = invoke(command, "nowhere")
    assert ended.code == 2
    assert "nowhere: expected a run's folder, found no state.db" in ended.err
    assert not Path("nowhere").exists()
