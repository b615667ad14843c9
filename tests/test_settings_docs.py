"""docs/settings.md names every setting, with the default and the flag that it has."""

from __future__ import annotations

import re
from pathlib import Path

from sensebatch.config import RunConfig, default_config
from sensebatch.settings import resolve_settings
from tests import documented_settings

DOCUMENT = documented_settings.DOCS.read_text(encoding="utf-8")


def test_the_table_is_what_is_declared() -> None:
    assert documented_settings.written(DOCUMENT) == DOCUMENT, (
        "run python -m tests.documented_settings"
    )
    assert {*documented_settings.SECTIONS, "accept", "tasks"} == set(RunConfig.__slots__)


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    path = tmp_path / "example.yaml"
    path.write_text(text, encoding="utf-8")
    config, default = resolve_settings(config_file=path), default_config()
    for section in ("memory", "output", "execution"):
        assert getattr(config, section) != getattr(default, section)
    assert config.tasks != default.tasks
