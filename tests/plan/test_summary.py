from __future__ import annotations

from sensebatch.config import MemoryConfig
from sensebatch.jobs import Task
from sensebatch.plan.batches import make_plan, plan_entry
from sensebatch.plan.summary import plan_summary
from tests.executor.fakes import make_job


def test_summary_counts_interleave_with_the_most_it_may_draw() -> None:
    jobs = [make_job("a"), make_job("b"), make_job("story", Task.INTERLEAVE)]
    summary = plan_summary(make_plan(map(plan_entry, jobs), MemoryConfig()))
    assert (summary["jobs"], summary["images"], summary["images_exact"]) == (3, 2 + 4, False)
    first, second = summary["groups"]
    assert (first["task"], first["width"], first["height"]) == ("t2i", 64, 32)
    assert (first["jobs"], first["batches"], first["images_exact"]) == (2, 1, True)
    assert (second["task"], second["images"], second["images_exact"]) == ("interleave", 4, False)
