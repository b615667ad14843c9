from __future__ import annotations

import json
import shutil
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.errors import RunFolderError
from sensebatch.jobs import BatchResult, JobResult
from sensebatch.store import log
from sensebatch.store.attempts import Attempt, Marks
from sensebatch.store.log import SCHEMA, read_log
from sensebatch.store.store import open_store
from sensebatch.tasks import Task
from tests.executor.fakes import IDENTITY, FakeEngine, make_config, make_job, mixed_jobs, run_folder
from tests.store import documented


def test_table_of_the_documentation_is_what_the_columns_say() -> None:
    document = documented.DOCS.read_text()
    declared = {**documented.field_texts(Attempt), **documented.field_texts(Marks)}
    assert set(declared) == set(SCHEMA.names)
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
    assert (a["worker"], a["node"]) == (0, socket.gethostname())
    assert (story["batch_size"], story["shared_figures"]) == (1, False)
    assert story["text_tok_per_s"] == pytest.approx(5 / 2.0)
    assert story["text_path"] == "text/s.txt"
    assert story["image_paths"][0] == "images/s/000.png"


class WrongSize(FakeEngine):
    """Draws every image half as high as it should be."""

    def generate(self, *args: Any, **options: Any) -> BatchResult:
        done = super().generate(*args, **options)
        results = (
            replace(result, images=tuple(image[::2] for image in result.images))
            if isinstance(result, JobResult)
            else result
            for result in done.results
        )
        return replace(done, results=tuple(results))


@pytest.mark.parametrize("engine", [FakeEngine(), WrongSize()])
def test_text_of_a_job_that_failed_after_it_took_its_time(
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


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job(f"j{i}") for i in range(4)])
    path = tmp_path / "log.parquet"
    whole = path.read_bytes()
    with open_store(tmp_path) as store:
        assert store.log.is_current()
        for place in range(0, len(whole), 97):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert not store.log.is_current(), place
    with open_store(tmp_path):
        assert path.read_bytes() == whole


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.97])
def test_damaged_part_is_written_again_from_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: float
) -> None:
    monkeypatch.setattr(log, "PART_ROWS", 2)
    run_folder(tmp_path, [make_job(f"j{i}") for i in range(4)])
    before = pq.read_table(tmp_path / "log.parquet")
    part = tmp_path / "log/part-00000.parquet"
    whole = part.read_bytes()
    flipped = bytearray(whole)
    flipped[int(place * len(whole))] ^= 4
    part.write_bytes(flipped)
    with open_store(tmp_path) as store:
        store.log.write()
    assert pq.read_table(tmp_path / "log.parquet").equals(before)
    assert part.read_bytes() == whole


def test_part_that_was_copied_over_another_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PART_ROWS", 2)
    run_folder(tmp_path, [make_job(f"j{i}") for i in range(4)])
    before = pq.read_table(tmp_path / "log.parquet")
    first, second = (tmp_path / f"log/part-0000{number}.parquet" for number in (0, 1))
    shutil.copyfile(first, second)
    with open_store(tmp_path) as store:
        store.log.write()
    assert pq.read_table(tmp_path / "log.parquet").equals(before)
    assert pq.read_schema(second).metadata[b"sensebatch.rows"] == b"3-4"


def test_reader_of_the_log_notices_damage_that_only_page_checksums_show(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job(f"j{i}") for i in range(4)])
    path = tmp_path / "log.parquet"
    whole, before = path.read_bytes(), read_log(path)
    group = pq.read_metadata(path).row_group(0)
    num_silent = 0
    for column in map(group.column, range(group.num_columns)):
        flipped = bytearray(whole)
        start = column.dictionary_page_offset or column.data_page_offset
        flipped[start + column.total_compressed_size - 1] ^= 1
        path.write_bytes(flipped)
        with suppress(OSError, UnicodeDecodeError, pa.ArrowException):
            if not pq.read_table(path).equals(before):
                num_silent += 1
                with pytest.raises(
                    RunFolderError, match=r"log\.parquet: expected the log of a run"
                ):
                    read_log(path)
    assert num_silent > 5


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


def test_log_of_a_file_is_a_mistake_about_the_folder(tmp_path: Path) -> None:
    manifest = tmp_path / "m.yaml"
    manifest.write_text("version: 1")
    with pytest.raises(RunFolderError, match=r"m\.yaml: expected a run's folder, found a file$"):
        read_log(manifest / "log.parquet")
