"""How a run's speed grows with its workers, measured."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sensebatch.profile import expected, scaling
from sensebatch.profile.expected import expectation
from sensebatch.profile.scaling import Row, baseline, format_rows, read_rows, write_rows
from sensebatch.profile.suites import Scale, Suite, chosen_cases, suite_cases, write_manifest
from sensebatch.resolutions import Resolution
from tests.profile.test_recorded import HIGHEST, LOWEST, without_packing

MEASURED = Path(__file__).parents[2] / "docs" / "measured"

ROW = Row(
    jobs="t2i",
    workers=1,
    vram_mode="full",
    killed=False,
    exit_code=0,
    model="synthetic:8b",
    width=2048,
    height=2048,
    num_steps=16,
    cfg_scale=4.0,
    num_jobs=16,
    images_per_s=0.25,
    idle_share=(0.0,),
    sha256="aa",
    sensebatch_version="0.1.0",
    started_at=datetime(2026, 1, 1, tzinfo=UTC),
    command="sensebatch run",
)


def test_runs_are_compared_with_the_same_jobs_on_one_worker() -> None:
    alone = replace(ROW, workers=0, images_per_s=0.26)
    both = replace(ROW, workers=2, images_per_s=0.49, idle_share=(0.01, 0.02))
    others = [replace(ROW, vram_mode="balanced"), replace(ROW, num_steps=8)]
    rows = [*others, alone, both, ROW]
    assert [baseline(row, rows) for row in rows] == [*others, ROW, ROW, ROW]
    assert baseline(both, [alone, both]) is both
    assert baseline(alone, [alone]) is alone
    of_both = next(line for line in format_rows(rows).splitlines() if "| 0.490 |" in line)
    assert "| 2 | 0.490 | 1.960 | yes | 1.0, 2.0 |" in of_both


def test_other_bytes_and_failed_runs_are_named() -> None:
    rows = [ROW, replace(ROW, workers=2, sha256="bb"), replace(ROW, workers=4, exit_code=1)]
    said = [line.split(" | ")[5] for line in format_rows(rows).splitlines()[2:]]
    assert said == ["yes", "NO", "NO"]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    write_rows(tmp_path, [ROW])
    (found,) = read_rows(tmp_path)
    assert replace(found, idle_share=tuple(found.idle_share), first_batch_s=()) == ROW


def test_speeds_are_drawn_where_one_worker_has_run_the_same_jobs() -> None:
    rows = [
        replace(ROW, workers=0),
        ROW,
        replace(ROW, workers=4, images_per_s=0.9),
        replace(ROW, workers=2, images_per_s=0.5),
        replace(ROW, workers=2, images_per_s=0.1, killed=True),
        replace(ROW, workers=4, images_per_s=9.0, num_jobs=512, num_steps=8),
    ]
    assert scaling.speeds(rows) == {"t2i 2048x2048, full": [(1, 1.0), (2, 2.0), (4, 3.6)]}


@pytest.mark.parametrize(
    ("record", "workers"), [("gpus", 1), ("gpus", 2), ("gpus", 4), ("pair", 2)]
)
def test_workers_took_the_memory_of_the_host_that_is_expected(
    record: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker that is alone keeps its weights to itself, and has packed them since.
    monkeypatch.setattr(expected, "gpu_computation", without_packing)
    rows = read_rows(MEASURED / record)
    (row,) = [row for row in rows if (row.vram_mode, row.workers) == ("balanced", workers)]
    size = Resolution(height=row.height, width=row.width)
    scale = Scale(num_steps=row.num_steps, num_jobs=row.num_jobs, resolution=size)
    (case,) = chosen_cases(suite_cases(Suite.MODES, scale), ["balanced"])
    manifest = write_manifest(case, scale, tmp_path)
    found = expectation(case, row.model, manifest, "bfloat16", num_workers=workers)
    assert row.worker_bytes is not None
    assert LOWEST <= found.placements.host_bytes / row.worker_bytes <= HIGHEST


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_killed_worker_leaves_the_bytes_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    # So many steps that the run is looked at many times after a quarter of its jobs.
    words = ["--cpu", "--model", "synthetic:tiny", "--jobs", "40", "--steps", "90", "--side", "64"]
    app = typer.Typer()
    app.command()(scaling.main)
    for more in (["--workers", "0"], ["--workers", "2", "--kill"]):
        result = CliRunner().invoke(app, [str(tmp_path), *words, *more])
        assert result.exit_code == 0, result.output
    alone, both = read_rows(tmp_path)
    assert both.killed
    assert alone.images == both.images == 40
    assert both.sha256 == alone.sha256
    assert len(alone.idle_share) == 1
    assert both.worker_bytes is not None
    assert both.host_bytes is not None
    assert 0 < both.worker_bytes < both.host_bytes
