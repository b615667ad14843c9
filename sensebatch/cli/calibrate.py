"""`sensebatch calibrate`: the steps that suit a checkpoint and prompts, measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import sensebatch
from sensebatch.cli import exits
from sensebatch.cli.options import (
    BatchOptions,
    Manifests,
    ModelOptions,
    ReadingOptions,
    ScreenOptions,
    flags_of,
)
from sensebatch.cli.paths import path
from sensebatch.cli.voice import Level, Voice
from sensebatch.errors import ConfigError
from sensebatch.units import counted

if TYPE_CHECKING:
    from sensebatch.calibrate.run import Scale, Verdict
    from sensebatch.config import RunConfig
    from sensebatch.loading import Backend
    from sensebatch.session import Request

_HEAD = ("steps", "evaluations", "dB to\nconverged", "SSIM", "s/image")
_FEWEST_JOBS = 2
_MARK = (0.5,)
"""Timesteps that a job keeps if nothing sets those of a configuration file aside."""
STOPPED = "stopped after the first run; the same command resumes the calibration"


@dataclass(frozen=True, slots=True, kw_only=True)
class AmountOptions:
    """How much is drawn, and what is looked for."""

    steps: Annotated[
        list[int] | None,
        typer.Option(
            help="Find the best timesteps for this many steps; may be repeated. [default: 25, 16]",
            metavar="N",
        ),
    ] = None
    jobs: Annotated[
        int, typer.Option(help="Jobs of each task; half of them judge.", metavar="N")
    ] = 8
    converged_steps: Annotated[
        int, typer.Option(help="Steps of the converged images.", metavar="N")
    ] = 128

    def scale(self) -> Scale:
        """Returns what was given.

        Raises:
            ConfigError: Nothing can be found with it.
        """
        from sensebatch.calibrate.run import Scale

        if self.jobs < _FEWEST_JOBS:
            raise ConfigError(f"--jobs: expected {_FEWEST_JOBS} or more, found {self.jobs}")
        num_steps, most = tuple(self.steps or (25, 16)), self.converged_steps // 2
        for steps in num_steps:
            if not 1 < steps <= most:
                raise ConfigError(
                    f"--steps: expected 2 to {most}, half of --converged-steps, found {steps}"
                )
        return Scale(max_jobs=self.jobs, num_steps=num_steps, converged_steps=self.converged_steps)


def calibrate(
    manifests: Manifests,
    model: ModelOptions,
    batch: BatchOptions,
    reading: ReadingOptions,
    screen: ScreenOptions,
    amount: AmountOptions,
    output_dir: Annotated[
        Path, typer.Option(parser=path, help="Where runs and results go.")
    ] = Path("outputs/calibration"),
) -> None:
    """Find the steps that come nearest to converged images, for your checkpoint and prompts.

    Draws jobs of the manifests converged, finds the timesteps that matter by dynamic programming
    over what each step changes, and judges them on jobs that the search did not see. Writes
    N-steps.yaml for --config, sheet.png to look at, and calibration.json. Only t2i and edit jobs
    count. The same command resumes it; another manifest or model needs another --output-dir.
    """
    from sensebatch.calibrate.files import claim_folder, write_files
    from sensebatch.calibrate.run import Calibration
    from sensebatch.manifest.read import read_manifests
    from sensebatch.settings import resolve_settings

    config = resolve_settings(config_file=model.config, flags=flags_of(model, batch, reading))
    scale = amount.scale()
    voice = screen.voice()
    with closing(voice):
        rows = list(read_manifests(manifests, config, warn=voice.warn_of))
        own = _num_with_own_steps(manifests, config)
        if own:
            voice.warn(
                f"{own:,} of {counted(len(rows), 'job')} give num_steps or the like themselves, "
                "which wins over --config: leave it out of the manifest to draw with what is found"
            )
        runs = _Runs(voice)
        calibration = Calibration(output_dir, config, scale, run_jobs=runs)
        by_task, name = calibration.evaluations(rows), config.model.model
        claim_folder(output_dir, manifests, name)
        for task, evaluations in by_task.items():
            voice.info(f"{task}: {evaluations:,} evaluations of the network in all")
        verdicts = calibration.calibrate(rows)
        if verdicts is None:
            raise typer.Exit(runs.exit_code)
        made_by = f"sensebatch {sensebatch.__version__}, {datetime.now(UTC).date().isoformat()}"
        files = write_files(
            output_dir,
            verdicts,
            scale.num_steps,
            manifests=manifests,
            model=name,
            made_by=made_by,
        )
        _show(verdicts)
        for file in files:
            voice.tell(Level.BRIEF, f"wrote {file}")


def _num_with_own_steps(manifests: Sequence[Path], config: RunConfig) -> int:
    """Returns how many jobs would set the timesteps of a configuration file aside."""
    from sensebatch.manifest.read import read_manifests

    marked = {
        task: replace(defaults, sampling=replace(defaults.sampling, timesteps=_MARK))
        for task, defaults in config.tasks.items()
    }
    jobs = read_manifests(manifests, replace(config, tasks=marked))
    drawn = (job for job in jobs if job.drawing is not None)
    return sum(job.sampling.timesteps != _MARK for job in drawn)


class _Runs:
    """Runs of a calibration, with their progress on the screen."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._stopped = False
        """Whether a signal came during the last run, although all of its jobs are done."""
        self.exit_code = exits.DONE
        """The exit code of the last run."""

    def __call__(self, request: Request, backend: Backend) -> bool:
        """Runs what is missing in a folder; returns whether all of it is done."""
        from sensebatch.cli.outcome import exit_code, outcome_lines, reporting_stops
        from sensebatch.cli.session import run_session
        from sensebatch.cli.signals import StopSignals

        if self._stopped:
            self._voice.tell(Level.ALERT, STOPPED)
            self.exit_code = exits.RESUMABLE
            return False
        stop = StopSignals()
        with reporting_stops(request.root, self._voice, as_json=False):
            summary = run_session(request, self._voice, backend, stop)
        self._stopped = stop.is_set()
        self.exit_code = exit_code(summary)
        if self.exit_code == exits.DONE:
            return True
        for line in outcome_lines(request.root, summary):
            self._voice.tell(Level.ALERT, line)
        return False


def _show(verdicts: Sequence[Verdict]) -> None:
    from sensebatch.calibrate.files import table_rows
    from sensebatch.cli.tables import FittingTable, print_parts

    parts: list[object] = []
    for verdict in verdicts:
        table = FittingTable(*_HEAD, words=_HEAD[:1])
        for row in table_rows(verdict):
            table.add_row(*row)
        judged = counted(verdict.num_judged, "image")
        parts += [f"{verdict.task}, {judged} that the search did not see", table]
    print_parts(*parts)
