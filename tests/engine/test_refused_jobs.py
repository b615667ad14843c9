"""Jobs that do not fit the memory: refused before they are begun, while the others run."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sensebatch.config import TINY_MODEL, default_config
from sensebatch.engine.device import memory
from sensebatch.errors import ConfigError
from sensebatch.loading import TorchBackend
from sensebatch.manifest.read import read_rows
from sensebatch.session import Request, RunObserver, WarmEngine, run_session
from sensebatch.store.run_dir import RunDir
from sensebatch.units import GIB, MIB

CONFIG = default_config(TINY_MODEL)
SMALL = {"id": "small", "prompt": "a dot", "width": 64, "height": 64, "num_steps": 1}
LARGE = {"id": "large", "prompt": "a dot", "width": 4096, "height": 4096, "num_steps": 1}


class Warnings(RunObserver):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, text: str) -> None:
        self.said.append(text)


def request(folder: Path, *rows: dict[str, object]) -> Request:
    jobs = list(read_rows(rows, CONFIG, path=folder / "rows"))
    return Request(root=folder, config=CONFIG, sources=("rows",), jobs=lambda: iter(jobs))


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 400 * MIB)


def test_job_that_does_not_fit_fails_unbegun_and_the_others_run(tmp_path: Path) -> None:
    observer = Warnings()
    summary = run_session(request(tmp_path, LARGE, SMALL), observer=observer)
    assert (summary.done, summary.failed) == (1, 1)
    (warning,) = observer.said
    assert warning.startswith("1 job does not fit and will fail: free host memory: expected at ")
    rows = {row["job_id"]: row for row in pq.read_table(RunDir(tmp_path).log).to_pylist()}
    assert rows["small"]["status"] == "done"
    assert rows["large"]["error_type"] == "DoesNotFitError"
    assert "t2i 4096x4096, found 0.39 GiB; vram_mode full" in rows["large"]["error_message"]
    # It was in no batch, so nothing was computed for it.
    assert rows["large"]["batch_id"] is None


def test_run_of_jobs_that_all_do_not_fit_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"free host memory: expected .* t2i 4096x4096, found"):
        run_session(request(tmp_path, LARGE))


def test_loaded_weights_count_as_free_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_free(num_bytes: int) -> None:
        monkeypatch.setattr(memory, "free_memory_bytes", lambda: num_bytes)

    with WarmEngine(CONFIG, TorchBackend()) as engine:
        assert run_session(request(tmp_path / "a", SMALL), engine).done == 1
        with_free(0)
        with pytest.raises(ConfigError) as caught:
            run_session(request(tmp_path / "b", SMALL))
        needed = re.search(r"at least ([.\d]+) GiB for t2i 64x64", str(caught.value))
        assert needed is not None
        # What is left is enough for the job, but not for the weights of 22 MiB once more.
        with_free(int(float(needed[1]) * GIB) - 21 * MIB)
        with pytest.raises(ConfigError, match="free host memory"):
            run_session(request(tmp_path / "b", SMALL))
        assert run_session(request(tmp_path / "b", SMALL), engine).done == 1
