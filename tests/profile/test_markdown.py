"""The document says what the rows say, with the published figures beside them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch.profile.markdown import format_markdown, published_markdown
from sensebatch.profile.published import published
from sensebatch.profile.rows import FAILED, with_ratios
from sensebatch.profile.suites import Suite
from tests.profile.results import result

DOCUMENT = Path(__file__).parents[2] / "docs" / "measurements.md"
FIGURES = (
    "wall_s", "step_s", "steady_step_s", "seconds_per_image", "image_tok_per_s",
    "steady_image_tok_per_s", "images", "text_tokens", "text_tok_per_s", "limit_s", "limit_step_s",
)  # fmt: skip
NONE = dict.fromkeys(FIGURES)

SPEED = """\
| case | options | mode taken | images | s/step | steady s/step | limit s/step | s/image | \
limit s/image | tok/s | ratio | steady tok/s | steady ratio | text tokens | text tok/s | \
waited % | rest % |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | \
---: | ---: | ---: |
| full | `--vram-mode full` | full | 8 | 0.3750 | 0.2500 | 0.2220 | 20.000 | 15.000 | 204.80 | \
1.000 | 300.00 | 1.000 | 2,400 | 96.0 | - | - |
| low (failed) | `--vram-mode low` | low | - | - | - | - | - | - | - | - | - | - | - | - | - | - |
"""
MEMORY = """\
| case | peak alloc / res GiB | expected GiB | expected / reserved | load s | \
of it compile s | load alloc / res GiB | RSS load → gen GiB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| full | 34.00 / 35.00 | 34.00 | 0.971 | 30.00 | 4.00 | 32.00 / 33.00 | 5.00 → 6.00 |
| low | 34.00 / 35.00 | 34.00 | 0.971 | 30.00 | 4.00 | 32.00 / 33.00 | 5.00 → 6.00 |
"""
BESIDE = """\
| case | source | load alloc / res GiB | peak alloc / res GiB | RSS load → gen GiB | s/image | \
tok/s |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| full | release | - | 34.83 / 35.82 | - | 22.108 | 185.27 |
| full | later | - | - | - | 20.900 | - |
| full | sensebatch | 32.00 / 33.00 | 34.00 / 35.00 | 5.00 → 6.00 | 20.000 | 204.80 |
| fast | later | - | 19.70 / 20.40 | - → 42.00 | 22.900 | - |
| fast | u1.5 | - | 17.30 / 17.90 | - | - | - |
| balanced | release | - | 6.78 / 12.50 | 0.95 → 47.18 | 112.394 | 36.44 |
"""


def _document(**changes: Any) -> str:
    low = result("low", status=FAILED, error="low-1: it broke", **NONE)
    return format_markdown(with_ratios([result("full", **changes), low]))


def test_tables_are_these() -> None:
    text = _document()
    assert SPEED in text
    assert MEMORY in text
    assert BESIDE in text
    assert "- low: low-1: it broke" in text
    assert "```\nsensebatch run full.yaml\nsensebatch run low.yaml\n```" in text
    assert "- device: a GPU" in text


@pytest.mark.parametrize(
    ("changes", "scaled"),
    [({}, False), ({"num_steps": 4}, True), ({"height": 64}, True), ({"model": "tiny"}, True)],
)
def test_figures_of_other_work_are_not_passed_off_as_comparable(
    changes: dict[str, Any], scaled: bool
) -> None:
    assert ("These cases were scaled down" in _document(**changes)) == scaled


def test_a_smaller_case_that_is_not_compared_is_no_scaling_down() -> None:
    rows = [result("t2i", suite="speed"), result("t2i-1024", suite="speed", height=1024)]
    assert "These cases were scaled down" not in format_markdown(rows)


def test_every_table_has_as_many_cells_as_columns() -> None:
    blocks = re.findall(r"(?:^\|.*\|\n)+", _document(), re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_a_suite_of_which_nothing_was_published_is_beside_nothing() -> None:
    text = format_markdown([result("night", suite="night", wait_share=0.0123)])
    assert "published" not in text
    assert text.count("| 1.23 |") == 1


def test_a_suite_that_draws_nothing_has_a_table_of_its_jobs() -> None:
    row = result("choices", suite="ask", jobs_per_s=21.5, steady_jobs_per_s=24.25)
    text = format_markdown([replace(row, images=0, jobs_done=128, text_tokens=0)])
    assert "| choices | `--vram-mode choices` | choices | 128 | 21.50 | 24.25 |" in text
    assert "s/step" not in text


@pytest.mark.parametrize("suite", [suite for suite in Suite if published(suite)])
def test_published_tables_of_the_documentation_are_the_data(suite: Suite) -> None:
    assert published_markdown(suite) in DOCUMENT.read_text(encoding="utf-8")
