"""A plan for people: what is run, and what it needs of memory and time, group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sensebatch.cli.tables import FittingTable, print_parts
from sensebatch.units import GIB, counted, duration

Summary = Mapping[str, Any]
MAX_GROUPS = 100
"""Most groups that each table lists."""


def print_plan(summary: Summary, *forecast: str) -> None:
    """Prints what `sensebatch plan --json` prints, and lines about the time that it takes."""
    titles: tuple[str, ...] = ("steps x\nbranches", "jobs", "images", "batches", "up to\njobs")
    levels = any(group["level"] for group in summary["groups"])
    titles = ("level", *titles) if levels else titles
    table = FittingTable("#", "task", "size", *titles, words=["task", "size"])
    for number, group in enumerate(summary["groups"][:MAX_GROUPS], start=1):
        table.add_row(
            str(number),
            f"{group['task']} (think)" if group["think"] else group["task"],
            _size(group),
            *([str(group["level"])] if levels else []),
            f"{group['num_steps']} x {len(group['branches'])}" if group["num_steps"] else "",
            f"{group['jobs']:,}",
            f"{_bound(group)}{group['images']:,}",
            f"{group['batches']:,}",
            f"{group['batch_size']}",
        )
    at_most = "" if summary["images_exact"] else "at most "
    tokens = sum(group["image_tokens"] for group in summary["groups"])
    total = (
        f"{counted(summary['jobs'], 'job')}, {at_most}{counted(summary['images'], 'image')} "
        f"({counted(tokens, 'token')} in all), "
        f"{counted(summary['batches'], 'batch')}"
    )
    more = len(summary["groups"]) - MAX_GROUPS
    lines = [f"... and {counted(more, 'more group')}; --json prints all", total]
    lines += [
        f"{counted(number, 'image')} judged by {name}, in this process beside the drawing"
        for name, number in summary["functions"].items()
    ]
    if summary["from_tries"]:
        # It imports Arrow, which most plans do without.
        from sensebatch.report.acceptance import starting_from

        what = "tries, and only if those are drawn"
        lines.append(starting_from(what, summary["from_tries"]))
    print_parts(table, *(lines if more > 0 else lines[1:]), *_memory(summary), *forecast)


def _size(group: Summary) -> str:
    return "" if group["width"] is None else f"{group['width']}x{group['height']}"


def _bound(group: Summary) -> str:
    return "" if group["images_exact"] else "<= "


def _memory(summary: Summary) -> list[object]:
    """Returns what is known of memory and time; nothing where it is not."""
    placements = summary["memory"]
    if placements is None:
        return []
    machine = summary["machine"]
    if len(placements) > 1:
        return [
            _by_mode(placements),
            "Expected peaks in GiB, GPU + host. Times need the speeds of a GPU, which "
            "sensebatch doctor measures.",
        ]
    (placement,) = placements
    lines = [
        _reason(placement),
        "Layers are those of the generation expert that stay on the GPU; the host's GiB are the "
        "resident memory of the process.",
    ]
    if placement["file_bytes"]:
        lines.append(
            f"{placement['file_bytes'] / GIB:.1f} GiB of weights do not fit the host's budget and "
            "are read from the checkpoint's files whenever they are needed."
        )
    if placement["attn_backend"] is not None and machine is not None:
        lines.append(f"Images are attended by {placement['attn_backend']}.")
    if placement["seconds"] is not None:
        lines.append(_least_time(placement["seconds"], summary))
        lines.append(
            f"From the speeds of {machine['gpu']}, measured {machine['measured_at'][:10]}: not "
            "the time of a run, which is longer."
        )
    elif machine is not None:
        lines.append(
            "No time is known: speeds are measured in half precision, and of 8-bit numbers by "
            "sensebatch doctor as far as the GPU multiplies them."
        )
    lines += [f"{text[0].upper()}{text[1:]}." for text in placement["refusals"]]
    return [_of_placement(placement, summary["groups"]), *lines]


def _reason(placement: Summary) -> str:
    """Returns why the groups have the modes they have."""
    reasons = {group["reason"] for group in placement["groups"] if group["vram_mode"]}
    if len(reasons) == 1:
        return f"{placement['vram_mode']}: {reasons.pop()}."
    what = placement["reason"].split(" holds ")[0]
    return f"{what[0].upper()}{what[1:]} does not hold all weights."


def _by_mode(placements: Sequence[Summary]) -> FittingTable:
    """Returns a table of all modes: a row a group, and one of the whole run."""
    modes = [placement["vram_mode"] for placement in placements]
    table = FittingTable("#", "batch", "in a\npass", *modes, optional=["in a\npass", "batch"])
    for number, groups in enumerate(
        zip(*(placement["groups"][:MAX_GROUPS] for placement in placements), strict=True), start=1
    ):
        passes = sorted({group["jobs_per_pass"] for group in groups})
        passes_words = "-".join(map(str, passes))
        table.add_row(str(number), str(groups[0]["batch_size"]), passes_words, *map(_peaks, groups))
    table.add_section()
    table.add_row("all", "", "", *map(_peaks, placements))
    return table


def _peaks(needs: Summary) -> str:
    return f"{needs['device_bytes'] / GIB:.2f}+{needs['host_bytes'] / GIB:.2f}"


def _of_placement(placement: Summary, groups: Sequence[Summary]) -> FittingTable:
    """Returns a table of one placement: a row a group, and one of the whole run."""
    timed = placement["seconds"] is not None
    texts = timed and placement["seconds"]["text"] > 0
    table = FittingTable(
        "#",
        "mode",
        "batch",
        "in a\npass",
        "layers",
        "GPU\nGiB",
        "host\nGiB",
        *(["seconds"] if timed else []),
        *(["for\ntext"] if texts else []),
        words=["mode"],
        optional=["layers", "in a\npass"],
    )
    listed = zip(groups[:MAX_GROUPS], placement["groups"][:MAX_GROUPS], strict=True)
    for number, (group, needs) in enumerate(listed, start=1):
        if needs["vram_mode"] is None:
            needed = f">= {needs['device_bytes'] / GIB:.2f}"
            blank = [""] * (timed + texts + 1)
            table.add_row(str(number), "none fits", "", "", "", needed, *blank)
            continue
        cells = _cells(needs, timed=timed, texts=texts, bound=_bound(group))
        passed = (str(needs[name]) for name in ("batch_size", "jobs_per_pass", "kept_layers"))
        table.add_row(str(number), needs["vram_mode"], *passed, *cells)
    table.add_section()
    bound = "" if all(group["images_exact"] for group in groups) else "<= "
    cells = _cells(placement, timed=timed, texts=texts, bound=bound)
    table.add_row("all", "", "", "", "", *cells)
    return table


def _cells(needs: Summary, *, timed: bool, texts: bool, bound: str) -> list[str]:
    cells = [f"{needs[name] / GIB:.2f}" for name in ("device_bytes", "host_bytes")]
    if timed:
        cells.append(f"{bound}{needs['seconds']['images']:,.1f}")
    if texts:
        text = needs["seconds"]["text"]
        cells.append(f"<= {text:,.1f}" if text else "")
    return cells


def _least_time(seconds: Mapping[str, float], summary: Summary) -> str:
    most = "" if summary["images_exact"] else " if all images are drawn"
    text = seconds["text"]
    more = f", and {duration(text)} more if all text is written" if text else ""
    return f"At least {duration(seconds['images'])}{most}{more}."
