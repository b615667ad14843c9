"""`sensebatch run`: what scripts may rely on."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from sensebatch.cli import session
from sensebatch.cli.progress import loaded_line
from sensebatch.settings import dump_settings, resolve_settings
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke
from tests.executor.fakes import FakeEngine

pytestmark = pytest.mark.usefixtures("backend")


def _failing(manifest: Path) -> None:
    text = manifest.read_text().replace("a line", "a line that fails")
    manifest.write_text(text)


def test_run_makes_the_folder_that_the_documentation_names(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    ended = invoke("run", manifest)
    root = tmp_path / "outputs" / "small"
    assert ended.code == 0
    assert ended.out == ""
    for name in (
        "run.yaml",
        "state.db",
        "log.parquet",
        "summary.txt",
        "images/a.png",
        "text/c.txt",
    ):
        assert (root / name).is_file(), name
    assert (root / "images" / "e" / "000.png").is_file()
    for name in ("images", "log.parquet", "summary.txt"):
        assert f"outputs/small/{name}" in ended.err
    assert "5 of 5 jobs done" in ended.err


def test_second_run_loads_nothing_and_reports_it(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    invoke("run", manifest)
    ended = invoke("run", manifest)
    assert ended.code == 0
    assert len(backend.loaded) == 1
    assert "nothing was left to run" in ended.err


def test_json_is_one_object_on_stdout(invoke: Invoke, manifest: Path) -> None:
    values = invoke("run", manifest, "--json", "--output-dir", "here").json
    assert values["output_dir"] == "here"
    assert values["exit_code"] == 0
    assert (values["jobs"], values["done"], values["failed"], values["remaining"]) == (5, 5, 0, 0)
    assert values["this_run"]["images"] == values["this_run"]["done"] + _extra_images("here")
    assert Path(values["log"]).is_file()
    assert Path(values["summary"]).is_file()
    assert Path(values["images"]).is_dir()


def _extra_images(root: str) -> int:
    return len(list(Path(root, "images", "e").iterdir())) - 1


def test_profile_is_part_of_the_json_object(invoke: Invoke, manifest: Path) -> None:
    values = invoke("run", manifest, "--json", "--profile").json
    assert values["profile"]["total"]["jobs"] == 5


def test_profile_prints_the_published_summary_of_this_run_alone(
    invoke: Invoke, manifest: Path
) -> None:
    invoke("run", manifest, "--limit", "1")
    ended = invoke("run", manifest, "--profile")
    assert ended.out.startswith("config ")
    assert "generations     calls=4 " in ended.out
    everything = (Path("outputs/small") / "summary.txt").read_text()
    assert "generations     calls=5 " in everything


def test_failed_job_gives_exit_code_1_and_is_named(invoke: Invoke, manifest: Path) -> None:
    _failing(manifest)
    ended = invoke("run", manifest)
    assert ended.code == 1
    assert "failed: b: ValueError: NaN in the output (errors/b-1.txt)" in ended.err
    assert "4 of 5 jobs done, 1 failed" in ended.err
    assert (Path("outputs/small") / "errors" / "b-1.txt").is_file()


def test_failed_job_stays_failed_until_it_is_retried(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    _failing(manifest)
    invoke("run", manifest)
    assert invoke("run", manifest).code == 1
    assert len(backend.loaded) == 1
    assert invoke("run", manifest, "--retry-failed").code == 1
    log = pq.read_table("outputs/small/log.parquet").to_pylist()
    assert [row["attempt"] for row in log if row["job_id"] == "b"] == [1, 2]


def test_max_failures_ends_a_run_that_can_be_resumed(invoke: Invoke, manifest: Path) -> None:
    _failing(manifest)
    ended = invoke("run", manifest, "--max-failures", "1", "--max-batch-size", "1")
    assert ended.code == 1
    assert "stopped after too many failures" in ended.err
    assert invoke("run", manifest, "--json").json["remaining"] == 0


def test_changed_job_runs_again_and_is_reported(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest)
    manifest.write_text(manifest.read_text().replace("a line", "two lines"))
    ended = invoke("run", manifest)
    assert "1 job with a changed definition, will be run again" in ended.err
    assert "1 image made" in ended.err


def test_another_precision_makes_every_image_again(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest)
    assert invoke("run", manifest, "--precision", "auto", "--json").json["this_run"]["done"] == 0
    ended = invoke("run", manifest, "--precision", "fp8", "--redraw")
    assert "5 jobs with a changed definition, will be run again" in ended.err
    assert "loading tiny on cpu (float32, fp8)" in ended.err


def test_limit_takes_the_first_jobs_and_the_rest_follows(invoke: Invoke, manifest: Path) -> None:
    assert invoke("run", manifest, "--limit", "2", "--json").json["jobs"] == 2
    values = invoke("run", manifest, "--json").json
    assert (values["jobs"], values["this_run"]["done"]) == (5, 3)


def test_jobs_beyond_the_limit_stay_in_a_folder_as_they_are(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest, "--limit", "3")
    (Path("outputs/small") / "images" / "c.png").unlink()
    ended = invoke("run", manifest, "--limit", "1", "--json")
    assert "2 jobs not read because of --limit; left as they are" in ended.err
    assert "no longer" not in ended.err
    assert (ended.json["jobs"], ended.json["remaining"]) == (1, 0)
    assert ended.json["this_run"]["done"] == 0
    assert "2 not read because of --limit" in invoke("status", "outputs/small").out
    assert invoke("run", manifest, "--json").json["this_run"]["done"] == 3


def test_failed_jobs_beyond_the_limit_are_not_tried_again(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    _failing(manifest)
    invoke("run", manifest)
    invoke("run", manifest, "--limit", "1", "--retry-failed")
    assert invoke("run", manifest).code == 1
    assert len(backend.loaded) == 1


def test_limit_beyond_the_last_job_reports_removed_jobs(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest)
    manifest.write_text(manifest.read_text().replace("  - {id: b, prompt: a line}\n", ""))
    ended = invoke("run", manifest, "--limit", "9")
    assert "1 job no longer in the manifest; files are kept" in ended.err


@pytest.mark.parametrize("args", [["run"], ["run", "--output-dir", "here"], ["plan"]])
def test_all_mistakes_are_reported_wherever_the_folder_gets_its_name(
    invoke: Invoke, manifest: Path, args: list[str]
) -> None:
    text = manifest.read_text().replace("num_steps: 2", "num_steps: x").replace("a dot", "")
    manifest.write_text(text)
    ended = invoke(*args, manifest)
    assert ended.code == 2
    assert "defaults.num_steps: expected a whole number" in ended.err
    assert "prompt: expected text" in ended.err
    assert "2 mistakes in the manifest" in ended.err
    assert not Path("outputs/small").exists()


def test_missing_manifest_is_reported_as_by_validate(invoke: Invoke) -> None:
    expected = "none.yaml: manifest: expected a file, found none"
    assert expected in invoke("run", "none.yaml").err
    assert expected in invoke("manifest", "validate", "none.yaml").err


def test_run_yaml_holds_the_resolved_settings_and_repeats_the_run(
    invoke: Invoke, manifest: Path
) -> None:
    invoke("run", manifest, "--max-batch-size", "3", "--no-embed-metadata")
    document = yaml.safe_load(Path("outputs/small/run.yaml").read_text())
    config = resolve_settings(config_file=Path("outputs/small/run.yaml"))
    assert document["manifests"] == [str(manifest)]
    assert document["config"] == dump_settings(config)
    assert config.memory.max_batch_size == 3
    assert config.output.embed_metadata is False


def test_flags_with_underscores_are_the_same_flags(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest, "--max_batch_size", "3", "--output_dir", "here", "--no_embed_metadata")
    assert resolve_settings(config_file=Path("here/run.yaml")).memory.max_batch_size == 3


def test_mistakes_are_reported_at_once_before_anything_is_loaded(
    invoke: Invoke, tmp_path: Path, backend: FakeBackend
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("version: 1\njobs:\n  - {prompt: a, seeed: 1}\n  - {prompt: b, n: 0}\n")
    ended = invoke("run", path)
    assert ended.code == 2
    assert backend.loaded == []
    assert "line 3: seeed: " in ended.err
    assert "did you mean 'seed'?" in ended.err
    assert "line 4: n: " in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere/at/all"], "nowhere/at/all: expected"),
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
        (["--max-attempts", "0"], "--max-attempts: expected a number of at least 1, found 0"),
        (["--lora-path", "none.safetensors"], "none.safetensors: expected a readable file"),
    ],
)
def test_mistake_in_a_setting_is_one_clear_line(
    invoke: Invoke, manifest: Path, args: list[str], message: str
) -> None:
    ended = invoke("run", manifest, *args)
    assert ended.code == 2
    assert f"\nsensebatch: {message}" in f"\n{ended.err}"
    assert not Path("outputs").exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_lora_that_does_not_fit_is_found_before_any_work(
    invoke: Invoke, manifest: Path, tmp_path: Path, command: str
) -> None:
    path = "language_model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{path}.lora_down.weight": np.full((2, 192), np.nan, np.float32),
        f"{path}.lora_up.weight": np.zeros((192, 2), np.float32),
        f"{path}.alpha": np.array(2.0, np.float32),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    for file, message in (
        ("lora.safetensors", "q_proj.lora_down.weight: expected finite numbers"),
        ("none.safetensors", "none.safetensors: expected a readable file"),
    ):
        ended = invoke(command, manifest, "--lora-path", file)
        assert ended.code == 2
        assert message in ended.err
    assert not Path("outputs").exists()


def test_a_file_that_is_not_a_lora_has_no_job_run_again(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    assert invoke("run", manifest).code == 0
    lora = tmp_path / "x.safetensors"
    lora.write_text("no lora")
    assert invoke("run", manifest, "--lora-path", lora).code == 2
    again = invoke("run", manifest, "--json").json
    assert again["this_run"]["done"] == 0


def test_unknown_option_is_a_usage_error(invoke: Invoke, manifest: Path) -> None:
    assert invoke("run", manifest, "--batchsize", "3").code == 2


def test_mistake_leaves_no_new_folder_and_nothing_in_an_old_one(
    invoke: Invoke, manifest: Path
) -> None:
    bad = manifest.with_name("bad.yaml")
    bad.write_text("version: 1\njobs:\n  - {id: a, promt: a dot}\n", encoding="utf-8")
    assert invoke("run", bad).code == 2
    assert not Path("outputs").exists()
    Path("mine").mkdir()
    assert invoke("run", bad, "--output-dir", "mine").code == 2
    assert list(Path("mine").iterdir()) == []
    assert invoke("run", manifest, "--output-dir", "run").code == 0
    assert invoke("run", bad, "--output-dir", "run").code == 2
    assert invoke("status", "run", "--json").json["done"] == 5


def test_folder_of_something_else_is_refused(invoke: Invoke, manifest: Path) -> None:
    Path("other/images").mkdir(parents=True)
    ended = invoke("run", manifest, "--output-dir", "other")
    assert ended.code == 2
    assert "choose another folder" in ended.err
    assert [path.name for path in Path("other").iterdir()] == ["images"]


def test_several_manifests_make_one_run(invoke: Invoke, manifest: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('{"id": "z", "prompt": "a dot", "width": 64, "height": 32}\n')
    values = invoke("run", manifest, more, "--json").json
    assert values["done"] == 6
    assert values["output_dir"] == "outputs/small+more"


def test_task_of_an_upstream_file_is_given_on_the_command_line(
    invoke: Invoke, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a story", "width": 64, "height": 32}\n')
    invoke("run", path, "--task", "interleave")
    log = pq.read_table("outputs/rows/log.parquet").to_pylist()
    assert [row["task"] for row in log] == ["interleave"]


def test_memory_is_planned_for_every_group_that_is_still_to_run(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    invoke("run", manifest, "--limit", "2")
    assert [load.group.task for load in backend.loads] == ["t2i"]
    invoke("run", manifest)
    assert [load.group.task for load in backend.loads] == ["t2i", "edit", "interleave"]


def test_memory_is_planned_for_failed_jobs_that_are_tried_again(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    _failing(manifest)
    invoke("run", manifest)
    invoke("run", manifest, "--retry-failed")
    assert [load.batch_size for load in backend.loads] == [1]


def test_published_memory_budgets_become_settings(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    args = ["--device_map", "auto", "--max_memory", "0=20GiB,cpu=80GiB"]
    assert invoke("run", manifest, *args).code == 0
    memory = backend.loaded[0].memory
    assert (memory.vram_budget_bytes, memory.host_budget_bytes) == (20 * 2**30, 80 * 2**30)


@pytest.mark.parametrize(
    "value", ["20GiB", "1=20GiB", "0=20", "0=20GiB,", "0=2GiB,0=3GiB", "0=0GiB"]
)
def test_invalid_memory_budgets_are_refused(invoke: Invoke, manifest: Path, value: str) -> None:
    ended = invoke("run", manifest, "--max-memory", value)
    assert ended.code == 2
    assert ended.err.startswith("sensebatch: --max-memory: expected")


@pytest.mark.parametrize(
    ("args", "host"),
    [
        (["--vram-budget", "13GiB"], None),
        (["--vram_budget", "13 GiB", "--max-memory", "cpu=20GiB"], 20 * 2**30),
        (["--vram-budget", "13.0GiB", "--max-memory", "0=13GiB,cpu=20GiB"], 20 * 2**30),
    ],
)
def test_a_vram_budget_is_the_gpus_part_of_max_memory(
    invoke: Invoke, manifest: Path, backend: FakeBackend, args: list[str], host: int | None
) -> None:
    assert invoke("run", manifest, *args).code == 0
    memory = backend.loaded[0].memory
    assert (memory.vram_budget_bytes, memory.host_budget_bytes) == (13 * 2**30, host)


@pytest.mark.parametrize("value", ["13", "13GB", "0GiB", "0=13GiB", "-1GiB", "1" * 400 + "GiB"])
def test_an_invalid_vram_budget_is_refused(
    invoke: Invoke, manifest: Path, backend: FakeBackend, value: str
) -> None:
    ended = invoke("run", manifest, f"--vram-budget={value}")
    assert ended.code == 2
    assert (
        f"--vram-budget: expected a positive number of GiB such as 13GiB, found {value!r}"
        in ended.err
    )
    assert backend.loaded == []


def test_two_budgets_of_the_gpu_that_differ_are_one_mistake(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    ended = invoke("run", manifest, "--vram-budget", "13GiB", "--max-memory", "0=9GiB,cpu=20GiB")
    assert ended.code == 2
    assert "--vram-budget and --max-memory: expected one amount for the GPU" in ended.err
    assert "found '13GiB' and '0=9GiB,cpu=20GiB'" in ended.err
    assert backend.loaded == []


CLOCK = r"\d\d:\d\d:\d\d"


def test_lines_of_a_run_have_the_time_of_day(invoke: Invoke, manifest: Path) -> None:
    lines = invoke("run", manifest).err.splitlines()
    timed = [line for line in lines if re.match(rf"{CLOCK} ", line)]
    assert re.fullmatch(rf"{CLOCK} reading .*small.yaml", timed[0])
    assert any(re.fullmatch(rf"{CLOCK} 2 of 5 done; t2i 64x32, 2 jobs in .* s.*", x) for x in timed)
    # Not what the run came to.
    assert lines[len(timed)].startswith("5 of 5 jobs done")


def test_quiet_prints_failures_and_the_outcome_of_a_run_that_failed(
    invoke: Invoke, manifest: Path
) -> None:
    # A size of the model, so that there is nothing to warn of.
    text = manifest.read_text().replace("width: 64, height: 32", 'resolution: "1:1"')
    manifest.write_text(text)
    assert invoke("run", manifest, "--quiet", "--limit", "1").err == ""
    _failing(manifest)
    first, second = invoke("run", manifest, "-q").err.splitlines()
    assert "failed: b: ValueError: NaN in the output" in first
    assert second.startswith("4 of 5 jobs done, 1 failed")


def test_verbose_names_the_files_of_every_job(invoke: Invoke, manifest: Path) -> None:
    assert "done: c: " not in invoke("run", manifest, "--limit", "1").err
    assert "done: c: images/c.png, text/c.txt" in invoke("run", manifest, "--verbose").err


def test_quiet_and_verbose_exclude_each_other(invoke: Invoke, manifest: Path) -> None:
    ended = invoke("run", manifest, "-q", "-v")
    assert (ended.code, "--quiet: expected no --verbose" in ended.err) == (2, True)


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_folder_keeps_a_log_of_what_was_printed_with_times(
    invoke: Invoke, manifest: Path, flags: list[str]
) -> None:
    _failing(manifest)
    invoke("run", manifest, "--limit", "1", *flags)
    invoke("run", manifest, *flags)
    log = Path("outputs/small/run.log").read_text(encoding="utf-8")
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    assert all(re.match(rf"{stamp} ", line) for line in log.splitlines())
    assert log.count("reading ") == 2
    assert "1 of 5 done" not in log.splitlines()[0]
    for said in ("loading tiny", "failed: b: ValueError", "4 of 5 jobs done, 1 failed"):
        assert said in log


def test_run_continues_if_its_log_cannot_be_kept(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest, "--limit", "1")
    log = Path("outputs/small/run.log")
    log.unlink()
    log.mkdir()
    assert invoke("run", manifest).code == 0


def test_warnings_of_libraries_are_printed_once_and_kept(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    logger, before = logging.getLogger("some.library"), list(logging.getLogger().handlers)
    backend.engine.on_step = lambda: logger.warning("hot")
    ended = invoke("run", manifest, "--limit", "1")
    assert ended.err.count("warning: hot") == 1
    assert "warning: hot" in Path("outputs/small/run.log").read_text(encoding="utf-8")
    assert logging.getLogger().handlers == before


def test_job_whose_image_would_overwrite_its_input_is_a_mistake(
    invoke: Invoke, manifest: Path
) -> None:
    assert invoke("run", manifest, "--output-dir", "o").code == 0
    before = Path("o/images/d.png").read_bytes()
    text = manifest.read_text()
    for found in ("o/images/d.png", "o/images/../images/d.png"):
        manifest.write_text(text.replace("in.png", found))
        ended = invoke("run", manifest, "--output-dir", "o")
        assert ended.code == 2
        assert f"image: expected an image that the job does not overwrite, found {found}" in (
            ended.err.replace(f"{manifest.parent}/", "")
        )
    manifest.write_text(text.replace("in.png", "o/images/a.png"))
    assert invoke("run", manifest, "--output-dir", "o").code == 0
    assert Path("o/images/d.png").read_bytes() != before


@pytest.mark.parametrize(
    ("platform", "given", "expected"),
    [("linux", None, "expandable_segments:True"), ("linux", "x:1", None), ("win32", None, None)],
)
def test_the_allocator_may_grow_its_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, platform: str, given: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    # Set first, so that what the call sets is taken back as well.
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    session._settle_allocator()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


def test_loaded_line_includes_the_time_of_compiling() -> None:
    info = FakeEngine().info
    assert loaded_line(replace(info, load_s=9.04)) == "loaded in 9.0 s"
    said = loaded_line(replace(info, load_s=9.04, compile_s=0.81))
    assert said == "loaded in 9.0 s, 0.8 s of it for kernels"


def test_manifests_of_one_name_in_different_folders_do_not_share_one(
    invoke: Invoke, tmp_path: Path
) -> None:
    """A row without an id, and images of one name."""
    for day, colour in (("mon", "red"), ("tue", "blue")):
        (tmp_path / day).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / day / "001.png")
        row = '{"task": "edit", "prompt": "Make it green", "image": "001.png"}\n'
        (tmp_path / day / "jobs.jsonl").write_text(row, encoding="utf-8")
    assert invoke("run", "mon/jobs.jsonl").code == 0
    (made,) = (tmp_path / "outputs/jobs/images").iterdir()
    before = made.read_bytes()
    refused = invoke("run", "tue/jobs.jsonl")
    assert refused.code == 2
    assert f"belongs to {tmp_path}/mon/jobs.jsonl, found another manifest" in refused.err
    assert "--output-dir" in refused.err
    assert "--other-manifest" in refused.err
    assert made.read_bytes() == before
    assert invoke("run", "tue/jobs.jsonl", "--other-manifest").code == 0
    assert made.read_bytes() == before
    assert len(list(made.parent.iterdir())) == 2
    together = invoke("manifest", "validate", "mon/jobs.jsonl", "tue/jobs.jsonl")
    assert together.code == 0


def test_renamed_input_of_a_row_without_an_id_draws_nothing_again(
    invoke: Invoke, backend: FakeBackend, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    path = tmp_path / "m.jsonl"
    path.write_text('{"task": "edit", "prompt": "p", "image": "x.png"}\n', encoding="utf-8")
    assert invoke("run", path, "--output-dir", "o").code == 0
    (tmp_path / "x.png").rename(tmp_path / "y.png")
    path.write_text('{"task": "edit", "prompt": "p", "image": "y.png"}\n', encoding="utf-8")
    assert invoke("run", path, "--output-dir", "o").code == 0
    assert len(backend.engine.batches) == 1
    assert len(list((tmp_path / "o/images").iterdir())) == 1


def test_unchanged_manifest_is_compared_in_bulk(
    invoke: Invoke, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensebatch.store.manifests._SETTLED_S", -60.0)
    assert invoke("run", manifest).code == 0

    def read(*_: object, **__: object) -> Iterator[None]:
        yield pytest.fail("the manifest was read again")

    with monkeypatch.context() as patch:
        patch.setattr("sensebatch.manifest.read.read_manifests", read)
        ended = invoke("run", manifest)
        assert (ended.code, "5 of 5 jobs done" in ended.err) == (0, True)
