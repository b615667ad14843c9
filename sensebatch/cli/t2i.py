"""`sensebatch t2i`: one picture from a prompt, or those of a JSONL file."""

from __future__ import annotations

from sensebatch.cli.job_options import JobOptions, SamplingOptions, SingleImageOptions, SizeOptions
from sensebatch.cli.options import (
    BatchOptions,
    ExecutionOptions,
    ImageOptions,
    ModelOptions,
    ScreenOptions,
)
from sensebatch.tasks import Task


def t2i(
    job: JobOptions,
    size: SizeOptions,
    sampling: SamplingOptions,
    single: SingleImageOptions,
    model: ModelOptions,
    batch: BatchOptions,
    execution: ExecutionOptions,
    images: ImageOptions,
    screen: ScreenOptions,
) -> None:
    """Draw a picture from a prompt.

    It is a run of one job, with its folder in OUTPUT_DIR/.sensebatch: the same command again
    draws nothing anew. With --jsonl, the folder is OUTPUT_DIR itself, as of `sensebatch run`.
    """
    from sensebatch.cli.one_job import Command, run_command

    flags = model.flags() | batch.flags() | execution.flags() | images.flags()
    for group in (sampling, single):
        flags |= group.flags(Task.T2I)
    run_command(
        Command(
            task=Task.T2I,
            job=job,
            fields=size.fields(),
            flags=flags,
            config_file=model.config,
            screen=screen,
            output=single.output,
        )
    )
