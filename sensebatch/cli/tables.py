"""Tables for people, on stdout: throughput by group, checkpoints."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from sensebatch.cli.messages import counted, show
from sensebatch.units import GIB

if TYPE_CHECKING:
    from sensebatch.checkpoint.summary import Summary as ModelSummary
    from sensebatch.report.summary import Summary, Throughput

MAX_NAMES = 5


def new_table(*columns: str, words: int = 1) -> Table:
    """Returns an empty table; all columns but the first `words` are figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", no_wrap=True)
    return table


def print_parts(*parts: object) -> None:
    """Prints tables and lines."""
    terminal = Console(highlight=False)
    # A table that is piped into a file keeps its width, whatever the terminal's.
    printed = io.StringIO()
    console = Console(
        file=printed,
        force_terminal=terminal.is_terminal,
        width=terminal.width if terminal.is_terminal else 120,
        highlight=False,
    )
    for part in parts:
        console.print(part)
    show(printed.getvalue().removesuffix("\n"))


def print_groups(summary: Summary) -> None:
    """Prints the throughput of each group of a report."""
    table = new_table(
        "group", "jobs", "images", "calls", "wall s", "s/image", "image tok/s", "text tokens"
    )
    for name, group in summary.by_group.items():
        table.add_row(name, *_throughput_cells(group))
    if summary.by_group:
        print_parts(table)


def _throughput_cells(group: Throughput) -> Iterable[str]:
    yield from (f"{count:,}" for count in (group.jobs, group.images, group.calls))
    yield f"{group.wall_s:,.1f}"
    for value in (group.seconds_per_image, group.image_tok_per_s):
        yield "-" if value is None else f"{value:,.2f}"
    yield f"{group.text_tokens:,}"


def print_model(summary: ModelSummary) -> None:
    """Prints a checkpoint's sizes, configuration and, if any, wrong tensors."""
    sizes = new_table("group", "tensors", "parameters", "GiB")
    for group, size in summary.groups.items():
        sizes.add_row(
            group.value,
            f"{size.num_tensors:,}",
            f"{size.num_parameters:,}",
            f"{size.nbytes / GIB:.3f}",
        )
    sizes.add_section()
    sizes.add_row("all", "", f"{summary.num_parameters:,}", f"{summary.nbytes / GIB:.3f}")
    settings = new_table("configuration", "value", words=2)
    for field in fields(summary.architecture):
        value = getattr(summary.architecture, field.name)
        if value is not None:
            settings.add_row(field.name, str(value))
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in summary.dtypes.items())
    print_parts(
        f"{summary.name}: {counted(summary.num_files, 'file')}, {dtypes}",
        summary.path,
        settings,
        sizes,
    )
    differences = summary.differences
    for kind, names in (
        ("missing", differences.missing),
        ("not expected", differences.extra),
        ("of another shape or dtype", differences.wrong),
    ):
        if names:
            more = f" ... and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            print_parts(f"{len(names)} tensors {kind}: {', '.join(names[:MAX_NAMES])}{more}")
