"""`sensebatch interleave`: text with pictures in it, or that of a JSONL file."""

from __future__ import annotations

from sensebatch.cli.job_options import (
    ImageGuidanceOptions,
    InputImages,
    InterleaveOptions,
    JobOptions,
    SamplingOptions,
    SizeOptions,
)
from sensebatch.cli.options import (
    BatchOptions,
    ExecutionOptions,
    ImageOptions,
    ModelOptions,
    ScreenOptions,
)
from sensebatch.tasks import Task


def interleave(
    job: JobOptions,
    size: SizeOptions,
    sampling: SamplingOptions,
    guidance: ImageGuidanceOptions,
    limits: InterleaveOptions,
    model: ModelOptions,
    batch: BatchOptions,
    execution: ExecutionOptions,
    images: ImageOptions,
    screen: ScreenOptions,
    image: InputImages = None,
) -> None:
    """Write text with pictures in it: STEM.txt marks each with <image>; STEM_0.png is the first.

    It is a run of one job, with its folder in OUTPUT_DIR/.sensebatch: the same command again
    draws nothing anew. With --jsonl, the folder is OUTPUT_DIR itself, as of `sensebatch run`.
    """
    from sensebatch.cli.one_job import Command, run_command

    flags = model.flags() | batch.flags() | execution.flags() | images.flags() | limits.flags()
    for group in (sampling, guidance):
        flags |= group.flags(Task.INTERLEAVE)
    run_command(
        Command(
            task=Task.INTERLEAVE,
            job=job,
            fields={**size.fields(), "image": image or None},
            flags=flags,
            config_file=model.config,
            screen=screen,
        )
    )
