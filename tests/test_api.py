"""The Python API: what it gives, what it refuses, and an engine that serves several runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sensebatch
from sensebatch import api, loading
from sensebatch.checkpoint.files import TINY_FOLDER
from sensebatch.jobs import Batch
from sensebatch.session import WarmEngine
from tests.backends import FakeBackend

ROOT = Path(__file__).parents[1]
SMALL = {"width": 64, "height": 32, "num_steps": 2}
T2I = {"id": "a", "prompt": "a dot", **SMALL}
STORY = {"id": "s", "task": "interleave", "prompt": "a story", "max_images": 2, **SMALL}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """What every run and every engine of the test computes with."""
    fake = FakeBackend()
    monkeypatch.setattr(loading, "TorchBackend", fake)
    monkeypatch.setattr(api, "TorchBackend", fake)
    return fake


def test_names_are_the_same_in_both_lists_and_all_there() -> None:
    assert sensebatch.__all__ == api.__all__
    for name in sensebatch.__all__:
        assert getattr(sensebatch, name) is getattr(api, name)
    assert set(sensebatch.__all__) <= set(dir(sensebatch))
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = sensebatch.runn


def test_import_loads_no_library_and_jobs_and_plans_no_torch() -> None:
    code = """
import sys
import sensebatch
print([name for name in ("numpy", "pyarrow", "pydantic", "typer", "torch") if name in sys.modules])
jobs = sensebatch.make_jobs([{"prompt": "a dot"}])
sensebatch.make_plan(jobs)
print([name for name in ("typer", "torch", "transformers") if name in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ended.stdout.splitlines() == ["[]", "[]"]


def test_settings_are_taken_by_place_or_by_section_and_on_top_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("memory: {max_batch_size: 3, max_batch_image_tokens: 64}\n")
    config = sensebatch.configure({"memory.max_batch_size": 2}, file=file)
    assert (config.memory.max_batch_size, config.memory.max_batch_image_tokens) == (2, 64)
    assert sensebatch.configure({"memory": {"max_batch_size": 2}}, file=file) == config


def test_mistake_in_a_setting_is_named_by_its_place() -> None:
    with pytest.raises(sensebatch.ConfigError) as raised:
        sensebatch.configure({"execution.max_attempts": 0})
    assert str(raised.value) == "execution.max_attempts: expected a number of at least 1, found 0"


@pytest.mark.usefixtures("backend")
def test_rows_of_a_manifest_resume_the_same_rows_in_memory(tmp_path: Path) -> None:
    manifest = tmp_path / "jobs.jsonl"
    manifest.write_text('{"prompt": "a dot", "width": 64, "height": 32, "num_steps": 2, "n": 2}\n')
    row = {"prompt": "a dot", "n": 2, **SMALL}
    assert sensebatch.run(sensebatch.make_jobs([row]), tmp_path / "out").done == 2
    again = sensebatch.run(sensebatch.iter_jobs(manifest), tmp_path / "out")
    assert (again.done, again.counts.done) == (0, 2)


@pytest.mark.usefixtures("backend")
def test_iterator_that_was_used_up_does_not_empty_a_folder(tmp_path: Path) -> None:
    jobs = iter(sensebatch.make_jobs([T2I]))
    sensebatch.run(jobs, tmp_path / "out")
    with pytest.raises(sensebatch.ConfigError, match="expected at least one job, found none"):
        sensebatch.run(jobs, tmp_path / "out")
    assert sensebatch.read_status(tmp_path / "out").counts.done == 1


@pytest.mark.usefixtures("backend")
def test_folder_that_is_not_a_runs_is_refused_everywhere(tmp_path: Path) -> None:
    for look in (sensebatch.read_status, sensebatch.read_log):
        with pytest.raises(sensebatch.RunFolderError):
            look(tmp_path)
    with pytest.raises(sensebatch.RunFolderError):
        next(sensebatch.finished_jobs(tmp_path))


def test_engine_is_loaded_once_and_planned_again_for_each_run(
    tmp_path: Path, backend: FakeBackend
) -> None:
    with sensebatch.open_engine() as engine:
        assert backend.loaded == []
        sensebatch.run(sensebatch.make_jobs([T2I]), tmp_path / "one", engine=engine)
        sensebatch.run(sensebatch.make_jobs([STORY]), tmp_path / "two", engine=engine)
        # Nothing to do, so there is nothing to plan for.
        sensebatch.run(sensebatch.make_jobs([STORY]), tmp_path / "two", engine=engine)
        assert len(backend.loaded) == 1
        assert backend.engine.replanned == [["interleave"]]
        assert backend.engine.closed == 0
    assert backend.engine.closed == 1


@pytest.mark.parametrize(("name", "value"), [("dtype", "bfloat16"), ("model", "x")])
@pytest.mark.usefixtures("backend")
def test_engine_refuses_a_run_with_other_model_settings(
    tmp_path: Path, name: str, value: str
) -> None:
    engine = sensebatch.open_engine()
    other = sensebatch.configure({f"model.{name}": value})
    with pytest.raises(
        sensebatch.EngineError, match=f"^model.{name}: expected .*, found '{value}'"
    ):
        sensebatch.run(sensebatch.make_jobs([T2I]), tmp_path / "out", config=other, engine=engine)
    assert not (tmp_path / "out").exists()


def test_engine_refuses_a_checkpoint_that_changed_since_it_was_opened(
    tmp_path: Path, backend: FakeBackend
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_FOLDER, folder)
    config = sensebatch.configure({"model.model": str(folder)})
    engine = sensebatch.open_engine(config)
    sensebatch.run(sensebatch.make_jobs([T2I]), tmp_path / "one", engine=engine)
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(sensebatch.EngineError, match="its files have changed"):
        sensebatch.run(sensebatch.make_jobs([STORY]), tmp_path / "two", engine=engine)
    assert len(backend.loaded) == 1


def test_same_weights_in_other_files_are_loaded_again(tmp_path: Path, backend: FakeBackend) -> None:
    folder, moved = tmp_path / "model", tmp_path / "other"
    shutil.copytree(TINY_FOLDER, folder)
    config = sensebatch.configure({"model.model": str(folder)})
    engine = sensebatch.open_engine(config)
    sensebatch.run(sensebatch.make_jobs([T2I]), tmp_path / "one", engine=engine)
    folder.rename(moved)
    folder.mkdir()
    for file in moved.iterdir():
        name = "renamed.safetensors" if file.suffix == ".safetensors" else file.name
        shutil.copy(file, folder / name)
    sensebatch.run(sensebatch.make_jobs([STORY]), tmp_path / "two", engine=engine)
    assert (len(backend.loaded), backend.engine.replanned) == (2, [])


def test_engine_serves_one_run_at_a_time_and_none_once_closed(
    tmp_path: Path, backend: FakeBackend
) -> None:
    engine = sensebatch.open_engine()
    refused: list[str] = []

    def try_another() -> None:
        with pytest.raises(sensebatch.EngineError) as raised:
            sensebatch.run(sensebatch.make_jobs([STORY]), tmp_path / "two", engine=engine)
        refused.append(str(raised.value))

    def in_a_thread() -> None:
        thread = threading.Thread(target=try_another)
        thread.start()
        thread.join()

    backend.engine.on_step = in_a_thread
    sensebatch.run(sensebatch.make_jobs([T2I]), tmp_path / "one", engine=engine)
    engine.close()
    try_another()
    assert refused == [
        "expected a free engine, found one that another run is using",
        "expected an open engine, found a closed one",
    ]


def test_run_that_failed_has_the_next_one_load_the_engine_again(
    tmp_path: Path, backend: FakeBackend
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    engine = sensebatch.open_engine()
    backend.engine.on_step = interrupted
    jobs = sensebatch.make_jobs([T2I])
    with pytest.raises(KeyboardInterrupt):
        sensebatch.run(jobs, tmp_path / "out", engine=engine)
    assert backend.engine.closed == 1
    backend.engine.on_step = lambda: None
    assert sensebatch.run(jobs, tmp_path / "out", engine=engine).done == 1
    assert len(backend.loaded) == 2


def test_mistake_in_the_jobs_keeps_the_engine_loaded(tmp_path: Path, backend: FakeBackend) -> None:
    engine = sensebatch.open_engine()
    sensebatch.run(sensebatch.make_jobs([T2I]), tmp_path / "one", engine=engine)

    def jobs() -> Iterator[sensebatch.Job]:
        yield from sensebatch.make_jobs([STORY])
        raise sensebatch.ManifestError([])

    with pytest.raises(sensebatch.ManifestError):
        sensebatch.run(jobs(), tmp_path / "two", engine=engine)
    sensebatch.run(sensebatch.make_jobs([STORY]), tmp_path / "two", engine=engine)
    assert (len(backend.loaded), backend.engine.closed) == (1, 0)


def test_run_with_an_engine_takes_its_settings(tmp_path: Path, backend: FakeBackend) -> None:
    config = sensebatch.configure({"memory.max_batch_size": 1})
    engine: WarmEngine = sensebatch.open_engine(config)
    sizes: list[int] = []

    class Watch(sensebatch.RunObserver):
        def batch_started(self, batch: Batch) -> None:
            sizes.append(len(batch.jobs))

    rows = [{"prompt": "a dot", "n": 2, **SMALL}]
    sensebatch.run(sensebatch.make_jobs(rows), tmp_path / "o", engine=engine, observer=Watch())
    assert sizes == [1, 1]
    assert backend.loaded == [config]


@pytest.mark.usefixtures("backend")
def test_finished_jobs_are_drawn_again_for_the_models_sake_only_if_that_is_said(
    tmp_path: Path,
) -> None:
    jobs = sensebatch.make_jobs([{"prompt": "A star"}])
    sensebatch.run(jobs, tmp_path)
    other = sensebatch.configure({"model.precision": "fp8"})
    with pytest.raises(sensebatch.RunFolderError, match="precision fp8 instead of auto"):
        sensebatch.run(jobs, tmp_path, config=other)
    assert sensebatch.run(jobs, tmp_path, config=other, redraw=True).done == 1


def test_settings_that_were_not_configured_are_a_mistake(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "a red disc"}]
    config: Any = {"memory.max_batch_size": 2}
    with pytest.raises(sensebatch.ConfigError, match="expected what `configure` returns, found a"):
        sensebatch.run(sensebatch.make_jobs(rows), tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()
