"""Weights that move give the same bits as weights that stay."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sensebatch.engine.memory.host import HostStore
from sensebatch.engine.memory.packing import Packed
from sensebatch.engine.model import transformer
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.runner import Runner
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.weights import residency as residency_module
from sensebatch.engine.weights.loader import NetworkLoader
from sensebatch.engine.weights.residency import Residency
from sensebatch.errors import CheckpointError, OutOfMemoryError
from sensebatch.jobs import VramMode
from sensebatch.plan.placement import Placement
from tests.engine.golden_model import (
    KeptImages,
    build_job,
    build_runner,
    case_resolutions,
    draw_together,
    infer,
)
from tests.golden_data import (
    ByteTokenizer,
    Case,
    golden_architecture,
    load_case,
    rule_weights,
)

pytestmark = pytest.mark.slow

CASES = [
    ("dense_fm", "t2i_think_end"),
    ("dense_fm", "edit_2img_cfg4_img2"),
    ("dense_fm", "il_img_think"),
    ("dense_pixel", "t2i_cfg4_none"),
    ("dense_pixel", "edit_think_end"),
    ("moe", "t2i_think_end"),
    ("moe", "il_img_nothink"),
]


class RuleWeights:
    """A weight source of golden weights, with a count of reads and a place to fail."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.num_reads = 0
        self.fails = False
        self.failing = ""
        """Part of the names that cannot be read; empty for none."""
        self.failed = threading.Event()

    def read_into(self, name: str, rows: tuple[int, int] | None, target: torch.Tensor) -> None:
        assert target.is_contiguous()
        if self.fails or (self.failing and self.failing in name):
            self.failed.set()
            raise CheckpointError(f"{name}: the disk was removed")
        self.num_reads += 1
        weight = self.weights[name]
        target.copy_(weight if rows is None else weight[slice(*rows)])


def make_placement(
    num_buffers: int | None, embed: bool = False, host_block_bytes: int | None = None
) -> Placement:
    return Placement(
        mode=VramMode.FULL,
        num_buffers=num_buffers,
        embed_on_device=embed,
        tokens_per_pass=1,
        park_caches=False,
        host_block_bytes=host_block_bytes,
        device_bytes=0,
        host_bytes=0,
        reason="",
    )


def moving_runner(
    case: Case, num_buffers: int | None, host_block_bytes: int | None, embed: bool = False
) -> tuple[Runner, RuleWeights, Residency]:
    source = RuleWeights(rule_weights(case.config, case.weight_edits))
    loader = NetworkLoader(
        arch=golden_architecture(case.config),
        source=source,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    network, residency = loader.load(make_placement(num_buffers, embed, host_block_bytes))
    return (
        Runner(network=network, tokenizer=ByteTokenizer(), attention=sdpa, weights=residency),
        source,
        residency,
    )


def run_case(runner: Runner, case: Case) -> list[torch.Tensor]:
    """Returns the exact images of a case."""
    with infer():
        if case.kind == "interleave":
            kept = KeptImages(1)
            job = build_job(case, case.params["system_message"])
            run_interleave(
                runner, [job], kept=(), channel=kept, resolutions=[case_resolutions(case)]
            )
            return [torch.from_numpy(drawn.image) for drawn in kept.images[0]]
        images, _ = draw_together(runner, [build_job(case, "You draw.")])
        return list(images)


@pytest.mark.parametrize(("config", "name"), CASES)
@pytest.mark.parametrize(
    ("num_buffers", "host_block_bytes"), [(None, None), (2, None), (3, 0), (5, 300_000), (7, None)]
)
def test_images_are_bit_identical_wherever_the_weights_are(
    config: str, name: str, num_buffers: int | None, host_block_bytes: int | None
) -> None:
    case = load_case(config, name)
    expected = run_case(build_runner(case), case)
    runner, _, _ = moving_runner(case, num_buffers, host_block_bytes)
    # Twice: the second batch meets what the first has left in the buffers.
    for _ in range(2):
        found = run_case(runner, case)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("num_buffers", "host_block_bytes"), [(2, None), (3, 0), (5, 300_000)])
def test_steps_without_the_middle_layers_are_bit_identical_wherever_the_weights_are(
    monkeypatch: pytest.MonkeyPatch, num_buffers: int, host_block_bytes: int | None
) -> None:
    """Blocks that are copied ahead are then not asked for."""
    monkeypatch.setattr(transformer, "middle_layers", lambda num_layers: range(1, num_layers))
    case = load_case("dense_fm", "t2i_think_end")
    job = build_job(case, "You draw.")
    sampling = replace(job.job.sampling, num_steps=9, layer_stride=3)
    job = replace(job, job=replace(job.job, sampling=sampling))
    drawn = []
    for buffers, budget in ((None, None), (num_buffers, host_block_bytes)):
        runner, _, _ = moving_runner(case, buffers, budget)
        with infer():
            drawn += [draw_together(runner, [job])[0] for _ in range(2)]
    assert all(torch.equal(images, drawn[0]) for images in drawn)


def test_a_network_that_fits_reads_each_weight_once() -> None:
    case = load_case("dense_fm", "t2i_cfg4_none")
    runner, source, residency = moving_runner(case, None, None, embed=True)
    loaded = source.num_reads
    run_case(runner, case)
    assert source.num_reads == loaded
    assert residency.host_bytes == 0


def test_a_host_budget_is_kept() -> None:
    case = load_case("dense_fm", "t2i_cfg4_none")
    for budget in (0, 200_000, 400_000):
        _, _, residency = moving_runner(case, 2, budget)
        block = 4 * (64 * (4 + 2 * 2) * 32 + 64 * 128 + 3 * 64 * 128 + 4 * 128)
        assert residency.host_bytes <= max(budget, 2 * block)


def test_a_failed_read_is_an_error_of_the_batch_and_not_of_the_next() -> None:
    case = load_case("dense_fm", "t2i_cfg4_none")
    expected = run_case(build_runner(case), case)
    runner, source, _ = moving_runner(case, 2, 0)
    source.fails = True
    with pytest.raises(CheckpointError, match="the disk was removed"):
        run_case(runner, case)
    source.fails = False
    assert torch.equal(run_case(runner, case)[0], expected[0])


@pytest.mark.parametrize(("num_buffers", "budget"), [(None, None), (2, None), (2, 900_000)])
def test_a_read_that_fails_among_others_ends_the_load(
    monkeypatch: pytest.MonkeyPatch, num_buffers: int | None, budget: int | None
) -> None:
    case = load_case("dense_fm", "t2i_cfg4_none")
    source = RuleWeights(rule_weights(case.config, case.weight_edits))
    source.failing = "layers.1.mlp_mot_gen.up_proj"
    loader = NetworkLoader(
        arch=golden_architecture(case.config),
        source=source,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    # Several parts of each tensor, on more threads than there may be cores.
    monkeypatch.setattr(residency_module, "PART_BYTES", 4096)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    with pytest.raises(CheckpointError, match="up_proj"):
        loader.load(make_placement(num_buffers, host_block_bytes=budget))
    reads = source.num_reads
    source.failing = ""
    loader.load(make_placement(num_buffers, host_block_bytes=budget))
    # The load that failed reads nothing after its error.
    assert source.num_reads > 2 * reads


def test_images_do_not_depend_on_the_parts_weights_are_read_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = load_case("moe", "t2i_think_end")
    expected = run_case(build_runner(case), case)
    monkeypatch.setattr(residency_module, "PART_BYTES", 1000)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for num_buffers, budget in ((None, None), (2, 0)):
        runner, _, _ = moving_runner(case, num_buffers, budget)
        assert torch.equal(run_case(runner, case)[0], expected[0])


def test_a_copy_ahead_that_failed_is_made_again_in_the_next_phase() -> None:
    case = load_case("dense_fm", "t2i_cfg4_none")
    runner, source, residency = moving_runner(case, 2, 0)
    generation = runner.network.generation
    residency.denoise()
    source.failing = ".layers.2."
    # Layers 1 and 2 are copied ahead, while 0 is used and after it.
    with generation.lend(0):
        pass
    assert source.failed.wait(30)
    residency.denoise()
    source.failing = ""
    with generation.lend(2) as layer:
        weights = {name: value.clone() for name, value in layer.named_parameters()}
    pristine = build_runner(case).network.generation.layers[2]
    assert all(torch.equal(weights[name], value) for name, value in pristine.named_parameters())


class Allocations(TorchDispatchMode):
    """Records operations that make tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append(func.__name__)
        return result


@pytest.mark.parametrize("num_buffers", [2, 4])
def test_moving_weights_allocates_nothing(num_buffers: int) -> None:
    case = load_case("dense_fm", "t2i_cfg4_none")
    runner, _, residency = moving_runner(case, num_buffers, None)
    run_case(runner, case)
    network = runner.network
    residency.denoise()

    def passes() -> Iterator[int]:
        for _ in range(3):
            for index in range(network.arch.num_layers):
                with network.generation.lend(index) as layer:
                    yield next(iter(layer.parameters())).data_ptr()

    with torch.inference_mode(), Allocations() as allocations:
        addresses = list(passes())
    assert allocations.made == []
    assert len(set(addresses)) <= num_buffers


@pytest.mark.parametrize("host_block_bytes", [None, 0])
def test_a_pool_of_another_size_changes_no_bit(
    host_block_bytes: int | None,
) -> None:
    case = load_case("dense_fm", "t2i_think_end")
    expected = run_case(build_runner(case), case)
    runner, _, residency = moving_runner(case, 6, host_block_bytes)
    for num_buffers in (6, 4, 2, 5):
        residency.resize(num_buffers)
        assert torch.equal(run_case(runner, case)[0], expected[0])


def test_memory_that_is_not_there_leaves_as_many_blocks_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = load_case("dense_fm", "t2i_think_end")
    expected = run_case(build_runner(case), case)
    runner, _, residency = moving_runner(case, 4, None)

    def new_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
        if num_bytes > few:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    few = residency._pool.num_bytes
    monkeypatch.setattr(residency_module, "new_buffer", new_buffer)
    assert residency.resize(6) == 4
    assert residency._pool.num_bytes == few
    assert torch.equal(run_case(runner, case)[0], expected[0])
    few -= 1
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match="of weights did not fit"):
            residency.resize(6)
    few += 1
    assert residency.resize(3) == 3
    assert torch.equal(run_case(runner, case)[0], expected[0])


def test_what_text_goes_through_is_packed_and_gives_the_same_bits() -> None:
    """Images are computed for longer than their weights take to come: those stay as they are."""
    case = load_case("dense_fm", "t2i_think_end")
    found = []
    for packs in (False, True):
        source = RuleWeights(rule_weights(case.config, case.weight_edits))
        loader = NetworkLoader(
            arch=golden_architecture(case.config),
            source=source,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
        )
        network = loader.new_network()
        placement = make_placement(2)
        residency = Residency(network, source, placement, loader.device, packs=packs)
        runner = Runner(
            network=network, tokenizer=ByteTokenizer(), attention=sdpa, weights=residency
        )
        found.append(run_case(runner, case)[0])
        kept = residency._host._kept
        packed = {block.name for block, one in kept.items() if isinstance(one, Packed)}
        assert packed == {one.name for one in kept if packs and "generation" not in one.name}
        assert len(packed) == packs * (loader.arch.num_layers + 1)
    assert torch.equal(*found)


def test_what_packing_took_goes_back_before_blocks_get_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two blocks of a sparse model do not fit where one of them was unpacked."""
    done: list[str] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*values: Any, **named: Any) -> Any:
            done.append(name)
            return call(*values, **named)

        return noted

    for owner, name in (
        (HostStore, "keep"),
        (residency_module, "empty_cache"),
        (residency_module, "Pool"),
    ):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    moving_runner(load_case("dense_fm", "t2i_think_end"), 2, None)
    assert done == ["keep", "empty_cache", "Pool"]
