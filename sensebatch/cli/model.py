"""`sensebatch model inspect`: prints what a checkpoint consists of, from its headers."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sensebatch.cli.help import HelpCommand, new_app
from sensebatch.cli.options import with_options

if TYPE_CHECKING:
    from sensebatch.checkpoint.summary import Summary

app = new_app(add_completion=False, help="Inspect checkpoints.")


@app.callback()
def _model() -> None:
    """Inspect checkpoints."""


@app.command(cls=HelpCommand)
@with_options
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, Hub id (owner/name), or tiny.", metavar="DIR|HUB_ID|tiny"
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Print the configuration, and parameters and bytes by group, without loading weights.

    A folder is read in place; a Hub id that is not in the cache is fetched first. The exit
    code is 2 for a checkpoint that no run would take: tensors are missing, extra or of another
    shape, or there is no tokenizer.
    """
    from sensebatch.checkpoint.files import open_checkpoint
    from sensebatch.checkpoint.summary import summarise
    from sensebatch.cli.messages import show

    summary = summarise(open_checkpoint(model, revision))
    if as_json:
        show(json.dumps(_plain(summary)))
    else:
        from sensebatch.cli.tables import print_model

        print_model(summary)
    if not summary.is_usable:
        raise typer.Exit(2)


def _plain(summary: Summary) -> dict[str, Any]:
    values = asdict(summary)
    values["groups"] = {group.value: asdict(size) for group, size in summary.groups.items()}
    return values
