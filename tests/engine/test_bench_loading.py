"""The tool that times loading: it loads the files it writes, and says how fast each mode is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sensebatch.checkpoint.files import check_tensors, open_checkpoint, read_folder
from sensebatch.engine import bench_loading
from sensebatch.engine.model.tokenizer import HFTokenizer
from sensebatch.engine.weights.sources import FileWeights, SyntheticWeights


@pytest.mark.slow
def test_written_files_are_the_synthetic_weights(tmp_path: Path) -> None:
    synthetic = open_checkpoint("synthetic:tiny")
    bench_loading.write_files(synthetic, tmp_path, shard_bytes=1 << 21)
    written = read_folder(tmp_path)
    check_tensors(written)
    HFTokenizer(tmp_path)
    assert len({tensor.file for tensor in written.tensors.values()}) > 2
    for name, tensor in written.tensors.items():
        weights = [torch.empty(tensor.shape, dtype=torch.bfloat16) for _ in range(2)]
        FileWeights(written).read_into(name, None, weights[0])
        SyntheticWeights(torch.bfloat16).read_into(name, None, weights[1])
        assert torch.equal(*weights), name


@pytest.mark.slow
def test_every_mode_is_timed_and_files_are_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_loading.main(tmp_path / "8b", "synthetic:tiny")
    monkeypatch.setattr(bench_loading, "write_files", None)
    bench_loading.main(tmp_path / "8b", "synthetic:tiny")
    lines = capsys.readouterr().out.splitlines()
    modes = [line.split()[1] for line in lines if line.startswith("| ") and "---" not in line]
    assert modes == ["mode", "full", "balanced"] * 2
    assert all(float(line.split()[-2]) > 0 for line in lines if "full" in line)
