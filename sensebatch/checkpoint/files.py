"""A checkpoint on disk: where it is and where in its files each tensor lies. No torch.

Only `config.json`, the index and the headers of the safetensors files are read here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensebatch.checkpoint.architecture import OFFICIAL_8B, Architecture, parse_architecture
from sensebatch.checkpoint.hub import download, is_hub_id
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.config import SYNTHETIC_PREFIX, TINY_MODEL
from sensebatch.errors import CheckpointError

TINY_FOLDER = Path(__file__).parents[1] / "tiny" / "checkpoint"
"""The embedded checkpoint."""

INDEX_SUFFIX = ".safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format; more means that the file is something else."""

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
            same sizes, with the convolutional head) or `synthetic:tiny`; a folder; or a Hub id
            `owner/name`. A folder wins over a Hub id; write `./tiny` for a folder of that name.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: There is no such folder or Hub id, it cannot be fetched, or its files
            cannot be read.
    """
    if model == TINY_MODEL:
        return read_folder(TINY_FOLDER, name=model)
    if model.startswith(SYNTHETIC_PREFIX):
        return _synthetic(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{model}: expected a Hub id beside revision {revision!r}, found a folder"
            )
        return read_folder(folder, name=model)
    if folder.exists():
        raise CheckpointError(f"{model}: expected a checkpoint folder, found a file")
    if not is_hub_id(model):
        raise CheckpointError(
            f"{model}: expected {TINY_MODEL!r}, a checkpoint folder or a Hub id owner/name; "
            "no such folder"
        )
    return read_folder(download(model, revision), name=model)


def _synthetic(model: str) -> Checkpoint:
    """Returns a checkpoint without files: the shape of a model, the embedded tokenizer."""
    size = model.removeprefix(SYNTHETIC_PREFIX)
    configs = {
        "8b": OFFICIAL_8B,
        "u1.5": {**OFFICIAL_8B, "use_pixel_head": True},
        "tiny": _read_json(TINY_FOLDER / "config.json"),
    }
    if size not in configs:
        raise CheckpointError(
            f"{model}: expected {' or '.join(SYNTHETIC_PREFIX + name for name in configs)}"
        )
    architecture = parse_architecture(configs[size])
    tensors = {
        name: TensorFile(
            file=Path(model),
            dtype="BF16",
            shape=spec.shape,
            offset=0,
            nbytes=DTYPE_BYTES["BF16"] * spec.num_elements,
        )
        for name, spec in expected_tensors(architecture).items()
    }
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
    config = _read_json(folder / "config.json")
    return Checkpoint(
        name=str(folder) if name is None else name,
        path=folder,
        config=config,
        architecture=parse_architecture(config),
        tensors=_read_tensors(folder),
    )


def compare_tensors(checkpoint: Checkpoint) -> TensorDifferences:
    """Returns which tensors are missing, extra or wrong; buffers that are no weights are extra."""
    expected = expected_tensors(checkpoint.architecture)
    found = checkpoint.tensors
    wrong = []
    for name in expected.keys() & found.keys():
        tensor, shape = found[name], expected[name].shape
        if tensor.shape != shape:
            wrong.append(f"{name}: expected {list(shape)}, found {list(tensor.shape)}")
        elif tensor.dtype not in DTYPE_BYTES:
            wrong.append(f"{name}: expected {' or '.join(DTYPE_BYTES)}, found {tensor.dtype}")
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
            lines += [f"  {name}" for name in names[:NUM_LISTED]]
        if len(names) > NUM_LISTED:
            lines.append(f"  ... and {len(names) - NUM_LISTED} more")
    raise CheckpointError("\n".join(lines))


def read_header(file: Path) -> dict[str, TensorFile]:
    """Returns the tensors of one safetensors file in its own order.

    Raises:
        CheckpointError: The file is missing, is no safetensors file, or is shorter or longer
            than its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: expected a safetensors file, found {size} bytes without its header"
                )
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        tensors = {name: _tensor(file, entry, 8 + header_bytes) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"{file}: expected a safetensors file: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: expected a safetensors file, found a header that cannot be read: {error}"
        ) from error
    _check_layout(file, tensors, start=8 + header_bytes, size=size)
    return tensors


def _tensor(file: Path, entry: Mapping[str, Any], data_start: int) -> TensorFile:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    return TensorFile(
        file=file,
        dtype=str(entry["dtype"]),
        shape=tuple(int(side) for side in entry["shape"]),
        offset=data_start + begin,
        nbytes=end - begin,
    )


def _check_layout(file: Path, tensors: Mapping[str, TensorFile], *, start: int, size: int) -> None:
    """Raises unless the tensors fill the file without gaps and have the bytes of their shapes."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        item_bytes = DTYPE_BYTES.get(tensor.dtype)
        if item_bytes is not None and tensor.nbytes != item_bytes * math.prod(tensor.shape):
            raise CheckpointError(
                f"{file}: {name}: expected {item_bytes * math.prod(tensor.shape)} bytes for "
                f"{tensor.dtype} {list(tensor.shape)}, found {tensor.nbytes} in the header"
            )
        if tensor.offset != end or tensor.nbytes < 0:
            raise CheckpointError(
                f"{file}: {name}: expected its data at byte {end}, found {tensor.offset}"
            )
        end += tensor.nbytes
    if end != size:
        reason = "it was not copied or downloaded to its end" if size < end else "it has a tail"
        raise CheckpointError(f"{file}: expected {end} bytes, found {size}: {reason}")


def _read_tensors(folder: Path) -> dict[str, TensorFile]:
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(f"{folder}: expected one *{INDEX_SUFFIX}, found {names}")
    if indices:
        return _read_shards(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:NUM_LISTED]) or "none"
        raise CheckpointError(
            f"{folder}: expected one *.safetensors file or several with an index, found {found}"
        )
    return read_header(files[0])


def _read_shards(index: Path) -> dict[str, TensorFile]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{index}: weight_map: expected a map of tensor to file name")
    tensors: dict[str, TensorFile] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if not file.exists():
            raise CheckpointError(f"{file}: named by {index.name}, not found")
        for tensor_name, tensor in read_header(file).items():
            if tensor_name in tensors:
                raise CheckpointError(
                    f"{file}: {tensor_name}: also in {tensors[tensor_name].file.name}"
                )
            tensors[tensor_name] = tensor
    for tensor_name, name in weight_map.items():
        if tensor_name not in tensors or tensors[tensor_name].file.name != Path(name).name:
            raise CheckpointError(
                f"{index.parent / name}: {tensor_name}: promised by {index.name}, not found"
            )
    return tensors


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: expected a JSON file: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, found: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
