"""The card of a dataset, README.md: what the Hub, `load_dataset` and people read of it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from sensebatch.export.collect import MAX_VALUES
from sensebatch.export.edited_card import with_configs
from sensebatch.export.ledger import Ledger, Shard
from sensebatch.export.target import Target
from sensebatch.store.provenance import SOFTWARE
from sensebatch.tasks import Output, Task, TaskSpec
from sensebatch.yaml_values import dump_yaml

CARD = "README.md"
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card says."""

    title: str
    license: str
    shards: tuple[Shard, ...]
    pattern: Callable[[str, str], str]
    """Returns which files are those of a task and split."""
    settings: Mapping[str, Collection[str]]
    """The values of each setting."""


class CardState(StrEnum):
    """What became of a card."""

    WRITTEN = "written"
    """It is that of the set."""
    KEPT = "kept"
    """A person changed it, and it was left alone; it names all subsets and splits."""
    UPDATED = "updated"
    """A person changed it, and the `configs` of its header were brought up to date."""
    OUTDATED = "outdated"
    """A person changed it, and it has no header whose `configs` can be brought up to date."""


def write_card(target: Target, ledger: Ledger, facts: CardFacts) -> CardState:
    """Writes the card; of one that a person has changed, only the subsets and splits."""
    content = card(facts).encode()
    there = target.read(CARD)
    if there == content:
        return CardState.WRITTEN
    replaced = None if there is None else hashlib.sha256(there).hexdigest()
    if there is not None and replaced not in ledger.cards:
        return _update(target, there, facts)
    ledger.replace_card(replaced, hashlib.sha256(content).hexdigest())
    with target.write(CARD) as file:
        file.write(content)
    return CardState.WRITTEN


def _update(target: Target, there: bytes, facts: CardFacts) -> CardState:
    """Names the subsets and splits in a card that a person changed."""
    try:
        text = there.decode()
    except UnicodeDecodeError:
        return CardState.OUTDATED
    changed = with_configs(text, _configs(facts, _splits(facts)), facts.pattern)
    if changed is None:
        return CardState.OUTDATED
    if changed == text:
        return CardState.KEPT
    with target.write(CARD) as file:
        file.write(changed.encode())
    return CardState.UPDATED


def card(facts: CardFacts) -> str:
    """Returns the text of a card."""
    splits = _splits(facts)
    return f"---\n{dump_yaml(_head(facts, splits))}---\n\n{_body(facts, splits)}"


def _splits(facts: CardFacts) -> dict[str, dict[str, Counter[str]]]:
    """Returns the counts of rows, shards and bytes by task and split."""
    splits: dict[str, dict[str, Counter[str]]] = {}
    for shard in sorted(facts.shards, key=lambda shard: list(Task).index(Task(shard.task))):
        count = splits.setdefault(shard.task, {}).setdefault(shard.split, Counter())
        count.update(rows=len(shard.rows), shards=1, bytes=sum(shard.files.values()))
    return splits


def _configs(facts: CardFacts, splits: Mapping[str, Iterable[str]]) -> list[dict[str, object]]:
    """Returns the subsets as the Hub and `load_dataset` read them."""
    configs: list[dict[str, object]] = [
        {
            "config_name": task,
            "data_files": [
                {"split": split, "path": facts.pattern(task, split)} for split in splits[task]
            ],
        }
        for task in splits
    ]
    # The one that `load_dataset` takes when nobody names one.
    configs[0]["default"] = True
    return configs


def _head(facts: CardFacts, splits: Mapping[str, Mapping[str, Counter[str]]]) -> dict[str, object]:
    num_rows = sum(count["rows"] for task in splits.values() for count in task.values())
    return {
        "license": facts.license,
        "pretty_name": facts.title,
        "task_categories": list(dict.fromkeys(_category(Task(task).spec) for task in splits)),
        "size_categories": [next((word for end, word in _SIZES if num_rows < end), "n>10M")],
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "source_datasets": ["original"],
        "tags": ["synthetic", "sensebatch"],
        "configs": _configs(facts, splits),
    }


def _category(spec: TaskSpec) -> str:
    """Returns what the Hub calls what a task's rows are good for."""
    if spec.output is Output.IMAGE:
        return "image-to-image" if spec.takes_images else "text-to-image"
    return "image-text-to-text" if spec.output is Output.TEXT else "any-to-any"


def _body(facts: CardFacts, splits: Mapping[str, Mapping[str, Counter[str]]]) -> str:
    lines = [f"# {_line(facts.title)}", ""]
    lines += [
        f"Drawn by a generative model with {SOFTWARE}. Input images are as they were given.",
        "",
    ]
    lines += ["| Subset | Split | Rows | Files | Bytes |", "| --- | --- | --: | --: | --: |"]
    lines += [
        f"| {task} | {split} | {count['rows']:,} | {count['shards']:,} | {count['bytes']:,} |"
        for task, of_task in splits.items()
        for split, count in of_task.items()
    ]
    lines += ["", "| Setting | Values |", "| --- | --- |"]
    for name, values in facts.settings.items():
        if values:
            shown = ", ".join(f"`{_line(value)}`" for value in sorted(values)[:MAX_VALUES])
            more = ", ..." if len(values) > MAX_VALUES else ""
            lines.append(f"| {name} | {shown}{more} |")
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """Returns a text that stays on its line and in its cell."""
    return re.sub(r"[\s`|<>\\]+", " ", text).strip()
