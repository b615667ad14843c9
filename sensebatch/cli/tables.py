"""Prints tables for people on stdout: throughput by group and by call, and checkpoints.

They fit 80 columns: titles of figures have two lines, and words wrap on narrower terminals. Nothing
is cut.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from operator import itemgetter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sensebatch.bounded import shown
from sensebatch.cli.messages import FILE_WIDTH, fitted, show
from sensebatch.units import GIB, counted

if TYPE_CHECKING:
    from sensebatch.checkpoint.summary import Summary as ModelSummary
    from sensebatch.report.summary import Call, Summary, Throughput
    from sensebatch.report.timeline import Batch

MAX_NAMES = 5
MEASURE_WIDTH = 1000
ASCII_HEAD = box.Box(str(box.SIMPLE_HEAD).replace("─", "-"), ascii=True)
"""Tables where standard output has no other characters."""


class FittingTable(Table):
    """A table that drops optional columns, one by one, if the terminal is too narrow.

    Args:
        columns: The titles; a line break keeps a column of figures narrow.
        words: The titles of columns of words, which are left-aligned and may wrap.
        wrapping: The titles of columns of figures that may wrap as well.
        optional: The titles of columns that may be dropped, in the order of dropping.
    """

    def __init__(
        self,
        *columns: str,
        words: Collection[str] = (),
        wrapping: Collection[str] = (),
        optional: Sequence[str] = (),
    ) -> None:
        super().__init__(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        self.collapse_padding = True
        num_lines = max(column.count("\n") for column in columns)
        self._optional = []
        for title in columns:
            wraps = title in words or title in wrapping
            self.add_column(
                # Titles are aligned at the bottom, cells at the top.
                "\n" * (num_lines - title.count("\n")) + title,
                justify="left" if title in words else "right",
                no_wrap=not wraps,
                overflow="fold",
            )
            if title in optional:
                self._optional.append((optional.index(title), self.columns[-1]))

    def fit(self, console: Console) -> None:
        """Removes padding, then optional columns, until the table fits the console."""
        if self._measured(console).maximum > console.width:
            self.padding = (0, 0)
        for _, column in sorted(self._optional, key=itemgetter(0)):
            if self._measured(console).minimum <= console.width:
                return
            self.columns.remove(column)

    def _measured(self, console: Console) -> Measurement:
        # Measured against a very wide console: a table claims to fit a narrow one.
        return Measurement.get(console, console.options.update(max_width=MEASURE_WIDTH), self)


def print_parts(*parts: object, file_width: int = FILE_WIDTH) -> None:
    """Prints tables and lines, with an empty line before and after a table.

    Args:
        parts: Tables and lines.
        file_width: The columns of tables where standard output is no terminal.
    """
    terminal = Console(highlight=False)
    printed = io.StringIO()
    console = Console(
        file=printed,
        force_terminal=terminal.is_terminal,
        # Rich takes COLUMNS=0 at its word.
        width=(terminal.width or FILE_WIDTH) if terminal.is_terminal else file_width,
        highlight=False,
        # Names of jobs and tensors may look like either.
        markup=False,
        emoji=False,
    )
    text_width = console.width if terminal.is_terminal else FILE_WIDTH
    before: object = None
    for part in parts:
        if isinstance(before, Table) or (isinstance(part, Table) and before is not None):
            console.print()
        if isinstance(part, FittingTable):
            if not _has_lines():
                part.box = ASCII_HEAD
            part.fit(console)
        if isinstance(part, str):
            # Paths and ids, which people copy, are not broken into lines.
            part = "\n".join(fitted(part, text_width))
        console.print(part, soft_wrap=isinstance(part, str))
        before = part
    lines = printed.getvalue().removesuffix("\n").split("\n")
    show("\n".join(lines if terminal.is_terminal else map(str.rstrip, lines)))


def _has_lines() -> bool:
    """Returns whether standard output can show the lines of tables."""
    try:
        str(box.SIMPLE_HEAD).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def print_report(summary: Summary, *, max_calls: int | None) -> None:
    """Prints the published summary: totals, then calls and groups as tables.

    Args:
        summary: The summary of a log.
        max_calls: The most rows for calls; None prints all.
    """
    from sensebatch.report.summary import format_totals

    if not summary.calls:
        show(format_totals(summary))
        return
    shown = summary.calls[:max_calls]
    more = len(summary.calls) - len(shown)
    lines = [f"... and {counted(more, 'more call')}; --calls prints all"] if more else []
    print_parts(format_totals(summary), _calls(shown), *lines, _groups(summary))


def _groups(summary: Summary) -> FittingTable:
    """Returns the throughput of each group."""
    titles = ("jobs", "images", "calls", "wall s", "s/image", "image\ntok/s", "text\ntokens")
    table = FittingTable("group", *titles, words=["group"], optional=["calls"])
    for name, group in summary.by_group.items():
        table.add_row(name, *_throughput_cells(group))
    return table


def _throughput_cells(group: Throughput) -> Iterable[str]:
    yield from (f"{count:,}" for count in (group.jobs, group.images, group.calls))
    yield f"{group.wall_s:,.1f}"
    for value in (group.seconds_per_image, group.image_tok_per_s):
        yield "-" if value is None else f"{value:,.2f}"
    yield f"{group.text_tokens:,}"


def _calls(calls: Sequence[Call]) -> FittingTable:
    """Returns one row per call; memory of the device is included only if there was one."""
    on_device = any(call.peak.reserved_bytes for call in calls)
    peaks = ["peak\nGiB", "res.\nGiB", "rss\nGiB"] if on_device else ["rss\nGiB"]
    titles = ("jobs", "images", "wall s", "s/step", "tok/s", *peaks)
    table = FittingTable("call", "group", *titles, words=["group"], optional=["res.\nGiB", "jobs"])
    for number, call in enumerate(calls, start=1):
        peak = (call.peak.allocated_bytes, call.peak.reserved_bytes, call.peak.rss_bytes)
        measured = call.wall_s and call.images and not call.kept_images
        table.add_row(
            str(number),
            call.group,
            f"{call.jobs:,}",
            f"{call.images:,}" + (f"\n({call.kept_images} kept)" if call.kept_images else ""),
            f"{call.wall_s:.3f}",
            "" if call.step_s is None else f"{call.step_s:.3f}",
            f"{call.image_tokens / call.wall_s:,.2f}" if measured else "-",
            *(f"{nbytes / GIB:.2f}" for nbytes in (peak if on_device else peak[2:])),
        )
    return table


def print_timeline(batches: Sequence[Batch]) -> None:
    """Prints each batch, and the share of the time that devices waited for them."""
    from sensebatch.report.timeline import timeline_table, waiting_lines

    titles, rows = timeline_table(batches)
    table = FittingTable(*titles, words=["what"], optional=["think\ns", "other\ns"])
    for row in rows:
        table.add_row(*row)
    lines = waiting_lines(batches)
    print_parts(table, *lines)


def print_model(summary: ModelSummary) -> None:
    """Prints a checkpoint's sizes, configuration and, if there are any, wrong tensors."""
    sizes = FittingTable("group", "tensors", "parameters", "GiB", words=["group"])
    for group, size in summary.groups.items():
        sizes.add_row(
            group.value,
            f"{size.num_tensors:,}",
            f"{size.num_parameters:,}",
            f"{size.nbytes / GIB:.3f}",
        )
    sizes.add_section()
    sizes.add_row("all", "", f"{summary.num_parameters:,}", f"{summary.nbytes / GIB:.3f}")
    settings = FittingTable("configuration", "value", words=["configuration", "value"])
    for field in fields(summary.architecture):
        value = getattr(summary.architecture, field.name)
        if value is not None:
            settings.add_row(field.name, str(value))
    dtypes = ", ".join(f"{count} {shown(dtype)}" for dtype, count in summary.dtypes.items())
    print_parts(
        f"{summary.name}: {counted(summary.num_files, 'file')}, {dtypes}",
        summary.path,
        settings,
        sizes,
    )
    if summary.tokenizer_problem is not None:
        print_parts(summary.tokenizer_problem)
    differences = summary.differences
    for kind, names in (
        ("missing", differences.missing),
        ("not expected", differences.extra),
        ("of another shape or dtype", differences.wrong),
    ):
        if names:
            more = f" ... and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            tensors = counted(len(names), "tensor")
            print_parts(f"{tensors} {kind}: {', '.join(map(shown, names[:MAX_NAMES]))}{more}")
