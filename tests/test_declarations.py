"""A setting is declared in one place, and everything reads it from there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge

from sensebatch.cli.job_options import setting_options
from sensebatch.config import default_config
from sensebatch.declarations import Setting, converter, declared, plain, restored, stated
from sensebatch.jobs import CfgNorm, ModelIdentity, Sampling, job_key
from sensebatch.manifest.fields import FOREIGN_FIELDS, SETTINGS, JobFields
from sensebatch.manifest.read import read_manifest
from sensebatch.store.codec import job_to_json
from sensebatch.tasks import Task
from tests.executor.fakes import make_job
from tests.patched import patched_package, run_patched

FIELD = """
    grain: Annotated[float, Ge(0), Setting(help="How grainy images are.", of=draws)] = 0.0
"""
BEFORE = """
        Setting(help="The most text tokens of the job.", of=_limits_text("max_new_tokens")),
    ]
"""
USES = """
import json
from pathlib import Path
import typer
from sensebatch.cli.main import app
from sensebatch.config import default_config
from sensebatch.jobs import ModelIdentity, job_key
from sensebatch.manifest.fields import manifest_schema
from sensebatch.manifest.read import read_manifest
from sensebatch.settings import dump_settings, resolve_settings
from sensebatch.store.codec import job_from_json, job_to_json

identity = ModelIdentity(
    checkpoint="", lora=None, dtype="", generation_prompt="", interleave_prompt=""
)
plain, grainy = read_manifest(Path("jobs.jsonl"), default_config())
old = job_from_json(Path("old.json").read_text())
set_ = resolve_settings(flags={"tasks.t2i.grain": 1.5}).tasks["t2i"].sampling
options = {
    name: [option for parameter in command.params for option in parameter.opts]
    for name, command in typer.main.get_command(app).commands.items()
}
job = manifest_schema()["$defs"]["JobFields"]["properties"]
print(json.dumps({
    "dumped": dump_settings(default_config())["tasks"]["t2i"]["grain"],
    "set": set_.grain,
    "field": job["grain"]["description"],
    "commands": [name for name, opts in options.items() if "--grain" in opts],
    "read": [plain.sampling.grain, grainy.sampling.grain, old.sampling.grain],
    "stored": ["grain" in job_to_json(job) for job in (plain, grainy)],
    "restored": job_from_json(job_to_json(grainy)) == grainy,
    "keys": [job_key(job, identity) for job in (plain, grainy)],
    "old key": job_key(old, identity),
}))
"""


ROWS = [{"id": "plain", "prompt": "a"}, {"id": "grainy", "prompt": "a", "grain": 2}]
NOBODY = ModelIdentity(
    checkpoint="", lora=None, dtype="", generation_prompt="", interleave_prompt=""
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a package makes of another field of `Sampling`, which nothing else knows."""
    root = patched_package(tmp_path_factory.mktemp("field"), inserted={("jobs.py", BEFORE): FIELD})
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (root / "jobs.jsonl").write_text(rows, encoding="utf-8")
    (root / "old.json").write_text(job_to_json(make_job("a")), encoding="utf-8")
    (root / "uses.py").write_text(USES, encoding="utf-8")
    found: dict[str, Any] = json.loads(run_patched(root, "uses.py"))
    return found


def test_a_new_field_is_a_setting_a_manifest_field_and_a_flag(found: dict[str, Any]) -> None:
    assert (found["dumped"], found["set"]) == (0.0, 1.5)
    assert found["field"] == "How grainy images are."
    assert set(found["commands"]) >= {task.value for task in Task if task.spec.drawing}


def test_a_new_field_is_read_stored_and_restored(found: dict[str, Any]) -> None:
    assert found["read"] == [0.0, 2.0, 0.0]
    assert found["stored"] == [False, True]
    assert found["restored"]


def test_no_key_changes_until_a_new_field_is_used(found: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text(json.dumps(ROWS[0]), encoding="utf-8")
    (today,) = read_manifest(path, default_config())
    assert found["keys"][0] == job_key(today, NOBODY) != found["keys"][1]
    assert found["old key"] == job_key(make_job("a"), NOBODY)


@pytest.mark.parametrize("task", Task)
def test_flags_and_fields_are_those_of_the_task(task: Task) -> None:
    having = {name for name, declaration in SETTINGS.items() if declaration.setting.of(task.spec)}
    assert set(setting_options(task).__dataclass_fields__) == having
    assert having <= JobFields.model_fields.keys() - FOREIGN_FIELDS[task]
    assert not having & FOREIGN_FIELDS[task]


def test_every_field_of_sampling_is_declared() -> None:
    assert list(declared(Sampling)) == list(Sampling.__slots__)
    for declaration in declared(Sampling).values():
        assert re.fullmatch("[A-Z].*[.]", declaration.setting.help)


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: Annotated[int, Setting(help="Any.")]
    norm: Annotated[CfgNorm, Setting(help="Any.")] = CfgNorm.NONE
    ends: Annotated[
        tuple[Annotated[float, Ge(0)], Annotated[float, Ge(0)]], Setting(help="Any.")
    ] = (0.0, 1.0)
    words: str = ""


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        (Sample(count=1), ["count"]),
        (Sample(count=0, norm=CfgNorm.GLOBAL, ends=(0.5, 1.0)), ["count", "norm", "ends"]),
    ],
)
def test_a_field_at_its_default_is_left_out_and_comes_back(
    sample: Sample, names: list[str]
) -> None:
    values = {name: plain(value) for name, value in stated(sample).items()}
    assert list(values) == names
    assert restored(Sample, json.loads(json.dumps(values))) == sample


def test_values_get_the_types_of_their_fields() -> None:
    types = {name: declaration.plain_type for name, declaration in declared(Sample).items()}
    assert types == {"count": int, "norm": CfgNorm, "ends": tuple[float, float]}
    assert converter(types["ends"])([0, 1]) == (0.0, 1.0)
    # A key says 0.0 and 0 in different words.
    assert [type(end) for end in converter(types["ends"])([0, 1])] == [float, float]
    assert converter(types["norm"])("global") is CfgNorm.GLOBAL
    assert converter(types["count"])(3) == 3
