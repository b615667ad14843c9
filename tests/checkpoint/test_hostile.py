"""Checkpoints that somebody made to do harm, or that were damaged: refused by name, in no time.

Nothing here measures time: a bound that is missing shows as a traceback, as memory, or as a test
that never ends.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from sensebatch.checkpoint.architecture import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    parse_architecture,
)
from sensebatch.checkpoint.files import check_tensors, open_checkpoint, read_folder, read_header
from sensebatch.checkpoint.fingerprint import fingerprint
from sensebatch.checkpoint.lora import read_lora
from sensebatch.checkpoint.system_prompts import (
    BUILT_IN,
    MAX_SOURCE_BYTES,
    resolve_system_prompts,
)
from sensebatch.checkpoint.tensors import expected_tensors, head_part_rows
from sensebatch.errors import CheckpointError
from sensebatch.tasks import Task
from sensebatch.units import MIB
from tests.bounds import bounded
from tests.checkpoint.folders import write_folder
from tests.golden_data import CONFIGS, golden_architecture, golden_config

pytestmark = pytest.mark.slow

MOST_BYTES = 256 * MIB
"""What reading a hostile checkpoint may take of memory."""

NUMBERS = st.sampled_from([-1, 0, 1, 7, 2**31, 2**63, 10**9, 10**99, 1e300, -0.5, 1e-320])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def fields_of(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Returns the places of all values in a configuration, sections included."""
    places = []
    for name, value in config.items():
        places.append((*prefix, name))
        if isinstance(value, dict):
            places += fields_of(value, (*prefix, name))
    return places


@settings(max_examples=300)
@given(st.sampled_from(CONFIGS), st.data())
def test_any_configuration_is_read_or_refused(name: str, data: st.DataObject) -> None:
    config = golden_config(name)
    for place in data.draw(st.lists(st.sampled_from(fields_of(config)), min_size=1, max_size=3)):
        section = config
        for part in place[:-1]:
            section = section.get(part) or {}
        if isinstance(section, dict):
            section[place[-1]] = data.draw(VALUES)
    message = "config.json"
    with bounded_memory(), bounded():
        try:
            head_part_rows(parse_architecture(config))
        except CheckpointError as error:
            message = str(error)
    assert "config.json" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", MAX_LAYERS + 1),
        ("num_hidden_layers", 10**9),
        ("num_experts", MAX_EXPERTS + 1),
        ("num_experts", 10**9),
        ("gen_num_experts", 10**9),
        ("vocab_size", MAX_VOCABULARY + 1),
        ("hidden_size", MAX_WIDTH + 1),
        ("num_attention_heads", 0),
        ("num_attention_heads", -1),
        ("head_dim", 10**30),
        ("mlp_only_layers", [[1]]),
        ("mlp_only_layers", [{}]),
        ("rope_scaling", ["x" * 100_000]),
    ],
)
def test_a_number_out_of_bounds_is_named(field: str, value: object) -> None:
    config = golden_config("moe")
    config["llm_config"][field] = value
    with pytest.raises(CheckpointError, match=rf"llm_config\.{field}: expected") as raised:
        parse_architecture(config)
    assert len(str(raised.value)) < 300


def test_layers_and_experts_are_bounded_together() -> None:
    config = golden_config("moe")
    config["llm_config"] |= {"num_hidden_layers": MAX_LAYERS, "num_experts": MAX_EXPERTS}
    with pytest.raises(CheckpointError, match="at most 200,000 matrices of experts"):
        parse_architecture(config)


def test_a_vocabulary_is_cut_into_few_parts_even_if_layers_are_tiny() -> None:
    config = golden_config("dense_fm")
    config["llm_config"] |= {"vocab_size": MAX_VOCABULARY, "intermediate_size": 1}
    rows = head_part_rows(parse_architecture(config))
    assert sum(rows) == MAX_VOCABULARY
    assert len(rows) <= 1024


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (nested(100_000), "nested more than 100 deep"),
        ('{"llm_config": {"rope_theta": ' + "9" * 400 + "}}", "a number of 400 characters"),
        ('{"rope_theta": Infinity}', "Infinity is not JSON"),
        ('{"rope_theta": 1e999}', "too large for a number"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("[" + "0," * 500_000 + "0]", "expected a JSON object, found list"),
        ('"' + "x" * 2**21 + '"', "expected a file of at most 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_out_of_bounds_is_refused_by_name(
    tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    file = write_folder(tmp_path) / name
    file.write_text(content, encoding="utf-8")
    if name != "config.json" and "of at most" in complaint:
        complaint = "expected a JSON object, found str"
    with bounded_memory(), pytest.raises(CheckpointError, match=complaint) as raised:
        read_folder(tmp_path)
    assert str(file) in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_byte_order_mark_is_accepted_in_every_json(tmp_path: Path) -> None:
    write_folder(tmp_path, num_shards=2)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"generation": "Draw."}', encoding="utf-8")
    for file in tmp_path.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    checkpoint = read_folder(tmp_path)
    check_tensors(checkpoint)
    assert resolve_system_prompts(checkpoint, prompts).of_task(Task.T2I).text == "Draw."


@pytest.mark.parametrize("name", ["._model.safetensors", ".model.safetensors.index.json", "._x.py"])
def test_hidden_files_are_left_out(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / name).write_bytes(b"\0\5\26\7SYSTEM_MESSAGE_FOR_GEN = 'x'")
    checkpoint = read_folder(tmp_path)
    check_tensors(checkpoint)
    assert resolve_system_prompts(checkpoint).of_task(Task.T2I).source == BUILT_IN


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "a.py"],
)
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "a.py":
        prompts = resolve_system_prompts(read_folder(tmp_path))
        assert prompts.of_task(Task.T2I).source == BUILT_IN
        return
    with pytest.raises(CheckpointError, match=rf"{name}: .*found a device or pipe"):
        fingerprint(read_folder(tmp_path))


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
def test_a_lora_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"lora: .*found a device or pipe"):
        read_lora(tmp_path / "lora", {})


def test_a_tokenizer_of_a_disks_size_is_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(200 * 2**30)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: .*of at most"):
        fingerprint(read_folder(tmp_path))


@pytest.mark.parametrize(
    "name", ["x" * 5000, "x" * 256, "../model.safetensors", "/etc/passwd", "a\nb", "a\0b", "", ".."]
)
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    index = write_folder(tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="weight_map: expected names of files") as raised:
        read_folder(tmp_path)
    assert len(str(raised.value)) < 500
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("model", ["x" * 5000, "~nobody-of-this-name/x", "a\0b"])
def test_a_model_name_that_no_folder_can_have_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="expected") as raised:
        open_checkpoint(model)
    assert str(raised.value).isprintable()


def as_safetensors(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": []},
        {"a": ENTRY | {"shape": [float("inf")]}},
        {"a": ENTRY | {"data_offsets": [0, float("inf")]}},
        {"a": ENTRY | {"data_offsets": [0, 8.0]}},
        {"a": ENTRY | {"data_offsets": [-8, 0]}},
        {"a": ENTRY | {"data_offsets": [0]}},
        {"a": ENTRY | {"shape": "2"}},
        {"a": ENTRY | {"shape": [True, 2]}},
        {"a": ENTRY | {"shape": [10**50]}},
        {"a": ENTRY | {"shape": [1] * 100_000}},
        {"a": ENTRY | {"dtype": {}}},
        {"a" * 100_000: {}},
        {"\x1b[31m": {}},
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: object) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(as_safetensors(header))
    with bounded_memory(), pytest.raises(CheckpointError, match=r"x\.safetensors") as raised:
        read_header(file)
    assert len(str(raised.value)) < 1000
    assert str(raised.value).isprintable()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=8), VALUES | st.just(ENTRY), max_size=4), st.data())
def test_any_header_is_read_or_refused(
    tmp_path: Path, header: dict[str, Any], data: st.DataObject
) -> None:
    for name in list(header):
        field = data.draw(st.sampled_from([*ENTRY, "no field"]))
        if header[name] == ENTRY and field in ENTRY:
            header[name] = ENTRY | {field: data.draw(VALUES)}
    file = tmp_path / "x.safetensors"
    try:
        file.write_bytes(as_safetensors(header))
    except ValueError:
        return
    message = file.name
    with bounded_memory(), bounded():
        try:
            read_header(file)
        except CheckpointError as error:
            message = str(error)
    assert file.name in message


EXPECTED = expected_tensors(golden_architecture("dense_fm"))
WEIGHT = "language_model.model.layers.0.self_attn.k_proj"
KOHYA = "lora_unet_" + WEIGHT.replace(".", "_")
ENDINGS = [".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".alpha"]
LORA_KEYS = st.sampled_from(
    [
        f"{prefix}{WEIGHT}{ending}"
        for prefix in ("", "diffusion_model.", "transformer.", "base_model.model.")
        for ending in ENDINGS
    ]
    + [f"{KOHYA}{ending}" for ending in ENDINGS]
)
MATRICES = st.builds(
    lambda shape, fill: np.full(shape, fill, np.float32),
    st.sampled_from([(), (0,), (1,), (2, 64), (64, 2), (0, 64), (32, 2), (1, 1, 64, 64)]),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)
ADAPTERS = st.dictionaries(
    st.sampled_from(
        ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type"]
    ),
    VALUES,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(LORA_KEYS | st.text(max_size=8), MATRICES, max_size=4),
    adapter=st.none() | ADAPTERS | VALUES,
    junk=st.none() | st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)),
)
def test_any_lora_is_read_or_refused(
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    adapter: Any,
    junk: tuple[float, bytes] | None,
) -> None:
    file, config = tmp_path / "lora.safetensors", tmp_path / "adapter_config.json"
    content = save(tensors)
    if junk is not None:
        place = int(junk[0] * len(content))
        content = content[:place] + junk[1] + content[place:]
    file.write_bytes(content)
    config.unlink(missing_ok=True)
    if adapter is not None:
        config.write_text(json.dumps(adapter), encoding="utf-8")
    message = file.name
    with bounded_memory(), bounded():
        try:
            assert read_lora(file, EXPECTED).pairs
        except CheckpointError as error:
            message = str(error)
    assert file.name in message or config.name in message


GEN = "SYSTEM_MESSAGE_FOR_GEN"
SOURCES = {
    "parentheses": f"{GEN} = {'(' * 5000}''{')' * 5000}",
    "signs": f"{GEN} = {'-' * 100_000}1",
    "sums": f"{GEN} = " + "+".join(["''"] * 50_000),
    "calls": f"{GEN} = ''" + ".strip()" * 50_000,
    "attributes": f"{GEN} = a" + ".b" * 50_000,
    "indents": "\n".join(" " * depth + "if 1:" for depth in range(200)) + f" {GEN} = ''",
    "escapes": f"{GEN} = '\\d' is 1",
    "a zero byte": f"{GEN} = '\0'",
    "half of a surrogate pair": f"{GEN} = '\\ud800'",
    "megabytes": f"{GEN} = ''\n" + "x = 1\n" * (MAX_SOURCE_BYTES // 6),
}


@pytest.mark.parametrize("name", SOURCES)
def test_python_out_of_bounds_is_passed_over(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "a.py").write_text(SOURCES[name], encoding="utf-8")
    with bounded_memory(), bounded():
        prompts = resolve_system_prompts(read_folder(tmp_path))
    assert prompts.of_task(Task.T2I).source == BUILT_IN


def test_only_so_much_python_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    source = f"x = '{GEN}'\n"
    last = f"{GEN} = 'found'\n"
    most = 9 * len(source) + len(last)
    monkeypatch.setattr("sensebatch.checkpoint.system_prompts.MAX_PARSED_BYTES", most)
    for number in range(10):
        (tmp_path / f"{number}.py").write_text(source)
    (tmp_path / "last.py").write_text(last)
    checkpoint = read_folder(tmp_path)
    assert resolve_system_prompts(checkpoint).of_task(Task.T2I).source == BUILT_IN
    (tmp_path / "9.py").unlink()
    assert resolve_system_prompts(checkpoint).of_task(Task.T2I).text == "found"


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode(errors="replace")))
@example(b"SYSTEM_MESSAGE_FOR_GEN = 'a'")
def test_any_python_is_passed_over_or_read(tmp_path: Path, source: bytes) -> None:
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        write_folder(folder)
    (folder / "a.py").write_bytes(GEN.encode() + b" = " + source)
    with bounded():
        text = resolve_system_prompts(read_folder(folder)).of_task(Task.T2I).text
    assert isinstance(text, str)
    text.encode()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"generation": "\\ud800"}', "half of a surrogate pair"),
        (nested(100_000), "nested more than 100 deep"),
        ('{"' + "x" * 10_000 + '": 1}', "expected only generation and interleave"),
        ('{"generation": ' + "[1]" + "}", "generation: expected a string, found"),
    ],
)
def test_a_prompt_file_out_of_bounds_is_refused_by_name(
    tmp_path: Path, content: str, complaint: str
) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=complaint) as raised:
        resolve_system_prompts(open_checkpoint("tiny"), file)
    assert str(file) in str(raised.value)
    assert len(str(raised.value)) < 500
