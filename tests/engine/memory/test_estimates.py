"""What the arithmetic expects against what the code takes, tensor by tensor."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from sensebatch.checkpoint.architecture import (
    OFFICIAL_8B,
    Architecture,
    HeadKind,
    parse_architecture,
)
from sensebatch.checkpoint.tokenizer import IMG_START
from sensebatch.config import MemoryConfig, default_config
from sensebatch.contract import Channel
from sensebatch.engine.decoding import decoding_operations
from sensebatch.engine.model.attention import Attention, attend_without_mask, sdpa
from sensebatch.engine.model.kv_cache import KVCache, SharedRoom
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import choose_operations
from sensebatch.engine.model.patchify import HEAD_MODULES
from sensebatch.engine.model.quantized import NUMBERS
from sensebatch.engine.preprocess import Patches
from sensebatch.engine.prompts import Prompt
from sensebatch.engine.runner import Extension, PassLimits, Runner
from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.engine.sampling.text import Script
from sensebatch.engine.tasks import interleave, single_image
from sensebatch.engine.tasks.denoise import Canvas, denoise
from sensebatch.engine.tasks.state import PreparedJob, prepare_job
from sensebatch.jobs import CfgNorm, Drawing, GroupKey, Job, Precision, Solver, Source, Stored
from sensebatch.plan.batches import make_plan, plan_entry
from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import (
    cache_bytes,
    decodes_fast,
    denoise_bytes,
    head_numbers,
    kept_per_image,
    prompt_bytes,
    quantising_bytes,
    text_bytes,
    velocity_bytes,
)
from sensebatch.plan.load import Load, group_load
from sensebatch.plan.passes import ROOM_SPARE
from sensebatch.resolutions import TOKEN_NUMBERS, Resolution
from sensebatch.tasks import Branch, Task
from tests.engine.drawings import drawing_of
from tests.engine.golden_model import infer
from tests.engine.memory.tracker import LiveBytes
from tests.golden_data import CONFIGS, ByteTokenizer, golden_architecture

pytestmark = pytest.mark.slow

LEAST, MOST = 0.97, 1.10
"""Bounds of the estimate relative to the measured peak."""


def small_architecture(hidden: int) -> Architecture:
    """Returns a small network with the proportions of the 8B model."""
    return replace(
        parse_architecture(OFFICIAL_8B),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        head_dim=hidden // 4,
        vocab_size=512,
        vision_hidden_size=hidden // 4,
    )


def small_network(
    hidden: int = 64, vision: int | None = None, head: HeadKind = HeadKind.MLP
) -> Network:
    torch.manual_seed(0)
    arch = small_architecture(hidden)
    arch = replace(arch, vision_hidden_size=vision or arch.vision_hidden_size, head=head)
    network = Network(arch).requires_grad_(False).eval()
    for parameter in network.parameters():
        parameter.normal_(std=0.02)
    return network


def computation_of(network: Network) -> Computation:
    return Computation(arch=network.arch, item_bytes=4)


def small_runner() -> Runner:
    return Runner(network=small_network(), tokenizer=ByteTokenizer(), attention=sdpa)


def make_load(task: Task, size: Resolution, jobs: int, prompt: int) -> Load:
    sampling = default_config("8b").tasks[task].sampling
    rule = task.spec.drawing
    assert rule is not None
    branches = rule.guidance.branches(sampling.cfg_scale, sampling.img_cfg_scale)
    drawing = Drawing(resolution=size, num_steps=2, timestep_shift=3.0, branches=branches)
    group = GroupKey(task=task, think=False, drawing=drawing)
    return Load(group=group, batch_size=jobs, prompt_tokens=prompt)


def attend_without_kernel(
    q_QHE: torch.Tensor, _k: torch.Tensor, _v: torch.Tensor, _causal: bool
) -> torch.Tensor:
    """Returns what attention allocates; on the meta device torch's own would form all scores."""
    return torch.empty_like(q_QHE)


@pytest.mark.parametrize("head", HeadKind)
@pytest.mark.parametrize(
    ("task", "hidden", "vision", "side", "jobs", "prompt"),
    [
        (Task.T2I, 64, 16, 1024, 1, 64),
        (Task.T2I, 64, 16, 1024, 6, 300),
        (Task.EDIT, 64, 16, 1024, 3, 600),
        (Task.T2I, 512, 128, 1024, 1, 64),
        (Task.EDIT, 512, 128, 1024, 2, 600),
        (Task.T2I, 64, 1024, 1024, 1, 64),
        (Task.T2I, 64, 1024, 1024, 5, 64),
        (Task.T2I, 4096, 1024, 256, 8, 300),
        (Task.T2I, 4096, 1024, 2048, 2, 300),
        (Task.T2I, 4096, 1024, 4096, 1, 300),
        (Task.EDIT, 4096, 1024, 4096, 2, 5000),
    ],
)
def test_denoising_takes_what_is_expected(
    task: Task, hidden: int, vision: int, side: int, jobs: int, prompt: int, head: HeadKind
) -> None:
    """Shapes alone are computed, so that the sizes may be those of real networks."""
    arch = replace(small_architecture(hidden), vision_hidden_size=vision, head=head)
    with torch.device("meta"):
        network = Network(arch).requires_grad_(False).eval()
    measured = drawn_bytes(network, attend_without_kernel, task, side, jobs, prompt)
    expected = denoise_bytes(computation_of(network), square_load(task, side, jobs, prompt), jobs)
    assert LEAST <= expected / measured <= MOST, (expected, measured)


def test_denoising_in_int8_takes_what_is_expected() -> None:
    """With torch's operations, whose sums take as much as quantising does."""
    arch = replace(small_architecture(4096), vision_hidden_size=1024)
    with torch.device("meta"):
        network = Network(arch).requires_grad_(False).eval()
    network.generation.quantise(NUMBERS[Stored.INT8])
    computation = replace(computation_of(network), precision=Precision.INT8)
    measured = drawn_bytes(network, attend_without_kernel, Task.T2I, 256, 8, 300)
    expected = denoise_bytes(computation, square_load(Task.T2I, 256, 8, 300), 8)
    expected += quantising_bytes(computation)
    assert LEAST <= expected / measured <= MOST, (expected, measured)


@pytest.mark.parametrize("head", HeadKind)
def test_denoising_with_kernels_takes_what_is_expected(head: HeadKind) -> None:
    network = small_network(64, head=head)
    measured = drawn_bytes(network, sdpa, Task.EDIT, 512, 2, 64)
    expected = denoise_bytes(computation_of(network), square_load(Task.EDIT, 512, 2, 64), 2)
    assert LEAST <= expected / measured <= MOST, (expected, measured)


def square_load(task: Task, side: int, jobs: int, prompt: int) -> Load:
    return make_load(task, Resolution(height=side, width=side), jobs, prompt)


def drawn_bytes(
    network: Network, attention: Attention, task: Task, side: int, jobs: int, prompt: int
) -> int:
    """Returns the peak of drawing images of jobs together, prefixes included."""
    limits = PassLimits(image_tokens=1 << 20)
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=attention, limits=limits)
    size = Resolution(height=side, width=side)
    guidance = Guidance(task, replace(default_config("8b").tasks[task].sampling, num_steps=2))

    def cached(num_tokens: int) -> KVCache:
        cache = network.new_cache()
        cache.reserve(num_tokens)
        cache.advance(num_tokens, num_tokens)
        return cache

    with infer(), LiveBytes() as live:
        shared = cached(8)
        canvases = []
        for _ in range(jobs):
            caches = {
                branch: shared if branch == Branch.UNCOND else cached(prompt)
                for branch in guidance.branches
            }
            noise = torch.zeros(3, side, side, device=network.device)
            canvases.append(Canvas(guidance=guidance, caches=caches, noise=noise))
        live.peak = live.now
        denoise(runner, canvases, drawing=drawing_of(guidance, size))
        # Noise as it was drawn is in host memory, which is the device here.
        return live.peak - jobs * noise.nbytes


@pytest.mark.parametrize("hidden", [64, 4096, 8192])
@pytest.mark.parametrize(("height", "width"), [(1024, 1536), (4096, 4096), (1024, 8192)])
@pytest.mark.parametrize("head", HeadKind)
def test_a_head_takes_what_is_expected(
    head: HeadKind, height: int, width: int, hidden: int
) -> None:
    arch = replace(small_architecture(hidden), head=head)
    size = Resolution(height=height, width=width)
    with torch.device("meta"):
        module = HEAD_MODULES[head](arch)
        hidden_BND = torch.zeros(1, size.image_tokens, hidden)
    with infer(), LiveBytes() as live:
        module(hidden_BND, height, width)
    assert live.peak == 4 * head_numbers(arch, size, 1)


def test_the_convolutional_head_takes_no_more_for_a_larger_image() -> None:
    arch = replace(small_architecture(4096), head=HeadKind.PIXEL)
    sizes = [Resolution(height=side, width=side) for side in (2048, 4096)]
    small, large = (head_numbers(arch, size, 1) for size in sizes)
    # Besides its predictions, and the rows that parts see as well.
    assert large - TOKEN_NUMBERS * sizes[1].image_tokens < 1.1 * small


@pytest.mark.parametrize(("jobs", "prompt"), [(1, 6000), (3, 2500), (4, 500)])
def test_prompts_take_what_is_expected(jobs: int, prompt: int) -> None:
    """As on a GPU without kernels."""
    runner = small_runner()
    runner.attention = attend_without_mask
    network = runner.network
    load = make_load(Task.T2I, Resolution(height=2048, width=2048), jobs, prompt)
    with infer(), LiveBytes() as live:
        hidden = runner.prefill(
            [runner.new_extension(Prompt(token_ids=(1,) * prompt)) for _ in range(jobs)]
        )
        runner.choose(hidden)
    expected = prompt_bytes(computation_of(network), load, parked=False)
    assert LEAST <= expected / live.peak <= MOST, (expected, live.peak)


@pytest.mark.parametrize(("jobs", "system", "prompt"), [(1, 500, 6000), (2, 1500, 3500)])
def test_prompts_after_a_system_turn_take_what_is_expected(
    jobs: int, system: int, prompt: int
) -> None:
    """As on a GPU without kernels."""
    runner = small_runner()
    runner.attention = attend_without_mask
    network = runner.network
    load = make_load(Task.T2I, Resolution(height=2048, width=2048), jobs, prompt)
    load = replace(load, system_tokens=system)
    with infer(), LiveBytes() as live:
        first = [runner.new_extension(Prompt(token_ids=(1,) * system)) for _ in range(jobs)]
        runner.prefill(first)
        rest = Prompt(token_ids=(1,) * (prompt - system))
        live.peak = live.now
        hidden = runner.prefill([Extension(cache=one.cache, prompt=rest) for one in first])
        runner.choose(hidden)
    # The system turn has a cache of its own in a run.
    expected = prompt_bytes(computation_of(network), load, parked=False)
    expected -= cache_bytes(computation_of(network), system)
    assert LEAST <= expected / live.peak <= MOST, (expected, live.peak)


@pytest.mark.parametrize(("jobs", "prompt", "text"), [(1, 1500, 6), (4, 400, 9)])
def test_decoding_takes_what_is_expected(jobs: int, prompt: int, text: int) -> None:
    """By passes; what kernels make room for is another test's."""
    runner = small_runner()
    network = runner.network
    load = make_load(Task.T2I, Resolution(height=2048, width=2048), jobs, prompt)
    load = replace(load, text_tokens=text)
    with infer(), LiveBytes() as live:
        extensions = [runner.new_extension(Prompt(token_ids=(1,) * prompt)) for _ in range(jobs)]
        caches = [extension.cache for extension in extensions]
        runner.prefill(extensions)
        del extensions
        # Prompts alone are another test's.
        live.peak = live.now
        step = runner.text_step(caches, text)
        for _ in range(text):
            step([(index, 1) for index in range(jobs)])
        runner.append_tokens([(cache, (1, 2, 3)) for cache in caches])
    expected = text_bytes(computation_of(network), load, parked=False)
    assert LEAST <= expected / live.peak <= MOST, (expected, live.peak)


def test_only_one_layer_of_a_room_is_there_twice_while_it_grows() -> None:
    arch = replace(small_architecture(64), num_layers=8)
    network = Network(arch)
    jobs, prompt, room = 3, 500, 200
    with infer(), LiveBytes() as live:
        caches = [network.new_cache() for _ in range(jobs)]
        for cache in caches:
            cache.reserve(prompt)
            cache.advance(prompt, prompt)
        shared = SharedRoom(caches, room)
        del shared
        for cache in caches:
            cache.advance(room, prompt + room)
        SharedRoom(caches, room)
    places = jobs * (prompt + 2 * room + ROOM_SPARE)
    taken = cache_bytes(computation_of(network), places)
    assert taken < live.peak <= taken + taken // arch.num_layers


def test_short_prompts_after_a_system_turn_take_no_more_than_their_tokens() -> None:
    runner = small_runner()
    network = runner.network
    turn = runner.new_extension(Prompt(token_ids=(1,) * 300))
    jobs, new = 8, 20
    with infer(), LiveBytes() as live:
        runner.prefill([turn])
        before = live.now
        rest = Prompt(token_ids=(1,) * new)
        extensions = [Extension(cache=turn.cache.fork(), prompt=rest) for _ in range(jobs)]
        runner.prefill(extensions)
        assert live.now - before == cache_bytes(computation_of(network), jobs * (300 + new))


def test_thoughts_leave_no_unused_room_while_images_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = Resolution(height=32, width=32)
    runner = small_runner()
    network = runner.network
    found = []

    def measured(_: Runner, canvases: list[Canvas], *_args: Any, **_options: Any) -> object:
        caches = {id(c): c for canvas in canvases for c in canvas.caches.values()}.values()
        lengths = sum(cache.length for cache in [*caches, *runner.system_turns.values()])
        found.append((live.now, cache_bytes(computation_of(network), lengths)))
        return torch.zeros(len(canvases), 3, size.height, size.width)

    monkeypatch.setattr(single_image, "denoise", measured)
    prepared = _prepared(runner, Task.T2I, size, think=True)
    with infer(), LiveBytes() as live:
        single_image.run_single_image(runner, [prepared] * 3, kept=(), channel=Channel())
    ((held, expected),) = found
    assert held == expected


def test_an_interleave_job_caches_no_more_than_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """All images but the last are read back."""
    size = Resolution(height=64, width=96)
    runner = small_runner()
    prepared = _prepared(runner, Task.INTERLEAVE, size, think=False)
    lengths = []

    def drawn(_: Runner, canvases: list[Canvas], *_args: Any, **_options: Any) -> object:
        caches = canvases[0].caches
        lengths.append(caches[Branch.COND].length + caches[Branch.IMG_COND].length)
        return torch.zeros(len(canvases), 3, size.height, size.width)

    monkeypatch.setattr(interleave, "denoise", drawn)
    script = Script(word=5, image_start=runner.tokenizer.token_id(IMG_START))
    with infer():
        interleave.run_interleave(runner, [prepared], kept=(), channel=Channel(), script=script)
    entry = plan_entry(prepared.job)
    load = group_load(make_plan([entry], MemoryConfig()).groups[0])
    prompts = [prepared.prompts[name] for name in (Branch.COND, Branch.IMG_COND)]
    expected = load.prefix_tokens - 2 * load.prompt_tokens
    assert len(lengths) == prepared.job.sampling.max_images
    assert lengths[-1] - sum(len(prompt.token_ids) for prompt in prompts) == expected


def _prepared(runner: Runner, task: Task, size: Resolution, *, think: bool) -> PreparedJob:
    sampling = replace(
        default_config("8b").tasks[task].sampling,
        num_steps=1,
        img_cfg_scale=2.0,
        max_think_tokens=5,
        max_images=3,
        max_new_tokens=9,
    )
    job = Job(
        id="a",
        task=task,
        prompt="a house",
        resolution=size,
        seed=1,
        think=think,
        sampling=sampling,
        source=Source(file="test", row="0"),
    )
    return prepare_job(runner.network.arch, runner.tokenizer, job, system_prompt="Draw.")


@pytest.mark.parametrize("precision", [None, Precision.INT8_ALL])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_plan_knows_how_text_is_decoded(config: str, precision: Precision | None) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    arch = golden_architecture(config)
    with torch.device("meta"):
        network = Network(arch, choose_operations(fused=True))
    if precision is not None:
        network.understanding.quantise(NUMBERS[Stored.INT8])
    fused = Computation(arch=arch, item_bytes=4, precision=precision, fused=True)
    assert decodes_fast(fused) == (decoding_operations(network) is not None)
    assert not decodes_fast(replace(fused, fused=False))


def test_a_layer_frees_what_it_attended_to_before_the_next_attends() -> None:
    network = small_network()
    alive: list[Any] = []

    class Watched:
        def parts(self, num_tokens: int) -> list[slice]:
            return [slice(0, num_tokens // 2), slice(num_tokens // 2, num_tokens)]

        def room(self, _: int) -> None:
            return None

        def attend(self, _layer: int, _part: slice, q_THE: torch.Tensor, *_: Any) -> torch.Tensor:
            assert not any(earlier() for earlier in alive)
            attended = torch.zeros_like(q_THE)
            alive.append(weakref.ref(attended))
            return attended

    with infer():
        rotary = network.token_rotary(torch.zeros(3, 4, dtype=torch.int64))
        network.understanding(torch.zeros(4, network.arch.hidden_size), rotary, Watched())
    assert len(alive) == 2 * network.arch.num_layers


def test_input_images_are_embedded_one_at_a_time() -> None:
    runner = small_runner()
    patches, count = 4 * 256, 6
    with infer(), LiveBytes() as one:
        runner.embed_images(
            Patches(rows_PD=torch.zeros(patches, 768), grid_hw=(32, 32)) for _ in "a"
        )
    with infer(), LiveBytes() as live:
        embeds = runner.embed_images(
            Patches(rows_PD=torch.zeros(patches, 768), grid_hw=(32, 32)) for _ in range(count)
        )
    kept = sum(embed.nbytes for embed in embeds)
    assert live.peak <= one.peak + kept + patches * 768 * 4


def test_a_cache_takes_what_is_expected() -> None:
    runner = small_runner()
    network = runner.network
    extension = Extension(cache=network.new_cache(), prompt=Prompt(token_ids=(1,) * 1000))
    with infer():
        runner.extend([extension])
    keys, values = extension.cache.read(0)
    taken = network.arch.num_layers * (keys.numel() + values.numel()) * 4
    assert cache_bytes(computation_of(network), 1000) == taken


@pytest.mark.parametrize(
    ("task", "jobs", "norm", "others"),
    [
        (Task.T2I, 3, CfgNorm.NONE, {}),
        (Task.T2I, 1, CfgNorm.CFG_ZERO_STAR, {}),
        (Task.T2I, 2, CfgNorm.CHANNEL, {}),
        (Task.EDIT, 2, CfgNorm.GLOBAL, {}),
        (Task.T2I, 3, CfgNorm.NONE, {"solver": Solver.AB2}),
        (Task.T2I, 1, CfgNorm.NONE, {"solver": Solver.DPM2M}),
        (Task.EDIT, 2, CfgNorm.NONE, {"solver": Solver.DPM2M, "guidance_stride": 2}),
        (Task.T2I, 3, CfgNorm.GLOBAL, {"guidance_stride": 3}),
    ],
)
def test_guidance_and_solvers_take_what_is_expected(
    monkeypatch: pytest.MonkeyPatch,
    task: Task,
    jobs: int,
    norm: CfgNorm,
    others: dict[str, Any],
) -> None:
    """With a network that needs nothing but what it returns."""
    network, size = small_network(), Resolution(height=512, width=512)
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=sdpa)
    sampling = replace(
        default_config("8b").tasks[task].sampling, cfg_scale=4, img_cfg_scale=2, cfg_norm=norm
    )
    sampling = replace(sampling, **others)
    guidance = Guidance(task, sampling)

    def predict(z_JNx: torch.Tensor, *args: Any, **_: Any) -> torch.Tensor:
        return torch.zeros(len(args[-1]), *z_JNx.shape[1:])

    monkeypatch.setattr(network, "predict_image", predict)
    caches = {branch: network.new_cache() for branch in guidance.branches}
    noise = torch.zeros(3, 512, 512)
    canvas = Canvas(guidance=guidance, caches=caches, noise=noise)
    with infer(), LiveBytes() as live:
        drawing = drawing_of(guidance, size, num_steps=5, **others)
        denoise(runner, [canvas] * jobs, drawing=drawing)
    branches = len(guidance.branches)
    assert branches == (3 if task is Task.EDIT else 2)
    state = jobs * noise.nbytes * (1 + kept_per_image(drawing))
    expected = state + velocity_bytes(size.image_tokens, jobs, branches)
    assert LEAST <= expected / live.peak <= MOST, (expected, live.peak)


def test_images_of_finished_passes_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network, size = small_network(), Resolution(height=512, width=512)
    limits = PassLimits(image_tokens=size.image_tokens)
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=sdpa, limits=limits)
    alive = []

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        alive.append(live.now)
        return denoise(*args, **options)

    monkeypatch.setattr(single_image, "denoise", watched)
    sampling = replace(default_config("8b").tasks[Task.T2I].sampling, num_steps=1)
    job = Job(
        id="a",
        task=Task.T2I,
        prompt="a house",
        resolution=size,
        seed=1,
        think=False,
        sampling=sampling,
        source=Source(file="test", row="0"),
    )
    prepared = prepare_job(network.arch, runner.tokenizer, job, system_prompt="")
    with infer(), LiveBytes() as live:
        single_image.run_single_image(runner, [prepared] * 4, kept=(), channel=Channel())
    assert len(alive) == 4
    pixels = prepared.noise.to("cpu").numel()
    floats = 4 * pixels
    # What is being kept is in host memory, as finished pixels are, which is the device here.
    assert max(alive) - alive[0] <= floats + 3 * pixels
