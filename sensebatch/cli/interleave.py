"""`sensebatch interleave`: text with images in it, or that of a JSONL file."""

from sensebatch.cli.job_options import one_job_command
from sensebatch.tasks import Task

COMMAND = one_job_command(
    Task.INTERLEAVE,
    "Write text with images in it: STEM.txt marks each with <image>; STEM_0.png is the first.",
)
