"""The rebuilt golden weights are those the golden vectors were made with."""

from __future__ import annotations

import pytest
import torch

from tests.golden_data import CONFIGS, SEEDS, rule_tensor, rule_weights, weights_manifest


@pytest.mark.parametrize("config", CONFIGS)
def test_rule_weights_match_the_manifest(config: str) -> None:
    for entry in weights_manifest(config):
        weight = rule_tensor(entry["name"], entry["shape"], SEEDS[config])
        first = torch.tensor(entry["first4"])
        assert torch.allclose(weight.flatten()[:4], first, rtol=1e-6, atol=1e-6), entry["name"]
        total = weight.double().sum().item()
        assert total == pytest.approx(entry["sum"], rel=1e-6, abs=1e-4), entry["name"]
        squares = weight.double().square().sum().item()
        assert squares == pytest.approx(entry["sum_sq"], rel=1e-6), entry["name"]


def test_edits_read_pristine_rows() -> None:
    edits = [
        {"op": "scale", "row": 1, "value": 2.0},
        {"op": "copy_row_scaled", "row": 2, "src_row": 1, "value": 3.0},
    ]
    name = "language_model.lm_head.weight"
    plain, edited = rule_weights("dense_fm")[name], rule_weights("dense_fm", edits)[name]
    assert torch.equal(edited[1], 2 * plain[1])
    assert torch.equal(edited[2], 3 * plain[1])
    assert torch.equal(edited[3], plain[3])
