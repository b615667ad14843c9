"""Shards of a manifest, and the folder that they are joined into."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import ExecutionConfig, OutputConfig
from sensebatch.errors import ConfigError, RunFolderError, StorageError
from sensebatch.executor.run import execute
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import Job
from sensebatch.store import merge as merging
from sensebatch.store import run_dir
from sensebatch.store.chains import reading
from sensebatch.store.finished import finished_jobs
from sensebatch.store.log import read_log
from sensebatch.store.merge import Merged, merge
from sensebatch.store.repair import repair
from sensebatch.store.shards import Shard
from sensebatch.store.status import read_status
from sensebatch.store.store import open_store
from sensebatch.store.verify import verify
from sensebatch.tasks import Task
from tests.executor.fakes import (
    IDENTITY,
    FakeEngine,
    Flag,
    Recorder,
    make_config,
    make_job,
    mixed_jobs,
    outcome,
    read_input,
    run_folder,
)
from tests.executor.test_crash import Killed, Life, mortal

pytestmark = pytest.mark.slow

CONFIG = make_config(execution=ExecutionConfig(max_attempts=2))


def run_shard(
    root: Path,
    number: int,
    count: int,
    jobs: Sequence[Job] | None = None,
    *,
    config: Any = CONFIG,
    engine: FakeEngine | None = None,
    stop: Flag | None = None,
) -> Recorder:
    """Runs one shard in its folder."""
    seen = Recorder()
    with open_store(root) as store:
        shard = Shard(number=number, count=count)
        store.ingest(mixed_jobs() if jobs is None else jobs, IDENTITY, shard=shard)
        execute(
            store=store,
            worker=EngineWorker(engine or FakeEngine()),
            config=config,
            read_image=reading(root, read_input),
            observer=seen,
            stop=stop or Flag(),
        )
    return seen


def run_shards(folder: Path, count: int, jobs: Sequence[Job] | None = None) -> list[Path]:
    roots = [folder / f"run-{number}-of-{count}" for number in range(1, count + 1)]
    for number, root in enumerate(roots, start=1):
        run_shard(root, number, count, jobs)
    return roots


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("whole")
    run_folder(root, mixed_jobs(), CONFIG)
    return outcome(root)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return run_shards(tmp_path_factory.mktemp("shards"), 3)


@pytest.mark.parametrize("count", [1, 2, 14])
def test_joined_shards_have_the_bytes_and_rows_of_an_undivided_run(
    count: int, tmp_path: Path, whole: Any
) -> None:
    merged = merge(run_shards(tmp_path, count), tmp_path / "all")
    assert outcome(tmp_path / "all") == whole
    assert (merged.missing, merged.unfinished, merged.missing_files) == ((), {}, ())
    assert merged.counts.remaining == merged.counts.elsewhere == 0


def test_every_job_runs_in_exactly_one_shard(shards: list[Path]) -> None:
    made = [row["job_id"] for root in shards for row in read_log(root / "log.parquet").to_pylist()]
    assert set(made) == {job.id for job in mixed_jobs()}
    counts = [read_status(root).counts for root in shards]
    assert sum(count.jobs for count in counts) == len(mixed_jobs())
    assert all(count.jobs + count.elsewhere == len(mixed_jobs()) for count in counts)
    assert all(count.jobs for count in counts)


def test_the_joined_folder_runs_on_verifies_and_keeps_sessions_apart(
    shards: list[Path], tmp_path: Path
) -> None:
    merge(shards, tmp_path / "all")
    assert {file.found for file in verify(tmp_path / "all")} == {"whole"}
    rows = read_log(tmp_path / "all" / "log.parquet").to_pylist()
    assert len({(row["run"], row["session"]) for row in rows}) == len(shards)
    assert len({row["session"] for row in rows}) == len(shards)
    done = list(finished_jobs(tmp_path / "all"))
    assert [one.row["job_id"] for one in done] == [one.job.id for one in done]
    assert {row["job_id"] for row in rows if row["current"]} == {job.id for job in mixed_jobs()}
    ran = run_folder(tmp_path / "all", mixed_jobs(), CONFIG)
    assert ran.engine.batches == []
    assert ran.summary.counts.failed == len([row for row in rows if row["attempt"] == 2])


def test_a_missing_shard_is_named_and_drawn_in_the_joined_folder_to_the_same_bytes(
    shards: list[Path], tmp_path: Path, whole: Any
) -> None:
    merged = merge([shards[0], shards[2]], tmp_path / "all")
    assert merged.missing == (2,)
    assert merged.counts.pending == read_status(shards[1]).counts.jobs
    run_folder(tmp_path / "all", mixed_jobs(), CONFIG)
    assert outcome(tmp_path / "all") == whole


def test_a_shard_that_was_missing_can_be_joined_later(
    shards: list[Path], tmp_path: Path, whole: Any
) -> None:
    merge([shards[2]], tmp_path / "all")
    assert merge(shards, tmp_path / "all").missing == ()
    assert merge([shards[0]], tmp_path / "all").missing == ()
    assert outcome(tmp_path / "all") == whole


def stories() -> list[Job]:
    return [make_job(f"s{i}", Task.INTERLEAVE, prompt="grows", seed=i) for i in range(4)]


def test_an_interrupted_batch_takes_its_kept_images_along(tmp_path: Path) -> None:
    config = make_config(max_batch_size=1)
    run_folder(tmp_path / "whole", stories(), config)
    run_shard(tmp_path / "a", 1, 2, stories(), config=config, stop=Flag(after=5))
    run_shard(tmp_path / "b", 2, 2, stories(), config=config)
    kept = read_status(tmp_path / "a").kept_images
    assert kept
    merged = merge([tmp_path / "b", tmp_path / "a"], tmp_path / "all")
    assert merged.unfinished == {1: 2}
    assert read_status(tmp_path / "all").kept_images == kept
    # Once more, after the shard has come further.
    run_shard(tmp_path / "a", 1, 2, stories(), config=config, stop=Flag(after=2))
    merge([tmp_path / "a"], tmp_path / "all")
    assert merge([tmp_path / "a"], tmp_path / "all").counts.started == 1
    ran = run_folder(tmp_path / "all", stories(), config)
    assert ran.engine.num_kept or ran.engine.steps < 2 * 5
    assert outcome(tmp_path / "all")[0] == outcome(tmp_path / "whole")[0]


def test_a_merge_that_dies_at_any_step_continues_to_the_same_folder(
    shards: list[Path], tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_CHUNK", 2)
    life = Life(None)
    with mortal(life):
        merge(shards, tmp_path / "steps")
    assert life.taken > 60
    root = tmp_path / "all"
    for steps in range(3, life.taken, 11):
        try:
            with mortal(Life(steps)):
                merge(shards, root)
        except Killed:
            continue
        break
    merged = merge(shards, root)
    assert (merged.missing_files, merged.counts.remaining) == ((), 0)
    assert outcome(root) == whole
    assert not [path for path in root.rglob("*") if path.name.endswith(".tmp")]
    assert outcome(shards[0])[1]


KILLED = """
import os, signal, sys
from pathlib import Path
from sensebatch.store import merge
merge._CHUNK = 3
left, link = int(sys.argv[1]), os.link
def dying(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    link(*args)
os.link = dying
merge.merge([Path(name) for name in sys.argv[3:]], Path(sys.argv[2]))
"""


def test_a_merge_that_is_killed_continues(shards: list[Path], tmp_path: Path, whole: Any) -> None:
    root = tmp_path / "all"
    command = [sys.executable, "-c", KILLED, "4", str(root), *map(str, shards)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert merge(shards, root).missing == ()
    assert outcome(root) == whole


def test_without_links_files_are_copied(
    shards: list[Path], tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merge(shards, tmp_path / "all")
    assert outcome(tmp_path / "all") == whole
    image = next((tmp_path / "all" / "images").rglob("*.png"))
    assert image.stat().st_nlink == 1


def test_a_missing_file_is_named_and_made_again(tmp_path: Path) -> None:
    roots = run_shards(tmp_path, 2)
    image = next((roots[1] / "images").rglob("*.png"))
    image.unlink()
    merged = merge(roots, tmp_path / "all")
    assert merged.missing_files == (str(image),)
    ran = run_folder(tmp_path / "all", mixed_jobs(), CONFIG)
    assert len(ran.engine.batches) == 1


def refused(folders: list[Path], root: Path, match: str) -> None:
    with pytest.raises(RunFolderError, match=match):
        merge(folders, root)
    assert not root.exists()


def test_folders_that_do_not_belong_together_are_refused_by_name(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.05)
    root, other = tmp_path / "all", tmp_path / "other"
    jobs = mixed_jobs()
    run_shard(other, 2, 4)
    refused([shards[0], other], root, "shard 1 of 3 and shard 2 of 4")
    refused([shards[0], shards[0]], root, "each folder once")
    run_shard(tmp_path / "twice", 1, 3)
    refused([shards[0], tmp_path / "twice"], root, "shard 1 of 3 in both")
    changed = [replace(jobs[0], seed=8), *jobs[1:]]
    run_shard(tmp_path / "changed", 2, 3, changed)
    refused([shards[0], tmp_path / "changed"], root, f"1 job with another .* {jobs[0].id}")
    run_shard(tmp_path / "less", 2, 3, jobs[1:])
    refused([shards[0], tmp_path / "less"], root, f"only shard 1 of 3 has, such as {jobs[0].id}")
    run_shard(tmp_path / "order", 2, 3, jobs[::-1])
    refused([shards[0], tmp_path / "order"], root, "another order")
    run_shard(tmp_path / "cut", 2, 3, config=make_config(max_batch_size=3))
    refused([shards[0], tmp_path / "cut"], root, "t2i 64x32 in 2s.* t2i 64x32 in 3s")
    webp = make_config(output=OutputConfig(image_format="webp", image_quality=100))
    run_shard(tmp_path / "webp", 2, 3, config=webp)
    refused([shards[0], tmp_path / "webp"], root, "png with metadata and webp of quality 100")
    run_folder(tmp_path / "plain", jobs, CONFIG)
    refused([shards[0], tmp_path / "plain"], root, "a run without --shard")
    refused([tmp_path / "nothing"], root, "no state.db")
    with open_store(tmp_path / "early") as store:
        store.ingest(jobs, IDENTITY, shard=Shard(number=2, count=3))
    refused([shards[0], tmp_path / "early"], root, "before its first batch")
    with open_store(shards[1]):
        refused(shards, root, "in use by a run")


def test_folders_with_something_else_are_not_joined_into(
    shards: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(RunFolderError, match="another folder than those"):
        merge(shards, shards[0])
    run_folder(tmp_path / "plain", mixed_jobs(), CONFIG)
    with pytest.raises(RunFolderError, match="found that of a run"):
        merge(shards, tmp_path / "plain")
    merge([shards[0]], tmp_path / "other")
    with pytest.raises(RunFolderError, match="found that of another merge"):
        merge(run_shards(tmp_path, 2), tmp_path / "other")
    run_shard(tmp_path / "again", 1, 3)
    with pytest.raises(RunFolderError, match="shard 1 of 3 was joined from before"):
        merge([tmp_path / "again"], tmp_path / "other")
    run_folder(tmp_path / "other", mixed_jobs(), CONFIG)
    with pytest.raises(RunFolderError, match="sensebatch run has continued"):
        merge(shards, tmp_path / "other")


def test_a_shard_resumes_only_its_own_batches(tmp_path: Path) -> None:
    run_shard(tmp_path / "whole", 2, 3)
    run_shard(tmp_path / "run", 2, 3, stop=Flag(after=2))
    assert read_status(tmp_path / "run").counts.remaining
    run_shard(tmp_path / "run", 2, 3)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_shard_says_what_is_its_own(tmp_path: Path) -> None:
    seen = run_shard(tmp_path / "run", 2, 3)
    counts = read_status(tmp_path / "run").counts
    (note,) = [note for note in seen.notes if note.startswith("shard 2 of 3: ")]
    assert f"{counts.jobs} of {len(mixed_jobs())} jobs" in note
    assert read_status(tmp_path / "run").shard == Shard(number=2, count=3)


@pytest.mark.parametrize(
    ("shard", "jobs", "match"),
    [
        (None, mixed_jobs(), "found the folder of shard 2 of 3; say --shard 2/3"),
        (Shard(number=1, count=3), mixed_jobs(), "expected shard 1 of 3, found shard 2 of 3"),
        (Shard(number=2, count=3), mixed_jobs()[1:], "the manifest, the settings or the model"),
    ],
)
def test_the_folder_of_a_shard_is_for_nothing_else(
    shard: Shard | None, jobs: list[Job], match: str, tmp_path: Path
) -> None:
    run_shard(tmp_path / "run", 2, 3)
    before = outcome(tmp_path / "run")
    with open_store(tmp_path / "run") as store, pytest.raises(RunFolderError, match=match):
        store.ingest(jobs, IDENTITY, shard=shard)
    run_shard(tmp_path / "run", 2, 3)
    assert outcome(tmp_path / "run") == before


def test_the_folder_of_a_whole_run_becomes_no_shard(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", mixed_jobs(), CONFIG)
    with (
        open_store(tmp_path / "run") as store,
        pytest.raises(RunFolderError, match="found one of a run without --shard"),
    ):
        store.ingest(mixed_jobs(), IDENTITY, shard=Shard(number=1, count=2))


def test_a_repaired_shard_is_still_that_shard(tmp_path: Path, whole: Any) -> None:
    roots = run_shards(tmp_path, 2)
    for path in roots[0].glob("state.db*"):
        path.unlink()
    (roots[0] / "run.yaml").write_text('shard: "1/2"\n', encoding="utf-8")
    repair(roots[0])
    seen = run_shard(roots[0], 1, 2)
    assert seen.finished == []
    merge(roots, tmp_path / "all")
    assert outcome(tmp_path / "all")[0] == whole[0]


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2", "1/2/3", ""])
def test_what_names_no_shard_is_a_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 2/8, found"):
        Shard.parse(text)


def test_a_full_disk_stops_a_merge_that_then_continues(
    shards: list[Path], tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(StorageError, match="no room left"):
            merge(shards, tmp_path / "all")
    assert isinstance(merge(shards, tmp_path / "all"), Merged)
    assert outcome(tmp_path / "all") == whole
