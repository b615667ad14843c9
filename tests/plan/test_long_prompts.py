"""Long prompts are noticed while jobs are read, with what they cost."""

from __future__ import annotations

import re
from pathlib import Path

from sensebatch.config import TINY_MODEL, default_config
from sensebatch.errors import Problem
from sensebatch.jobs import Job
from sensebatch.manifest.read import read_rows
from sensebatch.plan.long_prompts import LONG_TOKENS, LongPrompts
from sensebatch.plan.work import Speeds
from tests.plan.loads import ARCH

SPEEDS = Speeds(
    copy_bytes_per_s=5e10,
    gemm_flop_per_s=7e14,
    attention_flop_per_s=6e14,
    memory_bytes_per_s=4e12,
)


def jobs_of(*prompts: str, **fields: object) -> list[Job]:
    size = {"resolution": "2048x2048", "num_steps": 50, "cfg_scale": 4}
    rows = [{"prompt": prompt, **size, **fields} for prompt in prompts]
    return list(read_rows(rows, default_config(TINY_MODEL), path=Path("rows")))


def warned(jobs: list[Job], *, arch: bool = True, speeds: Speeds | None = None) -> str:
    """Returns the warning of jobs, which are passed on; empty without one."""
    problems: list[Problem] = []
    watcher = LongPrompts(problems.append, ARCH if arch else None, speeds)
    assert list(watcher.watch(jobs)) == jobs
    return "\n".join(map(str, problems))


def times(jobs: list[Job]) -> float:
    found = re.search(r"about ([\d.,]+) times as long", warned(jobs))
    assert found is not None
    return float(found[1].replace(",", ""))


def test_prompts_as_people_write_them_are_not_warned_of() -> None:
    # Three bytes a token are the fewest that the estimate allows.
    assert warned(jobs_of("a red circle", "abc" * LONG_TOKENS)) == ""
    assert warned(jobs_of("龍" * LONG_TOKENS)) == ""
    assert "up to 4,097 tokens" in warned(jobs_of("abc" * LONG_TOKENS + "d"))
    assert "up to 4,097 tokens" in warned(jobs_of("龍" * LONG_TOKENS + "龍"))


def test_the_longest_prompt_is_named_and_the_others_are_counted() -> None:
    jobs = jobs_of("a", "abc" * 5000, "abc" * 9000, "abc" * 6000)
    text = warned(jobs)
    assert text.startswith("rows: row 2: prompt: very long, up to 9,000 tokens, so the job takes ")
    assert text.endswith("; 2 others have over 4,096")
    (system,) = jobs_of("a", system_prompt="abc" * 9000)
    assert "up to 9,001 tokens" in warned([system])


def test_the_cost_grows_with_the_prompt_and_shrinks_beside_the_image() -> None:
    assert 1 < times(jobs_of("abc" * 5000)) < times(jobs_of("abc" * 30_000)) < 3
    assert times(jobs_of("abc" * 30_000, resolution="256x256")) > 5
    assert times(jobs_of("abc" * 30_000, resolution="64x64", num_steps=1)) > 100


def test_only_what_is_known_of_the_cost_is_said() -> None:
    jobs = jobs_of("abc" * 30_000)
    assert warned(jobs, arch=False) == "rows: row 0: prompt: very long, up to 30,000 tokens"
    assert " s more" not in warned(jobs)
    found = re.search(r"at least ([\d.]+) s more$", warned(jobs, speeds=SPEEDS))
    assert found is not None
    # 50 steps of 4096 queries attend to 30,000 keys more; reading those takes little beside it.
    width = ARCH.num_layers * ARCH.num_heads * ARCH.head_dim
    attention = 50 * 4 * width * 4096 * 30_000 / SPEEDS.attention_flop_per_s
    assert attention < float(found[1]) < 1.2 * attention
