"""The entry point: which commands there are, and what an error means for the exit code.

Commands import what they need when they run, so that `--help` stays quick and torch is loaded
only by those that compute.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core

import sensebatch
from sensebatch.cli import (
    demo,
    doctor,
    edit,
    exits,
    interleave,
    manifest,
    model,
    plan,
    profile,
    report,
    run,
    status,
    t2i,
)
from sensebatch.cli.messages import counted, say
from sensebatch.cli.options import with_options
from sensebatch.errors import ManifestError, RunStoppedError, SensebatchError, StoppedError

_SETTINGS = {
    # cfg_scale and cfg-scale are the same option; values are left alone.
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}


class _Group(typer.core.TyperGroup):
    """Says what is wrong with an option's value without the words of the library that found it."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was named."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sensebatch {sensebatch.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Image datasets with SenseNova-U1: batches of jobs on one GPU, resumable."""


def _make_app() -> typer.Typer:
    app = typer.Typer(
        name="sensebatch",
        cls=_Group,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings=_SETTINGS,
    )
    app.callback()(_root)
    for command in (
        demo.demo,
        run.run,
        plan.plan,
        status.status,
        report.report,
        profile.profile,
        doctor.doctor,
    ):
        app.command()(with_options(command))
    app.add_typer(manifest.app, name="manifest")
    app.add_typer(model.app, name="model")
    for one_job in (t2i.t2i, edit.edit, interleave.interleave):
        app.command(rich_help_panel="One job")(with_options(one_job))
    return app


app = _make_app()


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments; None takes the process's.

    Raises:
        SystemExit: Always, with the exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every terminal can show every character of a prompt or a box.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(args=None if args is None else list(args), prog_name="sensebatch")
    except SensebatchError as error:
        say(_message(error))
        raise SystemExit(exit_code(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(exits.INTERRUPTED) from None


def exit_code(error: SensebatchError) -> int:
    """Returns the exit code of an error that ended a command.

    A full disk or a failed device leaves a run that can go on; everything else is for the user
    to put right before anything can be done.
    """
    return exits.RESUMABLE if isinstance(error, RunStoppedError) else exits.USAGE


def _message(error: SensebatchError) -> str:
    if isinstance(error, StoppedError):
        return "stopped before anything was run; the same command starts it"
    if isinstance(error, ManifestError):
        mistakes = counted(error.num_problems, "mistake")
        return f"{error}\nsensebatch: {mistakes} in the manifest; nothing was started"
    return f"sensebatch: {error}"
