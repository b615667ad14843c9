from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.errors import RunFolderError
from sensebatch.jobs import BatchResult, Task
from sensebatch.store import log
from sensebatch.store.attempts import Attempt
from sensebatch.store.log import SCHEMA, read_log
from sensebatch.store.store import open_store
from tests.executor.fakes import IDENTITY, FakeEngine, make_config, make_job, mixed_jobs, run_folder
from tests.store import documented


def test_table_of_the_documentation_is_what_the_columns_say() -> None:
    document = documented.DOCS.read_text()
    assert set(documented.field_texts(Attempt)) == set(SCHEMA.names)
    assert document == documented.written(document), "run python -m tests.store.documented"


def test_log_is_there_before_the_first_batch(tmp_path: Path) -> None:
    with open_store(tmp_path):
        assert read_log(tmp_path / "log.parquet").num_rows == 0


def test_log_is_readable_at_every_step_of_a_run(tmp_path: Path) -> None:
    seen = []

    def look() -> None:
        seen.append(read_log(tmp_path / "log.parquet").num_rows)

    run_folder(tmp_path, mixed_jobs(), engine=FakeEngine(look))
    assert seen == sorted(seen)
    assert read_log(tmp_path / "log.parquet").num_rows == len(mixed_jobs())


def test_log_of_an_earlier_version_has_nothing_in_later_columns(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a")])
    path = tmp_path / "log.parquet"
    now = read_log(path)
    pq.write_table(now.drop_columns(["precision"]), path)
    then = read_log(path)
    assert then["precision"].to_pylist() == [None]
    assert then.drop_columns(["precision"]).equals(now.drop_columns(["precision"]))


def test_rows_say_what_was_made_and_what_it_cost(tmp_path: Path) -> None:
    jobs = [make_job("a", metadata={"tag": "x"}), make_job("b"), make_job("s", Task.INTERLEAVE)]
    run_folder(tmp_path, jobs)
    table = read_log(tmp_path / "log.parquet")
    assert table.schema.equals(SCHEMA)
    a, _, story = table.to_pylist()
    assert (a["image_paths"], a["image_tokens"]) == (["images/a.png"], 2)
    assert len(a["image_sha256"][0]) == 64
    assert (a["batch_size"], a["shared_figures"]) == (2, True)
    assert a["image_tok_per_s"] == pytest.approx(4 / 8.0)
    assert a["step_s"] == pytest.approx(0.5)
    assert a["text_tok_per_s"] is None
    assert (a["checkpoint"], a["system_prompt_source"]) == (IDENTITY.checkpoint, "default")
    assert json.loads(a["metadata"]) == {"tag": "x"}
    assert a["started_at"].tzinfo is not None
    assert a["peak_rss_bytes"] > 0
    assert (story["batch_size"], story["shared_figures"]) == (1, False)
    assert story["text_tok_per_s"] == pytest.approx(5 / 2.0)
    assert story["text_path"] == "text/s.txt"
    assert story["image_paths"][0] == "images/s/000.png"


class WrongSize(FakeEngine):
    """Draws every picture too low by half."""

    def generate(self, *args: Any, **options: Any) -> BatchResult:
        done = super().generate(*args, **options)
        results = (
            replace(result, images=tuple(image[::2] for image in result.images))
            for result in done.results
        )
        return replace(done, results=tuple(results))


@pytest.mark.parametrize("engine", [FakeEngine(), WrongSize()])
def test_text_of_a_job_that_failed_behind_it_took_its_time(
    tmp_path: Path, engine: FakeEngine
) -> None:
    jobs = [make_job("a", think=True), make_job("fails", prompt="fails", think=True)]
    run_folder(tmp_path, jobs, engine=engine)
    a, failed = read_log(tmp_path / "log.parquet").to_pylist()
    assert (failed["status"], failed["think_tokens"], failed["text_path"]) == ("failed", 10, None)
    assert a["think_tokens"] == 10
    assert a["text_tok_per_s"] == failed["text_tok_per_s"] == pytest.approx(20 / 2.0)


def test_log_is_rebuilt_from_the_state_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PART_ROWS", 3)
    run_folder(tmp_path, mixed_jobs(), make_config(execution=ExecutionConfig(max_attempts=2)))
    before = pq.read_table(tmp_path / "log.parquet")
    parts = sorted((tmp_path / "log").iterdir())
    assert len(parts) == before.num_rows // 3
    (tmp_path / "log.parquet").unlink()
    parts[0].write_bytes(b"damaged")
    run_folder(tmp_path, mixed_jobs())
    assert pq.read_table(tmp_path / "log.parquet").equals(before)
    (tmp_path / "log.parquet").write_bytes(b"damaged")
    shutil.rmtree(tmp_path / "log")
    run_folder(tmp_path, mixed_jobs())
    assert pq.read_table(tmp_path / "log.parquet").equals(before)


def test_what_is_written_stays_as_it_is_until_there_are_more_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PART_ROWS", 2)
    jobs = [make_job(f"j{i}") for i in range(4)]
    run_folder(tmp_path, jobs)

    def written() -> list[tuple[int, int]]:
        files = [*sorted((tmp_path / "log").iterdir()), tmp_path / "log.parquet"]
        return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files]

    before = written()
    assert len(before) == 3
    with open_store(tmp_path):
        assert written() == before
    run_folder(tmp_path, [*jobs, make_job("j4"), make_job("j5")])
    assert written()[:2] == before[:2]
    assert read_log(tmp_path / "log.parquet").num_rows == 6


@pytest.mark.parametrize("name", ["log.parquet", "log/part-00000.parquet"])
def test_file_that_is_damaged_before_its_end_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(log, "PART_ROWS", 2)
    run_folder(tmp_path, [make_job(f"j{i}") for i in range(4)])
    before = read_log(tmp_path / "log.parquet")
    whole = (tmp_path / name).read_bytes()
    column = pq.read_metadata(tmp_path / name).row_group(0).column(0)
    start = column.dictionary_page_offset
    damage = bytes(byte ^ 255 for byte in whole[start : start + column.total_compressed_size])
    (tmp_path / name).write_bytes(whole.replace(whole[start : start + len(damage)], damage))
    with open_store(tmp_path) as store:
        if name != "log.parquet":
            store.log.write()
    assert read_log(tmp_path / "log.parquet").equals(before)
    assert pq.read_table(tmp_path / name).slice(0, 2).equals(before.slice(0, 2))


def test_parts_of_another_state_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PART_ROWS", 2)
    run_folder(tmp_path / "a", [make_job(f"a{i}") for i in range(4)])
    run_folder(tmp_path / "b", [make_job(f"b{i}") for i in range(4)])
    for part in (tmp_path / "a/log").iterdir():
        (tmp_path / "b/log" / part.name).write_bytes(part.read_bytes())
    (tmp_path / "b/log.parquet").unlink()
    run_folder(tmp_path / "b", [make_job(f"b{i}") for i in range(4)])
    found = pq.read_table(tmp_path / "b/log.parquet")["job_id"].to_pylist()
    assert found == ["b0", "b1", "b2", "b3"]


def test_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"log\.parquet: expected the log of a run"):
        read_log(tmp_path / "log.parquet")
