from __future__ import annotations

from collections import Counter

import pytest

from sensebatch.errors import ConfigError
from sensebatch.export.splits import parse_splits, unused


def test_set_without_splits_is_all_train() -> None:
    assert parse_splits(None).of("anything") == "train"


def test_splits_have_about_their_shares() -> None:
    splits = parse_splits("train=0.8, val=0.1, test=0.1")
    count = Counter(splits.of(f"prompt {number}") for number in range(5000))
    assert count["train"] / 5000 == pytest.approx(0.8, abs=0.03)
    assert count["val"] / 5000 == pytest.approx(0.1, abs=0.03)


def test_split_of_a_group_never_changes() -> None:
    # Sets that were published depend on it.
    splits = parse_splits("train=0.5,test=0.5")
    found = [splits.of(f"prompt {number}") for number in range(8)]
    assert " ".join(found) == "train train train test test test train train"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("train=0.9", "a sum of 0.9"),
        ("train=0.9,test=0.2", "a sum of 1.1"),
        ("train=1,test=0", "a share of 0"),
        ("train=1.5,test=-0.5", "a share of 1.5"),
        ("train=x", "found 'train=x'"),
        ("train", "found 'train'"),
        ("", "the name ''"),
        ("all=1", "the name 'all'"),
        ("a/b=1", "the name 'a/b'"),
        ("a=0.5,a=0.5", "a name twice"),
        ("a=1/0", "found 'a=1/0'"),
    ],
)
def test_mistakes_in_splits_are_named(text: str, found: str) -> None:
    with pytest.raises(ConfigError, match="--split") as caught:
        parse_splits(text)
    assert found in str(caught.value)


def test_thirds_sum_to_one() -> None:
    assert parse_splits("a=0.3333333,b=0.3333333,c=0.3333334").names == ("a", "b", "c")
    assert parse_splits("a=1/3,b=2/3").names == ("a", "b")


def test_splits_without_a_row_are_named() -> None:
    assert unused(parse_splits("a=0.5,b=0.5"), ["b"]) == ["a"]
