"""`sensebatch merge`: joins the folders of shards into one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.paths import path

if TYPE_CHECKING:
    from sensebatch.store.merge import Merged

MAX_NAMES = 10


def merge(
    folders: Annotated[
        list[Path], typer.Argument(parser=path, help="The folders of shards.", metavar="DIR...")
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="The joined folder. [default: the first DIR without -I-of-N at its end]",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="DIR",
            help="Keep state.db in a folder of this machine, if the joined one is on a network.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout at the end.")
    ] = False,
) -> None:
    """Join the folders of sensebatch run --shard into one, as if one run had made it.

    The shards' folders are only read; files are linked if they are on the same disk, and copied if
    not. The same command continues a merge that was interrupted. Exit codes: 0 all jobs done, 1
    some failed, 2 nothing was joined because of an error, 75 jobs remain.
    """
    from sensebatch.cli.messages import say, show
    from sensebatch.session import write_summary
    from sensebatch.store.merge import merge as join

    root = _default(folders) if output_dir is None else output_dir
    merged = join(folders, root, (lambda _: None) if as_json else say, state_dir=state_dir)
    write_summary(root)
    code = _exit_code(merged)
    if as_json:
        values = asdict(merged)
        ended = {"output_dir": str(root), "exit_code": code, **values.pop("counts")}
        show(json.dumps({**ended, **values}))
    else:
        show("\n".join(_lines(root, merged)))
    raise typer.Exit(code)


def _default(folders: Sequence[Path]) -> Path:
    """Returns where shards are joined if nobody says.

    Raises:
        ConfigError: The folders have other names than those a shard has by default.
    """
    from sensebatch.errors import ConfigError
    from sensebatch.store.shards import without_suffix

    name = without_suffix(folders[0].name)
    if name is None:
        raise ConfigError(
            f"--output-dir: expected where to join the shards, because {folders[0]} does not end "
            "with -I-of-N"
        )
    return folders[0].with_name(name)


def _exit_code(merged: Merged) -> int:
    from sensebatch.cli import exits

    if merged.counts.remaining:
        return exits.RESUMABLE
    return exits.FAILED if merged.counts.failed else exits.DONE


def _lines(root: Path, merged: Merged) -> Iterator[str]:
    from sensebatch.units import counted

    counts = merged.counts
    words = [f"{counts.done:,} of {counted(counts.jobs, 'job')} done"]
    words += [f"{counts.failed:,} failed"] if counts.failed else []
    words += [f"{counts.pending:,} to do"] if counts.pending else []
    words += [f"{counts.started:,} interrupted"] if counts.started else []
    yield f"{root}: {', '.join(words)}"
    if merged.missing:
        yield f"  missing     {_shards(merged.missing)} of {merged.shards}"
    for number, left in merged.unfinished.items():
        yield f"  unfinished  shard {number} of {merged.shards}, with {counted(left, 'job')} to run"
    if merged.missing_files:
        yield f"  no file     {_some(merged.missing_files)}"
    if merged.missing or merged.unfinished:
        yield (
            "merge again once they are there, or run the manifest in the joined folder with "
            "sensebatch run to run what is missing"
        )
    elif merged.missing_files:
        yield "run the manifest with sensebatch run to make the missing files again"


def _shards(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MAX_NAMES]))
    if len(numbers) > MAX_NAMES:
        shown += f" and {len(numbers) - MAX_NAMES} more"
    return f"{'shard' if len(numbers) == 1 else 'shards'} {shown}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES])
    return f"{shown} and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else shown
