"""Small manifests and images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sensebatch.config import RunConfig, default_config
from sensebatch.errors import ManifestError
from sensebatch.jobs import Job
from sensebatch.manifest.read import read_manifests

WriteJsonl = Callable[..., Path]
ReadRows = Callable[..., list[Job]]
Mistakes = Callable[..., list[str]]


@pytest.fixture
def config() -> RunConfig:
    return default_config()


@pytest.fixture
def write_yaml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "jobs.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    def write(*rows: dict[str, Any], name: str = "jobs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def draw_input(tmp_path: Path) -> Callable[..., str]:
    """Draws an image beside the manifest and returns its name."""

    def draw(name: str = "in.png", size: tuple[int, int] = (96, 64), colour: str = "red") -> str:
        Image.new("RGB", size, colour).save(tmp_path / name)
        return name

    return draw


@pytest.fixture
def read_rows(write_jsonl: WriteJsonl, config: RunConfig) -> ReadRows:
    """Reads rows as a JSONL manifest."""

    def read(*rows: dict[str, Any], **options: Any) -> list[Job]:
        return list(read_manifests([write_jsonl(*rows)], config, **options))

    return read


@pytest.fixture
def mistakes(read_rows: ReadRows) -> Mistakes:
    """Reads bad rows as a JSONL manifest; returns `row: field: message` of each mistake."""

    def read(*rows: dict[str, Any], **options: Any) -> list[str]:
        with pytest.raises(ManifestError) as caught:
            read_rows(*rows, **options)
        return [f"{p.row}: {p.field}: {p.message}" for p in caught.value.problems]

    return read
