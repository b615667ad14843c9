"""Tables fit 80 columns with nothing cut, and stay whole in 60."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sensebatch.cli.messages import show
from sensebatch.cli.tables import FittingTable, print_parts, print_report, print_timeline
from sensebatch.report.summary import summarise
from sensebatch.report.timeline import Batch
from sensebatch.units import GIB
from tests.cli.conftest import Invoke
from tests.log_rows import log_row, log_table

ROOT = Path(__file__).parents[2]
BATCH = Batch(
    session=0,
    worker=0,
    node="host",
    batch_id="b",
    task="interleave",
    width=2048,
    height=1152,
    think=True,
    jobs=16,
    images=64,
    start_s=1234.25,
    wait_s=2.5,
    prefill_s=10.125,
    think_s=100.25,
    denoise_s=1000.5,
    other_s=12.125,
    total_s=1123.0,
)
WIDTHS = (80, 60)


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Columns of a terminal that output goes to."""
    for name, value in (("COLUMNS", str(request.param)), ("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    return request.param


def _lines(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


def _check(text: str, width: int) -> list[str]:
    """Returns the lines of what was printed, which fit and have nothing cut."""
    lines = _lines(text)
    assert max(map(len, lines)) <= width
    assert "…" not in text
    return lines


@pytest.mark.parametrize("flags", [[], ["--vram-mode", "low"], ["--vram-budget", "13GiB"]])
def test_plan_of_a_night_fits(invoke: Invoke, width: int, flags: list[str]) -> None:
    manifest = ROOT / "manifests" / "sensenova-8b.yaml"
    ended = invoke("plan", manifest, "--model", "synthetic:8b", *flags)
    lines = _check(ended.out, width)
    assert any("2048x2048" in line for line in lines)
    assert any(re.search(r"^ *1 .*t2i.* 50 x ", line) for line in lines)


def test_report_of_a_gpu_fits(capfd: pytest.CaptureFixture[str], width: int) -> None:
    rows = [
        log_row(
            f"{task}{number}",
            f"{task}{number}",
            task=task,
            width=2048,
            height=2048,
            think=False,
            total_s=12345.678,
            peak_allocated_bytes=134 * GIB,
            peak_reserved_bytes=135 * GIB,
            peak_rss_bytes=136 * GIB,
        )
        for number in range(120)
        for task in ("t2i", "interleave")
    ]
    summary = summarise(log_table(*rows))
    group = replace(summary.by_group["interleave 2048x2048"], images=1_234_567, wall_s=98765.4)
    print_report(replace(summary, by_group={"interleave 2048x2048": group}), max_calls=200)
    text = capfd.readouterr().out
    lines = _check(text, width)
    assert "... and 40 more calls; --calls prints all" in lines
    for figure in ("12345.678", "1,234,567", "98,765.4", "134.00", "136.00"):
        assert figure in text
    # Once in the totals; in a column of its own where there is room.
    assert (text.count("135.00") > 1) == (width == 80)


def test_checkpoint_fits_and_its_path_can_be_copied(invoke: Invoke, width: int) -> None:
    lines = _lines(invoke("model", "inspect", "tiny").out)
    path = lines[1]
    assert Path(path).is_dir()
    _check("\n".join(line for line in lines if line != path), width)


def test_optional_columns_go_one_by_one_and_only_where_there_is_no_room(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for columns, titles in ((40, "abc"), (32, "ac"), (20, "c")):
        monkeypatch.setenv("COLUMNS", str(columns))
        table = FittingTable("a", "b", "c", optional=["b", "a"])
        table.add_row("1" * 12, "2" * 12, "3" * 12)
        print_parts(table)
        header, _, row = _lines(capfd.readouterr().out)
        assert header.split() == list(titles)
        assert len(row.split()) == len(titles)


def test_what_is_not_a_terminal_gets_80_columns(
    invoke: Invoke, manifest: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert invoke("run", manifest).code == 0
    for command in (["jobs"], ["report"], ["report", "--timeline"], ["status"]):
        lines = invoke(*command, "outputs/small").out.splitlines()
        assert 20 < max(map(len, lines)) <= 80, command
    print_timeline([replace(BATCH, worker=worker) for worker in range(2)])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["start", "waited", "prefill"]
    assert lines[3].split()[:4] == ["0", "1234.250", "2.500", "10.125"]
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("waiting of worker 1: 2.500 s before 1 batch (")


def test_what_goes_to_a_file_does_not_depend_on_the_terminal(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = invoke("model", "inspect", "tiny").out
    monkeypatch.setenv("COLUMNS", "40")
    assert invoke("model", "inspect", "tiny").out == before


def test_terminal_that_is_said_to_have_no_columns_has_80(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COLUMNS", "0"), ("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    print_parts("word " * 30)
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [79, 71]


def test_nothing_but_messages_prints() -> None:
    assert show is not print
    for path in (ROOT / "sensebatch" / "cli").glob("*.py"):
        if path.name != "messages.py":
            assert not re.search(r"(?<![\w.])print\(", path.read_text(encoding="utf-8")), path


def test_tables_have_ascii_lines_where_only_ascii_can_be_shown() -> None:
    script = "from sensebatch.cli.main import main; main(['model', 'inspect', 'tiny'])"
    shown = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--------\n" in shown.stdout
    assert "\\u" not in shown.stdout


def test_ids_are_whole_where_the_list_of_jobs_is_no_terminal(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a-lighthouse-at-dusk-with-gulls-over-a-rough-sea-seed=42"
    prompt = "a red disc on a white background, seen from very far away " * 3
    lines = f"version: 1\njobs:\n  - {{id: {name}, prompt: {prompt!r}, width: 64, height: 64}}\n"
    Path("long.yaml").write_text(lines)
    assert invoke("run", "long.yaml", "--output-dir", "out").code == 0
    listed = invoke("jobs", "out").out.splitlines()
    assert any(line.startswith(f"{name} ") for line in listed)
    assert listed == [line.rstrip() for line in listed]
