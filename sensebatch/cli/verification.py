"""`sensebatch doctor --verify`: shows which promises hold on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import typer

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.cli import exits
from sensebatch.cli.doctor import VerifyOptions
from sensebatch.cli.launch import launch
from sensebatch.cli.messages import say, show
from sensebatch.cli.signals import StopSignals
from sensebatch.errors import ConfigError
from sensebatch.resolutions import ResolutionError
from sensebatch.store.files import unused, write_atomic
from sensebatch.verify.check import Machine, Verdict, verify
from sensebatch.verify.jobs import Scale, check_side
from sensebatch.verify.promises import Trial, chosen_trials
from sensebatch.verify.table import format_verdicts

CHILD = "sensebatch.verify.child"
FOLDER = Path("outputs/verify")
TABLE_NAME = "promises.md"
_FULL = Scale(model="synthetic:8b", side=2048)
_SMALL = Scale(model="tiny", side=128, text_tokens=24)


def check_options(options: VerifyOptions) -> None:
    """Makes sure that what was asked for can be run, before anything is measured or loaded.

    Raises:
        ConfigError: A run or a size that there is not, or a folder that is there already.
        CheckpointError: The model cannot be read.
    """
    chosen_trials(options.only or ())
    if options.side is not None:
        try:
            check_side(options.side)
        except ResolutionError as error:
            raise ConfigError(f"--side: {error}") from None
    if options.model is not None:
        open_checkpoint(options.model)
    if options.output_dir is not None and options.output_dir.exists():
        raise ConfigError(f"--output-dir: expected a new folder, {options.output_dir} exists")


def run_verification(options: VerifyOptions, machine: Machine, *, as_json: bool) -> NoReturn:
    """Checks the promises, prints what came out and ends the command.

    Args:
        options: What was asked for.
        machine: What can be run.
        as_json: Whether to print JSON in place of the table.

    Raises:
        typer.Exit: Always, with the exit code.
    """
    trials = chosen_trials(options.only or ())
    default = _FULL if machine.has_gpu else _SMALL
    scale = replace(
        default, model=options.model or default.model, side=options.side or default.side
    )
    folder = options.output_dir or unused(FOLDER)
    with StopSignals("stopped at once").installed() as stop:
        child = partial(launch, CHILD, stop=stop, echo=lambda _: None)
        verdicts = [
            _reported(verdict)
            for verdict in verify(
                trials,
                scale,
                machine,
                folder,
                launch=child,
                say=say,
                stopped=stop.is_set,
            )
        ]
    table = format_verdicts(verdicts, trials)
    write_atomic(folder / TABLE_NAME, table.encode())
    show(json.dumps(_as_json(verdicts)) if as_json else table.rstrip("\n"))
    say(f"results {folder / TABLE_NAME}")
    raise typer.Exit(_exit_code(verdicts, trials))


def _reported(verdict: Verdict) -> Verdict:
    words = {True: "equal", False: "NOT EQUAL", None: "a reference for others"}[verdict.holds]
    say(f"{verdict.trial.name}: {verdict.error or verdict.skipped or words}")
    return verdict


def _as_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [
        {
            "run": verdict.trial.name,
            "compared_with": verdict.trial.like,
            "holds": verdict.holds,
            "skipped": verdict.skipped,
            "error": verdict.error,
            "groups": {name: asdict(outcome) for name, outcome in verdict.outcomes.items()},
        }
        for verdict in verdicts
    ]


def _exit_code(verdicts: Sequence[Verdict], trials: Sequence[Trial]) -> int:
    if any(verdict.holds is False for verdict in verdicts):
        return exits.FAILED
    return exits.DONE if len(verdicts) == len(trials) else exits.RESUMABLE
