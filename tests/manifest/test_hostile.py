"""Whatever a manifest holds, it is read or refused with a place, within bounds."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sensebatch.config import RunConfig
from sensebatch.errors import ManifestError
from sensebatch.manifest.fields import JOB_FIELD_NAMES
from sensebatch.manifest.read import read_manifest, run_name
from tests.bounds import bounded

pytestmark = pytest.mark.slow

MAX_BYTES = 64 * 2**20
"""Most memory that a small manifest may take to be refused or read."""


def outcome(path: Path, config: RunConfig) -> list[str]:
    """Returns the mistakes of a manifest, of which each must have a place and fit a screen."""

    def read() -> Any:
        return read_manifest(path, config)

    try:
        with bounded():
            run_name([path], read)
            for _ in read():
                pass
    except ManifestError as error:
        for problem in error.problems:
            assert problem.file
            assert problem.row
            assert len(problem.message) < 1500
            assert "\x1b" not in str(problem)
        return [problem.message for problem in error.problems]
    return []


HUGE = "9" * 5000
DOCUMENTS = [
    "version: 1\njobs: " + "[" * 100_000,
    "version: 1\njobs:\n- " + "- " * 100_000 + "a",
    "version: 1\njobs:\n- prompt: !!bool maybe",
    "version: 1\njobs:\n- prompt: !!timestamp foo",
    "version: 1\njobs:\n- prompt: !!binary //",
    "version: 1\njobs:\n- {prompt: a, seed: 0x" + "f" * 5000 + "}",
    "version: 0x" + "f" * 5000 + "\njobs: []",
    "version: 1\njobs:\n- {prompt: a, metadata: {x: " + HUGE + "}}",
    "version: 1\njobs:\n- {prompt: a, matrix: {seed: [" + HUGE + "]}}",
    "version: 1\njobs:\n- {prompt: a, n: 2147483647}",
    "version: 1\njobs:\n- {prompt: a, n: 1000000, matrix: {cfg_scale: [1, 2]}}",
    'version: 1\njobs:\n- {prompt: a, system_prompt: "\\uD800"}',
    'version: 1\nname: "\\uDFFF"\njobs: [{prompt: a}]',
    "version: 1\nname: " + "n" * 300 + "\njobs: [{prompt: a}]",
    "version: 1\njobs: &a [*a]",
    "version: 1\n? [a]\n: b",
    "version: 1\njobs:\n- {prompt: a, num_steps: 1e400}",
    "version: 1\njobs:\n- {prompt: a, cfg_scale: .nan}",
    "\x00",
    "version: 1\njobs:\n- {prompt: a, \x1b[31m: 1}",
]


LINES = [
    "[" * 100_000,
    '{"prompt": "a", "metadata": ' + '{"a":' * 500 + "1" + "}" * 501,
    '{"prompt": "a", "seed": ' + HUGE + "}",
    '{"prompt": "a", "metadata": {"x": 1e999}}',
    '{"prompt": "a", "metadata": "' + "[" * 5000 + '"}',
    '{"prompt": "a", "matrix": {"x": [' + "1," * 5000 + "1]}}",
    '{"prompt": "a", "n": 2147483647}',
    '{"prompt": "a", "system_prompt": "\\ud800"}',
    '{"prompt": "a", "image": "/dev/zero"}',
    '{"prompt": "a", "image": "' + "x/" * 3000 + '"}',
    '{"prompt": "a", "images": [[[["x"]]]]}',
    '{"prompt": "a", "' + "k" * 5000 + '": 1}',
    '{"prompt": "a", "\\u001b[31m": 1}',
    '{"prompt": "a", "id": "' + "i" * 5000 + '"}',
    '{"prompt": "a", "resolution": "' + "9" * 5000 + "x" + '9"}',
    '{"prompt": "a", "input_max_pixels": "' + "9" * 5000 + '"}',
]


HOSTILE = [*(("yaml", text) for text in DOCUMENTS), *(("jsonl", line) for line in LINES)]


@pytest.mark.parametrize(("suffix", "text"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_hostile_is_a_mistake_within_bounds(
    tmp_path: Path, config: RunConfig, suffix: str, text: str
) -> None:
    path = tmp_path / f"jobs.{suffix}"
    path.write_text(text)
    tracemalloc.start()
    assert outcome(path, config)
    assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    tracemalloc.stop()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**31 - 2, 2**64)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["t2i", "edit", "interleave", "in.png", ".", "16:9", "64x64", "{x}", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*JOB_FIELD_NAMES, "x", "bytes", "path"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
NAMES = st.sampled_from([*JOB_FIELD_NAMES, "x", "steps"]) | st.text(max_size=4)
ROWS = st.lists(st.dictionaries(NAMES, VALUES, max_size=5) | VALUES, max_size=3)
FUZZED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZED
@given(rows=ROWS)
@example(rows=[{"prompt": "a", "matrix": {"seed": {"x": 1}}}])
def test_any_jsonl_is_read_or_refused(tmp_path: Path, config: RunConfig, rows: list[Any]) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome(path, config)


@FUZZED
@given(rows=ROWS, version=VALUES, defaults=VALUES)
def test_any_yaml_is_read_or_refused(
    tmp_path: Path, config: RunConfig, rows: list[Any], version: Any, defaults: Any
) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(json.dumps({"version": version, "defaults": defaults, "jobs": rows}))
    outcome(path, config)


@FUZZED
@given(text=st.text(st.characters(max_codepoint=127), max_size=60))
def test_any_text_is_read_or_refused(tmp_path: Path, config: RunConfig, text: str) -> None:
    for suffix in ("yaml", "jsonl", "parquet"):
        path = tmp_path / f"jobs.{suffix}"
        path.write_text(text)
        outcome(path, config)


@FUZZED
@given(data=st.data())
def test_any_table_is_read_or_refused(
    tmp_path: Path, config: RunConfig, data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(JOB_FIELD_NAMES), unique=True, max_size=4))
    columns = {}
    for name in names:
        values = data.draw(st.lists(VALUES, min_size=2, max_size=2))
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            columns[name] = pa.array([json.dumps(value, default=str) for value in values])
    path = tmp_path / "jobs.parquet"
    try:
        pq.write_table(pa.table(columns), path)
    except pa.ArrowException:
        return
    outcome(path, config)


@FUZZED
@given(place=st.floats(0, 1), junk=st.binary(min_size=1, max_size=6))
def test_a_damaged_table_is_read_or_refused(
    tmp_path: Path, config: RunConfig, place: float, junk: bytes
) -> None:
    path = tmp_path / "jobs.parquet"
    table = pa.table({"prompt": ["a", "b"], "seed": [1, 2], "tags": [["x"], None]})
    pq.write_table(table, path)
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    content[start : start + len(junk)] = junk
    path.write_bytes(content)
    outcome(path, config)
