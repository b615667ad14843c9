"""`sensebatch report`: prints the published summary of a run from its log."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.paths import path

if TYPE_CHECKING:
    import pyarrow as pa

    from sensebatch.store.status import Acceptance

MAX_CALLS = 20


def report(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: seconds, bytes, tokens.")
    ] = False,
    calls: Annotated[
        bool, typer.Option("--calls", help=f"Print every call, not just the first {MAX_CALLS}.")
    ] = False,
    show_timeline: Annotated[
        bool,
        typer.Option(
            "--timeline",
            help="Print when each batch began, how long the device waited for it, and its phases.",
        ),
    ] = False,
) -> None:
    """Print what a run cost: load time, seconds per image, throughput, peak memory, calls."""
    from sensebatch.cli.messages import say, show, warn
    from sensebatch.cli.tables import print_report
    from sensebatch.report.summary import read_log, summarise, summary_json
    from sensebatch.store.run_dir import RunDir
    from sensebatch.store.status import folder_shard, num_unlogged, read_acceptance
    from sensebatch.units import counted

    run_dir = RunDir(folder)
    if not run_dir.log.exists():
        run_dir.require_state()
    log, shard = read_log(run_dir.log), folder_shard(folder)
    if missing := num_unlogged(folder, log.num_rows):
        warn(
            f"log.parquet lacks the latest {counted(missing, 'row')}, which are written when the "
            "run ends or is resumed"
        )
    if shard is not None and not as_json:
        say(f"{folder}: {shard.words}")
    if show_timeline:
        _print_batches(log, as_json=as_json)
        return
    summary, acceptance = summarise(log), read_acceptance(folder)
    if as_json:
        part = None if shard is None else str(shard)
        accepted = [asdict(one) for one in acceptance.series]
        show(json.dumps({"shard": part, **summary_json(summary), "acceptance": accepted}))
        return
    print_report(summary, max_calls=None if calls else MAX_CALLS)
    _print_acceptance(acceptance)


def _print_batches(log: pa.Table, *, as_json: bool) -> None:
    """Prints when each batch began, how long the device waited for it, and its phases."""
    from sensebatch.cli.messages import show
    from sensebatch.cli.tables import print_timeline
    from sensebatch.report.timeline import timeline

    batches = timeline(log)
    if as_json:
        show(json.dumps([asdict(batch) for batch in batches]))
    else:
        print_timeline(batches)


def _print_acceptance(found: Acceptance) -> None:
    """Prints what share of the images of each prompt passed; nothing where none was judged."""
    from sensebatch.cli.messages import fitted, output_width, show
    from sensebatch.report.acceptance import acceptance_table

    lines = acceptance_table(found, output_width())
    if text := "\n".join(line for one in lines for line in fitted(one)):
        show(f"\n{text}")
