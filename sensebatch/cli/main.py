"""The entry point: lists the commands, and maps errors to messages and exit codes.

Commands import what they need when they run, so that `--help` stays fast and only those that
compute load torch.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated, Any, TextIO, cast

import typer
from pydantic import ValidationError

import sensebatch
from sensebatch.bounded import shown
from sensebatch.cli import (
    calibrate,
    demo,
    doctor,
    exits,
    export,
    gallery,
    hash_images,
    jobs,
    manifest,
    merge,
    model,
    plan,
    profile,
    prune,
    repair,
    report,
    run,
    show_images,
    status,
)
from sensebatch.cli.help import HelpCommand, new_app
from sensebatch.cli.job_options import command_of
from sensebatch.cli.messages import (
    ClosedOutput,
    Output,
    OutputError,
    drop_output,
    say,
    show,
    show_anyway,
)
from sensebatch.cli.options import UNUSED_BY_PLAN, with_options
from sensebatch.cli.suggestions import advice
from sensebatch.errors import ManifestError, RunStoppedError, SensebatchError, StoppedError, found
from sensebatch.settings import expected
from sensebatch.tasks import Task
from sensebatch.units import counted

_NAME = "sensebatch"
_USAGE_ERRORS: tuple[type[Exception], ...] = tuple(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""The library's errors about a command line; typer has no public name for their base class."""
_MAX_SIZE_DIGITS = 6
"""Longest number of columns or lines; whoever wants no line to be broken says 100000."""
_SETTINGS = {
    # cfg_scale and cfg-scale are the same option; values stay as they are.
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"sensebatch {sensebatch.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Generate image datasets with SenseNova-U1, resumably, on one GPU or many."""


def _make_app() -> typer.Typer:
    app = new_app(name=_NAME, pretty_exceptions_enable=False, context_settings=_SETTINGS)
    app.callback()(_root)
    for command in (
        demo.demo,
        run.run,
        plan.plan,
        status.status,
        jobs.jobs,
        show_images.show,
        export.export,
        report.report,
        prune.prune,
        gallery.gallery,
        repair.repair,
        merge.merge,
        profile.profile,
        calibrate.calibrate,
        doctor.doctor,
    ):
        hidden = UNUSED_BY_PLAN if command is plan.plan else ()
        app.command(cls=HelpCommand)(with_options(command, hidden=hidden))
    # A function of that name would hide Python's own.
    app.command("hash", cls=HelpCommand)(with_options(hash_images.hash_images))
    app.add_typer(manifest.app, name="manifest")
    app.add_typer(model.app, name="model")
    for task in Task:
        # Nothing is drawn that inputs could be compared with.
        unused = () if task.spec.drawing is not None else ("compare",)
        command = with_options(command_of(task), hidden=unused)
        app.command(task.value, cls=HelpCommand, rich_help_panel="One job")(command)
    return app


app = _make_app()


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments; None takes the process's.

    Raises:
        SystemExit: Always, with the exit code.
    """
    _forget_odd_sizes()
    if sys.stdout is None:
        sys.stdout = ClosedOutput()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every terminal can show every character.
        sys.stdout.reconfigure(errors="backslashreplace")
    with redirect_stdout(cast("TextIO", Output(sys.stdout))):
        code = _run(sys.argv[1:] if args is None else list(args))
    raise SystemExit(code)


def _forget_odd_sizes() -> None:
    """Removes sizes of the terminal that are not numbers, on which rich would fail."""
    for name in ("COLUMNS", "LINES"):
        size = os.environ.get(name, "")
        # int() refuses digits such as a superscript two, and very long numbers.
        if not (size.isascii() and size.isdigit() and len(size) <= _MAX_SIZE_DIGITS):
            os.environ.pop(name, None)


def _run(args: list[str]) -> int:
    """Runs a command line, reports what is wrong with it, and returns the exit code."""
    as_json = "--json" in args
    try:
        code = app(args=args, prog_name=_NAME, standalone_mode=False)
    except SensebatchError as error:
        say(_message(error))
        if as_json and not isinstance(error, RunStoppedError):
            _show_error(_message(error), **_details(error))
        return exit_code(error)
    except _USAGE_ERRORS as error:
        say(_usage_message(error))
        if as_json:
            _show_error(_usage_message(error))
        return exits.USAGE
    except OutputError as error:
        drop_output()
        if not str(error):
            # The reader has seen enough, as in `sensebatch report DIR | head`.
            return exits.DONE
        say(f"{_NAME}: {error}")
        return exits.UNWRITTEN
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    return code if isinstance(code, int) else exits.DONE


def _show_error(text: str, **details: Any) -> None:
    """Prints the object of `--json` when nothing was started."""
    show_anyway(json.dumps({"exit_code": exits.USAGE, "error": text, **details}))


def exit_code(error: SensebatchError) -> int:
    """Returns the exit code for an error that ended a command.

    A full disk or a failed device leaves a run that can be resumed; anything else has to be fixed
    before anything can be done.
    """
    return exits.RESUMABLE if isinstance(error, RunStoppedError) else exits.USAGE


def _message(error: SensebatchError) -> str:
    if isinstance(error, StoppedError):
        return "stopped before anything ran; the same command starts the run"
    if isinstance(error, ManifestError):
        mistakes = counted(error.num_problems, "mistake")
        return f"{error}\n{_NAME}: {mistakes} in the manifest; nothing was started"
    return f"{_NAME}: {error}"


def _details(error: SensebatchError) -> dict[str, Any]:
    """Returns what `--json` reports about an error besides its text."""
    if not isinstance(error, ManifestError):
        return {}
    problems = [asdict(problem) for problem in error.problems]
    return {"num_problems": error.num_problems, "problems": problems}


def _value_message(error: Any) -> str | None:
    """Returns what is wrong with a value, in the words of settings; None for anything else."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return None
    record = cause.errors()[0]
    words = expected(record) or _choices(error.param)
    # A number is text here, which has quotes only where it is none.
    is_number = record["type"].startswith(("greater", "less"))
    value = record["input"] if is_number else found(record["input"])
    if words is None:
        return None
    return f"{error.param.opts[0]}: expected {words}, found {value}"


def _choices(parameter: Any) -> str | None:
    """Returns the words that an option takes, as files and the log have them; None for others."""
    # Older releases of the library keep them elsewhere, and its own words are good enough.
    choices = getattr(getattr(parameter, "type_descriptor", None), "choices", None)
    if not choices:
        return None
    *others, last = (str(getattr(choice, "value", choice)) for choice in choices)
    return f"{', '.join(others)} or {last}" if others else last


def _option_message(error: Any) -> str | None:
    """Returns what to do about an option that a command does not have; None for anything else."""
    if type(error).__name__ != "NoSuchOption":
        return None
    from sensebatch.manifest.fields import JOB_FIELD_NAMES

    parameters = error.ctx.command.get_params(error.ctx)
    known = {name for p in parameters if p.param_type_name == "option" for name in p.opts}
    reads_manifest = any(p.name in ("manifests", "source") for p in parameters)
    said = advice(error.option_name, known, JOB_FIELD_NAMES if reads_manifest else ())
    words = f"expected an option of {error.ctx.command_path}, found {shown(error.option_name)}"
    return f"{words}; {said}" if said else words


def _usage_message(error: Any) -> str:
    """Returns what is wrong with a command line."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.ctx.get_help())
    context = getattr(error, "ctx", None)
    message = _option_message(error) or _value_message(error) or error.format_message()
    # Pydantic puts words before what the parser of a flag says, and so does the library.
    message = re.sub(
        r"^Invalid value for '([^']+)': (Value error, )?expected ", r"\1: expected ", message
    )
    text = f"{_NAME}: {message}"
    return text if context is None else f"{text}\nsee {context.command_path} --help"
