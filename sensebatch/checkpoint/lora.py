"""A LoRA on disk: which weights it changes, where its matrices lie and how much they count.

Knows three ways of naming: that of the release (`<path>.lora_down.weight`), that of kohya's
trainers (the path in one word) and that of PEFT and diffusers (`lora_A`, `lora_B` and an
`adapter_config.json`). No torch. R = rank, I and O = inputs and outputs of a weight.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sensebatch.bounded import check_file, quoted, shown
from sensebatch.checkpoint.files import DTYPE_BYTES, TensorFile, read_header, read_json
from sensebatch.checkpoint.tensors import TensorSpec
from sensebatch.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What PEFT and diffusers call the weights in a folder."""
MAX_ALPHA_BYTES = 8
NUM_LISTED = 5
"""How many keys an error names."""
PIECE_BYTES = 1 << 24
"""How much of a matrix is searched for infinities at a time."""
EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Numbers of a dtype as bits, and those of the exponent: all set in infinities and NaN."""

FOREIGN = {
    r"\.lora_magnitude_vector": "DoRA",
    r"\.dora_scale$": "DoRA",
    r"\.hada_[wt]\d": "LoHa",
    r"\.lokr_[wt]\d": "LoKr",
    r"\.lora_mid\.": "LoCon with a middle matrix",
    r"\.oft_": "OFT",
    r"\.ia3_l$": "IA3",
    r"\.lora_embedding_[AB]": "LoRA of embeddings",
    r"_lora\.(down|up)\.weight$": "LoRA of diffusers' old attention processors",
    r"\.diff(_b)?$": "difference of whole weights",
}
"""Forms of keys that show another kind of adapter, which cannot be merged here."""
INTEGERS = {"I64": "<i8", "I32": "<i4"}
"""Dtypes that an alpha may have besides those of weights."""

ALTERED_START = ("pissa", "olora", "corda", "loftq")
"""Beginnings of `init_lora_weights` of adapters that belong to an altered checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """The low-rank change of one weight: `scale` times `up` by `down`."""

    down: TensorFile
    """`[R, I]`"""
    up: TensorFile
    """`[O, R]`"""
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A LoRA whose every key changes a weight of a checkpoint."""

    file: Path
    pairs: Mapping[str, LoraPair]
    """By the weight that each changes."""
    fingerprint: str
    """Identity (64 hex digits) of everything that decides the changes."""
    has_alphas: bool
    """Whether it says how much each product counts; without, each counts as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Naming:
    """How the keys of a file name weights."""

    name: str
    """For people."""
    roles: Mapping[str, str]
    """Ending of a key to `down`, `up` or `alpha`."""
    prefixes: tuple[str, ...]
    """What all keys of a file may begin with; "" where they may begin with a path."""
    spell: Callable[[str], str] = str
    """Turns a weight's path into the form that keys have it in."""


RELEASE = _Naming(
    name="a LoRA as of the release",
    roles={".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"},
    prefixes=("diffusion_model.", ""),
)
KOHYA = _Naming(
    name="a LoRA of kohya's",
    roles=RELEASE.roles,
    prefixes=("lora_unet_", "lora_transformer_"),
    spell=lambda path: path.replace(".", "_"),
)
PEFT = _Naming(
    name="a PEFT adapter",
    roles={".lora_A.weight": "down", ".lora_B.weight": "up"},
    prefixes=("base_model.model.", "diffusion_model.", "transformer.", ""),
)
DIFFUSERS = _Naming(
    name="a LoRA of diffusers", roles={**PEFT.roles, ".alpha": "alpha"}, prefixes=PEFT.prefixes
)


def read_lora(path: Path, expected: Mapping[str, TensorSpec]) -> LoraFile:
    """Reads a LoRA and checks that every key of it changes a weight, by finite numbers.

    Args:
        path: A safetensors file, or the folder of an adapter.
        expected: The checkpoint's tensors, from `expected_tensors`.

    Raises:
        CheckpointError: The file cannot be read, is of another kind, names no weight, lacks a
            matrix or an alpha that others have, or has one of the wrong shape, dtype or with
            numbers that are not finite; or its configuration asks for what is not supported.
    """
    file = _in_folder(path) if path.is_dir() else path
    fingerprint = _sha256(file)
    tensors = read_header(file)
    if not tensors:
        raise CheckpointError(f"{file}: expected a LoRA, found no tensors")
    _refuse_foreign(file, tensors)
    config = file.with_name(ADAPTER_CONFIG)
    naming = _naming(tensors, has_config=config.is_file())
    found = _by_weight(file, naming, tensors, expected)
    adapter = None
    if naming is PEFT:
        adapter = _Adapter.read(config)
        fingerprint = hashlib.sha256(f"{fingerprint}{adapter.identity}".encode()).hexdigest()
    has_alphas = adapter is not None or any("alpha" in parts for parts in found.values())
    if not has_alphas and naming in (RELEASE, KOHYA):
        # All tools that write or read these names take alpha for the rank then.
        naming = replace(naming, roles={k: r for k, r in naming.roles.items() if r != "alpha"})
    pairs = {
        weight: _pair(file, naming, adapter, parts, expected[weight].shape)
        for weight, parts in found.items()
    }
    return LoraFile(file=file, pairs=pairs, fingerprint=fingerprint, has_alphas=has_alphas)


def _sha256(file: Path) -> str:
    """Returns the sha256 (64 hex digits) of a whole file.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        check_file(file)
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: expected a readable file: {error.strerror}") from error


def _in_folder(folder: Path) -> Path:
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            return folder / name
    pickled = folder / "adapter_model.bin"
    hint = f", found {pickled.name}: save it as safetensors" if pickled.exists() else ""
    raise CheckpointError(f"{folder}: expected {' or '.join(ADAPTER_FILES)} in it{hint}")


def _refuse_foreign(file: Path, tensors: Mapping[str, TensorFile]) -> None:
    for form, kind in FOREIGN.items():
        keys = [key for key in tensors if re.search(form, key)]
        if keys:
            raise CheckpointError(
                f"{file}: expected a LoRA of two matrices a weight, found {kind}: "
                f"{shown(min(keys))}"
            )


def _naming(tensors: Mapping[str, TensorFile], *, has_config: bool) -> _Naming:
    if any(key.endswith(tuple(PEFT.roles)) for key in tensors):
        return PEFT if has_config else DIFFUSERS
    if any(key.startswith(KOHYA.prefixes) for key in tensors):
        return KOHYA
    return RELEASE


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of a LoRA."""

    key: str
    tensor: TensorFile


def _by_weight(
    file: Path,
    naming: _Naming,
    tensors: Mapping[str, TensorFile],
    expected: Mapping[str, TensorSpec],
) -> dict[str, dict[str, _Part]]:
    """Returns the tensors of a file by the weight they change, and by their role there."""
    prefix = _prefix(file, naming, tensors)
    weights = _spelled(naming, expected)
    found: dict[str, dict[str, _Part]] = {}
    unknown = []
    for key, tensor in tensors.items():
        bare = key.removeprefix(prefix)
        ending = next((ending for ending in naming.roles if bare.endswith(ending)), None)
        weight = None if ending is None else weights.get(bare.removesuffix(ending))
        if weight is None or ending is None:
            unknown.append(key)
        else:
            found.setdefault(weight, {})[naming.roles[ending]] = _Part(key, tensor)
    if unknown:
        raise CheckpointError(
            f"{file}: read as {naming.name}: {len(unknown)} keys fit no weight of the checkpoint: "
            f"{_listed(unknown)}"
        )
    return found


def _prefix(file: Path, naming: _Naming, tensors: Mapping[str, TensorFile]) -> str:
    """Returns what all keys of a file begin with before a weight's path."""
    for prefix in naming.prefixes:
        without = [key for key in tensors if not key.startswith(prefix)]
        if not without:
            return prefix
        if len(without) < len(tensors):
            raise CheckpointError(
                f"{file}: expected {prefix} before all keys or none, found {len(without)} of "
                f"{len(tensors)} without it: {_listed(without)}"
            )
    raise AssertionError(f"keys of {naming.name} that begin with no prefix of it")


def _spelled(naming: _Naming, expected: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Returns the weights by their paths as keys spell them; no two are spelled alike."""
    paths = {name: name.removesuffix(".weight") for name in expected if name.endswith(".weight")}
    spelled = {naming.spell(path): name for name, path in paths.items()}
    assert len(spelled) == len(paths), "two weights have one name in one word"
    return spelled


def _listed(keys: list[str]) -> str:
    return ", ".join(map(shown, sorted(keys)[:NUM_LISTED]))


def _pair(
    file: Path,
    naming: _Naming,
    adapter: _Adapter | None,
    parts: Mapping[str, _Part],
    shape: tuple[int, ...],
) -> LoraPair:
    path = _path_of(naming, next(iter(parts.values())).key)
    for ending, role in naming.roles.items():
        if role not in parts:
            hint = f" (or {ADAPTER_CONFIG} beside it)" if naming is DIFFUSERS else ""
            raise CheckpointError(f"{file}: {shown(path)}{ending}: expected, not found{hint}")
    down, up = parts["down"].tensor, parts["up"].tensor
    fits = len(down.shape) == len(up.shape) == len(shape) == 2 and (
        down.shape[1] == shape[1] and up.shape[0] == shape[0] and 0 < down.shape[0] == up.shape[1]
    )
    if not fits:
        names = {role: ending.removesuffix(".weight")[1:] for ending, role in naming.roles.items()}
        raise CheckpointError(
            f"{file}: {shown(path)}: expected {names['up']} [{shape[0]}, rank] and {names['down']} "
            f"[rank, {shape[-1]}] for a weight of {list(shape)}, found {list(up.shape)} and "
            f"{list(down.shape)}"
        )
    for role in ("down", "up"):
        _check_finite(file, parts[role])
    rank = down.shape[0]
    if adapter is not None:
        return LoraPair(down=down, up=up, scale=adapter.scale(path, rank))
    alpha = _alpha(file, parts["alpha"]) if "alpha" in parts else rank
    return LoraPair(down=down, up=up, scale=alpha / rank)


def _path_of(naming: _Naming, key: str) -> str:
    """Returns the path of a weight as a key has it."""
    for prefix in naming.prefixes:
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            break
    return next(key.removesuffix(ending) for ending in naming.roles if key.endswith(ending))


def _check_finite(file: Path, part: _Part) -> None:
    tensor = part.tensor
    if tensor.dtype not in EXPONENTS:
        raise CheckpointError(
            f"{file}: {shown(part.key)}: expected {' or '.join(EXPONENTS)}, found {tensor.dtype}"
        )
    bits, exponent = EXPONENTS[tensor.dtype]
    for piece in _pieces(tensor):
        numbers = np.frombuffer(piece, bits)
        if (numbers & numbers.dtype.type(exponent) == exponent).any():
            raise CheckpointError(
                f"{file}: {shown(part.key)}: expected finite numbers, found NaN or infinite ones"
            )


def _pieces(tensor: TensorFile) -> Iterator[bytes]:
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            for start in range(0, tensor.nbytes, PIECE_BYTES):
                yield stream.read(min(PIECE_BYTES, tensor.nbytes - start))
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read: {error.strerror}") from error


def _alpha(file: Path, part: _Part) -> float:
    tensor = part.tensor
    data = b"".join(_pieces(tensor)) if tensor.nbytes <= MAX_ALPHA_BYTES else b""
    kinds = INTEGERS | {name: f"<f{size}" for name, size in DTYPE_BYTES.items()}
    if tensor.dtype == "BF16":
        # The upper half of a float32.
        data, kinds["BF16"] = b"\0\0" + data, "<f4"
    kind = np.dtype(kinds.get(tensor.dtype, "V1"))
    if math.prod(tensor.shape) != 1 or tensor.dtype not in kinds or len(data) != kind.itemsize:
        raise CheckpointError(
            f"{file}: {shown(part.key)}: expected one finite number, found {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    value = float(np.frombuffer(data, kind)[0])
    if not math.isfinite(value):
        raise CheckpointError(
            f"{file}: {shown(part.key)}: expected one finite number, found {value}"
        )
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    """What `adapter_config.json` says of alphas and ranks."""

    file: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    """Alphas of single modules, by their path or the end of it."""
    by_root: bool
    """Whether the product is divided by the root of the rank (rsLoRA)."""

    @classmethod
    def read(cls, file: Path) -> _Adapter:
        """Reads a configuration, and refuses what it asks for beyond low-rank matrices.

        Raises:
            CheckpointError: It cannot be read, or asks for something that is not supported.
        """
        config = read_json(file)
        for field, allowed in (
            ("peft_type", (None, "LORA")),
            ("use_dora", (None, False)),
            ("bias", (None, "none")),
            ("lora_bias", (None, False)),
            ("fan_in_fan_out", (None, False)),
            ("modules_to_save", (None, [])),
            ("trainable_token_indices", (None, [], {})),
        ):
            if config.get(field) not in allowed:
                raise CheckpointError(
                    f"{file}: {field}: expected {json.dumps(allowed[1])}, found "
                    f"{quoted(config[field])}; such an adapter cannot be merged"
                )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(ALTERED_START):
            raise CheckpointError(
                f"{file}: init_lora_weights: {quoted(start)} belongs to an altered checkpoint; "
                "convert it to an ordinary LoRA first"
            )
        return cls(
            file=file,
            rank=_number(file, config, "r", int),
            alpha=_number(file, config, "lora_alpha", float),
            ranks=_pattern(file, config, "rank_pattern", int),
            alphas=_pattern(file, config, "alpha_pattern", float),
            by_root=config.get("use_rslora") is True,
        )

    @property
    def identity(self) -> str:
        """Everything that scales depend on, as canonical text."""
        content = [self.rank, self.alpha, dict(self.ranks), dict(self.alphas), self.by_root]
        return json.dumps(content, sort_keys=True)

    def scale(self, path: str, rank: int) -> float:
        """Returns what the product of two matrices of this rank is multiplied by.

        Raises:
            CheckpointError: The configuration says another rank.
        """
        expected = _matching(self.ranks, path, self.rank)
        if rank != expected:
            raise CheckpointError(
                f"{self.file}: expected rank {rank} for {shown(path)}, as its matrices have, "
                f"found {expected}"
            )
        alpha = _matching(self.alphas, path, self.alpha)
        return alpha / math.sqrt(rank) if self.by_root else alpha / rank


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Returns what the first pattern says that is a path or the end of it."""
    return next(
        (v for name, v in patterns.items() if path == name or path.endswith(f".{name}")), default
    )


def _number(file: Path, values: Mapping[str, Any], field: str, kind: type, where: str = "") -> Any:
    value = values.get(field)
    kinds: Any = int if kind is int else int | float
    if isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value):
        return kind(value)
    what = "a whole number" if kind is int else "a number"
    raise CheckpointError(f"{file}: {where}{field}: expected {what}, found {quoted(value)}")


def _pattern(file: Path, config: Mapping[str, Any], field: str, kind: type) -> dict[str, Any]:
    values = config.get(field) or {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: {field}: expected a map, found {quoted(values)}")
    for name in values:
        if re.fullmatch(r"[\w.]+", name) is None:
            raise CheckpointError(
                f"{file}: {field}: expected names of modules, found the pattern {quoted(name)}"
            )
    return {name: _number(file, values, name, kind, f"{field}.") for name in values}
