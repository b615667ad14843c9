"""The attention backend of a run is the one that was measured to be the fastest for its images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.plan.batches import Demand
from sensebatch.plan.load import Load
from sensebatch.plan.seconds import Clock
from sensebatch.plan.work import Speeds
from sensebatch.resolutions import Resolution
from tests.plan.loads import COMPUTATION, make_load, placed, with_drawing


def speeds(**flop_per_s: dict[int, float]) -> AttentionSpeeds:
    return AttentionSpeeds(gpu="NVIDIA Test", torch="2.11", flop_per_s=flop_per_s)


def images(side: int, jobs: int = 1) -> Load:
    load = with_drawing(make_load(), resolution=Resolution(height=side, width=side))
    return replace(load, demands=((Demand(500, 0, 1), jobs),))


SMALL_WINS = speeds(cudnn={1024: 1e14, 4096: 4e14}, flash={1024: 3e14, 4096: 2e14})


def test_the_fastest_for_the_sizes_of_the_run_comes_first() -> None:
    assert SMALL_WINS.ranking([images(2048)]) == ("cudnn", "flash")
    assert SMALL_WINS.ranking([images(1024)]) == ("flash", "cudnn")
    # Sizes in between count as the nearest that was measured.
    assert SMALL_WINS.ranking([images(3072)]) == ("cudnn", "flash")


def test_many_small_images_outweigh_a_large_one() -> None:
    assert SMALL_WINS.ranking([images(2048), images(1024)]) == ("cudnn", "flash")
    assert SMALL_WINS.ranking([images(2048), images(1024, jobs=500)]) == ("flash", "cudnn")


def test_images_that_no_backend_attends_say_nothing() -> None:
    assert SMALL_WINS.ranking([images(512)]) == ()
    assert SMALL_WINS.ranking([]) == ()


def test_what_is_about_as_fast_stays_in_its_order() -> None:
    alike = speeds(cudnn={4096: 4e14}, flash={4096: 4.1e14}, sdpa={4096: 4.11e14})
    assert alike.ranking([images(2048)]) == ("cudnn", "flash", "sdpa")
    faster = speeds(cudnn={4096: 3.9e14}, flash={4096: 4.1e14}, sdpa={4096: 4.11e14})
    assert faster.ranking([images(2048)]) == ("flash", "sdpa", "cudnn")


def test_a_plan_takes_the_speed_of_the_backend_for_the_size() -> None:
    measured = Speeds(
        copy_bytes_per_s=5e10,
        gemm_flop_per_s=7e14,
        attention_flop_per_s=6e14,
        memory_bytes_per_s=4e12,
    )

    def seconds(load: Load, **options: Any) -> float:
        clock = Clock(COMPUTATION, measured, **options)
        return clock.group_seconds(load, 4, placed([load])).images

    large, small = images(2048), images(512)
    plain = seconds(large)
    assert seconds(large, attention=lambda _: None) == plain
    assert seconds(large, attention=lambda _: 6e14) == pytest.approx(plain)
    assert seconds(large, attention=lambda tokens: 3e14 if tokens == 4096 else None) > plain
    # Small images are attended by kernels of this project.
    assert seconds(small, attention=lambda _: 1.0) == seconds(small)
