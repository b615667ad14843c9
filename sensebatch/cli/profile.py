"""`sensebatch profile`: measured suites, case by case, beside the published tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from sensebatch.cli import exits
from sensebatch.cli.launch import launch
from sensebatch.cli.paths import path
from sensebatch.errors import ConfigError

if TYPE_CHECKING:
    from sensebatch.profile.rows import Row
    from sensebatch.profile.suites import Scale, Suite
    from sensebatch.resolutions import Resolution

MARKDOWN_NAME = "profile.md"
PROGRAM = "sensebatch"


Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps. [default: 50; 8 in suite few]")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Jobs in most cases. [default: 8]")]
Size = Annotated[
    str | None,
    typer.Option(
        help="Size of all images. [default: each case's published size]", metavar="WIDTHxHEIGHT"
    ),
]
TextTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Text tokens of a thought, or before each image of interleave, with synthetic "
        "weights. [default: 300]",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="As for run. [default: synthetic:8b, synthetic weights of full size]"),
]
Only = Annotated[
    list[str] | None, typer.Option(help="Run only this case; may be repeated.", metavar="CASE")
]


def profile(
    suite: Annotated[
        Literal["tasks", "budgets", "modes", "speed", "night", "ask", "quality", "few"] | None,
        typer.Option(help="What the cases differ in."),
    ] = None,
    model: Model = None,
    steps: Steps = None,
    jobs: Jobs = None,
    size: Size = None,
    text_tokens: TextTokens = None,
    only: Only = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Where runs and results go. [default: outputs/profile-SUITE]"
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Run nothing: write the Markdown and the plot of these results again.",
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Measure speed and memory, case by case, beside the published tables.

    Every case is a manifest run by `sensebatch run` in a process of its own. Results are
    profile.parquet, profile.md and, where matplotlib is installed, profile.png. A signal ends the
    suite after the current images; what was measured is printed. Exit codes: 0 all cases done, 1
    some failed, 2 nothing started because of a mistake, 75 stopped with cases missing.
    """
    from sensebatch.profile.rows import read_rows, with_ratios
    from sensebatch.profile.suites import Suite

    if report is not None:
        if any((suite, model, steps, jobs, size, text_tokens, only, output_dir)):
            raise ConfigError("--report: expected no other option beside it")
        _finish(report, with_ratios(read_rows(report)))
    if suite is None:
        *first, last = (choice.value for choice in Suite)
        raise ConfigError(f"--suite: expected {', '.join(first)} or {last}, found nothing")
    given = {
        "model": model,
        "num_steps": steps,
        "num_jobs": jobs,
        "resolution": _parsed(size),
        "text_tokens": text_tokens,
    }
    folder = Path("outputs") / f"profile-{suite}" if output_dir is None else output_dir
    chosen = {name: value for name, value in given.items() if value is not None}
    rows, missing = _run(suite, chosen, only or [], folder)
    _finish(folder, rows, missing)


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
        return Resolution.asked_for(width=int(match[1]), height=int(match[2]))
    except ResolutionError as error:
        raise ConfigError(f"--size: {error}") from None


def _run(
    suite_name: str, given: dict[str, Any], only: list[str], folder: Path
) -> tuple[list[Row], list[str]]:
    """Runs a suite; returns all rows of the folder, and the cases that a stop left out."""
    from sensebatch.checkpoint.files import open_checkpoint
    from sensebatch.cli.messages import say, warn
    from sensebatch.cli.signals import StopSignals
    from sensebatch.cli.speed_cache import read_speeds
    from sensebatch.engine.device.choice import cuda_is_available
    from sensebatch.profile.expected import cpu_weight_bytes
    from sensebatch.profile.forecast import Forecast
    from sensebatch.profile.measure import Hooks, run_suite
    from sensebatch.profile.suites import Scale, Suite, chosen_cases, default_steps, suite_cases

    suite = Suite(suite_name)
    scale = Scale(**{"num_steps": default_steps(suite), **given})
    cases = chosen_cases(suite_cases(suite, scale), only)
    # A missing model is reported once and now; this loads no weights.
    checkpoint = open_checkpoint(scale.model)
    has_gpu = cuda_is_available()
    if not has_gpu:
        _require_room(cpu_weight_bytes(checkpoint.architecture), scale, suite)
    machine, mistake = read_speeds()
    if mistake is not None:
        warn(mistake)
    if not has_gpu and not scale.is_small:
        warn(
            "found no GPU that torch can use; at full size a case takes hours on the CPU. "
            f"{_scaled_down(suite)}"
        )
    speeds = {machine.gpu: machine.machine.speeds} if machine is not None and has_gpu else {}
    forecast = Forecast(cases, scale, folder, speeds, has_gpu=has_gpu)
    say(forecast.before())
    with StopSignals("stopped at once").installed() as stop:
        rows = run_suite(
            suite,
            cases,
            scale,
            folder,
            hooks=Hooks(
                launch=partial(launch, PROGRAM, stop=stop, echo=_pass_on),
                say=say,
                stopped=stop.is_set,
                finished=lambda case: say(forecast.after(case)),
            ),
            speeds=speeds,
        )
    return rows, forecast.left


def _require_room(weight_bytes: int, scale: Scale, suite: Suite) -> None:
    """Checks that the CPU can hold a model's weights.

    Raises:
        ConfigError: It cannot.
    """
    from sensebatch.process import free_memory_bytes
    from sensebatch.units import GIB

    free = free_memory_bytes()
    if weight_bytes > free:
        needed, found = (f"{count / GIB:.1f} GiB" for count in (weight_bytes, free))
        raise ConfigError(
            f"--model {scale.model}: expected a GPU that torch can use, or {needed} of free memory "
            f"for the weights on the CPU, found no GPU and {found}. {_scaled_down(suite)}"
        )


def _scaled_down(suite: Suite) -> str:
    """Returns how a suite is measured within minutes."""
    return (
        "Scaled down, the suite takes minutes: sensebatch profile --suite "
        f"{suite} --model synthetic:tiny --steps 2 --jobs 2 --size 64x64"
    )


def _pass_on(line: str) -> None:
    """Shows what a case says of its progress.

    Its warnings are the same for all cases, and its stop is that of the suite, which said so.
    """
    from sensebatch.cli.messages import say
    from sensebatch.cli.signals import FINISHING, LEAVING

    if not line.startswith("warning") and line not in (FINISHING, LEAVING):
        say(f"  {line}")


def _finish(folder: Path, rows: Sequence[Row], missing: Sequence[str] = ()) -> NoReturn:
    """Writes and prints the results, says which cases are missing, and ends the command.

    Raises:
        typer.Exit: Always, with the exit code.
    """
    from sensebatch.cli.messages import say, show
    from sensebatch.profile.markdown import format_markdown
    from sensebatch.profile.plot import plot
    from sensebatch.profile.rows import DONE, PARQUET_NAME
    from sensebatch.store.files import write_atomic

    if not rows:
        say("stopped before any case was measured; the same command starts again")
        raise typer.Exit(exits.RESUMABLE)
    text = format_markdown(rows, missing)
    write_atomic(folder / MARKDOWN_NAME, text.encode())
    show(text.rstrip("\n"))
    say(f"results {folder / PARQUET_NAME}, {folder / MARKDOWN_NAME}")
    say(plot(folder, rows))
    if missing:
        only = " ".join(f"--only {name}" for name in missing)
        say(f"stopped; to measure what is missing, add {only} to the same command")
        raise typer.Exit(exits.RESUMABLE)
    failed = any(row.status != DONE for row in rows)
    raise typer.Exit(exits.FAILED if failed else exits.DONE)
