"""The network against the reference, piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sensebatch.engine.model.lockstep import Pass
from sensebatch.engine.model.patchify import tokens_to_patches
from sensebatch.engine.prompts import ImageSpan, Prompt
from sensebatch.engine.runner import Extension
from tests.engine.golden_model import (
    build_network,
    build_runner,
    case_patches,
    golden_step,
    infer,
    predict,
    prefill_text,
)
from tests.golden_data import TOLERANCE, case_ids, load_case, relative_error


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # The reference keeps a batch axis of one.
    assert relative_error(actual.reshape(expected.shape), expected) < TOLERANCE


@pytest.mark.parametrize(("config", "name"), case_ids("vision"))
def test_both_patch_embedders_match_the_reference(config: str, name: str) -> None:
    case = load_case(config, name)
    network = build_network(config)
    rows = case.tensor("pixel_values")
    grids = tuple((int(h), int(w)) for h, w in case.tensor("grid_hw"))
    with infer():
        images = list(zip(rows.split([h * w for h, w in grids]), grids, strict=True))
        embeds = [network.embed_image(image, grid) for image, grid in images]
        assert_close(torch.cat(embeds), case.tensor("und_embeds"))
        generated = [
            network.generation_vision(image, grid, network.patch_rotary(grid))
            for image, grid in images
        ]
        assert_close(torch.cat(generated), case.tensor("gen_embeds"))


@pytest.mark.parametrize(("config", "name"), case_ids("prefix_text"))
def test_text_prefix_matches_the_reference_with_its_cache(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    with infer():
        cache, hidden = prefill_text(runner, case)
        assert_close(hidden, case.tensor("last_hidden_state"))
        assert_close(runner.network.logits(hidden), case.tensor("logits"))
        for layer in range(runner.network.arch.num_layers):
            keys, values = cache.read(layer)
            for cached, stored in ((keys, f"key_{layer}"), (values, f"value_{layer}")):
                assert_close(cached.transpose(0, 1), case.tensor(stored))


@pytest.mark.parametrize(("config", "name"), case_ids("prefix_image"))
def test_image_prefix_matches_the_reference(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    network = runner.network
    ids = case.tensor("input_ids").tolist()
    context = runner.tokenizer.token_id("<IMG_CONTEXT>")
    spans, place = [], 0
    patches = case_patches(case)
    for image in patches:
        place = ids.index(context, place)
        spans.append(ImageSpan(place, image.token_grid))
        place = spans[-1].end
    with infer(), pytest.MonkeyPatch.context() as patch:
        embeds = runner.embed_images(patches)
        prompt = Prompt(token_ids=tuple(ids), images=tuple(spans))
        seen: list[torch.Tensor] = []
        original = network.understanding.through

        def record(*args: Any) -> Pass[torch.Tensor]:
            # Copied, because the layers compute in their input's memory.
            seen.append(args[0].clone())
            seen.append((yield from original(*args)))
            return seen[1]

        patch.setattr(network.understanding, "through", record)
        extension = Extension(cache=network.new_cache(), prompt=prompt, embeds=embeds)
        last = runner.extend([extension])
        patch.undo()
        assert_close(seen[0], case.tensor("input_embeds"))
        assert_close(seen[1], case.tensor("last_hidden_state"))
        assert_close(network.logits(seen[1]), case.tensor("logits"))
        assert torch.equal(last[0], seen[1][-1])
        assert extension.cache.next_t == int(case.tensor("indexes")[0].max()) + 1


@pytest.mark.parametrize(("config", "name"), case_ids("gen_step"))
def test_one_velocity_matches_the_reference(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    with infer():
        step = golden_step(runner, case)
        embedded = runner.network.embed_noisy(step.z_JNx, step.condition_D, step.positions, [0])
        assert_close(embedded, case.tensor("input_embeds"))
        x = predict(runner, step)
        assert_close(x, case.tensor("x_pred"))
        assert_close(step.velocity(x), case.tensor("v_pred"))


@pytest.mark.parametrize(("config", "name"), case_ids("gen_step"))
def test_everything_a_velocity_is_made_of_matches_the_reference(
    config: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    network = runner.network
    outputs: list[torch.Tensor] = []
    original = network.generation.forward

    def record(*args: Any) -> torch.Tensor:
        outputs.append(original(*args).clone())
        return outputs[-1]

    with infer():
        step = golden_step(runner, case)
        size, t = step.positions.resolution, case.tensor("t").reshape(1)
        assert step.t == pytest.approx(t.item(), abs=1e-7)
        embeds = network.generation_vision(
            tokens_to_patches(step.z_JNx, size.height, size.width),
            step.positions.patch_grid,
            step.positions.patch_rotary,
        )
        assert_close(embeds, case.tensor("gen_vit_embeds"))
        expected = case.tensor("timestep_embeds")
        assert_close(network.timestep_embedder(t).expand_as(expected), expected)
        expected = case.tensor("noise_scale_embeds")
        ratio = torch.tensor([case.params["noise_scale"] / network.arch.noise_scale_max_value])
        assert_close(network.noise_scale_embedder(ratio).expand_as(expected), expected)
        places = network.token_rotary(case.tensor("image_indexes"))
        assert all(map(torch.equal, step.positions.token_rotary, places))
        monkeypatch.setattr(network.generation, "forward", record)
        predict(runner, step)
        assert_close(outputs[0], case.tensor("last_hidden_state"))
