"""An export: what is selected, in shards, with a card. It can be interrupted and repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from sensebatch.dataset.records import Dataset
from sensebatch.dataset.selection import Selection
from sensebatch.errors import ExportError, JobError
from sensebatch.export.card import CardFacts, CardState, write_card
from sensebatch.export.collect import Collected, Spool, collect, damaged
from sensebatch.export.formats import FORMATS
from sensebatch.export.images import Conversion, ImageLoader, LoadedSample, Sign
from sensebatch.export.ledger import Ledger, Shard, is_record
from sensebatch.export.licenses import UNKNOWN
from sensebatch.export.samples import Sample
from sensebatch.export.shards import ShardPlan, plan_shards
from sensebatch.export.splits import Splits, unused
from sensebatch.export.target import Target
from sensebatch.jobs import InputImage
from sensebatch.tasks import Task
from sensebatch.units import counted

SHARD_BYTES = 500 * 10**6
"""The size of the images in a shard, as `datasets` has it."""
VERSION = 1
"""The version of the columns and their values; an export of another one is not continued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What an export is to be like."""

    format: str
    """A name of `FORMATS`."""
    selection: Selection = field(default_factory=Selection)
    splits: Splits = field(default_factory=Splits)
    conversion: Conversion = field(default_factory=Conversion)
    shard_bytes: int = SHARD_BYTES
    skip_missing: bool = False
    """Whether jobs whose files are missing or damaged are left out."""
    with_rejected: bool = False
    """Whether tries that were not accepted are in it, and the questions about tries."""
    title: str | None = None
    """The title of the card; None for that of an earlier export, or the name of the run's folder.
    """
    license: str | None = None
    """The licence of the set, in the Hub's words; None for that of an earlier export, or unknown.
    """
    signer: str | None = None
    """Fingerprint of the certificate that images are signed with."""


@dataclass(slots=True, kw_only=True)
class Exported:
    """What an export came to."""

    jobs: int = 0
    tasks: list[str] = field(default_factory=list)
    shards: int = 0
    written_shards: int = 0
    written_images: int = 0
    written_bytes: int = 0
    removed_shards: int = 0
    """Shards that were there and are not now."""
    removed_rows: int = 0
    """Rows that were there and are not now: their jobs are left out now, or have changed."""
    not_done: int = 0
    """Selected jobs that are not done, and so not in it."""
    not_needed: int = 0
    """Tries that are held since enough others are accepted, and what starts from such; likewise."""
    not_accepted: int = 0
    """Tries that were not accepted, what starts from them, and questions about tries; likewise."""
    dropped: int = 0
    """Rejected tries whose images were removed, and questions about them; likewise."""
    look_alikes: int = 0
    """Jobs whose images look like those of an earlier one; likewise, where that is asked for."""
    skipped: list[str] = field(default_factory=list)
    """Jobs left out because of their files, and why."""
    empty_splits: list[str] = field(default_factory=list)
    license: str = UNKNOWN
    """The set's licence, in the Hub's words."""
    card: CardState = CardState.WRITTEN


class ExportObserver:
    """Watches an export; the methods do nothing until they are overridden."""

    def planned(self, num_images: int) -> None:
        """Takes how many images are to be written."""

    def wrote(self, num_images: int) -> None:
        """Takes how many images more were written."""


def export(
    dataset: Dataset,
    target: Target,
    config: ExportConfig,
    *,
    read_input: Callable[[InputImage], bytes],
    sign: Sign | None = None,
    observer: ExportObserver | None = None,
) -> Exported:
    """Writes the selected jobs of a folder to a target; what is there already is not written again.

    Args:
        dataset: The run's folder.
        target: Is empty, or has an earlier export of the same folder in the same format.
        config: What the export is to be like.
        read_input: Returns the bytes of an input image, or raises a JobError.
        sign: Signs images; `config.signer` is its certificate.
        observer: Receives the progress.

    Raises:
        ConfigError: The selection, or what is at the target, does not fit.
        ExportError: Nothing is there to export, or files are missing or damaged.
        StorageError: The target failed; the same export continues where it was.
    """
    observer = observer or ExportObserver()
    ledger, terms = Ledger(target), _terms(dataset, config)
    # What does not fit is refused before the folder is read.
    ledger.open(terms)
    _require_manifests(dataset)
    with Spool() as spool:
        found = _collected(dataset, spool, config)
        if not found.rows:
            raise ExportError(_nothing(dataset.root, found))
        loader = ImageLoader(dataset.root, read_input, conversion=config.conversion, sign=sign)
        with target.held(), loader:
            whole, others = ledger.open(terms)
            limits = FORMATS[config.format].limits(config.shard_bytes)
            plan = plan_shards(whole, found.rows, limits)
            observer.planned(sum(row.num_images for _, rows in plan.written for row in rows))
            facts = _facts(dataset, config, found, ledger)
            ledger.begin()
            writing = _Writing(target, ledger, loader, config, observer)
            writing.clear(plan, whole, others)
            shards = [*plan.kept, *writing.write(plan, spool)]
            if not shards:
                raise ExportError(f"{dataset.root}: expected files that can be read, found none")
            facts = replace(facts, shards=tuple(shards))
            state = write_card(target, ledger, facts)
    done = _done(config, found, writing, whole, shards)
    done.license, done.card = facts.license, state
    return done


def _done(
    config: ExportConfig,
    found: Collected,
    writing: _Writing,
    old: Sequence[Shard],
    shards: Sequence[Shard],
) -> Exported:
    """Returns what an export came to, besides the card.

    Args:
        config: Of the export.
        found: What there was to export.
        writing: Has written it.
        old: The shards that were there before.
        shards: Those that are there now.
    """
    return Exported(
        jobs=sum(len(shard.rows) for shard in shards),
        tasks=[task.value for task in Task if any(shard.task == task for shard in shards)],
        shards=len(shards),
        written_shards=writing.num_shards,
        written_images=writing.num_images,
        written_bytes=writing.num_bytes,
        removed_shards=len(_stems(old) - _stems(shards)),
        removed_rows=len(_rows(old) - _rows(shards)),
        not_done=found.not_done,
        not_needed=found.not_needed,
        not_accepted=found.not_accepted,
        dropped=found.dropped,
        look_alikes=found.look_alikes,
        skipped=[*found.missing, *found.changed, *writing.skipped],
        empty_splits=unused(config.splits, [shard.split for shard in shards]),
    )


def _stems(shards: Iterable[Shard]) -> set[str]:
    return {shard.stem for shard in shards}


def _rows(shards: Iterable[Shard]) -> set[str]:
    return {digest for shard in shards for digest in shard.rows}


class _Writing:
    """Writes shards, one after the other."""

    def __init__(
        self,
        target: Target,
        ledger: Ledger,
        loader: ImageLoader,
        config: ExportConfig,
        observer: ExportObserver,
    ) -> None:
        self._target = target
        self._ledger = ledger
        self._loader = loader
        self._config = config
        self._format = FORMATS[config.format]
        self._observer = observer
        self.num_shards = 0
        self.num_images = 0
        self.num_bytes = 0
        self.skipped: list[str] = []

    def clear(self, plan: ShardPlan, whole: Iterable[Shard], others: Iterable[str]) -> None:
        """Removes shards that change, and what an export that was interrupted left."""
        kept = _stems(plan.kept)
        for shard in whole:
            if shard.stem in kept:
                continue
            self._ledger.drop(shard)
            for name in shard.files:
                self._target.remove(name)
        for name in others:
            if any(self._format.is_own(name, task) for task in Task) or is_record(name):
                self._target.remove(name)

    def write(self, plan: ShardPlan, spool: Spool) -> list[Shard]:
        """Writes the shards of a plan and returns those that have a row that can be read."""
        written = (self._write(shard, spool.get(rows)) for shard, rows in plan.written)
        return [shard for shard in written if shard is not None]

    def _write(self, shard: Shard, samples: Iterator[Sample]) -> Shard | None:
        """Writes a shard and records it; returns None where no row of it can be read."""
        loaded = self._readable(self._loader.load(samples))
        first = next(loaded, None)
        if first is None:
            return None
        digests: list[str] = []
        files = self._format.write(
            self._target, shard, self._noted(chain([first], loaded), digests)
        )
        written = replace(shard, rows=tuple(digests), files=files)
        self._ledger.add(written)
        self.num_shards += 1
        self.num_bytes += sum(files.values())
        return written

    def _readable(self, rows: Iterable[LoadedSample | JobError]) -> Iterator[LoadedSample]:
        for row in rows:
            if isinstance(row, LoadedSample):
                yield row
            elif self._config.skip_missing:
                self.skipped.append(str(row))
            else:
                raise ExportError(damaged(str(row))) from row

    def _noted(self, rows: Iterable[LoadedSample], digests: list[str]) -> Iterator[LoadedSample]:
        """Yields rows, and notes which they were."""
        for row in rows:
            yield row
            digests.append(row.digest)
            self.num_images += len(row.images)
            self._observer.wrote(len(row.images))


def _require_manifests(dataset: Dataset) -> None:
    if not dataset.knows_manifests:
        raise ExportError(
            f"{dataset.root}: expected manifests that were read since sensebatch repair, which "
            "finds neither input images nor what was accepted; run them once more (what is done "
            "stays), then export"
        )


def _terms(dataset: Dataset, config: ExportConfig) -> dict[str, Any]:
    """Returns what two exports to one place have in common."""
    conversion = config.conversion
    return {
        "format": config.format,
        "run": dataset.run_id,
        "image format": conversion.image_format,
        "image quality": conversion.image_quality if conversion.image_format else None,
        "max side": conversion.max_side,
        "certificate": config.signer,
        "version": VERSION,
    }


def _collected(dataset: Dataset, spool: Spool, config: ExportConfig) -> Collected:
    look_alikes: list[str] = []
    found = collect(
        dataset.records(config.selection, look_alikes=look_alikes),
        spool,
        config.splits,
        skip_missing=config.skip_missing,
        with_rejected=config.with_rejected,
    )
    found.look_alikes = len(look_alikes)
    return found


def _nothing(root: Path, found: Collected) -> str:
    """Returns why there is nothing to export."""
    if found.missing or found.changed:
        return f"{root}: expected files that can be read, found none"
    if found.not_done:
        which = "that is" if found.not_done == 1 else "that are"
        return f"{root}: expected jobs that are done, found {found.not_done:,} {which} not"
    if found.not_accepted:
        jobs = counted(found.not_accepted, "job")
        return f"{root}: expected images that are accepted, found none in {jobs}; see --rejected"
    return f"{root}: expected jobs to export, found none that are selected"


def _facts(dataset: Dataset, config: ExportConfig, found: Collected, ledger: Ledger) -> CardFacts:
    """Returns what the card says, as yet without shards."""
    title = ledger.given("title", config.title)
    return CardFacts(
        title=dataset.root.resolve().name if title is None else title,
        license=ledger.given("license", config.license) or UNKNOWN,
        shards=(),
        pattern=FORMATS[config.format].pattern,
        settings=found.settings,
    )
