"""`sensebatch repair` and `sensebatch status --verify`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

ROOT = Path("outputs/small")


@pytest.fixture
def _done(invoke: Invoke, manifest: Path) -> None:
    assert invoke("run", manifest).code == 0


@pytest.mark.usefixtures("_done")
def test_lost_state_is_reported_by_status_and_rebuilt_by_the_command_it_names(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    for path in ROOT.glob("state.db*"):
        path.unlink()
    for command in (("status", ROOT), ("run", manifest)):
        refused = invoke(*command)
        assert refused.code == 2
        assert f"sensebatch repair {ROOT}" in refused.err
    repaired = invoke("repair", ROOT)
    assert repaired.code == 0
    assert repaired.out.splitlines() == [
        f"{ROOT}: rebuilt from 5 rows of the log",
        "  done      5 jobs, with the files that the log names",
        "  not read  state.db is missing",
        "run the manifest again with sensebatch run to run what is missing",
    ]
    assert invoke("status", ROOT).out.splitlines()[:2] == [
        f"{ROOT}: 5 jobs rebuilt by repair,",
        "  sensebatch run says which of them the manifest has, not running",
    ]
    num_batches = len(backend.engine.batches)
    assert invoke("run", manifest).code == 0
    assert len(backend.engine.batches) == num_batches
    assert invoke("status", ROOT, "--json").json["done"] == 5


@pytest.mark.usefixtures("_done")
def test_what_could_not_be_saved_is_listed(invoke: Invoke) -> None:
    (ROOT / "images/a.png").unlink()
    (ROOT / "images/extra.png").write_bytes(b"the user's")
    lines = invoke("repair", ROOT).out.splitlines()
    assert "  to run    a: files are missing or have changed" in lines
    assert "  unknown   images/extra.png: kept, but no job is known for them" in lines
    assert "the former state.db is kept as state.db.damaged-1" in lines
    again = invoke("repair", ROOT, "--json").json
    assert (again["done"], again["to_run"], again["unknown"]) == (4, ["a"], ["images/extra.png"])


@pytest.mark.slow
@pytest.mark.usefixtures("_done")
def test_whole_folder_is_left_alone_unless_forced(invoke: Invoke) -> None:
    ended = invoke("repair", ROOT)
    assert ended.code == 0
    assert "nothing is damaged, and nothing was changed" in ended.out
    assert not list(ROOT.glob("state.db.damaged-*"))
    lines = invoke("repair", ROOT, "--force").out.splitlines()
    assert lines == [
        f"{ROOT}: rebuilt from 5 rows of the log",
        "  done      5 jobs, with the files that the log names",
        "the former state.db is kept as state.db.damaged-1",
    ]


def test_folder_without_anything_is_a_mistake(invoke: Invoke, tmp_path: Path) -> None:
    ended = invoke("repair", tmp_path / "nowhere")
    assert ended.code == 2
    assert "expected a run's folder" in ended.err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_done")
def test_verify_reads_every_file_and_names_those_that_changed(
    invoke: Invoke, manifest: Path
) -> None:
    whole = invoke("status", ROOT, "--verify")
    assert whole.code == 0
    num_files = len([path for name in ("images", "text") for path in (ROOT / name).rglob("*.*")])
    assert f"  files  {num_files} of {num_files} files are as they were written" in whole.out
    assert "verified_files" not in invoke("status", ROOT, "--json").json
    (ROOT / "text/c.txt").unlink()
    hint = invoke("status", ROOT, "--verify").out.splitlines()[-1]
    assert hint == "run the manifest again with sensebatch run to make the missing files again"
    (ROOT / "images/a.png").write_bytes(b"overwritten")
    assert invoke("status", ROOT).code == 0
    ended = invoke("status", ROOT, "--verify")
    assert ended.code == 1
    assert f"  files  {num_files - 2} of {num_files} files are" in ended.out
    assert "  images/a.png: changed (job a)" in ended.out
    assert "  text/c.txt: missing (job c)" in ended.out
    hint = " ".join(ended.out.split())
    assert "remove the files that have changed, then run the manifest again" in hint, ended.out
    found = invoke("status", ROOT, "--verify", "--json")
    assert (found.code, found.json["verified_files"]) == (1, num_files)
    assert [file["path"] for file in found.json["wrong_files"]] == ["images/a.png", "text/c.txt"]
    (ROOT / "images/a.png").unlink()
    assert invoke("run", manifest).code == 0
    assert invoke("status", ROOT, "--verify").code == 0
