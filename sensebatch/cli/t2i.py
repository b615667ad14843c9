"""`sensebatch t2i`: one image from a prompt, or those of a JSONL file."""

from sensebatch.cli.job_options import one_job_command
from sensebatch.tasks import Task

COMMAND = one_job_command(Task.T2I, "Draw an image from a prompt.")
