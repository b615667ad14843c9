"""`sensebatch edit`: pictures changed by a prompt, or those of a JSONL file."""

from __future__ import annotations

from sensebatch.cli.job_options import (
    EditOptions,
    ImageGuidanceOptions,
    InputImages,
    JobOptions,
    SamplingOptions,
    SingleImageOptions,
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


def edit(
    job: JobOptions,
    size: SizeOptions,
    sampling: SamplingOptions,
    guidance: ImageGuidanceOptions,
    single: SingleImageOptions,
    inputs: EditOptions,
    model: ModelOptions,
    batch: BatchOptions,
    execution: ExecutionOptions,
    images: ImageOptions,
    screen: ScreenOptions,
    image: InputImages = None,
) -> None:
    """Change one or several pictures by a prompt.

    It is a run of one job, with its folder in OUTPUT_DIR/.sensebatch: the same command again
    draws nothing anew. With --jsonl, the folder is OUTPUT_DIR itself, as of `sensebatch run`.
    """
    from sensebatch.cli.one_job import Command, run_command

    flags = model.flags() | batch.flags() | execution.flags() | images.flags() | inputs.flags()
    for group in (sampling, guidance, single):
        flags |= group.flags(Task.EDIT)
    run_command(
        Command(
            task=Task.EDIT,
            job=job,
            fields={**size.fields(), "image": image or None},
            flags=flags,
            config_file=model.config,
            screen=screen,
            output=single.output,
        )
    )
