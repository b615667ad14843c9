"""What others wrote is read within bounds on size, depth and digits."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.bounded import (
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_VALUES,
    UnreadableFileError,
    abridged,
    check_depth,
    check_file,
    in_the_way,
    load_json,
    read_file,
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.booleans(), st.booleans())
def test_json_is_read_back_with_or_without_a_byte_order_mark(
    value: Any, marked: bool, escaped: bool
) -> None:
    try:
        content = json.dumps(value, ensure_ascii=escaped).encode()
    except UnicodeEncodeError:
        return
    if escaped and "\\ud" in content.decode():
        return
    assert load_json(b"\xef\xbb\xbf" + content if marked else content) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 100 deep"),
        ("[" + "[]," * 500 + "[" * 200 + "]" * 201, "nested more than 100 deep"),
        ("9" * (MAX_DIGITS + 1), "a number of 101 characters"),
        ("0." + "9" * 5000, "a number of 5,002 characters"),
        ("1e999", "too large for a number"),
        ("[NaN]", "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        ("[" + "0," * MAX_VALUES + "0]", "more than 2,000,000 values"),
        ("[1,", "Expecting value"),
        ("", "Expecting value"),
    ],
)
def test_what_is_out_of_bounds_is_an_error_that_says_so(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_json(text)


def test_bytes_that_are_not_utf_8_are_refused() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        load_json(b'"\xff"')


def test_brackets_count_only_outside_of_text_and_as_deep_as_they_nest() -> None:
    text = json.dumps({"a": "[" * 1000, "b": '"{[' * 500})
    assert load_json(text)["a"] == "[" * 1000
    assert load_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert len(load_json("[" + "[],{}," * 5000 + "[]]")) == 10_001


@pytest.mark.parametrize("end", ["", '"', "\\", '\\"'])
def test_a_text_of_escapes_takes_no_memory_and_no_time(end: str) -> None:
    """A pattern that tries again at every quotation mark would not come to its end."""
    text = "[]" * (MAX_DEPTH + 1) + '"' + '\\"' * 1_000_000 + end
    tracemalloc.start()
    check_depth(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(UnreadableFileError, match="of at most 4 bytes, found 5"):
        read_file(path, 4)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")
    with pytest.raises(UnreadableFileError, match="found a folder"):
        read_file(tmp_path)


def test_a_sparse_file_of_a_disks_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(200 * 2**30)
    with pytest.raises(UnreadableFileError, match=r"found 214,748,364,800"):
        read_file(path)


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
def test_a_pipe_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UnreadableFileError, match="found a device or pipe"):
            check_file(path)


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "there").symlink_to(tmp_path)
    assert in_the_way(tmp_path / "file" / "a") == f"{tmp_path}/file is a file"
    assert (
        in_the_way(tmp_path / "link" / "a" / "b") == f"{tmp_path}/link is a link that leads nowhere"
    )
    assert in_the_way(tmp_path / "there" / "new") is None


def test_a_long_text_loses_its_middle_and_no_more_than_it_must() -> None:
    assert abridged("abcdef", 6) == "abcdef"
    assert abridged("abcdefg", 6) == "abc ... (1 characters left out) ... efg"
