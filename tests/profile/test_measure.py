"""Cases are processes of their own: one that fails is one failed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sensebatch.cli.launch import launch
from sensebatch.cli.signals import StopSignals
from sensebatch.errors import RunFolderError
from sensebatch.profile import suites
from sensebatch.profile.markdown import format_markdown
from sensebatch.profile.measure import Hooks, run_suite
from sensebatch.profile.rows import DONE, FAILED, PARQUET_NAME, SCHEMA, Row, read_rows, with_ratios
from sensebatch.profile.suites import Case, Scale, Suite, suite_cases
from sensebatch.resolutions import Resolution
from tests.profile.results import result

pytestmark = pytest.mark.slow

SCALE = Scale(
    model="synthetic:tiny", num_steps=2, num_jobs=2, resolution=Resolution(height=64, width=64)
)
CASES = suite_cases(Suite.MODES, SCALE)


def _silent(_line: str) -> None:
    pass


def _fails(arguments: Sequence[str], messages: Path) -> int:
    """A run that ends before it has a folder."""
    messages.write_text(f"reading\nsensebatch: no room for {arguments[1]}\n\n")
    return 2


def _launch(arguments: Sequence[str], messages: Path) -> int:
    return launch("sensebatch", arguments, messages, stop=StopSignals(), echo=_silent)


def _run(cases: Sequence[Case], folder: Path, suite: Suite = Suite.MODES) -> list[Row]:
    return run_suite(suite, cases, SCALE, folder, hooks=Hooks(launch=_fails, say=_silent))


def test_real_runs_give_figures_and_a_refused_one_a_failed_row(tmp_path: Path) -> None:
    refused = replace(CASES[0], name="none", vram_mode="auto", device_gib=0)
    rows = run_suite(
        Suite.MODES, [refused, CASES[3]], SCALE, tmp_path, hooks=Hooks(launch=_launch, say=_silent)
    )
    failed, low = rows
    assert (failed.status, failed.images, failed.image_tok_per_s) == (FAILED, None, None)
    assert failed.error is not None
    assert failed.error.startswith("exit code 2: sensebatch: ")
    assert (low.status, low.error, low.vram_mode) == (DONE, None, "low")
    assert (low.images, low.jobs_done) == (2, 2)
    assert low.image_tok_per_s == pytest.approx(2 * 4 / low.wall_s)
    assert 0 < low.step_s * 2 * 2 < low.wall_s
    assert low.expected_peak_bytes > 0
    assert low.load_peak_rss_bytes > 0
    assert low.torch_version is not None
    # Two small jobs are one batch.
    assert (low.calls, low.steady_step_s) == (1, None)
    assert low.command.startswith("sensebatch run ")
    assert len(list((tmp_path / "low" / "images").glob("*.png"))) == 2
    assert read_rows(tmp_path) == rows


def test_quality_is_the_distance_to_the_converged_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "CONVERGED_STEPS", 24)
    scale = replace(SCALE, model="tiny", cfg_scale=2.0)
    converged, exact, _, fast = suite_cases(Suite.QUALITY, scale)
    hooks = Hooks(launch=_launch, say=_silent)
    run_suite(Suite.QUALITY, [exact], scale, tmp_path, hooks=hooks)
    (alone,) = read_rows(tmp_path)
    assert (alone.evaluations, alone.psnr_db, alone.ssim) == (100, None, None)
    rows = run_suite(Suite.QUALITY, [converged, fast], scale, tmp_path, hooks=hooks)
    by_case = {row.case: row for row in rows}
    assert [row.num_steps for row in rows] == [50, 24, 22]
    assert by_case["converged"].psnr_db is None
    assert 20 < by_case["exact"].psnr_db < 99
    assert 0.5 < by_case["fast"].ssim < 1
    assert "| fast | 22 | 31 |" in format_markdown(rows)


def test_rows_of_cases_that_are_not_run_again_stay(tmp_path: Path) -> None:
    _run(CASES[:2], tmp_path)
    rows = _run(CASES[1:3], tmp_path)
    assert [row.case for row in rows] == ["full", "fast", "balanced"]
    assert "no room for" in (rows[0].error or "")


def test_a_case_never_goes_on_in_the_folder_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    assert f"--output-dir {tmp_path / 'full-2'} " in _run(CASES[:1], tmp_path)[0].command


def test_results_of_another_suite_are_not_mixed_in(tmp_path: Path) -> None:
    _run(CASES[:1], tmp_path)
    with pytest.raises(RunFolderError, match="expected results of suite budgets, found those of"):
        _run(CASES[:1], tmp_path, Suite.BUDGETS)


def test_a_file_that_holds_no_results_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="found no file"):
        read_rows(tmp_path)
    (tmp_path / PARQUET_NAME).write_bytes(b"no")
    with pytest.raises(RunFolderError, match="expected the results of a profile"):
        read_rows(tmp_path)


def test_speed_is_held_against_the_baseline_of_the_same_conditions() -> None:
    full = result("full", image_tok_per_s=100.0)
    low = result("low", image_tok_per_s=80.0)
    assert [row.ratio_to_baseline for row in with_ratios([full, low])] == [1.0, 0.8]
    steady = [replace(full, steady_image_tok_per_s=50.0), replace(low, steady_image_tok_per_s=45.0)]
    assert [row.steady_ratio_to_baseline for row in with_ratios(steady)] == [1.0, 0.9]
    elsewhere = replace(low, device="another")
    assert with_ratios([full, elsewhere])[1].ratio_to_baseline is None
    assert with_ratios([low])[0].ratio_to_baseline is None


def test_every_column_is_described() -> None:
    document = (Path(__file__).parents[2] / "docs" / "profile.md").read_text(encoding="utf-8")
    assert [name for name in SCHEMA.names if f"| `{name}` |" not in document] == []


def test_results_that_lack_younger_columns_can_be_read(tmp_path: Path) -> None:
    _run(CASES[:1], tmp_path)
    path = tmp_path / PARQUET_NAME
    pq.write_table(pq.read_table(path).drop_columns(["steady_step_s"]), path)
    assert read_rows(tmp_path)[0].steady_step_s is None


def test_parquet_holds_every_column(tmp_path: Path) -> None:
    _run(CASES[:1], tmp_path)
    assert pq.read_schema(tmp_path / PARQUET_NAME).equals(SCHEMA)
