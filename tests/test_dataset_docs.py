"""Every command and example of docs/dataset.md runs, in its order, after the catalog was drawn."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sensebatch.cli.main import main

DOCUMENT = Path(__file__).parents[1] / "docs" / "dataset.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
NEEDS = {"--c2pa-certificate": "c2pa", "load_dataset": "datasets"}
"""Packages that are not everywhere, by a word of what needs them."""


class PrivateHub:
    """Stands for the Hub, which no test asks; tests/export/fake_hub.py has one that answers."""

    def __init__(self, repo: str, **_: Any) -> None:
        self.repo = repo

    def push(self, folder: Path, *_: Any, **__: Any) -> str:
        assert (folder / "README.md").exists()
        return self.repo


def _run(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command)[1:])
    assert ended.value.code == 0, f"{command}: {capfd.readouterr().err}"
    capfd.readouterr()


def _write_picks() -> None:
    """Writes a picks file as the gallery does, which a person would have saved."""
    import pyarrow.parquet as pq

    (run, *_) = pq.read_table("outputs/catalog/log.parquet")["run"].to_pylist()
    picks = {"run": run, "jobs": {"red-circle": {"pick": "keep"}}}
    Path("picks.json").write_text(json.dumps({"sensebatch_picks": 1, "runs": [picks]}))


@pytest.mark.slow
def test_commands_and_examples_of_the_document_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sensebatch.export.push.Hub", PrivateHub)
    if find_spec("datasets") is not None:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if find_spec("c2pa") is not None:
        from tests.export.certificates import make_certificate

        make_certificate(tmp_path)
    blocks = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))
    num_run = 0
    for number, (language, text) in enumerate(blocks):
        if any(word in text and find_spec(NEEDS[word]) is None for word in NEEDS):
            continue
        if language == "python":
            exec(compile(text, f"{DOCUMENT.name}, block {number}", "exec"), {"__name__": "example"})
            out, _ = capfd.readouterr()
            if out:
                assert out == blocks[number + 1][1]
            num_run += 1
        elif text.startswith("sensebatch "):
            for command in text.splitlines():
                _run(command, capfd)
                if command == "sensebatch demo":
                    _write_picks()
                num_run += 1
    assert num_run >= 10
