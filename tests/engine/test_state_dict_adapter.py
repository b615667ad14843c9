"""The table of names, both ways."""

from __future__ import annotations

import pytest
import torch

from sensebatch.engine.model.state_dict_adapter import checkpoint_slots, state_dict
from tests.engine.golden_model import build_network
from tests.golden_data import CONFIGS, golden_architecture, rule_weights, weights_manifest


@pytest.mark.parametrize("config", CONFIGS)
def test_the_table_names_every_checkpoint_tensor(config: str) -> None:
    names = {entry["name"] for entry in weights_manifest(config)}
    assert set(checkpoint_slots(golden_architecture(config))) == names


@pytest.mark.parametrize("config", CONFIGS)
def test_a_loaded_network_gives_its_checkpoint_back(config: str) -> None:
    weights = rule_weights(config)
    found = state_dict(build_network(config), golden_architecture(config))
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[name]), name
