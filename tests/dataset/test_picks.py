"""Picks files, as the gallery saves them and as they are not to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sensebatch.dataset.picks import Pick, PickedJob, picks_to_json, read_picks
from sensebatch.errors import ConfigError

RUNS = {
    "0123456789ab": {
        "storm": PickedJob(pick=Pick.KEEP, tags=("best", "sky"), key="a" * 64),
        "a/b": PickedJob(pick=Pick.REJECT),
        "c": PickedJob(tags=("sea",)),
    },
    "ba9876543210": {},
}


def test_picks_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "picks.json"
    path.write_text(picks_to_json(RUNS), encoding="utf-8")
    found = read_picks(path)
    assert found.runs == RUNS
    assert found.of_run("0123456789ab")["storm"].pick is Pick.KEEP


def test_two_entries_of_a_run_are_one(tmp_path: Path) -> None:
    run = {"run": "r", "jobs": {"a": {"pick": "keep"}}}
    again = {"run": "r", "jobs": {"a": {"pick": "reject"}, "b": {"pick": None}}, "folder": "x"}
    path = tmp_path / "picks.json"
    path.write_text(json.dumps({"sensebatch_picks": 1, "runs": [run, again], "saved_at": "now"}))
    assert read_picks(path).runs == {"r": {"a": PickedJob(pick=Pick.REJECT), "b": PickedJob()}}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "expected a picks file"),
        ({"runs": []}, "expected a picks file"),
        ({"sensebatch_picks": 2, "runs": []}, "expected 1, found 2; update sensebatch"),
        ({"sensebatch_picks": 1}, "runs: expected a list, found None"),
        ({"sensebatch_picks": 1, "runs": [3]}, r"runs\[0\]: expected an object, found 3"),
        ({"sensebatch_picks": 1, "runs": [{"jobs": {}}]}, r"runs\[0\]\.run: expected text"),
        ({"sensebatch_picks": 1, "runs": [{"run": "r"}]}, r"runs\[0\]\.jobs: expected an object"),
    ],
)
def test_file_of_another_form_is_refused(tmp_path: Path, document: Any, said: str) -> None:
    path = tmp_path / "picks.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=said) as caught:
        read_picks(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (3, r"jobs\['a'\]: expected an object, found 3"),
        ({"pick": "maybe"}, r"\['a'\]\.pick: expected keep, reject or null, found 'maybe'"),
        ({"tags": "best"}, r"\['a'\]\.tags: expected a list of words, found 'best'"),
        ({"tags": [1]}, r"\['a'\]\.tags: expected a list of words"),
        ({"key": 5}, r"\['a'\]\.key: expected text, found 5"),
    ],
)
def test_wrong_pick_is_named_with_its_job(tmp_path: Path, values: Any, said: str) -> None:
    path = tmp_path / "picks.json"
    runs = [{"run": "r", "jobs": {"a": values}}]
    path.write_text(json.dumps({"sensebatch_picks": 1, "runs": runs}))
    with pytest.raises(ConfigError, match=said):
        read_picks(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 1000])
def test_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picks.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="expected a picks file"):
        read_picks(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file"):
        read_picks(tmp_path / "none.json")
