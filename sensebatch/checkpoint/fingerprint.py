"""The identity of a model on disk, for job keys. Reads samples of a checkpoint, not all of it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from sensebatch.bounded import read_file
from sensebatch.checkpoint.files import Checkpoint, TensorFile
from sensebatch.checkpoint.lora import read_lora
from sensebatch.checkpoint.system_prompts import SystemPrompts
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.checkpoint.tokenizer import MAX_TOKENIZER_BYTES, TOKENIZER_FILES
from sensebatch.config import ModelConfig
from sensebatch.errors import CheckpointError
from sensebatch.jobs import ModelIdentity
from sensebatch.tasks import SystemPromptKind

_LOGGER = logging.getLogger(__name__)

SAMPLE_BYTES = 4096
"""How much of each tensor is read, from its middle."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns the identity (64 hex digits) of a checkpoint's weights, configuration, tokenizer.

    It covers the content of `config.json`, the tokenizer files byte by byte, and of every tensor
    the name, dtype, shape and `SAMPLE_BYTES` from its middle. So it is the same for a folder, its
    copy in the Hub cache and a resharded copy, and differs after any training or merge, which
    touches all numbers of a tensor. It does not see a change that spares the middle of every
    tensor, such as a damaged block or a few edited rows of an embedding table.

    Raises:
        CheckpointError: A file cannot be read.
    """
    tokenizer = {
        name: hashlib.sha256(_read(checkpoint.path / name)).hexdigest()
        for name in TOKENIZER_FILES
        if (checkpoint.path / name).exists()
    }
    content = {
        "config": checkpoint.config,
        "tokenizer": tokenizer,
        "tensors": {
            name: [tensor.dtype, tensor.shape, sample]
            for name, (tensor, sample) in _samples(checkpoint).items()
        },
        "synthetic": checkpoint.synthetic,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def model_identity(
    checkpoint: Checkpoint, prompts: SystemPrompts, model: ModelConfig, *, dtype: str
) -> ModelIdentity:
    """Returns what job keys depend on besides the job.

    Args:
        checkpoint: The weights and their files.
        prompts: Its system prompts.
        model: Names the LoRA that is merged, and the precision.
        dtype: The dtype by name; not `auto`.

    Raises:
        CheckpointError: A file cannot be read, or the LoRA does not fit the checkpoint.
    """
    lora = None
    if model.lora_path is not None:
        lora = read_lora(Path(model.lora_path), expected_tensors(checkpoint.architecture))
        if not lora.has_alphas:
            _LOGGER.warning(
                "%s: has no alphas, so the products of its matrices count as they are, as if each "
                "alpha were the rank",
                model.lora_path,
            )
    return ModelIdentity(
        checkpoint=fingerprint(checkpoint),
        lora=None if lora is None else lora.fingerprint,
        dtype=dtype,
        precision=model.quantised,
        generation_prompt=prompts.by_kind[SystemPromptKind.GENERATION].text,
        interleave_prompt=prompts.by_kind[SystemPromptKind.INTERLEAVE].text,
    )


def _samples(checkpoint: Checkpoint) -> dict[str, tuple[TensorFile, str]]:
    """Returns every tensor with the hash of its sample, read file by file in ascending order."""
    if checkpoint.synthetic:
        # Synthetic weights follow a fixed rule, so the configuration identifies them.
        return {}
    by_file: dict[Path, list[tuple[str, TensorFile]]] = {}
    for name, tensor in sorted(checkpoint.tensors.items(), key=lambda item: item[1].offset):
        by_file.setdefault(tensor.file, []).append((name, tensor))
    samples = {}
    for file, tensors in by_file.items():
        try:
            with file.open("rb", buffering=0) as stream:
                for name, tensor in tensors:
                    num_bytes = min(SAMPLE_BYTES, tensor.nbytes)
                    stream.seek(tensor.offset + (tensor.nbytes - num_bytes) // 2)
                    sample = hashlib.sha256(stream.read(num_bytes)).hexdigest()
                    samples[name] = (tensor, sample)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return samples


def _read(file: Path) -> bytes:
    try:
        return read_file(file, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
