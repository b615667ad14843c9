"""`sensebatch jobs`: lists the jobs of a run, chosen and written as one likes."""

from __future__ import annotations

from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.options import MAX_LIMIT, SelectionOptions
from sensebatch.cli.paths import path

if TYPE_CHECKING:
    from sensebatch.dataset.records import Dataset
    from sensebatch.dataset.selection import Selection

MAX_ROWS = 100
"""Most rows of a table, unless a number is given."""


class Format(StrEnum):
    """How jobs are written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


Columns = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Columns to print, such as id,seed,text. [default: the main ones in a table, "
        "else all but text]",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_LIMIT,
        help=f"Print at most this many jobs. [default: {MAX_ROWS} in a table, else all]",
    ),
]


def jobs(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    selection: SelectionOptions,
    columns: Columns = None,
    form: Annotated[
        Format | None,
        typer.Option("--format", help="[default: that of --output's name, else table]"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list; the same as --format json.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(parser=path, help="Write to this file: .json, .csv or .parquet."),
    ] = None,
    limit: Limit = None,
    removed: Annotated[
        bool,
        typer.Option("--removed", help="Also jobs that are no longer in the manifest."),
    ] = False,
) -> None:
    """List the jobs of a run, all of them or those that you choose.

    It works during the run. Columns are those of the log and of docs/dataset.md.
    """
    from sensebatch.cli.job_list import check_columns, print_table, write_list
    from sensebatch.cli.messages import say
    from sensebatch.dataset.records import open_dataset
    from sensebatch.units import counted

    wanted = selection.selection(removed=removed)
    chosen = _format(form, as_json, output)
    names = None if columns is None else [name.strip() for name in columns.split(",")]
    with open_dataset(folder) as dataset:
        check_columns(dataset, names)
        warn_of_picks(dataset, wanted)
        records = dataset.records(wanted)
        if chosen is Format.TABLE:
            print_table(records, names, MAX_ROWS if limit is None else limit)
            return
        count = write_list(chosen.value, islice(records, limit), dataset, names, output)
        if output is not None:
            say(f"{output}: {counted(count, 'job')}")


def _format(form: Format | None, as_json: bool, output: Path | None) -> Format:
    """Returns how jobs are written.

    Raises:
        ConfigError: Nobody said, or two say different things.
    """
    from sensebatch.errors import ConfigError

    named = None
    if output is not None:
        ending = output.suffix.removeprefix(".").lower()
        named = Format(ending) if ending in [*Format][1:] else None
    said = Format.JSON if as_json else form
    if as_json and form not in (None, Format.JSON):
        raise ConfigError(f"--json: expected no --format {form} beside it")
    if output is not None and said is None and named is None:
        raise ConfigError(
            f"--output {output}: expected a name that ends in .json, .csv or .parquet, or --format "
            "json, csv or parquet"
        )
    chosen = said or named or Format.TABLE
    if output is not None and chosen is Format.TABLE:
        raise ConfigError("--output: expected --format json, csv or parquet, found table")
    if output is None and chosen is Format.PARQUET:
        raise ConfigError("--format parquet: expected --output FILE, found none")
    return chosen


def warn_of_picks(dataset: Dataset, selection: Selection) -> None:
    """Warns of picks that a folder has no use for."""
    from sensebatch.cli.messages import warn

    if selection.picks is None:
        return
    unknown, replaced = dataset.stale_picks(selection.picks)
    for ids, why in (
        (unknown, "of jobs that the folder does not have"),
        (replaced, "of images that were replaced since"),
    ):
        if ids:
            more = "" if len(ids) == 1 else f" and {len(ids) - 1:,} more"
            warn(f"{selection.picks.path}: picks {why} do not count: {ids[0]}{more}")
