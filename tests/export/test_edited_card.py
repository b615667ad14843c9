"""Headers that people write, and what an export changes in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sensebatch.export.edited_card import Config, with_configs
from sensebatch.export.hf import pattern
from sensebatch.yaml_values import load_yaml


def subset(task: str, *splits: str, **more: Any) -> dict[str, Any]:
    files = [{"split": split, "path": pattern(task, split)} for split in splits]
    return {"config_name": task, "data_files": files, **more}


WANTED: Sequence[Config] = (subset("t2i", "train", "test", default=True), subset("edit", "train"))

CARD = """---
license: other  # see below
# What the Hub shows first.
configs:
- config_name: t2i
  data_files:
  - split: train
    path: t2i/train-*.parquet
  default: true
# Ours.
tags:
  - mine
---

Body, with configs: and
---
a line.
"""


def configs_of(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load_yaml(text.split("---\n")[1]).value["configs"]
    return found


def changed(text: str, wanted: Sequence[Config] = WANTED) -> str:
    found = with_configs(text, wanted, pattern)
    assert found is not None
    # What was brought up to date is up to date.
    assert with_configs(found, wanted, pattern) == found
    return found


def in_card(configs: str) -> str:
    return f"---\nlicense: mit\nconfigs:\n{configs}---\nBody\n"


def test_subsets_and_splits_are_added_and_nothing_else_changes() -> None:
    found = changed(CARD)
    added = """  - split: test
    path: t2i/test-*.parquet
  default: true
- config_name: edit
  data_files:
  - split: train
    path: edit/train-*.parquet
"""
    assert found == CARD.replace("  default: true\n", added)


def test_line_ends_stay() -> None:
    windows = CARD.replace("\n", "\r\n")
    assert changed(windows) == changed(CARD).replace("\n", "\r\n")


def test_header_without_configs_gets_them() -> None:
    for header in ("license: mit\n", "license: mit\nconfigs:\n", "license: mit\nconfigs: []\n"):
        found = changed(f"---\n{header}---\nBody\n")
        assert configs_of(found) == list(WANTED)
        assert found.startswith("---\nlicense: mit\nconfigs:\n- config_name: t2i\n")
        assert found.endswith("\n---\nBody\n")


def test_subsets_and_splits_that_are_gone_leave_the_header() -> None:
    found = changed(CARD, [subset("ask", "train", default=True)])
    # The default was that of a subset that is gone.
    assert configs_of(found) == [subset("ask", "train", default=True)]
    found = changed(changed(CARD), [subset("t2i", "test"), subset("edit", "train", default=True)])
    assert configs_of(found) == [subset("t2i", "test", default=True), subset("edit", "train")]


def test_what_a_person_wrote_in_configs_stays() -> None:
    found = changed(
        in_card("""  - config_name: words
    data_files: words.csv
    default: true
  - config_name: pictures
    description: Mine.
    data_files:
      - {split: fit, path: t2i/train-*.parquet}
      - {split: more, path: [a.parquet, b.parquet]}
      - {split: old, path: t2i/old-*.parquet}
  - config_name: edit
    data_files: edit/*.parquet
""")
    )
    assert configs_of(found) == [
        {"config_name": "words", "data_files": "words.csv", "default": True},
        {
            "config_name": "pictures",
            "description": "Mine.",
            "data_files": [
                {"split": "fit", "path": "t2i/train-*.parquet"},
                {"split": "more", "path": ["a.parquet", "b.parquet"]},
            ],
        },
        {"config_name": "edit", "data_files": "edit/*.parquet"},
        subset("t2i", "test"),
    ]


def test_default_that_a_person_removed_stays_removed() -> None:
    found = changed(CARD.replace("  default: true\n", ""))
    assert not any("default" in config for config in configs_of(found))


def test_header_that_names_all_stays_whatever_its_form() -> None:
    text = "---\n{license: mit, configs: [{config_name: edit, data_files: e.parquet}]}\n---\n"
    assert with_configs(text, [subset("edit", "train")], pattern) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# My own words\n",
        "---\nlicense: mit\n",
        "\n---\nlicense: mit\n---\n",
        "---\n- a\n---\n",
        "---\na: [\n---\n",
        "---\n{license: mit, configs: [{config_name: words, data_files: words.csv}]}\n---\n",
        "---\nconfigs: all\n---\n",
        "---\nconfigs: [a]\n---\n",
        "---\nconfigs: &a\n- config_name: x\nother: *a\n---\n",
    ],
)
def test_header_that_cannot_be_changed_alone_is_left(text: str) -> None:
    assert with_configs(text, WANTED, pattern) is None
