"""Writes the embedded checkpoint, and sets its shape and its starting weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sensebatch.checkpoint.tokenizer import IM_END
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.state_dict_adapter import checkpoint_slots, state_dict
from sensebatch.tiny.vocabulary import (
    END_OF_TEXT,
    GENERATION_PROMPT,
    INTERLEAVE_PROMPT,
    build_tokenizer,
)

NOISE_SCALE = 8.0
"""Noise scale of the square image. Flat shapes show through little noise, so it takes much to hide
them; with less, the network would hardly ever need the prompt."""


def network_config(vocab_size: int) -> dict[str, Any]:
    """Returns the content of `config.json`: the official architecture in the small."""
    return {
        "architectures": ["NEOChatModel"],
        "model_type": "neo_chat",
        "template": "neo1_0",
        "patch_size": 16,
        "downsample_ratio": 0.5,
        "use_pixel_head": True,
        "fm_head_layers": 2,
        "concat_time_token_num": 0,
        "noise_scale": NOISE_SCALE,
        "noise_scale_mode": "resolution",
        "noise_scale_base_image_seq_len": 64,
        "noise_scale_max_value": NOISE_SCALE,
        "add_noise_scale_embedding": True,
        "vision_config": {"hidden_size": 192, "patch_size": 16, "rope_theta_vision": 10000.0},
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": vocab_size,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_theta_hw": 100.0,
            "attention_bias": False,
            "tie_word_embeddings": False,
        },
    }


@torch.no_grad()
def init_weights(network: Network, seed: int) -> None:
    """Sets a network's starting weights: normal numbers, scaled by the inputs of each matrix.

    Matrices that add to the residual stream are scaled down by the number of layers, the last
    convolution starts at zero, and the embedding of noisy images is scaled to their noise.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * network.arch.num_layers)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 or name.endswith(("q_norm", "k_norm")):
            parameter.fill_(1.0 if "norm" in name else 0.0)
            continue
        drawn = torch.randn(parameter.shape, generator=generator)
        if name == "embed_tokens.weight":
            drawn *= 0.5
        else:
            drawn /= math.sqrt(math.prod(parameter.shape[1:]))
        if name.endswith(("o.weight", "down.weight")):
            drawn /= depth
        if name == "generation_vision.patch_embedding.weight":
            drawn /= network.arch.noise_scale / 2
        if name == "head.conv2.weight":
            drawn *= 0
        parameter.copy_(drawn)


@torch.no_grad()
def start_from(network: Network, folder: Path, tokens: Mapping[str, int]) -> None:
    """Copies the weights of an earlier checkpoint, whose vocabulary may be smaller.

    The rows of new tokens keep their starting embeddings; their logits start at the mean of all.

    Args:
        network: Has the new vocabulary.
        folder: The earlier checkpoint.
        tokens: The new vocabulary.
    """
    tensors = load_file(folder / "model.safetensors")
    earlier = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    known = {piece: index for index, (piece, _) in enumerate(earlier["model"]["vocab"])}
    known |= {added["content"]: added["id"] for added in earlier["added_tokens"]}
    common = [token for token in tokens if token in known]
    new, old = (torch.tensor([ids[token] for token in common]) for ids in (tokens, known))
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    for name, slots in checkpoint_slots(network.arch).items():
        for slot in slots:
            target = slot.view(parameters)
            source = tensors[name].to(target)[
                slice(None) if slot.rows is None else slice(*slot.rows)
            ]
            if (
                source.shape == target.shape
                and "embed_tokens" not in name
                and "lm_head" not in name
            ):
                target.copy_(source)
                continue
            if "lm_head" in name:
                target.copy_(source.mean(0).expand_as(target))
            target[new.to(target.device)] = source[old.to(target.device)]


def export(
    folder: Path,
    config: Mapping[str, Any],
    network: Network,
) -> None:
    """Writes a checkpoint folder: configuration, tokenizer, system prompts and weights.

    Args:
        folder: Is created if missing; files in it are replaced.
        config: What `network_config` returns.
        network: Has the weights, which are rounded to bfloat16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "system_prompts.py").write_text(
        '"""The system prompts that this checkpoint was trained with."""\n\n'
        f'SYSTEM_MESSAGE_FOR_GEN = "{GENERATION_PROMPT}"\n'
        f'DEFAULT_SYSTEM_MESSAGE = "{INTERLEAVE_PROMPT}"\n',
        encoding="utf-8",
    )
    tensors = {
        name: tensor.to("cpu", torch.bfloat16).contiguous().clone()
        for name, tensor in state_dict(network, network.arch).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
