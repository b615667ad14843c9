"""What docs/manifest.md and the manifests of the project say is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from sensebatch.config import RunConfig, default_config
from sensebatch.errors import Problem
from sensebatch.jobs import Job
from sensebatch.manifest.fields import FOREIGN_FIELDS, SETTINGS, JobFields
from sensebatch.manifest.read import read_manifest
from sensebatch.settings import resolve_settings
from sensebatch.tasks import Task

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/manifest.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(yaml|jsonl)\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
CONFIGURATIONS = [text for _, text in BLOCKS if text.startswith("accept:")]
EXAMPLES = [(suffix, text) for suffix, text in BLOCKS if text not in CONFIGURATIONS]


@pytest.mark.parametrize(("suffix", "text"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_is_a_manifest(
    tmp_path: Path, config: RunConfig, suffix: str, text: str
) -> None:
    path = tmp_path / f"example.{suffix}"
    path.write_text(text, encoding="utf-8")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos/0003.jpg")
    assert list(read_manifest(path, config))


def test_the_example_of_a_configuration_is_one(tmp_path: Path) -> None:
    (text,) = CONFIGURATIONS
    path = tmp_path / "example.yaml"
    path.write_text(text, encoding="utf-8")
    assert [one.at_least for one in resolve_settings(config_file=path).accept] == [0.5, 0.8]


def test_there_are_examples_of_both_text_formats() -> None:
    assert {suffix for suffix, _ in EXAMPLES} == {"yaml", "jsonl"}


def test_the_id_of_the_matrix_example_is_as_described(tmp_path: Path, config: RunConfig) -> None:
    text = next(text for _, text in EXAMPLES if "matrix:" in text)
    path = tmp_path / "example.yaml"
    path.write_text(text, encoding="utf-8")
    ids = [job.id for job in read_manifest(path, config)]
    assert len(ids) == 16
    assert "animals-animal=fox-colour=deep-blue-resolution=16x9-seed=42" in ids


def test_every_field_is_documented_with_its_tasks() -> None:
    table = DOCS.partition("\n## Fields\n")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*?) \|", table, re.MULTILINE)
    assert {name for name, _ in rows} == set(JobFields.model_fields)
    for name, tasks in rows:
        having = [str(task) for task in Task if name not in FOREIGN_FIELDS[task]]
        assert tasks == ("all" if len(having) == len(Task) else ", ".join(having))


def test_settings_are_described_in_the_words_of_their_help() -> None:
    table = DOCS.partition("\n## Fields\n")[2].partition("\n### ")[0]
    meanings = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", table, re.MULTILINE))
    for name, declaration in SETTINGS.items():
        assert meanings[name].replace("`", "").startswith(declaration.setting.help)


def test_the_table_of_tasks_is_what_their_rows_say() -> None:
    table = DOCS.partition("\n## Tasks\n")[2].partition("\n## ")[0]
    row = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*?) \| `sensebatch (\w+)` \|$", re.MULTILINE)
    specs = [task.spec for task in Task]
    said = [(spec.task, spec.inputs, spec.output, spec.task) for spec in specs]
    assert row.findall(table) == said


def read(name: str, model: str) -> list[Job]:
    warnings: list[Problem] = []
    path = ROOT / "manifests" / name
    jobs = list(read_manifest(path, default_config(model), warn=warnings.append))
    assert warnings == []
    return jobs


def test_the_catalog_is_small_and_has_every_kind_of_job() -> None:
    jobs = read("catalog.yaml", "tiny")
    assert len(jobs) <= 30
    assert {job.task for job in jobs} == set(Task)
    assert {len(job.images) for job in jobs} == {0, 1, 2}
    assert {job.think for job in jobs} == {True, False}


def test_the_pipeline_draws_edits_describes_and_accepts() -> None:
    jobs = read("pipeline.yaml", "tiny")
    steps = [job.id.partition("-")[0] for job in jobs]
    assert sorted(set(steps), key=steps.index) == ["draw", "edit", "caption", "night"]
    assert [image.path for job in jobs[:6] for image in job.images] == []


def test_the_8b_manifest_has_the_published_sizes() -> None:
    sizes = {job.id: str(job.resolution) for job in read("sensenova-8b.yaml", "some/model")}
    assert sizes == {
        "portrait": "2048x2048",
        "portrait-think": "2048x2048",
        "coat": "2048x2048",
        "tomato-sauce": "2048x1152",
    }
