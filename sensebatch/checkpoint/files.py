"""A checkpoint on disk: where it is and where in its files each tensor lies. No torch.

Reads `config.json`, the index and the headers of the safetensors files, and nothing else. Others
wrote them, so everything is read within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensebatch.bounded import check_file, load_json, quoted, read_file, shown
from sensebatch.checkpoint.architecture import (
    A3B,
    OFFICIAL_8B,
    OFFICIAL_U15,
    Architecture,
    parse_architecture,
)
from sensebatch.checkpoint.hub import download, is_hub_id
from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
from sensebatch.config import SYNTHETIC_PREFIX, TINY_MODEL
from sensebatch.errors import CheckpointError

TINY_FOLDER = Path(__file__).parents[1] / "tiny" / "checkpoint"
"""The embedded checkpoint."""

INDEX_SUFFIX = ".safetensors.index.json"
MAX_CONFIG_BYTES = 2**20
MAX_INDEX_BYTES = 2**25
MAX_HEADER_BYTES = 2**25
"""Many times the header of a model with thousands of experts; a larger one is something else."""
MAX_NAME_BYTES = 255
"""Longest file name that file systems have."""
MAX_SIDES = 8
"""Most dimensions of a tensor."""
MAX_NUMBER = 2**63 - 1
"""Largest side or offset."""

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The dtypes, in safetensors' names, that weights may have."""

NUM_LISTED = 5
"""How many tensors of a kind an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """Where a tensor lies."""

    file: Path
    dtype: str
    """In safetensors' names: `BF16`, `F32`."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder, read as far as its headers."""

    name: str
    """As the user named it."""
    path: Path
    config: Mapping[str, Any]
    """The parsed `config.json`."""
    architecture: Architecture
    tensors: Mapping[str, TensorFile]
    synthetic: bool = False
    """Whether the weights come from a rule; `tensors` then name no files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifferences:
    """How a checkpoint's tensors differ from what its architecture asks for."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    wrong: tuple[str, ...]
    """Tensors of another shape, or of a dtype that weights cannot have; with both said."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.wrong)


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Returns a checkpoint from a folder, from the Hub, or the embedded one.

    Args:
        model: `tiny`; synthetic weights for profiling, `synthetic:8b`, `synthetic:u1.5` (of the
            same sizes, with the convolutional head and the generation expert in float32),
            `synthetic:a3b` (sparse) or `synthetic:tiny`; a folder; or a Hub id `owner/name`. A
            folder wins over a Hub id; write `./tiny` for a folder of that name.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: There is no such folder or Hub id, it cannot be fetched, or its files
            cannot be read.
    """
    if model == TINY_MODEL:
        return read_folder(TINY_FOLDER, name=model)
    if model.startswith(SYNTHETIC_PREFIX):
        return _synthetic(model)
    if not model.strip():
        raise CheckpointError("expected a checkpoint folder, a Hub id or tiny, found an empty text")
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{quoted(model)}: expected a checkpoint folder or a Hub id: {reason}"
        ) from error
    if is_folder:
        if revision is not None:
            raise CheckpointError(
                f"{shown(model)}: expected a Hub id beside revision {revision!r}, found a folder"
            )
        return read_folder(folder, name=model)
    if exists:
        raise CheckpointError(f"{shown(model)}: expected a checkpoint folder, found a file")
    if not is_hub_id(model):
        raise CheckpointError(
            f"{shown(model)}: expected {TINY_MODEL!r}, a checkpoint folder or a Hub id owner/name; "
            "no such folder"
        )
    return read_folder(download(model, revision), name=model)


def _synthetic(model: str) -> Checkpoint:
    """Returns a checkpoint without files: the shape of a model, the embedded tokenizer."""
    size = model.removeprefix(SYNTHETIC_PREFIX)
    configs = {
        "8b": OFFICIAL_8B,
        "u1.5": OFFICIAL_U15,
        "a3b": A3B,
        "tiny": read_json(TINY_FOLDER / "config.json"),
    }
    if size not in configs:
        raise CheckpointError(
            f"{shown(model)}: expected {' or '.join(SYNTHETIC_PREFIX + name for name in configs)}"
        )
    architecture = parse_architecture(configs[size])
    tensors = {}
    for name, spec in expected_tensors(architecture).items():
        wide = size == "u1.5" and spec.group is TensorGroup.GENERATION
        dtype = "F32" if wide else "BF16"
        tensors[name] = TensorFile(
            file=Path(model),
            dtype=dtype,
            shape=spec.shape,
            offset=0,
            nbytes=DTYPE_BYTES[dtype] * spec.num_elements,
        )
    return Checkpoint(
        name=model,
        path=TINY_FOLDER,
        config=configs[size],
        architecture=architecture,
        tensors=tensors,
        synthetic=True,
    )


def read_folder(folder: Path, *, name: str | None = None) -> Checkpoint:
    """Returns the checkpoint in a folder; see `open_checkpoint`."""
    config = read_json(folder / "config.json")
    return Checkpoint(
        name=str(folder) if name is None else name,
        path=folder,
        config=config,
        architecture=parse_architecture(config),
        tensors=_read_tensors(folder),
    )


def compare_tensors(checkpoint: Checkpoint) -> TensorDifferences:
    """Returns which tensors are missing, extra or wrong; buffers, not being weights, are extra."""
    expected = expected_tensors(checkpoint.architecture)
    found = checkpoint.tensors
    wrong = []
    for name in expected.keys() & found.keys():
        tensor, shape = found[name], expected[name].shape
        if tensor.shape != shape:
            wrong.append(f"{name}: expected {list(shape)}, found {list(tensor.shape)}")
        elif tensor.dtype not in DTYPE_BYTES:
            wrong.append(
                f"{name}: expected {' or '.join(DTYPE_BYTES)}, found {shown(tensor.dtype)}"
            )
    return TensorDifferences(
        missing=tuple(name for name in expected if name not in found),
        extra=tuple(name for name in found if name not in expected),
        wrong=tuple(sorted(wrong)),
    )


def check_tensors(checkpoint: Checkpoint) -> None:
    """Checks that the checkpoint holds exactly the tensors of its architecture.

    Raises:
        CheckpointError: A tensor is missing, extra or wrong; the first few of each are named.
    """
    differences = compare_tensors(checkpoint)
    if not differences:
        return
    kinds = {
        "missing": differences.missing,
        "not expected": differences.extra,
        "of the wrong shape or dtype": differences.wrong,
    }
    lines = [f"{checkpoint.name}: the tensors are not those that config.json asks for"]
    for kind, names in kinds.items():
        if names:
            lines.append(f"{len(names)} {kind}:")
            lines += [f"  {shown(name)}" for name in names[:NUM_LISTED]]
        if len(names) > NUM_LISTED:
            lines.append(f"  ... and {len(names) - NUM_LISTED} more")
    raise CheckpointError("\n".join(lines))


def read_header(file: Path) -> dict[str, TensorFile]:
    """Returns the tensors of one safetensors file in its own order.

    Raises:
        CheckpointError: The file is missing, is not a safetensors file, or is shorter or longer
            than its header says.
    """
    try:
        check_file(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: expected a safetensors file, found {size} bytes without its header"
                )
            header = load_json(stream.read(header_bytes))
        tensors = _tensors(file, header, 8 + header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file}: expected a safetensors file: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{file}: expected a safetensors file, found a header that cannot be read: {error}"
        ) from error
    _check_layout(file, tensors, start=8 + header_bytes, size=size)
    return tensors


def _tensors(file: Path, header: object, data_start: int) -> dict[str, TensorFile]:
    """Returns the tensors of a header.

    Raises:
        ValueError: The header is not one of a safetensors file.
    """
    if not isinstance(header, dict):
        raise ValueError(f"expected a map of tensors, found {quoted(header)}")
    return {
        name: _tensor(file, name, entry, data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _tensor(file: Path, name: str, entry: object, data_start: int) -> TensorFile:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
            if len(shape) <= MAX_SIDES and all(map(_is_count, numbers)):
                return TensorFile(
                    file=file,
                    dtype=dtype,
                    shape=tuple(shape),
                    offset=data_start + begin,
                    nbytes=end - begin,
                )
    raise ValueError(
        f"{shown(name)}: expected dtype, shape and data_offsets, found {quoted(entry)}"
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER


def _check_layout(file: Path, tensors: Mapping[str, TensorFile], *, start: int, size: int) -> None:
    """Raises unless the tensors fill the file without gaps and have the bytes of their shapes."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        item_bytes = DTYPE_BYTES.get(tensor.dtype)
        if item_bytes is not None and tensor.nbytes != item_bytes * math.prod(tensor.shape):
            raise CheckpointError(
                f"{file}: {shown(name)}: expected {item_bytes * math.prod(tensor.shape)} bytes "
                f"for {tensor.dtype} {list(tensor.shape)}, found {tensor.nbytes} in the header"
            )
        if tensor.offset != end or tensor.nbytes < 0:
            raise CheckpointError(
                f"{file}: {shown(name)}: expected its data at byte {end}, found {tensor.offset}"
            )
        end += tensor.nbytes
    if end != size:
        reason = "it was not copied or downloaded to its end" if size < end else "it has a tail"
        raise CheckpointError(f"{file}: expected {end} bytes, found {size}: {reason}")


def _read_tensors(folder: Path) -> dict[str, TensorFile]:
    indices = visible_files(folder, f"*{INDEX_SUFFIX}")
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(f"{folder}: expected one *{INDEX_SUFFIX}, found {names}")
    if indices:
        return _read_shards(indices[0])
    files = visible_files(folder, "*.safetensors")
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:NUM_LISTED]) or "none"
        raise CheckpointError(
            f"{folder}: expected one *.safetensors file or several with an index, found {found}"
        )
    return read_header(files[0])


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the files of a folder without hidden ones, such as macOS adds, in order."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _is_file_name(name: str) -> bool:
    """Returns whether a name can only be that of a file in the same folder."""
    plain = name.isprintable() and name not in ("", "..") and Path(name).name == name
    return plain and len(name.encode()) <= MAX_NAME_BYTES


def _read_shards(index: Path) -> dict[str, TensorFile]:
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{index}: weight_map: expected a map of tensor to file name")
    for name in set(weight_map.values()):
        if not _is_file_name(name):
            raise CheckpointError(
                f"{index}: weight_map: expected names of files beside it, found {quoted(name)}"
            )
    tensors: dict[str, TensorFile] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        try:
            file.stat()
        except OSError as error:
            raise CheckpointError(
                f"{file}: named by {index.name}, not found: {error.strerror}"
            ) from error
        for tensor_name, tensor in read_header(file).items():
            if tensor_name in tensors:
                raise CheckpointError(
                    f"{file}: {shown(tensor_name)}: also in {tensors[tensor_name].file.name}"
                )
            tensors[tensor_name] = tensor
    for tensor_name, name in weight_map.items():
        if tensor_name not in tensors or tensors[tensor_name].file.name != name:
            raise CheckpointError(
                f"{index.parent / name}: {shown(tensor_name)}: promised by {index.name}, not found"
            )
    return tensors


def read_json(file: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Returns the JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: The file cannot be read, or does not hold a JSON object within bounds.
    """
    try:
        value = load_json(read_file(file, max_bytes))
    except OSError as error:
        raise CheckpointError(f"{file}: expected a JSON file: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, found: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
