"""A fingerprint follows the weights, not where or how they are stored."""

from __future__ import annotations

from pathlib import Path

from sensebatch.checkpoint.files import read_folder
from sensebatch.checkpoint.fingerprint import fingerprint
from tests.checkpoint.folders import write_folder, zeros


def test_copies_and_resharded_copies_have_the_same_fingerprint(tmp_path: Path) -> None:
    prints = {
        fingerprint(read_folder(write_folder(tmp_path / str(shards), num_shards=shards)))
        for shards in (1, 2, 3)
    }
    assert len(prints) == 1


def test_a_change_of_any_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    prints = set()
    names = ["language_model.lm_head.weight", "language_model.model.norm.weight", None]
    for name in names:
        tensors = zeros()
        if name is not None:
            tensors[name] += 1
        prints.add(fingerprint(read_folder(write_folder(tmp_path, tensors))))
    assert len(prints) == len(names)


def test_configuration_and_tokenizer_change_the_fingerprint(tmp_path: Path) -> None:
    prints = [fingerprint(read_folder(write_folder(tmp_path)))]
    (tmp_path / "tokenizer.json").write_text("{}")
    prints.append(fingerprint(read_folder(tmp_path)))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"noise_scale_max_value": 16.0', '"n": 1'))
    prints.append(fingerprint(read_folder(tmp_path)))
    assert len(set(prints)) == 3


def test_the_layout_of_config_json_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    before = fingerprint(read_folder(write_folder(tmp_path)))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace(", ", ",\n  "))
    assert fingerprint(read_folder(tmp_path)) == before
