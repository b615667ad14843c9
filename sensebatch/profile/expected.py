"""What the memory arithmetic says of a case, from its manifest and options alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.errors import ConfigError
from sensebatch.manifest.read import read_manifest
from sensebatch.plan import group_load, make_plan, plan_entry
from sensebatch.profile.rows import Row
from sensebatch.profile.suites import Case, Scale, Suite, chosen_cases, suite_cases, write_manifest
from sensebatch.resolutions import Resolution
from sensebatch.settings import resolve_settings
from sensebatch.vram import Placement, place

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ENOUGH_BYTES = 1 << 50
"""Host memory where no budget is given: how much of it is used changes nothing on the device."""


def expected_placement(case: Case, model: str, manifest: Path, dtype: str) -> Placement:
    """Returns where weights are put for a case, and so how much memory it is expected to take.

    Args:
        case: With its options.
        model: As `sensebatch run --model` takes it.
        manifest: The case's.
        dtype: Of weights and activations.

    Raises:
        ConfigError: The case does not fit its budget.
    """
    config = resolve_settings(flags={"model.model": model} | case.flags)
    checkpoint = open_checkpoint(model)
    prompts = resolve_system_prompts(checkpoint).by_task.values()
    plan = make_plan((plan_entry(job) for job in read_manifest(manifest, config)), config.memory)
    longest = max(len(prompt.text.encode()) for prompt in prompts)
    return place(
        checkpoint.architecture,
        config.memory,
        [group_load(group, system_prompt_bytes=longest) for group in plan.groups],
        item_bytes=ITEM_BYTES[dtype],
        device_free=None,
        host_free=ENOUGH_BYTES,
    )


def recomputed_placement(row: Row) -> Placement:
    """Returns what the arithmetic says today of a case that was measured before.

    Args:
        row: Of a case that was run, so that its dtype is known.

    Raises:
        ConfigError: The suite has no such case any more, or one with other options; or it does
            not fit its budget.
    """
    assert row.dtype is not None
    scale = Scale(
        model=row.model,
        num_steps=row.num_steps,
        num_jobs=row.num_jobs,
        resolution=Resolution(height=row.height, width=row.width),
    )
    (case,) = chosen_cases(suite_cases(Suite(row.suite), scale), [row.case])
    if (case.setting, case.num_jobs) != (row.setting, row.num_jobs):
        raise ConfigError(
            f"{row.suite}, {row.case}: expected {row.num_jobs} jobs with {row.setting!r} as they "
            f"were measured, found {case.num_jobs} with {case.setting!r}: measure it again"
        )
    with TemporaryDirectory() as folder:
        manifest = write_manifest(case, scale, Path(folder))
        return expected_placement(case, row.model, manifest, row.dtype)
