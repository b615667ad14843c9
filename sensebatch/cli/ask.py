"""`sensebatch ask`: a question about images, or those of a JSONL file."""

from sensebatch.cli.job_options import one_job_command
from sensebatch.tasks import Task

COMMAND = one_job_command(
    Task.ASK, "Answer a question about images, or choose between the answers given with --choices."
)
