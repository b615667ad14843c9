"""`sensebatch profile`: measured suites, case by case, beside the published tables."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from sensebatch.cli import exits
from sensebatch.cli.paths import path
from sensebatch.errors import ConfigError

if TYPE_CHECKING:
    from sensebatch.profile.rows import Row
    from sensebatch.resolutions import Resolution

MARKDOWN_NAME = "profile.md"
_PROGRAM = ("-m", "sensebatch")
_POLL_S = 0.5


Steps = Annotated[int | None, typer.Option(min=1, help="Of denoising; 50 if not given.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Of most cases; 8 if not given.")]
Size = Annotated[
    str | None,
    typer.Option(
        help="Of all pictures; each case's published size if not given.", metavar="WIDTHxHEIGHT"
    ),
]
TextTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Of a thought, or before each picture of a story, where weights are made up; 300 if "
        "not given.",
    ),
]
Only = Annotated[
    list[str] | None, typer.Option(help="Run only this case; may be repeated.", metavar="CASE")
]


def profile(
    suite: Annotated[
        Literal["tasks", "budgets", "modes", "speed", "night"] | None,
        typer.Option(help="What the cases differ in."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="As for run; synthetic:8b (full-size made-up weights) if not given."),
    ] = None,
    steps: Steps = None,
    jobs: Jobs = None,
    size: Size = None,
    text_tokens: TextTokens = None,
    only: Only = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Where runs and results go; outputs/profile-SUITE if not given."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Run nothing: write the Markdown and the plot of these results anew.",
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Measure speed and memory, case by case, beside the published tables.

    Every case is a manifest run by `sensebatch run` in a process of its own. Results are
    profile.parquet, profile.md and, where matplotlib is installed, profile.png. Exit codes: 0 all
    cases done, 1 some failed, 2 nothing started because of a mistake.
    """
    from sensebatch.profile.rows import read_rows, with_ratios

    if report is not None:
        if any((suite, model, steps, jobs, size, text_tokens, only, output_dir)):
            raise ConfigError("--report: expected no other option beside it")
        _finish(report, with_ratios(read_rows(report)))
    if suite is None:
        raise ConfigError("--suite: expected tasks, budgets, modes, speed or night, found nothing")
    given = {
        "model": model,
        "num_steps": steps,
        "num_jobs": jobs,
        "resolution": _parsed(size),
        "text_tokens": text_tokens,
    }
    folder = Path("outputs") / f"profile-{suite}" if output_dir is None else output_dir
    rows = _run(suite, {k: v for k, v in given.items() if v is not None}, only or [], folder)
    _finish(folder, rows)


def _parsed(size: str | None) -> Resolution | None:
    """Returns a size in words as a size.

    Raises:
        ConfigError: It is written otherwise, or the model cannot draw it.
    """
    from sensebatch.resolutions import Resolution, ResolutionError

    if size is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise ConfigError(f"--size: expected WIDTHxHEIGHT, found {size!r}")
    try:
        return Resolution(width=int(match[1]), height=int(match[2]))
    except ResolutionError as error:
        raise ConfigError(f"--size: {error}") from None


def _run(suite_name: str, given: dict[str, Any], only: list[str], folder: Path) -> list[Row]:
    from sensebatch.checkpoint.files import open_checkpoint
    from sensebatch.cli.messages import say, warn
    from sensebatch.cli.speed_cache import read_speeds
    from sensebatch.profile.measure import run_suite
    from sensebatch.profile.suites import Scale, Suite, chosen_cases, suite_cases

    suite, scale = Suite(suite_name), Scale(**given)
    cases = chosen_cases(suite_cases(suite, scale), only)
    # A model that is not there should be told once and now; this loads no weights.
    open_checkpoint(scale.model)
    machine, mistake = read_speeds()
    if mistake is not None:
        warn(mistake)
    speeds = {} if machine is None else {machine.gpu: machine.machine.speeds}
    return run_suite(suite, cases, scale, folder, launch=launch, say=say, speeds=speeds)


def launch(arguments: Sequence[str], messages: Path) -> int:
    """Runs `sensebatch` in a process of its own and returns its exit code.

    Args:
        arguments: What is typed behind `sensebatch`.
        messages: Takes what the process says.

    Raises:
        KeyboardInterrupt: A signal came; the process was told and has ended.
    """
    from sensebatch.cli.signals import StopSignals

    command = [sys.executable, *_PROGRAM, *arguments]
    quiet = subprocess.DEVNULL
    with (
        StopSignals("stopped at once").installed() as stop,
        messages.open("wb") as file,
        # A session of its own, or a signal of the terminal would reach the run twice.
        subprocess.Popen(command, stdout=quiet, stderr=file, start_new_session=True) as process,
    ):
        told = False
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            if stop.is_set() and not told:
                process.terminate()
                told = True
        if stop.is_set():
            raise KeyboardInterrupt
        return process.returncode


def _finish(folder: Path, rows: Sequence[Row]) -> NoReturn:
    """Writes and prints the results and ends the command.

    Raises:
        typer.Exit: Always, with the exit code.
    """
    from sensebatch.cli.messages import say, show
    from sensebatch.profile.markdown import format_markdown
    from sensebatch.profile.plot import plot
    from sensebatch.profile.rows import DONE, PARQUET_NAME
    from sensebatch.store.files import write_atomic

    text = format_markdown(rows)
    write_atomic(folder / MARKDOWN_NAME, text.encode())
    show(text.rstrip("\n"))
    say(f"results {folder / PARQUET_NAME}, {folder / MARKDOWN_NAME}")
    say(plot(folder, rows))
    failed = any(row.status != DONE for row in rows)
    raise typer.Exit(exits.FAILED if failed else exits.DONE)
