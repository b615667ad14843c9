"""A judge is measured by how often it prefers what the checker finds right."""

from __future__ import annotations

import pytest

from sensebatch.tiny.evaluate import open_engine, run_config
from sensebatch.tiny.judge import auroc, judge

pytestmark = pytest.mark.slow


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    assert auroc([0.9, 0.8], [0.1]) == 1.0
    assert auroc([0.1], [0.9, 0.8]) == 0.0
    assert auroc([0.5, 0.9], [0.5, 0.1]) == 0.875
    assert auroc([], [0.5]) is None


def test_the_embedded_checkpoint_tells_right_images_from_near_misses() -> None:
    config = run_config(device="cpu", sampling={})
    figures = judge(open_engine("tiny", config), config, 5)
    clean, wrong = figures["clean"], figures["wrong prompt"]
    assert (clean["right"], clean["wrong"]) == (5, 5)
    assert clean["auroc"] > 0.9
    assert wrong["right"] == 0
    assert wrong["yes_to_wrong"] <= 0.2
    assert figures["own mistakes"]["wrong"] >= 2, "strong guidance spoils drawings"
    drawn = figures["all drawings"]
    assert 0.6 < drawn["right_of_all"] < 0.8
    assert drawn["right_of_accepted"] > 0.9, "what is accepted is right more often"
