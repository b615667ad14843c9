"""Exit code 75 where a run was stopped by something that concerns every job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sensebatch.errors import DeviceError, RunFolderError, SensebatchError, StorageFullError
from sensebatch.jobs import BatchResult
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke


@pytest.mark.parametrize("kind", [DeviceError, StorageFullError, RunFolderError])
def test_run_that_cannot_continue_is_resumable(
    invoke: Invoke,
    manifest: Path,
    backend: FakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[SensebatchError],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("it is unplugged")

    with monkeypatch.context() as patch:
        patch.setattr(backend.engine, "generate", fail)
        ended = invoke("run", manifest, "--json")
    assert ended.code == 75
    assert ended.json["stopped"]
    assert (ended.json["exit_code"], ended.json["error"]) == (75, "it is unplugged")
    assert "sensebatch: it is unplugged" in ended.err
    counts = invoke("status", "outputs/small", "--json").json
    assert (counts["failed"], counts["started"] + counts["pending"]) == (0, 5)
    assert invoke("run", manifest).code == 0


@pytest.mark.parametrize("asked", [("--prompt", "a dot"), ("--jsonl", "one.jsonl")])
def test_one_job_that_cannot_continue_reports_it_in_its_object(
    invoke: Invoke,
    backend: FakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    asked: tuple[str, str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DeviceError("it is unplugged")

    (tmp_path / "one.jsonl").write_text('{"prompt": "a dot"}\n', encoding="utf-8")
    monkeypatch.setattr(backend.engine, "generate", fail)
    ended = invoke("t2i", *asked, "--output-dir", "out", "--json")
    assert ended.code == 75
    assert (ended.json["exit_code"], ended.json["error"]) == (75, "it is unplugged")


def test_what_was_committed_is_in_the_log_and_the_summary(
    invoke: Invoke, manifest: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = backend.engine.generate

    def fail_after_the_first(*args: Any, **options: Any) -> BatchResult:
        if backend.engine.batches:
            raise DeviceError("it is unplugged")
        return real(*args, **options)

    monkeypatch.setattr(backend.engine, "generate", fail_after_the_first)
    assert invoke("run", manifest).code == 75
    done = invoke("status", "outputs/small", "--json").json["done"]
    total = invoke("report", "outputs/small", "--json").json["total"]
    assert total["jobs"] == done > 0
    assert "calls=1" in Path("outputs/small/summary.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", [".lock", "log.parquet", "state.db", "summary.txt", "images"])
def test_run_on_a_folder_with_a_part_in_the_way_ends_with_75_and_no_traceback(
    invoke: Invoke, manifest: Path, part: str
) -> None:
    root = Path("outputs/small")
    if part == "images":
        root.mkdir(parents=True)
        (root / part).write_text("")
    else:
        (root / part).mkdir(parents=True)
    ended = invoke("run", manifest)
    assert ended.code == 75
    assert f"{root / part}: expected a " in ended.err
