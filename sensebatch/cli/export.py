"""`sensebatch export`: writes what a run made as a dataset."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sensebatch.cli.options import SelectionOptions
from sensebatch.cli.paths import path
from sensebatch.settings import ImageFormat

if TYPE_CHECKING:
    from sensebatch.export.images import Conversion
    from sensebatch.export.push import Hub
    from sensebatch.export.run import ExportConfig, Exported, ExportObserver
    from sensebatch.export.signing import Signer

_CONTENT = "Content"
_IMAGES = "Images"
_PUBLISH = "Publishing"
NUM_SHOWN = 5
"""Jobs with damaged files that are named."""
_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]+)?) ?(MB|GB|MiB|GiB)")
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


class Format(StrEnum):
    """The formats by name; `export.formats` has a row for each."""

    HF = "hf"
    IMAGEFOLDER = "imagefolder"
    WEBDATASET = "webdataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentOptions:
    """What goes into an export, and how it is divided."""

    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=SHARE,...",
            help="Divide into splits, such as train=0.9,test=0.1; jobs of one prompt stay "
            "together. [default: train=1]",
            rich_help_panel=_CONTENT,
        ),
    ] = None
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing",
            help="Leave out jobs whose files are missing or damaged.",
            rich_help_panel=_CONTENT,
        ),
    ] = False
    rejected: Annotated[
        bool,
        typer.Option(
            "--rejected",
            help="Include tries that are not accepted, what starts from them, and questions "
            "about tries.",
            rich_help_panel=_CONTENT,
        ),
    ] = False
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most bytes of images in one shard, such as 500MB. [default: 500MB]",
            rich_help_panel=_CONTENT,
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """What is done to images, which are copied as they are otherwise."""

    image_format: Annotated[
        ImageFormat | None,
        typer.Option(
            help="Encode images again in this format. [default: as they are]",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    image_quality: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="Quality of jpeg and webp that are encoded again. [default: 95]",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    max_side: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Scale larger images down, to this many pixels on their longer side.",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    c2pa_certificate: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Sign images with this certificate, a PEM file with its chain (Content "
            "Credentials; needs sensebatch[c2pa]).",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    c2pa_key: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="The certificate's private key in PEM.", rich_help_panel=_IMAGES
        ),
    ] = None
    c2pa_timestamps: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Time stamping authority to ask for each image.",
            rich_help_panel=_IMAGES,
        ),
    ] = None

    def conversion(self) -> Conversion:
        """Returns what is done to images.

        Raises:
            ConfigError: A quality is given, but nothing is encoded.
        """
        from sensebatch.errors import ConfigError
        from sensebatch.export.images import Conversion

        is_encoded = self.image_format is not None or self.max_side is not None
        if self.image_quality is not None and not is_encoded:
            raise ConfigError(
                "--image-quality: expected --image-format or --max-side beside it; images are "
                "copied as they are without them"
            )
        default = Conversion()
        return Conversion(
            image_format=self.image_format,
            image_quality=self.image_quality or default.image_quality,
            max_side=self.max_side,
        )

    def signer(self) -> Signer | None:
        """Returns what signs images; None if nothing does.

        Raises:
            ConfigError: It cannot sign.
        """
        from sensebatch.errors import ConfigError
        from sensebatch.export.signing import Signer

        if (self.c2pa_certificate, self.c2pa_key, self.c2pa_timestamps) == (None, None, None):
            return None
        if self.c2pa_certificate is None or self.c2pa_key is None:
            raise ConfigError("expected both --c2pa-certificate and --c2pa-key, found one of them")
        return Signer(self.c2pa_certificate, self.c2pa_key, timestamps=self.c2pa_timestamps)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOptions:
    """How the set is presented, and where it is pushed."""

    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Licence of the set for its card, in the Hub's words, such as cc-by-4.0. "
            "[default: as in an earlier export, or unknown]",
            rich_help_panel=_PUBLISH,
        ),
    ] = None
    title: Annotated[
        str | None,
        typer.Option(
            help="Title of the card. [default: as in an earlier export, or the name of DIR]",
            rich_help_panel=_PUBLISH,
        ),
    ] = None
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Upload OUT to this dataset of the Hub, owner/name, as the user who is logged in "
            "(hf auth login).",
            rich_help_panel=_PUBLISH,
        ),
    ] = None
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="Make the repository private if it is new.",
            rich_help_panel=_PUBLISH,
        ),
    ] = False


Out = Annotated[
    str,
    typer.Argument(
        help="A folder, or a URL such as s3://bucket/set, gs://bucket/set or "
        "hf://datasets/owner/name.",
        metavar="OUT",
    ),
]


def export(
    format: Annotated[
        Format, typer.Argument(help="hf, imagefolder or webdataset.", metavar="FORMAT")
    ],
    folder: Annotated[Path, typer.Argument(parser=path, help="A run's folder.", metavar="DIR")],
    out: Out,
    selection: SelectionOptions,
    content: ContentOptions,
    images: ImageOptions,
    publish: PublishOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write what a run made as a dataset: Parquet for datasets, image folders or WebDataset.

    FORMAT is hf (Parquet that load_dataset opens), imagefolder (image files with metadata) or
    webdataset (tar files). Image files are copied byte for byte. The same command continues an
    export that was interrupted, and adds what has been made since.
    """
    from sensebatch.cli.jobs import warn_of_picks
    from sensebatch.cli.messages import fitted, show
    from sensebatch.dataset.records import open_dataset
    from sensebatch.export import run
    from sensebatch.export.formats import FORMATS
    from sensebatch.export.target import open_target
    from sensebatch.manifest.inputs import InputReader
    from sensebatch.tasks import Task

    signer = images.signer()
    config = _config(format, selection, content, images, publish, signer)
    target = open_target(out)
    hub = _hub(publish, target.folder)
    reader = InputReader()
    with open_dataset(folder) as dataset, _continues(), _progress() as observer:
        warn_of_picks(dataset, config.selection)
        done = run.export(
            dataset, target, config, read_input=reader.read, sign=signer, observer=observer
        )
    address = None
    if hub is not None and target.folder is not None:
        own = FORMATS[format].is_own
        address = hub.push(
            target.folder,
            lambda name: any(own(name, task) for task in Task),
            private=publish.private,
        )
    if as_json:
        show(json.dumps({**asdict(done), "out": out, "pushed_to": address}))
    else:
        lines = [line for text in _lines(out, done) for line in fitted(text)]
        # What is to be copied stays whole.
        show("\n".join([*lines, *_next_lines(out, config, done, address)]))


def _config(
    format: Format,
    selection: SelectionOptions,
    content: ContentOptions,
    images: ImageOptions,
    publish: PublishOptions,
    signer: Signer | None,
) -> ExportConfig:
    from sensebatch.export.licenses import checked_license
    from sensebatch.export.run import SHARD_BYTES, ExportConfig
    from sensebatch.export.splits import parse_splits

    return ExportConfig(
        format=format.value,
        selection=selection.selection(),
        splits=parse_splits(content.split),
        conversion=images.conversion(),
        shard_bytes=SHARD_BYTES if content.shard_size is None else _bytes(content.shard_size),
        skip_missing=content.skip_missing,
        with_rejected=content.rejected,
        title=publish.title or None,
        license=None if publish.license is None else checked_license(publish.license),
        signer=None if signer is None else signer.fingerprint,
    )


def _bytes(text: str) -> int:
    """Returns the bytes that a size means."""
    from sensebatch.errors import ConfigError

    match = _SIZE.fullmatch(text.strip())
    size = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size == 0:
        raise ConfigError(f"--shard-size: expected a size such as 500MB or 1GiB, found {text!r}")
    return size


def _hub(publish: PublishOptions, folder: Path | None) -> Hub | None:
    """Returns where an export is pushed to, after making sure that it can be; None for nowhere."""
    from sensebatch.errors import ConfigError
    from sensebatch.export.push import Hub

    if publish.push is None:
        if publish.private:
            raise ConfigError("--private: expected --push beside it")
        return None
    if folder is None:
        raise ConfigError("--push: expected OUT to be a folder of this machine, found a URL")
    if publish.license is None:
        raise ConfigError(
            "--push: expected --license beside it, such as --license cc-by-4.0; a set that is "
            "published needs one (unknown is one as well)"
        )
    return Hub(publish.push, shows_progress=_is_terminal())


@contextmanager
def _continues() -> Iterator[None]:
    """Says, where Ctrl-C ends an export, that nothing is lost."""
    from sensebatch.cli.messages import say

    try:
        yield
    except KeyboardInterrupt:
        say("stopped; the same command continues the export")
        raise


def _is_terminal() -> bool:
    """Returns whether somebody watches."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def _progress() -> Iterator[ExportObserver]:
    """Yields what shows the progress on a terminal, and nothing elsewhere."""
    from sensebatch.export.run import ExportObserver

    if not _is_terminal():
        yield ExportObserver()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("exporting", BarColumn(20), MofNCompleteColumn(), "images", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("exporting", total=None)

        class Bar(ExportObserver):
            def planned(self, num_images: int) -> None:
                progress.update(bar, total=num_images)

            def wrote(self, num_images: int) -> None:
                progress.advance(bar, num_images)

        yield Bar()


def _lines(out: str, done: Exported) -> Iterator[str]:
    """Yields what became of an export."""
    from sensebatch.export.card import CardState
    from sensebatch.export.licenses import UNKNOWN
    from sensebatch.units import counted

    yield f"{out}: {counted(done.jobs, 'job')} in {counted(done.shards, 'shard')}"
    if done.written_shards:
        written = counted(done.written_images, "image")
        yield f"  written  {counted(done.written_shards, 'shard')} with {written}"
    else:
        yield "  written  nothing: all of it is there already"
    if done.removed_rows:
        rows = counted(done.removed_rows, "row")
        shards = f"{counted(done.removed_shards, 'shard')} and " if done.removed_shards else ""
        yield f"  removed  {shards}{rows} of jobs that are left out now, or have changed"
    yield from _left_out_lines(done)
    for split in done.empty_splits:
        yield f"  empty    split {split}: no prompt falls into it"
    if done.card != CardState.WRITTEN:
        yield f"  card     README.md was changed by hand, and {_of_edited_card(done)}"
    elif done.license == UNKNOWN:
        yield "  licence  unknown; --license names one"


def _of_edited_card(done: Exported) -> str:
    """Returns what became of a card that a person changed."""
    from sensebatch.export.card import CardState

    if done.card == CardState.UPDATED:
        return "is left as it is but for the subsets and splits in its header"
    if done.card == CardState.KEPT:
        return "is left as it is"
    subsets = ", ".join(done.tasks)
    return (
        f"has no header whose configs could be brought up to date, so that {subsets} may not "
        "load; move it away, export again and copy the configs from the new README.md"
    )


def _left_out_lines(done: Exported) -> Iterator[str]:
    """Yields which of the chosen jobs are not in an export."""
    from sensebatch.units import counted

    if done.not_accepted:
        jobs = counted(done.not_accepted, "job")
        what = "tries that are not accepted, what starts from them, and questions about tries"
        yield f"  left out {jobs}: {what}; see --rejected"
    if done.dropped:
        yield f"  left out {counted(done.dropped, 'job')} of rejected images that were removed"
    if done.not_needed:
        which = "that was" if done.not_needed == 1 else "that were"
        yield f"  left out {counted(done.not_needed, 'job')} {which} not needed"
    if done.not_done:
        which = "that is" if done.not_done == 1 else "that are"
        yield f"  left out {counted(done.not_done, 'job')} {which} not done"
    if done.look_alikes:
        jobs = counted(done.look_alikes, "job")
        yield f"  left out {jobs} whose images look like those of an earlier job (--dedupe)"
    if done.skipped:
        yield f"  left out {counted(len(done.skipped), 'job')} with missing or damaged files:"
        yield from (f"    {text}" for text in done.skipped[:NUM_SHOWN])


def _next_lines(
    out: str, config: ExportConfig, done: Exported, address: str | None
) -> Iterator[str]:
    """Yields where the set is, or how it is opened."""
    if address is not None:
        yield f"  pushed   {address}"
    elif config.format == Format.WEBDATASET and "://" not in out:
        files = f"{out}/{done.tasks[0]}/*.tar"
        yield f"  open     webdataset.WebDataset(sorted(glob.glob({files!r})))"
    elif "://" not in out:
        yield f"  open     datasets.load_dataset({out!r}, {done.tasks[0]!r})"
