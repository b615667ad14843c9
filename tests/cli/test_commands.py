"""The commands that need no model: plan, status, report, manifest, model, and help."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import sensebatch
from sensebatch.checkpoint.files import TINY_FOLDER
from tests.checkpoint.folders import write_folder, zeros
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_version(invoke: Invoke) -> None:
    ended = invoke("--version")
    assert (ended.code, ended.out) == (0, f"sensebatch {sensebatch.__version__}\n")


def test_plan_json_counts_jobs_and_batches_by_group(invoke: Invoke, manifest: Path) -> None:
    plan = invoke("plan", manifest, "--json", "--max-batch-size", "1").json
    assert plan["jobs"] == 5
    first = plan["groups"][0]
    assert (first["task"], first["width"], first["height"]) == ("t2i", 64, 32)
    assert (first["jobs"], first["batches"]) == (2, 2)
    assert plan["images"] == sum(group["images"] for group in plan["groups"])


def test_plan_for_people_names_every_group(invoke: Invoke, manifest: Path) -> None:
    ended = invoke("plan", manifest)
    assert ended.code == 0
    for words in ("t2i (think)", "edit", "interleave", "64x32", "5 jobs"):
        assert words in ended.out


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("command", [["manifest", "validate"], ["plan"], ["run"]])
def test_long_prompt_is_warned_of_with_its_cost_before_it_runs(
    invoke: Invoke, tmp_path: Path, command: list[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a red circle " * 8000, "resolution": "1:1"}))
    ended = invoke(*command, path)
    assert ended.code == 0
    warning = r"long.jsonl: line 1: prompt: very long, up to 34,\d+ tokens, so the job takes about "
    assert re.search(f"{warning}[\\d,]+ times as long", ended.err)


def test_plan_makes_no_folder(invoke: Invoke, manifest: Path) -> None:
    invoke("plan", manifest)
    assert not Path("outputs").exists()


@pytest.mark.usefixtures("backend")
def test_status_counts_jobs_by_state(invoke: Invoke, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace("a line", "a line that fails"))
    invoke("run", manifest, "--max-failures", "1", "--max-batch-size", "1")
    counts = invoke("status", "outputs/small", "--json").json
    assert counts["jobs"] == 5
    assert counts["failed"] == 1
    assert counts["done"] + counts["pending"] == 4
    assert counts["running"] is False
    assert "of 5 jobs done, 1 failed" in invoke("status", "outputs/small").out


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("args", "folder"), [([], "outputs/catalog"), (["--output-dir", "drawn"], "drawn")]
)
def test_demo_draws_the_catalog_wherever_it_is_started(
    invoke: Invoke, args: list[str], folder: str
) -> None:
    ended = invoke("demo", *args)
    assert ended.code == 0
    counts = invoke("status", folder, "--json").json
    assert counts["done"] == counts["jobs"] == 30


@pytest.mark.parametrize("command", ["status", "report"])
def test_folder_without_a_run_is_a_clear_error(invoke: Invoke, command: str) -> None:
    ended = invoke(command, "nowhere")
    assert ended.code == 2
    assert ended.err == "sensebatch: nowhere: expected a run's folder, found no state.db\n"


@pytest.mark.usefixtures("backend")
def test_report_prints_the_summary_and_groups_or_json(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest)
    ended = invoke("report", "outputs/small")
    assert ended.out.startswith("config          vram_mode=full  attn_backend=sdpa  dtype=float32")
    assert "interleave 64x32" in ended.out
    assert invoke("report", "outputs/small", "--json").json["total"]["calls"] == 4


@pytest.mark.slow
def test_report_says_how_many_rows_the_log_lacks(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest)
    log = Path("outputs/small/log.parquet")
    assert "lacks" not in invoke("report", "outputs/small").err
    rows = pq.read_table(log)
    pq.write_table(rows.slice(0, 3), log)
    assert "log.parquet lacks the latest 2 rows" in invoke("report", "outputs/small").err
    Path("outputs/small/state.db").write_bytes(b"damaged")
    ended = invoke("report", "outputs/small")
    assert (ended.code, "lacks" in ended.err) == (0, False)


def test_validate_counts_jobs_or_reports_every_error(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    assert invoke("manifest", "validate", manifest).out == (
        "5 jobs are valid (3 t2i, 1 edit, 1 interleave)\n"
    )
    (tmp_path / "in.png").unlink()
    ended = invoke("manifest", "validate", manifest)
    assert ended.code == 2
    assert "image: " in ended.err
    assert "1 mistake in the manifest" in ended.err


def test_schema_is_a_json_schema_of_jobs(invoke: Invoke) -> None:
    assert "jobs" in invoke("manifest", "schema").json["properties"]


def test_convert_writes_a_manifest_with_the_same_plan(invoke: Invoke, manifest: Path) -> None:
    assert invoke("manifest", "convert", manifest, "out.jsonl").code == 0
    of_source = invoke("plan", manifest, "--json").json
    assert invoke("plan", "out.jsonl", "--json").json == of_source


def test_convert_replaces_a_file_only_if_asked(invoke: Invoke, manifest: Path) -> None:
    Path("out.jsonl").write_text("mine")
    ended = invoke("manifest", "convert", manifest, "out.jsonl")
    assert ended.code == 2
    assert "out.jsonl: expected no file, found one; --overwrite replaces it" in ended.err
    assert Path("out.jsonl").read_text() == "mine"
    assert invoke("manifest", "convert", manifest, "out.jsonl", "--overwrite").code == 0
    assert invoke("manifest", "validate", "out.jsonl").code == 0


def test_model_inspect_adds_up(invoke: Invoke) -> None:
    values = invoke("model", "inspect", "tiny", "--json").json
    groups = values["groups"]
    assert set(groups) == {"understanding", "generation", "shared"}
    assert values["nbytes"] == sum(group["nbytes"] for group in groups.values())
    assert "understanding" in invoke("model", "inspect", "tiny").out


def test_model_inspect_says_how_sparse_a_model_is(invoke: Invoke) -> None:
    printed = invoke("model", "inspect", "synthetic:a3b").out
    assert "128 experts of 768, 8 a token, in 48 of 48 layers" in printed
    assert "32 experts of 768, 8 a token, in 48 of 48 layers" in printed


def test_model_inspect_and_plan_see_that_the_tokenizer_is_missing(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(TINY_FOLDER, tmp_path / "checkpoint"))
    (folder / "tokenizer.json").unlink()
    inspected = invoke("model", "inspect", folder)
    assert inspected.code == 2
    assert "found neither" in " ".join(inspected.out.split())
    as_json = invoke("model", "inspect", folder, "--json")
    assert (as_json.code, "found neither" in as_json.json["tokenizer_problem"]) == (2, True)
    for device in ("auto", "cpu"):
        planned = invoke("plan", manifest, "--model", folder, "--device", device)
        assert planned.code == 2
        assert "found neither" in planned.err


def test_names_of_tensors_do_nothing_to_a_terminal(invoke: Invoke, tmp_path: Path) -> None:
    tensors = zeros()
    extra = np.zeros(1, dtype=np.float16)
    tensors |= dict.fromkeys(("[/x]", "\x1b[31mred", "[bold]:smiley:"), extra)
    ended = invoke("model", "inspect", write_folder(tmp_path / "checkpoint", tensors))
    assert ended.code == 2
    assert "3 tensors not expected:" in ended.out
    assert "[/x]" in ended.out
    assert "[bold]:smiley:" in ended.out
    assert "\x1b" not in ended.out


def test_model_inspect_of_nothing_is_a_clear_error(invoke: Invoke) -> None:
    ended = invoke("model", "inspect", "./nothing")
    assert ended.code == 2
    assert ended.err.startswith("sensebatch: ./nothing: expected")


WITHOUT_MODEL = [
    ["--help"],
    ["run", "--help"],
    ["t2i", "--help"],
    ["manifest", "validate", "manifests/catalog.yaml"],
    ["manifest", "schema"],
    ["plan", "manifests/catalog.yaml"],
    ["model", "inspect", "tiny"],
    ["status", "outputs/none"],
    ["report", "outputs/none"],
    ["merge", "outputs/none-1-of-2"],
    ["profile", "--report", "outputs/none"],
    ["profile", "--suite", "modes", "--only", "none"],
]


def _imported(commands: list[list[str]], names: tuple[str, ...]) -> list[str]:
    """Returns which of some modules a fresh process has after these commands."""
    code = f"""
import sys
from sensebatch.cli.main import main
for args in {commands!r}:
    try:
        main(args)
    except SystemExit as ended:
        assert ended.code in (0, 2), args
print(*(name for name in {names!r} if name in sys.modules), sep=",")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return ended.stdout.splitlines()[-1].split(",")


def test_what_needs_no_model_imports_neither_torch_nor_transformers() -> None:
    names = ("torch", "transformers", "sensebatch.settings")
    assert _imported(WITHOUT_MODEL, names) == ["sensebatch.settings"]


def test_plans_and_checks_of_yaml_do_without_arrow() -> None:
    names = ("pyarrow", "sensebatch.manifest.read")
    commands = [args for args in WITHOUT_MODEL if args[0] in ("plan", "manifest", "model")]
    assert _imported(commands, names) == ["sensebatch.manifest.read"]


def test_help_imports_no_library_for_data() -> None:
    names = ("torch", "pyarrow", "numpy", "PIL", "typer")
    assert _imported([["--help"], ["edit", "--help"]], names) == ["typer"]


def test_convert_to_a_place_that_cannot_be_written_is_one_line(
    invoke: Invoke, manifest: Path
) -> None:
    ended = invoke("manifest", "convert", manifest, manifest / "out.jsonl")
    assert ended.code == 75
    assert (
        ended.err == f"sensebatch: {manifest}/out.jsonl: cannot be written: {manifest} is a file\n"
    )
