"""What a checkpoint is made of, from its headers alone. Prints nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.files import Checkpoint, TensorDifferences, compare_tensors
from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
from sensebatch.checkpoint.tokenizer import check_tokenizer
from sensebatch.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSize:
    """The tensors of one group that the files hold."""

    num_tensors: int
    num_parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A checkpoint at a glance."""

    name: str
    path: str
    architecture: Architecture
    num_files: int
    groups: Mapping[TensorGroup, GroupSize]
    """Sizes of the expected tensors that were found; extra ones are in no group."""
    num_parameters: int
    """Parameters of all groups."""
    nbytes: int
    """Bytes of all groups."""
    dtypes: Mapping[str, int]
    """Tensors by dtype, in safetensors' names."""
    differences: TensorDifferences
    tokenizer_problem: str | None
    """Why a run would refuse the tokenizer."""

    @property
    def is_usable(self) -> bool:
        """Whether a run would take the checkpoint as it is."""
        return not self.differences and self.tokenizer_problem is None


def summarise(checkpoint: Checkpoint) -> Summary:
    """Returns the sizes of a checkpoint by group; loads no weights."""
    found = checkpoint.tensors
    num_tensors: Counter[TensorGroup] = Counter()
    num_parameters: Counter[TensorGroup] = Counter()
    nbytes: Counter[TensorGroup] = Counter()
    for name, spec in expected_tensors(checkpoint.architecture).items():
        if name in found:
            num_tensors[spec.group] += 1
            num_parameters[spec.group] += math.prod(found[name].shape)
            nbytes[spec.group] += found[name].nbytes
    return Summary(
        name=checkpoint.name,
        path=str(checkpoint.path),
        architecture=checkpoint.architecture,
        num_files=len({tensor.file for tensor in found.values()}),
        groups={
            group: GroupSize(
                num_tensors=num_tensors[group],
                num_parameters=num_parameters[group],
                nbytes=nbytes[group],
            )
            for group in TensorGroup
        },
        num_parameters=num_parameters.total(),
        nbytes=nbytes.total(),
        dtypes=dict(sorted(Counter(tensor.dtype for tensor in found.values()).items())),
        differences=compare_tensors(checkpoint),
        tokenizer_problem=_tokenizer_problem(checkpoint),
    )


def _tokenizer_problem(checkpoint: Checkpoint) -> str | None:
    try:
        check_tokenizer(checkpoint.path)
    except CheckpointError as error:
        return str(error)
    return None
