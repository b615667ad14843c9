"""`run --dry-run`, `--redraw` and `--retry-from`: what is drawn again, and who has a say in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch import loading
from sensebatch.checkpoint.fingerprint import model_identity
from sensebatch.cli import messages
from sensebatch.cli.demo import catalog
from sensebatch.dataset.records import open_dataset
from sensebatch.jobs import ModelIdentity
from sensebatch.store.log import read_log
from tests.backends import FakeBackend
from tests.cli.conftest import Ended, Invoke

pytestmark = pytest.mark.slow

ROOT = Path("outputs/jobs")
PROMPTS = {"a": "a star", "b": "a ring", "c": "a circle", "bad": "this one fails"}


@pytest.fixture
def write(invoke: Invoke, backend: FakeBackend) -> Callable[..., Path]:
    """Writes a manifest of prompts by id."""
    del invoke, backend

    def write(prompts: dict[str, str] = PROMPTS, **fields: Any) -> Path:
        jobs = [{"id": name, "prompt": prompt, **fields} for name, prompt in prompts.items()]
        path = Path("jobs.yaml")
        path.write_text(json.dumps({"version": 1, "name": "jobs", "jobs": jobs}))
        return path

    return write


def decided(ended: Ended) -> dict[str, tuple[str, str]]:
    return {job["id"]: (job["verdict"], job["reason"]) for job in ended.json["jobs"]}


def content(root: Path = ROOT) -> dict[str, str]:
    """Returns a hash of every file of a folder but those that a look may touch."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith((".lock", "state.db-"))
    }


def test_dry_run_of_a_new_folder_makes_none(invoke: Invoke, write: Any) -> None:
    ended = invoke("run", write(), "--dry-run")
    assert ended.code == 0
    assert "outputs/jobs: 4 jobs; this is a dry run, so nothing is done" in ended.out
    assert "  drawn        4 jobs: new\n               a, b, c, bad" in ended.out
    assert not Path("outputs").exists()


@pytest.mark.parametrize("folder", ["file", "file/run"])
def test_dry_run_refuses_what_a_run_would_refuse(invoke: Invoke, write: Any, folder: str) -> None:
    Path("file").write_text("")
    ended = [invoke("run", write(), "--output-dir", folder, *how) for how in ((), ("--dry-run",))]
    assert {one.code for one in ended} == {2}
    for one in ended:
        assert f"{folder}: expected a folder that can be made: file is a file" in one.err


def test_dry_run_says_what_becomes_of_each_job_and_changes_nothing(
    invoke: Invoke, write: Any, backend: FakeBackend
) -> None:
    invoke("run", write())
    (ROOT / "images" / "c.png").unlink()
    before, loaded = content(), len(backend.loaded)
    manifest = write({"a": "a star", "b": "a blue ring", "c": "a circle", "bad": "this one fails"})
    manifest.write_text(manifest.read_text().replace('"name": "jobs"', '"name": "jobs", "x-": 0'))
    write({**PROMPTS, "b": "a blue ring", "new": "a square"})
    ended = invoke("run", "jobs.yaml", "--dry-run", "--json")
    assert decided(ended) == {
        "a": ("kept", "done"),
        "b": ("redrawn", "prompt changed"),
        "c": ("redrawn", "a file is missing"),
        "bad": ("left failed", "failed; --retry-failed tries it again"),
        "new": ("drawn", "new"),
    }
    again = invoke("run", "jobs.yaml", "--dry-run", "--json", "--retry-failed")
    assert decided(again)["bad"] == ("drawn", "failed before")
    assert (content(), len(backend.loaded)) == (before, loaded)
    # What it says is what happens.
    values = invoke("run", "jobs.yaml", "--json").json
    assert values["this_run"]["done"] == 3


def test_dry_run_names_changed_settings_and_removed_jobs(invoke: Invoke, write: Any) -> None:
    invoke("run", write())
    write({"a": "a star"}, seed=7, num_steps=3)
    ended = invoke("run", "jobs.yaml", "--dry-run")
    assert "redrawn      1 job: seed, num_steps changed" in ended.out
    assert "removed      3 jobs: no longer in the manifest; files stay" in ended.out
    assert ended.out.count("\n") == 4


def test_dry_run_finds_mistakes_of_the_manifest(invoke: Invoke, write: Any) -> None:
    write({"a": ""})
    assert invoke("run", "jobs.yaml", "--dry-run").code == 2
    assert not Path("outputs").exists()


def test_jobs_of_another_dtype_are_not_drawn_again_unasked(invoke: Invoke, write: Any) -> None:
    invoke("run", write())
    before = content()
    ended = invoke("run", "jobs.yaml", "--precision", "fp8")
    assert ended.code == 2
    assert (
        "outputs/jobs: 3 finished jobs would be drawn again: precision fp8 instead of auto. "
        "Nothing was changed: say --redraw"
    ) in ended.err
    assert content() == before
    dry = invoke("run", "jobs.yaml", "--precision", "fp8", "--dry-run")
    assert "redrawn      3 jobs: precision fp8 instead of auto" in dry.out
    assert "--redraw" in dry.out
    assert invoke("run", "jobs.yaml", "--json").json["this_run"]["done"] == 0
    ended = invoke("run", "jobs.yaml", "--precision", "fp8", "--redraw", "--json")
    assert ended.json["this_run"]["done"] == 3


def test_edited_jobs_are_drawn_again_without_a_question(invoke: Invoke, write: Any) -> None:
    invoke("run", write())
    write({**PROMPTS, "a": "another star"})
    assert invoke("run", "jobs.yaml", "--json").json["this_run"]["done"] == 1


@pytest.mark.parametrize(("answer", "code"), [("y\n", 1), ("n\n", 2), ("\n", 2), ("", 2)])
def test_a_person_is_asked_on_a_terminal(
    invoke: Invoke, write: Any, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    invoke("run", write())

    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    ended = invoke("run", "jobs.yaml", "--precision", "fp8", "--quiet")
    assert ended.code == code
    assert "precision fp8 instead of auto. Draw them again? [y/N] " in ended.err


def test_nobody_is_asked_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert messages.asking() is None
    monkeypatch.setattr("sys.stdin", None)
    assert messages.asking() is None


def test_embedded_model_is_refused_where_another_one_drew(
    invoke: Invoke, write: Any, backend: FakeBackend
) -> None:
    load = backend.load_engine

    def other(*args: Any, **options: Any) -> Any:
        engine = load(*args, **options)
        engine.model = "/data/a model"
        engine.identity = type(engine.identity)(
            checkpoint="d" * 64,
            lora=None,
            dtype="bfloat16",
            generation_prompt="",
            interleave_prompt="",
        )
        return engine

    backend.load_engine = other
    invoke("run", write())
    before = content()
    for args in ([], ["--redraw"], ["--dry-run"]):
        ended = invoke("run", "jobs.yaml", *args)
        assert ended.code == 2
        assert (
            "expected the model that made its images, /data/a model, found the embedded one, "
            "tiny; say --model '/data/a model', or give another --output-dir"
        ) in ended.err
    assert content() == before


def write_picks(jobs: dict[str, Any]) -> Path:
    with open_dataset(ROOT) as dataset:
        runs = [{"run": dataset.run_id, "jobs": jobs}]
    path = Path("picks.json")
    path.write_text(json.dumps({"sensebatch_picks": 1, "runs": runs}))
    return path


def test_rejected_jobs_run_again_once(invoke: Invoke, write: Any, backend: FakeBackend) -> None:
    invoke("run", write())
    said = {"a": {"pick": "reject"}, "b": {"pick": "keep"}, "bad": {"pick": "reject"}}
    stale = {"c": {"pick": "reject", "key": "0" * 64}, "unknown": {"pick": "reject"}}
    picks = write_picks({**said, **stale})
    dry = invoke("run", "jobs.yaml", "--retry-from", picks, "--dry-run", "--json")
    assert {name: verdict for name, (verdict, _) in decided(dry).items()} == {
        "a": "redrawn",
        "b": "kept",
        "c": "kept",
        "bad": "drawn",
    }
    backend.engine.batches.clear()
    ended = invoke("run", "jobs.yaml", "--retry-from", picks)
    assert "warning: 1 rejected job is drawn again as they were" in ended.err
    assert sorted(job for batch in backend.engine.batches for job in batch) == ["a", "bad"]
    log = read_log(ROOT / "log.parquet", ["job_id", "attempt", "current"]).to_pylist()
    assert [(row["attempt"], row["current"]) for row in log if row["job_id"] == "a"] == [
        (1, False),
        (2, True),
    ]
    # The same command finds nothing more to do; other picks do.
    backend.engine.batches.clear()
    invoke("run", "jobs.yaml", "--retry-from", picks)
    assert backend.engine.batches == []
    invoke("run", "jobs.yaml", "--retry-from", write_picks({"b": {"pick": "reject"}}))
    assert backend.engine.batches == [("b",)]


def test_picks_of_another_folder_are_refused(invoke: Invoke, write: Any) -> None:
    invoke("run", write())
    path = Path("picks.json")
    path.write_text(json.dumps({"sensebatch_picks": 1, "runs": []}))
    ended = invoke("run", "jobs.yaml", "--retry-from", path)
    assert ended.code == 2
    assert "picks.json: expected picks of the folder with the id" in ended.err


def test_demo_draws_again_what_an_earlier_embedded_checkpoint_drew(
    invoke: Invoke, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("demo").code == 0

    def later(*args: Any, **options: Any) -> ModelIdentity:
        return replace(model_identity(*args, **options), checkpoint="e" * 64)

    monkeypatch.setattr(loading, "model_identity", later)
    backend.engine.batches.clear()
    ended = invoke("run", catalog(), "--output-dir", "outputs/catalog")
    assert ended.code == 2
    assert "another checkpoint (drawn by tiny)" in ended.err
    assert backend.engine.batches == []
    assert invoke("demo").code == 0
    assert backend.engine.batches
