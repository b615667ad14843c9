"""Times steps and tokens on a loaded network, and measures the errors of each path.

    python -m sensebatch.engine.bench --model synthetic:8b

A developer's tool; `sensebatch profile` measures what users get. All weights stay on the device.
Prints a Markdown table for docs/measurements.md.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, TypeVar

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.files import Checkpoint, open_checkpoint
from sensebatch.config import SYNTHETIC_PREFIX, default_config
from sensebatch.engine.decoding import PlainDecoder
from sensebatch.engine.device.runtime import (
    DTYPES,
    new_attention,
    resolve_attention,
    resolve_fused,
)
from sensebatch.engine.model.attention import Attention, sdpa
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.operations import Operations
from sensebatch.engine.model.patchify import image_to_tokens
from sensebatch.engine.model.quantized import (
    NUMBERS,
    Numbers,
    QuantisedLinear,
    quantise_rows,
)
from sensebatch.engine.model.tokenizer import HFTokenizer
from sensebatch.engine.model.transformer import DecoderLayer, Expert, SparseMlp, SwiGLU
from sensebatch.engine.prompts import Prompt
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.engine.tasks.denoise import Canvas, denoise, draw_noise, image_noise_scale
from sensebatch.engine.tasks.state import job_generator
from sensebatch.engine.weights.loader import NetworkLoader, open_weights, warm_up
from sensebatch.jobs import QUANTISED, Drawing, Precision, VramMode
from sensebatch.plan.device import place
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Task

Lend = Callable[[nn.Module], AbstractContextManager[nn.Module]]
"""Turns a layer of the network into one that a variant computes with."""
M = TypeVar("M", bound=nn.Module)
LIMIT_ROWS = 4096
PROMPT_TOKENS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    side: int
    """Pixels along a side of a large image."""
    steps: int
    tokens: int


FULL = Sizes(side=2048, steps=10, tokens=200)
SMALL = Sizes(side=128, steps=2, tokens=4)


def open_runner(model: str) -> Runner:
    """Returns a runner of the network as in a run in `full` mode.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    checkpoint, config = open_checkpoint(model), default_config(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    backend = resolve_attention("auto", device.type, dtype)
    loader = _loader(checkpoint, device, DTYPES[dtype])
    attention = new_attention(backend, device.type, fused=loader.fused)
    compile_s = warm_up(loader, attention)
    memory = replace(config.memory, vram_mode=VramMode.FULL)
    placements = place(loader.computation, memory=memory, loads=[], device_free=None, host_free=0)
    network, residency = loader.load(placements.leanest)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    seconds = "not compiled" if compile_s is None else f"kernels {compile_s:.1f} s"
    print(f"{model}, {name}, torch {torch.__version__}, {dtype}, {backend}, {seconds}\n")
    return Runner(
        network=network,
        tokenizer=HFTokenizer(checkpoint.path),
        attention=attention,
        weights=residency,
    )


def _loader(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> NetworkLoader:
    return NetworkLoader(
        arch=checkpoint.architecture,
        source=open_weights(checkpoint, None, dtype),
        device=device,
        dtype=dtype,
        fused=resolve_fused(True, device.type, checkpoint.architecture),
    )


def step_seconds(
    runner: Runner, *, jobs: int, side: int, steps: int, prompts: tuple[int, int]
) -> float:
    """Returns the seconds of a denoising step by jobs, after one to warm up.

    Args:
        runner: The network.
        jobs: How many share a pass.
        side: Pixels along a side of the images.
        steps: How many are timed.
        prompts: Tokens of the conditional prompts, and of the one that all jobs share.
    """
    size = Resolution(height=side, width=side)
    drawings = _drawings(runner, jobs, size, prompts)
    drawing = Drawing(
        resolution=size, num_steps=1, timestep_shift=3.0, branches=drawings[0].guidance.branches
    )
    denoise(runner, drawings, drawing=drawing)
    start = _now(runner)
    denoise(runner, drawings, drawing=replace(drawing, num_steps=steps))
    return (_now(runner) - start) / (steps * jobs)


def _drawings(
    runner: Runner, jobs: int, size: Resolution, prompts: tuple[int, int]
) -> list[Canvas]:
    sampling = default_config(SYNTHETIC_PREFIX + "8b").tasks[Task.T2I].sampling
    guidance = Guidance(Task.T2I, sampling)
    shared = runner.new_extension(_prompt(prompts[1]))
    # They differ in length, as prompts do.
    own = [runner.new_extension(_prompt(prompts[0] + job)) for job in range(jobs)]
    runner.prefill([shared, *own])
    arch = runner.network.arch
    return [
        Canvas(
            guidance=guidance,
            caches={Branch.COND: extension.cache, Branch.UNCOND: shared.cache},
            noise=draw_noise(arch, size, job_generator(job)),
        )
        for job, extension in enumerate(own)
    ]


def _prompt(tokens: int, first: int = 1) -> Prompt:
    return Prompt(token_ids=tuple(range(first, first + tokens)))


def _now(runner: Runner) -> float:
    if runner.network.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def token_seconds(runner: Runner, *, sequences: int, tokens: int, plain: bool) -> float:
    """Returns the seconds of a decoding step, after three to warm up.

    Args:
        runner: The network.
        sequences: How many decode together.
        tokens: How many are timed.
        plain: Whether to decode by the passes that also read prompts.
    """
    # Their tokens differ, so that they do not all go to the same experts.
    prompts = [_prompt(PROMPT_TOKENS + i, first=1 + i * PROMPT_TOKENS) for i in range(sequences)]
    extensions = [runner.new_extension(prompt) for prompt in prompts]
    choices = runner.choose(runner.prefill(extensions))
    caches = [extension.cache for extension in extensions]
    step = runner.text_step(caches, tokens + 3)
    if plain:
        step = PlainDecoder(caches, runner.appending, runner.network.lm_head.through).step
    for _ in range(3):
        choices = [*step(list(enumerate(choices)))]
    start = _now(runner)
    for _ in range(tokens):
        choices = [*step(list(enumerate(choices)))]
    return (_now(runner) - start) / tokens


def limit_seconds(runner: Runner, *, numbers: Numbers | None, steps: int) -> float:
    """Returns the seconds that products and attention alone take of a step of two branches.

    They are those of images of `LIMIT_ROWS` tokens after a prompt, one after the other and with
    nothing in between. Those of sparse blocks are as if one expert had all rows.

    Args:
        runner: The network.
        numbers: What is multiplied, if it is not the dtype.
        steps: How many are timed.
    """
    network, arch = runner.network, runner.network.arch

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=network.device).to(network.dtype)

    products: list[Callable[[], object]] = []
    for rows, height, width, dense in _products(arch):
        x, weight = noise(rows, width), noise(height, width) / width**0.5
        if numbers is not None and dense:
            linear = _quantised(weight, numbers, network.operations)
            tokens = quantise_rows(x, numbers)
            products.append(partial(linear.multiply, tokens, network.dtype))
        else:
            products.append(partial(F.linear, x, weight))
    queries = noise(LIMIT_ROWS, arch.num_heads, arch.head_dim)
    keys = noise(LIMIT_ROWS + PROMPT_TOKENS, arch.num_kv_heads, arch.head_dim)
    products.append(lambda: runner.attention(queries, keys, keys, False))
    seconds = 0.0
    for count in (1, steps):
        start = _now(runner)
        for _ in range(2 * arch.num_layers * count):
            for product in products:
                product()
        seconds = (_now(runner) - start) / count
    return seconds


def _products(arch: Architecture) -> Iterator[tuple[int, int, int, bool]]:
    """Yields the products of a layer: rows of tokens, sides of the matrix, whether it is dense."""
    hidden, query = arch.hidden_size, arch.num_heads * arch.head_dim
    key, moe = arch.num_kv_heads * arch.head_dim, arch.generation_moe
    yield LIMIT_ROWS, query + 2 * key, hidden, True
    yield LIMIT_ROWS, hidden, query, True
    rows, inner = LIMIT_ROWS, arch.intermediate_size
    if moe is not None:
        yield LIMIT_ROWS, moe.num_experts, hidden, False
        rows, inner = LIMIT_ROWS * moe.num_experts_per_tok, moe.intermediate_size
    yield rows, 2 * inner, hidden, moe is None
    yield rows, hidden, inner, moe is None


def variant(
    network: Network,
    understanding: Lend = nullcontext,
    generation: Lend = nullcontext,
    *,
    operations: Operations | None = None,
    dtype: torch.dtype | None = None,
) -> Network:
    """Returns a network with the same weights whose layers are lent in another form.

    Args:
        network: Is loaded, with all weights on the device.
        understanding: Changes a layer of that expert each time it is lent.
        generation: The same for the other expert.
        operations: Operations of the new network; those of `network` if None.
        dtype: Dtype of everything outside layers; that of `network` if None.
    """
    operations, dtype = operations or network.operations, dtype or network.dtype
    with torch.device("meta"):
        twin = Network(network.arch, operations).requires_grad_(False).to(dtype)
    for name, parameter in network.named_parameters():
        if parameter.device.type != "meta":
            owner, _, attribute = name.rpartition(".")
            value = nn.Parameter(parameter.to(dtype), requires_grad=False)
            setattr(twin.get_submodule(owner), attribute, value)
    twin.understanding.lend = _lender(network.understanding, understanding)
    twin.generation.lend = _lender(network.generation, generation)
    twin.lm_head.lend = network.lm_head.lend
    return twin


def _lender(expert: Expert, form: Lend) -> Callable[[int], AbstractContextManager[nn.Module]]:
    @contextmanager
    def lend(index: int) -> Iterator[nn.Module]:
        with expert.lend(index) as layer, form(layer) as formed:
            yield formed

    return lend


def _shallow(module: M) -> M:
    """Returns a module with the same parameters, whose parts can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


@contextmanager
def naive(layer: nn.Module) -> Iterator[nn.Module]:
    """Lends a layer with torch's operations and the same weights."""
    assert isinstance(layer, DecoderLayer)
    twin = _shallow(layer)
    twin.mlp = _shallow(layer.mlp)
    twin.operations = Operations()
    assert isinstance(twin.mlp, SwiGLU | SparseMlp)
    twin.mlp.operations = twin.operations
    yield twin


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[nn.Module]:
    """Lends a layer with torch's operations that computes in float32."""
    with naive(layer) as twin:
        yield copy.deepcopy(twin).float()


def in_numbers(numbers: Numbers) -> Lend:
    """Returns what lends a layer whose products are of quantised tokens and weights.

    Layers are quantised when they are first lent, and kept.
    """
    kept: dict[nn.Module, nn.Module] = {}

    @contextmanager
    def quantised(layer: nn.Module) -> Iterator[nn.Module]:
        if layer not in kept:
            kept[layer] = _quantised_layer(layer, numbers)
        yield kept[layer]

    return quantised


def _quantised_layer(layer: nn.Module, numbers: Numbers) -> DecoderLayer:
    assert isinstance(layer, DecoderLayer)
    # What is not quantised is shared, above all experts.
    twin = _shallow(layer)
    twin.qkv = _quantised(layer.qkv.weight, numbers, layer.operations)
    twin.o = _quantised(layer.o.weight, numbers, layer.operations)
    if isinstance(layer.mlp, SwiGLU):
        twin.mlp = _shallow(layer.mlp)
        twin.mlp.gate_up = _quantised(layer.mlp.gate_up.weight, numbers, layer.operations)
        twin.mlp.down = _quantised(layer.mlp.down.weight, numbers, layer.operations)
    return twin


def _quantised(weight: Tensor, numbers: Numbers, operations: Operations) -> QuantisedLinear:
    rows, columns = weight.shape
    linear = QuantisedLinear(columns, rows, numbers, weight.device, operations)
    quantised, scale = quantise_rows(weight, numbers)
    linear.weight = nn.Parameter(quantised, requires_grad=False)
    linear.scale = nn.Parameter(scale[:, 0].contiguous(), requires_grad=False)
    return linear


def quantised_network(network: Network, precision: Precision) -> Network:
    """Returns a `variant` with a precision's layers quantised."""
    quantisation = QUANTISED[precision]
    form = in_numbers(NUMBERS[quantisation.stored])
    return variant(network, form if quantisation.text else nullcontext, form)


def velocity(runner: Runner, network: Network, attention: Attention, side: int) -> Tensor:
    """Returns the velocities of both branches at t = 0.5, in float64."""
    own = Runner(network=network, tokenizer=runner.tokenizer, attention=attention)
    size = Resolution(height=side, width=side)
    (drawing,) = _drawings(own, 1, size, (PROMPT_TOKENS, 8))
    caches = [drawing.caches[branch] for branch in (Branch.COND, Branch.UNCOND)]
    z_JNx = image_to_tokens(drawing.noise.to(network.device)[None]) / 2
    t = torch.full((1,), 0.5, device=network.device)
    condition = network.condition(t, image_noise_scale(network.arch, size))[0]
    positions = network.image_positions(caches, size)
    x = network.predict_image(z_JNx, condition, caches, positions, attention, [0, 0])
    return ((x - z_JNx) / 0.5).double()


def errors(runner: Runner, side: int) -> dict[str, float]:
    """Returns the relative error of velocities by path, as a root mean square against float32."""
    network = runner.network
    exact = variant(network, in_float32, in_float32, operations=Operations(), dtype=torch.float32)
    expected = velocity(runner, exact, sdpa, side)
    plain = variant(network, naive, naive, operations=Operations())
    paths = {"torch's operations": (plain, sdpa), "as it is run": (network, runner.attention)}
    for precision in QUANTISED:
        paths[precision] = quantised_network(network, precision), runner.attention
    return {
        name: float((velocity(runner, path, attention, side) - expected).norm() / expected.norm())
        for name, (path, attention) in paths.items()
    }


def rows(runner: Runner, sizes: Sizes) -> Iterator[tuple[str, str]]:
    """Yields what was measured, with the result."""
    side, steps = sizes.side, sizes.steps
    prompts = (PROMPT_TOKENS, 8)
    plain = variant(runner.network, naive, naive, operations=Operations())
    slow = Runner(network=plain, tokenizer=runner.tokenizer, attention=sdpa)
    quantised = {
        precision: Runner(
            network=quantised_network(runner.network, precision),
            tokenizer=runner.tokenizer,
            attention=runner.attention,
        )
        for precision, quantisation in QUANTISED.items()
        if quantisation.text
    }
    yield "limit of a step", f"{limit_seconds(runner, numbers=None, steps=steps):.4f} s"
    for stored, numbers in NUMBERS.items():
        limit = limit_seconds(runner, numbers=numbers, steps=steps)
        yield f"limit of a step in {stored}", f"{limit:.4f} s"
    cases: Sequence[tuple[str, Runner, int, int, tuple[int, int]]] = (
        ("t2i", runner, 1, side, prompts),
        ("t2i", runner, 2, side, prompts),
        ("t2i", runner, 8, side // 2, prompts),
        ("t2i", runner, 8, side // 4, prompts),
        ("edit", runner, 1, side, (PROMPT_TOKENS + (side // 32) ** 2, (side // 32) ** 2)),
        *((f"t2i, {precision}", own, 1, side, prompts) for precision, own in quantised.items()),
        ("t2i, torch's operations", slow, 1, side, prompts),
    )
    for name, own, jobs, pixels, lengths in cases:
        seconds = step_seconds(own, jobs=jobs, side=pixels, steps=steps, prompts=lengths)
        yield f"{name}, {pixels}x{pixels}, {jobs} a pass", f"{seconds:.4f} s a step and job"
    for sequences in (1, 16):
        for name, own, tokens in (
            ("text", runner, sizes.tokens),
            *((f"text, {name}", own, sizes.tokens) for name, own in quantised.items()),
            ("text, torch's operations", slow, max(sizes.tokens // 20, 1)),
        ):
            seconds = token_seconds(own, sequences=sequences, tokens=tokens, plain=own is slow)
            speed = f"{seconds * 1e3:.2f} ms a token, {sequences / seconds:,.1f} tok/s"
            yield f"{name}, {sequences} together", speed
    for name, error in errors(runner, side // 2).items():
        yield f"velocity error, {name}", f"{error:.3%}"


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or synthetic:8b.")],
    small: Annotated[bool, typer.Option(help="A few small steps, to try the tool.")] = False,
) -> None:
    """Prints how long steps and tokens take, and their errors."""
    runner = open_runner(model)
    print("| what | measured |\n| --- | ---: |")
    with torch.inference_mode():
        for what, measured in rows(runner, SMALL if small else FULL):
            print(f"| {what} | {measured} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
