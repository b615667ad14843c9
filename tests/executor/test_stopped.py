"""What every job needs can fail: the run stops, no job is marked as failed, all can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sensebatch.errors import DeviceError
from sensebatch.jobs import BatchResult
from sensebatch.tasks import Task
from tests.executor.fakes import FakeEngine, make_job, outcome, run_folder


class BrokenDevice(FakeEngine):
    """Fails like a device that is lost in the middle of the third batch."""

    def generate(self, *args: Any, **options: Any) -> BatchResult:
        result = super().generate(*args, **options)
        if len(self.batches) > 2:
            raise DeviceError("cuda failed")
        return result


def test_failed_device_stops_the_run_with_its_jobs_pending(tmp_path: Path) -> None:
    jobs = [make_job(f"t{i}") for i in range(6)]
    jobs += [make_job(f"story{i}", Task.INTERLEAVE) for i in range(2)]
    broken = BrokenDevice()
    with pytest.raises(DeviceError):
        run_folder(tmp_path / "a", jobs, engine=broken)
    assert broken.batches == [("t0", "t1"), ("t2", "t3"), ("t4", "t5")]
    log = pq.read_table(tmp_path / "a/log.parquet")
    assert log.column("job_id").to_pylist() == ["t0", "t1", "t2", "t3"]
    resumed = run_folder(tmp_path / "a", jobs)
    assert resumed.engine.batches[0] == ("t4", "t5")
    assert (resumed.summary.done, resumed.summary.failed) == (4, 0)
    run_folder(tmp_path / "b", jobs)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
