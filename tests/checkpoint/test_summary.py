"""A summary counts what the headers say, complete or not."""

from __future__ import annotations

from pathlib import Path

from sensebatch.checkpoint.files import read_folder
from sensebatch.checkpoint.summary import summarise
from sensebatch.checkpoint.tensors import TensorGroup
from tests.checkpoint.folders import write_folder, zeros


def test_groups_add_up_to_the_checkpoint(tmp_path: Path) -> None:
    summary = summarise(read_folder(write_folder(tmp_path, num_shards=2)))
    assert summary.num_files == 2
    assert summary.num_parameters == sum(tensor.size for tensor in zeros().values())
    assert summary.nbytes == 2 * summary.num_parameters
    assert summary.groups[TensorGroup.SHARED].num_parameters == 2 * 512 * 64
    assert sum(group.num_tensors for group in summary.groups.values()) == len(zeros())
    assert summary.dtypes == {"F16": len(zeros())}
    assert not summary.differences
    assert "found neither" in str(summary.tokenizer_problem)


def test_an_incomplete_checkpoint_is_summarised_too(tmp_path: Path) -> None:
    tensors = zeros()
    head = tensors.pop("language_model.lm_head.weight")
    tensors["other"] = head
    summary = summarise(read_folder(write_folder(tmp_path, tensors)))
    assert summary.differences.missing == ("language_model.lm_head.weight",)
    assert summary.differences.extra == ("other",)
    assert summary.groups[TensorGroup.SHARED].num_parameters == 512 * 64
