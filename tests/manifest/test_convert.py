"""A converted manifest makes the same jobs, whatever the formats on the way."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensebatch.config import RunConfig, default_config
from sensebatch.errors import ConfigError, ManifestError, StorageError
from sensebatch.jobs import Job, Source
from sensebatch.manifest.convert import convert_manifest
from sensebatch.manifest.inputs import read_input_image
from sensebatch.manifest.read import manifest_name, read_manifest
from tests.manifest.conftest import WriteJsonl
from tests.manifest.test_images import encoded

NOWHERE = Source(file="", row="")
SUFFIXES = (".yaml", ".jsonl", ".parquet")


def contents(path: Path, config: RunConfig) -> list[Job]:
    """Returns the jobs without the places that a conversion changes, and the matrix it expands."""
    return [
        replace(
            job,
            source=NOWHERE,
            matrix={},
            images=tuple(replace(image, path="", member=None) for image in job.images),
        )
        for job in read_manifest(path, config)
    ]


YAML = """
version: 1
name: night
defaults:
  num_steps: 5
  metadata: {set: a}
  edit: {input_max_pixels: null}
jobs:
  - {id: a, prompt: "A {literal}: 1e6", seeds: [1, 2], tags: [x, "yes"]}
  - {prompt: "{x}", matrix: {x: [cat, "16:9"], resolution: ["16:9", 64x96]}, cfg_scale: 3}
  - {prompt: redder, image: in.png, cfg_interval: [0, 0.5]}
  - {prompt: redder, image: in.png, input_max_pixels: auto, think_mode: true}
  - {prompt: story, images: [in.png, in.png], task: interleave, max_images: 2, system_prompt: Hi}
  - {conversations: [{from: system, value: Hm}, {from: human, value: x}], type: portrait}
  - {prompt: nested, metadata: {a: [1, null, {b: 1.5}], set: b}, width: 32, height: 64, n: 2}
"""


@pytest.mark.parametrize("order", list(itertools.permutations(SUFFIXES)))
def test_any_way_round_gives_the_same_jobs(
    tmp_path: Path, config: RunConfig, draw_input: Any, order: tuple[str, ...]
) -> None:
    draw_input()
    source = tmp_path / "source.yaml"
    source.write_text(YAML)
    expected = contents(source, config)
    assert len(expected) == 12
    for step, suffix in enumerate(order):
        target = tmp_path / f"step-{step}" / f"jobs{suffix}"
        assert convert_manifest(source, target, config) == len(expected)
        assert contents(target, config) == expected
        source = target


prompts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: not text.isspace() and "<image>" not in text
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(prompts, unique=True, min_size=1, max_size=4))
def test_any_prompt_survives_every_format(
    tmp_path: Path, config: RunConfig, write_jsonl: WriteJsonl, texts: list[str]
) -> None:
    source = write_jsonl(*({"prompt": text, "metadata": {text: text}} for text in texts))
    for suffix in SUFFIXES:
        target = tmp_path / f"to{suffix}"
        convert_manifest(source, target, config, overwrite=True)
        assert [job.prompt for job in read_manifest(target, config)] == texts
        assert [job.metadata for job in read_manifest(target, config)] == [{t: t} for t in texts]


def test_defaults_of_the_model_stay_open(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    target = tmp_path / "jobs.parquet"
    convert_manifest(write_jsonl({"prompt": "x"}), target, default_config())
    (job,) = read_manifest(target, default_config("some/model"))
    assert str(job.resolution) == "2048x2048"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_images_inside_a_manifest_come_out_and_go_in(
    tmp_path: Path, config: RunConfig, suffix: str
) -> None:
    source = tmp_path / "inside.parquet"
    cell = [{"bytes": encoded("PNG"), "path": None}, {"bytes": encoded("JPEG"), "path": None}]
    pq.write_table(pa.table({"prompt": ["x"], "images": [cell]}), source)
    target = tmp_path / "out" / f"jobs{suffix}"
    convert_manifest(source, target, config)
    names = {path.stem: path.suffix for path in (tmp_path / "out/jobs-images").iterdir()}
    suffixes = (".png", ".jpg")
    assert names == {
        hashlib.sha256(one["bytes"] or b"").hexdigest(): suffix
        for one, suffix in zip(cell, suffixes, strict=True)
    }
    source.unlink()
    embedded = tmp_path / "again.parquet"
    convert_manifest(target, embedded, config, embed_images=True)
    (job,) = read_manifest(embedded, config)
    assert [image.member for image in job.images] == [(0, "images", 0), (0, "images", 1)]
    assert [read_input_image(image) for image in job.images] == [c["bytes"] for c in cell]


def test_paths_lead_to_the_same_file_through_links(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`..` leaves a linked folder for where it really is, and not for where the link is."""
    (tmp_path / "store" / "deep" / "conv").mkdir(parents=True)
    (tmp_path / "conv").symlink_to("store/deep/conv")
    (tmp_path / "in.png").write_bytes(encoded("PNG"))
    (tmp_path / "store" / "deep" / "in.png").write_bytes(encoded("PNG", (30, 20)))
    (tmp_path / "m.jsonl").write_text('{"prompt": "x", "image": "in.png"}')
    monkeypatch.chdir(tmp_path)
    convert_manifest(Path("m.jsonl"), Path("conv/m.yaml"), config)
    (expected,) = read_manifest(Path("m.jsonl"), config)
    (found,) = read_manifest(Path("conv/m.yaml"), config)
    assert found.images[0].sha256 == expected.images[0].sha256
    assert not Path(found.images[0].path).is_absolute()


def test_values_of_a_matrix_are_in_the_rows_and_no_matrix_is(
    tmp_path: Path, config: RunConfig, write_jsonl: WriteJsonl
) -> None:
    source = write_jsonl({"prompt": "a {x}", "matrix": {"x": ["cat"], "num_steps": [3]}})
    convert_manifest(source, tmp_path / "other.yaml", config)
    (before,), (after,) = (
        read_manifest(source, config),
        read_manifest(tmp_path / "other.yaml", config),
    )
    assert (dict(before.matrix), dict(after.matrix)) == ({"x": "cat", "num_steps": 3}, {})
    assert (after.prompt, after.sampling.num_steps) == ("a cat", 3)


def test_the_name_is_kept(tmp_path: Path, config: RunConfig) -> None:
    source = tmp_path / "source.yaml"
    source.write_text("version: 1\nname: night\njobs: [{prompt: x}]")
    convert_manifest(source, tmp_path / "other.yaml", config)
    assert manifest_name([tmp_path / "other.yaml"]) == "night"


def test_a_bad_manifest_leaves_the_target_as_it_was(
    tmp_path: Path, config: RunConfig, write_jsonl: WriteJsonl
) -> None:
    target = tmp_path / "target.yaml"
    target.write_text("precious")
    source = write_jsonl({"prompt": "x"}, {"prompt": ""})
    with pytest.raises(ManifestError, match="line 2: prompt"):
        convert_manifest(source, target, config, overwrite=True)
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.jsonl", "target.yaml"]


@pytest.mark.parametrize(
    ("name", "embed", "message"),
    [
        ("a.csv", False, "expected a name that ends in one of .yaml"),
        ("a.yaml", True, "expected a Parquet manifest to store images in, found 'a.yaml'"),
        ("jobs.jsonl", False, "expected another file than the one that is read"),
    ],
)
def test_a_target_of_another_kind_is_refused(
    tmp_path: Path,
    config: RunConfig,
    write_jsonl: WriteJsonl,
    name: str,
    embed: bool,
    message: str,
) -> None:
    source = write_jsonl({"prompt": "x"})
    content = source.read_bytes()
    with pytest.raises(ConfigError, match=message):
        convert_manifest(source, tmp_path / name, config, embed_images=embed)
    assert source.read_bytes() == content


def test_a_target_that_exists_is_replaced_only_if_asked(
    tmp_path: Path, config: RunConfig, write_jsonl: WriteJsonl
) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    broken = write_jsonl({"prompt": ""})
    # Before the manifest is read, which has a mistake.
    with pytest.raises(ConfigError, match=r"mine\.yaml: expected no file, found one; --overwrite "):
        convert_manifest(broken, target, config)
    assert target.read_text() == "precious"
    convert_manifest(write_jsonl({"prompt": "x"}), target, config, overwrite=True)
    assert [job.prompt for job in read_manifest(target, config)] == ["x"]


def test_a_target_in_the_place_of_a_file_cannot_be_written(
    config: RunConfig, write_jsonl: WriteJsonl
) -> None:
    source = write_jsonl({"prompt": "x"})
    with pytest.raises(StorageError, match=r"a.yaml: cannot be written: .*jobs.jsonl is a file"):
        convert_manifest(source, source / "a.yaml", config)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("suffix", ["jsonl", "yaml", "parquet"])
def test_a_full_disk_is_not_a_mistake_in_the_manifest(
    tmp_path: Path, config: RunConfig, write_jsonl: WriteJsonl, suffix: str
) -> None:
    source = write_jsonl({"prompt": "x"})
    target = tmp_path / f"other.{suffix}"
    target.with_name(f".{target.name}.tmp").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=f"other.{suffix}: cannot be written: No space left"):
        convert_manifest(source, target, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.jsonl"]
