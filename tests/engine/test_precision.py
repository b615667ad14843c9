"""What is computed in float32 where weights and activations are bfloat16.

The golden vectors are float32 throughout, so they cannot tell.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sensebatch.checkpoint.architecture import Moe
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.network import Network, ScalarEmbedder
from sensebatch.engine.model.operations import Operations, rms_norm
from sensebatch.engine.model.patchify import PixelHead, image_to_tokens
from sensebatch.engine.model.rope import patch_rotary, rotate_patches, token_rotary
from sensebatch.engine.model.transformer import SparseMlp
from sensebatch.engine.prompts import Prompt
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.engine.tasks.denoise import Canvas, denoise, draw_noise
from sensebatch.engine.tasks.state import job_generator
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Task
from tests.engine.drawings import drawing_of
from tests.engine.golden_model import fill, infer
from tests.engine.test_sampling import SAMPLING
from tests.golden_data import ByteTokenizer, golden_architecture, rule_weights

SIZE = Resolution(height=64, width=96)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def assert_rounded_once(found: Tensor, expected: Tensor) -> None:
    """Checks bfloat16 against float64; of equal numbers a few may be rounded to the other side."""
    assert found.dtype == torch.bfloat16
    assert (found == expected.bfloat16()).double().mean() > 0.99


def test_norm_is_computed_in_float32_and_cast_back_before_the_weight() -> None:
    x, weight = noise(8, 4096), noise(4096)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_rounded_once(rms_norm(x, weight, 1e-6), weight.double() * normed.bfloat16().double())


def test_angles_of_tokens_are_exact_far_from_the_first() -> None:
    t, h, w = positions = torch.tensor([[0, 257, 3001, 12289], [0, 0, 63, 85], [0, 1, 107, 31]])
    cos, sin = token_rotary(positions, head_dim=128, theta=5e6, theta_hw=1e4, dtype=torch.bfloat16)
    parts = []
    for place, dim, theta in ((t, 64, 5e6), (h, 32, 1e4), (w, 32, 1e4)):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        parts += [place.double()[:, None] * frequencies] * 2
    angles = torch.cat(parts, dim=-1)[:, None]
    torch.testing.assert_close(cos, angles.cos().bfloat16(), rtol=0, atol=2**-8)
    torch.testing.assert_close(sin, angles.sin().bfloat16(), rtol=0, atol=2**-8)


def test_patches_are_rotated_in_float32() -> None:
    rows, columns, channels = 3, 130, 64
    x = noise(rows * columns, channels)
    rotary = patch_rotary((rows, columns), channels=channels, theta=1e4, device=torch.device("cpu"))
    half = channels // 2
    frequencies = 1e4 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    patch = torch.arange(rows * columns, dtype=torch.float64)[:, None]
    angles = torch.cat(((patch % columns) * frequencies, (patch // columns) * frequencies), dim=-1)
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    assert_rounded_once(rotate_patches(x, rotary), torch.view_as_real(turned).flatten(-2))


def test_sinusoids_of_a_timestep_are_computed_in_float32() -> None:
    embedder = ScalarEmbedder(32).bfloat16()
    seen: list[Tensor] = []
    embedder.first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    t = torch.tensor([0.1234567, 0.987654])
    embedder(t)
    angles = t.double()[:, None] * 1e4 ** -(torch.arange(128, dtype=torch.float64) / 128)
    assert_rounded_once(seen[0], torch.cat((angles.cos(), angles.sin()), dim=-1))


@pytest.mark.parametrize("best", range(4))
def test_experts_are_chosen_in_float32(best: int) -> None:
    """Their probabilities are all a quarter in bfloat16."""
    moe = Moe(
        num_experts=4,
        num_experts_per_tok=1,
        intermediate_size=1,
        norm_topk_prob=True,
        sparse_layers=(True,),
    )
    mlp = SparseMlp(2, moe, Operations()).bfloat16().requires_grad_(False)
    mlp.gate.weight.zero_()
    mlp.gate.weight[best, 0] = 2**-10
    mlp.gate_up.fill_(1)
    mlp.down.zero_()
    mlp.down[best] = 1
    x = torch.tensor([[1, 0]], dtype=torch.bfloat16)
    out = mlp.add_to(torch.zeros_like(x), x, in_place=False)
    assert torch.equal(out, torch.nn.functional.silu(x[:, :1]).expand(1, 2))


def test_an_image_is_kept_in_float32_between_the_steps() -> None:
    """With one prediction for all steps, the last one ends at it, whatever the noise was."""
    arch = golden_architecture("dense_fm")
    network = Network(arch).requires_grad_(False).eval()
    fill(network, rule_weights("dense_fm"))
    runner = Runner(network=network.bfloat16(), tokenizer=ByteTokenizer(), attention=sdpa)
    expected = torch.randn(1, 3, SIZE.height, SIZE.width)
    predict = network.predict_image

    def fixed(z_JNx: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert z_JNx.dtype == predict(z_JNx, *rest, **options).dtype == torch.float32
        return image_to_tokens(expected).repeat(2, 1, 1)

    network.predict_image = fixed
    with infer():
        extension = runner.new_extension(Prompt(token_ids=(1, 2, 3)))
        runner.prefill([extension])
        noise = draw_noise(arch, SIZE, job_generator(1))
        canvas = Canvas(
            guidance=Guidance(Task.EDIT, SAMPLING),
            caches={Branch.COND: extension.cache, Branch.IMG_COND: extension.cache},
            noise=noise,
        )
        drawn = denoise(runner, [canvas], drawing=drawing_of(canvas.guidance, SIZE, num_steps=5))
    assert noise.dtype == torch.float32
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


def test_convolutions_of_float32_are_not_rounded_by_the_library() -> None:
    head = PixelHead(golden_architecture("dense_pixel"))
    allowed: list[bool] = []
    for convolution in (head.conv1, head.conv2):
        convolution.register_forward_pre_hook(
            lambda *_: allowed.append(torch.backends.cudnn.allow_tf32)
        )
    head(torch.zeros(1, SIZE.image_tokens, 64), SIZE.height, SIZE.width)
    assert allowed == [False, False]
