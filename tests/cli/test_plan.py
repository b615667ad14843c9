"""What `plan` says of memory and time, without a GPU and without loading weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sensebatch.cli.plan_tables import MAX_GROUPS
from sensebatch.units import GIB
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.slow

MODEL = ("--model", "synthetic:8b")
SPEEDS = {
    "gpu": "NVIDIA Test",
    "torch": "2.11.0",
    "measured_at": "2026-11-23T04:50:00+00:00",
    "free_bytes": 140 * GIB,
    "total_bytes": 141 * GIB,
    "copy_bytes_per_s": 51.6 * GIB,
    "gemm_flop_per_s": 734e12,
    "attention_flop_per_s": 604e12,
    "memory_bytes_per_s": 4e12,
}

FOR_TEXT = r" for\n.* seconds +text\n"
"""The titles of two columns in two lines."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.yaml"
    path.write_text(
        "version: 1\njobs:\n"
        "  - {id: a, prompt: a dot, width: 2048, height: 2048, seeds: [1, 2, 3, 4]}\n"
        "  - {id: b, prompt: a dot, width: 1024, height: 1024}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """The file in which `doctor` has left the speeds of a GPU."""
    path = tmp_path / "cache" / "speeds.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SPEEDS), encoding="utf-8")
    return path


def test_plan_says_what_each_mode_needs(invoke: Invoke, large: Path) -> None:
    plan = invoke("plan", large, *MODEL, "--json").json
    memory = plan["memory"]
    assert [mode["vram_mode"] for mode in memory] == ["full", "fast", "balanced", "low"]
    peaks = [mode["device_bytes"] for mode in memory]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 32 * GIB
    assert [mode["host_bytes"] > 30 * GIB for mode in memory] == [False, True, True, True]
    passes = [[group["jobs_per_pass"] for group in mode["groups"]] for mode in memory]
    assert passes == [[2, 1]] * 3 + [[1, 1]]
    assert plan["machine"] is None
    assert all(mode["seconds"] is None for mode in memory)


def test_each_group_needs_no_more_than_the_run(invoke: Invoke, large: Path) -> None:
    for mode in invoke("plan", large, *MODEL, "--json").json["memory"]:
        groups = mode["groups"]
        assert [group["batch_size"] for group in groups] == [4, 1]
        for name in ("device_bytes", "host_bytes"):
            assert max(group[name] for group in groups) == mode[name]
        assert groups[0]["device_bytes"] > groups[1]["device_bytes"]


def test_caches_that_wait_are_counted_as_host_memory(invoke: Invoke, large: Path) -> None:
    balanced = invoke("plan", large, *MODEL, "--vram-mode", "balanced", "--json").json["memory"][0]
    first, second = (group["host_bytes"] for group in balanced["groups"])
    # Four jobs' prefixes against one's: the weights are the same.
    assert first > second > 30 * GIB
    assert first - second < GIB


def test_plan_with_a_budget_shows_what_a_run_would_use(invoke: Invoke, large: Path) -> None:
    (mode,) = invoke("plan", large, *MODEL, "--max-memory", "0=12GiB", "--json").json["memory"]
    assert mode["vram_mode"] in ("balanced", "low")
    assert 11 * GIB < mode["device_bytes"] <= 12 * GIB
    assert "budget of 12.0 GiB" in mode["reason"]


def test_a_budget_that_is_too_small_is_reported(invoke: Invoke, large: Path) -> None:
    ended = invoke("plan", large, *MODEL, "--max-memory", "0=1GiB")
    assert ended.code == 2
    smallest = re.search(r"expected at least (\d+\.\d\d) GiB", ended.err)
    assert smallest is not None
    enough = f"0={smallest[1]}GiB"
    assert invoke("plan", large, *MODEL, "--max-memory", enough).code == 0


def test_plan_for_people_has_a_column_for_each_mode(invoke: Invoke, large: Path) -> None:
    printed = invoke("plan", large, *MODEL).out
    header = next(line for line in printed.splitlines() if "balanced" in line)
    assert header.split() == ["#", "batch", "pass", "full", "fast", "balanced", "low"]
    assert "1-2" in printed
    assert "doctor measures" in " ".join(printed.split())


@pytest.mark.parametrize("options", [(), ("--vram-mode", "low")])
def test_tables_of_many_groups_list_the_first_ones(
    invoke: Invoke, tmp_path: Path, options: tuple[str, ...]
) -> None:
    rows = (
        json.dumps({"prompt": "a dot", "width": 256 + 32 * number, "height": 256})
        for number in range(MAX_GROUPS + 20)
    )
    manifest = tmp_path / "many.jsonl"
    manifest.write_text("\n".join(rows), encoding="utf-8")
    planned = invoke("plan", manifest, *MODEL, *options)
    assert "... and 20 more groups" in planned.out
    first_words = [line.split()[0] for line in planned.out.splitlines() if line.strip()]
    listed = [first_words.count(str(number)) for number in range(1, MAX_GROUPS + 2)]
    assert listed == [2] * MAX_GROUPS + [0]


@pytest.mark.parametrize("model", ["/data/none", "./none", "~/none/at/all", "a/b/c"])
def test_a_folder_that_is_missing_is_a_mistake_as_in_a_run(
    invoke: Invoke, large: Path, model: str
) -> None:
    ended = invoke("plan", large, "--model", model)
    assert ended.code == 2
    assert f"sensebatch: {model}: expected 'tiny', a checkpoint folder or a Hub id" in ended.err


@pytest.mark.parametrize("width", [80, 60])
def test_memory_of_all_modes_fits_the_terminal(
    invoke: Invoke, manifest: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    for name, value in (("COLUMNS", str(width)), ("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", invoke("plan", manifest, *MODEL).out)
    lines = [line.rstrip() for line in printed.splitlines()]
    assert max(map(len, lines)) <= width
    (row,) = (line.split() for line in lines if line.lstrip().startswith("all "))
    # No figure is broken into lines.
    assert len(row) == 5
    assert len(lines) > 9
    assert all(re.fullmatch(r"\d+\.\d\d\+\d+\.\d\d", figure) for figure in row[1:])


def test_a_model_that_would_be_downloaded_is_left_alone(invoke: Invoke, large: Path) -> None:
    assert invoke("plan", large, "--model", "owner/name", "--json").json["memory"] is None


@pytest.mark.usefixtures("measured")
def test_plan_takes_what_fits_the_measured_gpu_and_times_it(invoke: Invoke, large: Path) -> None:
    plan = invoke("plan", large, *MODEL, "--json").json
    assert plan["machine"] == SPEEDS | {"attention": {}, "quantised_flop_per_s": {}}
    (mode,) = plan["memory"]
    assert mode["vram_mode"] == "full"
    images = [group["seconds"]["images"] for group in mode["groups"]]
    # Four images of 50 steps, of which none can be faster than this on that machine.
    assert images[0] == pytest.approx(4 * 50 * 0.222, rel=0.02)
    assert sum(images) == pytest.approx(mode["seconds"]["images"])
    assert mode["seconds"]["text"] == 0


@pytest.mark.usefixtures("measured")
def test_streaming_one_job_at_a_time_takes_longer(invoke: Invoke, large: Path) -> None:
    def least(mode: str) -> float:
        plan = invoke("plan", large, *MODEL, "--vram-mode", mode, "--json").json
        return plan["memory"][0]["seconds"]["images"]

    assert least("full") < least("balanced") < least("low")


def test_plan_names_the_attention_that_was_the_fastest_and_counts_with_it(
    invoke: Invoke, large: Path, measured: Path
) -> None:
    def planned(*options: str) -> dict[str, Any]:
        (placement,) = invoke("plan", large, *MODEL, "--json", *options).json["memory"]
        return placement

    assert planned()["attn_backend"] is None
    reached = {"cudnn": {"4096": 3e14}, "flash": {"4096": 6e14}}
    measured.write_text(json.dumps(SPEEDS | {"attention": reached}), encoding="utf-8")
    fast, slow = planned(), planned("--attn-backend", "cudnn")
    assert (fast["attn_backend"], slow["attn_backend"]) == ("flash", "cudnn")
    assert fast["seconds"]["images"] < slow["seconds"]["images"]
    assert "Images are attended by flash." in invoke("plan", large, *MODEL).out


@pytest.mark.usefixtures("measured")
def test_plan_for_people_names_the_gpu_and_the_total(invoke: Invoke, large: Path) -> None:
    out = invoke("plan", large, *MODEL, "--vram-mode", "low").out
    printed = " ".join(out.split())
    assert "speeds of NVIDIA Test, measured 2026-11-23" in printed
    assert re.search(r"At least \d+ (s|min)\.", printed)
    assert not re.search(FOR_TEXT, out)


@pytest.mark.usefixtures("measured")
def test_the_time_of_text_is_shown_separately(invoke: Invoke, manifest: Path) -> None:
    out = invoke("plan", manifest, *MODEL).out
    assert re.search(FOR_TEXT, out)
    assert "more if all text is written" in " ".join(out.split())


@pytest.mark.usefixtures("measured")
def test_speeds_of_half_precision_are_not_used_for_float32(invoke: Invoke, large: Path) -> None:
    options = (*MODEL, "--dtype", "float32", "--vram-mode", "low")
    assert invoke("plan", large, *options, "--json").json["memory"][0]["seconds"] is None
    assert "half precision" in invoke("plan", large, *options).out


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_8_bits_take_less_memory_and_the_seconds_that_were_measured(
    invoke: Invoke, large: Path, measured: Path, precision: str
) -> None:
    def planned(*words: str) -> dict[str, Any]:
        options = (*words, "--vram-mode", "fast", "--json")
        return invoke("plan", large, *MODEL, *options).json["memory"][0]

    plain, quantised = planned(), planned("--precision", precision)
    assert plain["seconds"] is not None
    assert quantised["seconds"] is None
    for memory in ("device_bytes", "host_bytes"):
        assert plain[memory] - quantised[memory] > 7 * 2**30
    speeds = {"float8": 1.4e15, "int8": 1.4e15}
    measured.write_text(json.dumps(SPEEDS | {"quantised_flop_per_s": speeds}), encoding="utf-8")
    images = planned("--precision", precision)["seconds"]["images"]
    assert 0.5 < images / plain["seconds"]["images"] < 0.8


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("fp8 --dtype float32", "fp8 needs dtype bfloat16, found float32"),
        ("fp8-all --dtype float16", "fp8-all needs dtype bfloat16, found float16"),
        ("fp8 --device cpu", "fp8 needs a CUDA device of compute capability 8.9 or newer"),
    ],
)
@pytest.mark.parametrize("model", [MODEL, ("--model", "someone/release")])
def test_a_precision_that_no_run_would_take_is_refused(
    invoke: Invoke, large: Path, model: tuple[str, ...], words: str, why: str
) -> None:
    ended = invoke("plan", large, *model, "--precision", *words.split())
    assert ended.code == 2
    assert f"precision: {why}" in " ".join(ended.err.split())


@pytest.mark.parametrize(
    "words",
    ["fp8", "fp8 --dtype bfloat16", "fp8 --device cuda", "int8 --device cpu --dtype float16"],
)
def test_a_precision_that_depends_on_the_gpu_is_planned(
    invoke: Invoke, large: Path, words: str
) -> None:
    assert invoke("plan", large, *MODEL, "--precision", *words.split()).code == 0


@pytest.mark.usefixtures("measured")
def test_a_plan_for_the_cpu_has_nothing_of_the_gpu(invoke: Invoke, large: Path) -> None:
    plan = invoke("plan", large, *MODEL, "--device", "cpu", "--json").json
    assert plan["machine"] is None
    assert plan["memory"] is None


def test_a_gpu_that_is_too_small_is_reported_with_what_would_do(
    invoke: Invoke, large: Path, measured: Path
) -> None:
    measured.write_text(json.dumps(SPEEDS | {"free_bytes": GIB}), encoding="utf-8")
    ended = invoke("plan", large, *MODEL)
    assert ended.code == 2
    assert "expected at least" in ended.err
    assert invoke("plan", large, *MODEL, "--vram-mode", "low").code == 0


@pytest.mark.parametrize("width", [80, 60])
def test_jobs_that_do_not_fit_the_gpu_are_named_and_the_others_planned(
    invoke: Invoke, tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    measured.write_text(json.dumps(SPEEDS | {"free_bytes": 3 * GIB}), encoding="utf-8")
    manifest = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "a", "n": 2, "resolution": f"{side}x{side}"} for side in (2048, 8192)]
    rows.append({"prompt": "a " * 90_000, "resolution": "2048x2048"})
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (mode,) = invoke("plan", manifest, *MODEL, "--json").json["memory"]
    fits, too_large = mode["groups"]
    assert (fits["refused_jobs"], too_large["refused_jobs"]) == (1, 2)
    assert fits["vram_mode"] == "balanced"
    assert too_large["vram_mode"] is None
    assert mode["device_bytes"] <= 3 * GIB < too_large["device_bytes"]
    monkeypatch.setenv("COLUMNS", str(width))
    printed = " ".join(invoke("plan", manifest, *MODEL).out.split())
    assert "2 none fits >= 8." in printed
    assert "1 job does not fit and will fail: free device memory: expected at least" in printed
    assert "for t2i 2048x2048 with up to 60," in printed
    assert "2 jobs do not fit and will fail: free device memory: expected at least" in printed


def test_jobs_of_one_group_that_fit_at_none_of_its_levels_are_counted_by_level(
    invoke: Invoke, manifest: Path, measured: Path
) -> None:
    measured.write_text(json.dumps(SPEEDS | {"free_bytes": 3 * GIB}), encoding="utf-8")
    rows: list[dict[str, object]] = [
        {"id": "small", "task": "t2i", "prompt": "a", "width": 2048, "height": 2048},
        {"id": "first", "prompt": "a", "image": "in.png"},
        {"id": "second", "prompt": "a", "image": "@first"},
    ]
    sizes = {"task": "edit", "width": 8192, "height": 8192}
    path = manifest.with_suffix(".jsonl")
    path.write_text("\n".join(json.dumps({**sizes, **row}) for row in rows), encoding="utf-8")
    (mode,) = invoke("plan", path, *MODEL, "--json").json["memory"]
    assert [group["refused_jobs"] for group in mode["groups"]] == [0, 1, 1]


@pytest.mark.parametrize("content", ["{}", "no json", json.dumps({"gpu": "NVIDIA Test"})])
def test_a_file_of_speeds_that_cannot_be_used_is_named(
    invoke: Invoke, large: Path, measured: Path, content: str
) -> None:
    measured.write_text(content, encoding="utf-8")
    ended = invoke("plan", large, *MODEL, "--json")
    assert ended.code == 0
    assert f"warning: {measured}: " in ended.err
    assert ended.json["machine"] is None


def test_plan_says_for_each_group_what_stays_and_what_is_read_again(
    invoke: Invoke, large: Path
) -> None:
    options = (*MODEL, "--max-memory", "0=13GiB,cpu=4GiB")
    (mode,) = invoke("plan", large, *options, "--json").json["memory"]
    assert [group["batch_size"] for group in mode["groups"]] == [2, 1]
    assert [group["kept_layers"] for group in mode["groups"]] == [31, 32]
    assert 30 * GIB < mode["file_bytes"] < 31 * GIB


def test_plan_for_people_has_steps_branches_and_modes_of_each_group(
    invoke: Invoke, large: Path
) -> None:
    options = (*MODEL, "--max-memory", "0=16GiB,cpu=4GiB")
    lines = [line.split() for line in invoke("plan", large, *options).out.splitlines()]
    assert [line[:5] for line in lines if line[:1] in (["1"], ["2"])] == [
        ["1", "t2i", "2048x2048", "50", "x"],
        ["2", "t2i", "1024x1024", "50", "x"],
        ["1", "balanced", "2", "2", "39"],
        ["2", "fast", "1", "1", "42"],
    ]


def test_what_functions_judge_costs_a_gpu_nothing(invoke: Invoke, tmp_path: Path) -> None:
    manifest, config = tmp_path / "m.yaml", tmp_path / "c.yaml"
    manifest.write_text("version: 1\njobs: [{id: a, prompt: a dot, keep: 2, tries: 4}]")
    config.write_text("accept: nowhere:own")
    values = invoke("plan", manifest, "--config", config, "--json").json
    assert [group["task"] for group in values["groups"]] == ["t2i"]
    assert values["functions"] == {"nowhere:own": 4}
    assert "4 images judged by nowhere:own" in invoke("plan", manifest, "--config", config).out
