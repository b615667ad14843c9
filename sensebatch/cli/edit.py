"""`sensebatch edit`: images changed as a prompt says, or those of a JSONL file."""

from sensebatch.cli.job_options import one_job_command
from sensebatch.tasks import Task

COMMAND = one_job_command(Task.EDIT, "Change one or several images as a prompt says.")
