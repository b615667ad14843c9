"""The jobs that promises are checked with: every task, thinking, guidance and steps of every kind.

Writes a manifest, its input image and a LoRA; the file of the LoRA changes two matrices a little.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from sensebatch.checkpoint.files import Checkpoint
from sensebatch.resolutions import Resolution
from sensebatch.store.files import write_atomic
from sensebatch.yaml_values import dump_yaml

GROUPS = ("t2i", "small", "steps", "think", "edit", "interleave", "ask")
"""What a job's id begins with; results are shown by these."""
LORA_RANK = 2
LORA_PARTS = ("mlp_mot_gen.down_proj.weight", "self_attn.q_proj_mot_gen.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the jobs are."""

    model: str
    """As `sensebatch run --model` takes it."""
    side: int
    """Pixels of a large square image; a multiple of 128. Small ones have a quarter of it."""
    num_steps: int = 3
    text_tokens: int = 8
    """Most tokens of a thought, and of the text before each image of a story."""


def write_jobs(scale: Scale, folder: Path) -> Path:
    """Writes the manifest with its input image, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    _draw_input(scale.side, folder / "input.png")
    manifest = {
        "version": 1,
        "name": "promises",
        "defaults": {"num_steps": scale.num_steps, "cfg_scale": 4.0, "timestep_shift": 3.0},
        "jobs": [
            *_t2i(scale),
            *_steps(scale),
            *_think(scale),
            *_edit(scale),
            *_stories(scale),
            *_questions(scale),
        ],
    }
    path = folder / "promises.yaml"
    write_atomic(path, dump_yaml(manifest).encode())
    return path


def _job(group: str, number: int, side: int, **fields: Any) -> dict[str, Any]:
    size = {"width": side, "height": fields.pop("height", side)}
    return {"id": f"{group}-{number}", "seed": 40 + number, **size, **fields}


def _t2i(scale: Scale) -> list[dict[str, Any]]:
    # More large images than share a pass, so that some are kept while others are drawn.
    large = [
        _job("t2i", 1, scale.side, prompt="A harbour at dawn, gulls over the boats"),
        _job("t2i", 2, scale.side, prompt="Three lemons", cfg_norm="global"),
        _job("t2i", 3, scale.side, prompt="A red train in the snow", cfg_interval=[0.2, 0.9]),
    ]
    small = [
        _job("small", number, scale.side // 4, prompt=f"A drawing of {number} boats")
        for number in range(1, 6)
    ]
    return large + small


def _steps(scale: Scale) -> list[dict[str, Any]]:
    """Returns jobs of which two steps use again what the middle layers added, and what guidance
    did."""
    fields = {"num_steps": 5, "solver": "ab2", "layer_stride": 3, "guidance_stride": 2}
    return [
        _job("steps", number, scale.side // 2, prompt=f"{number} kites over a field", **fields)
        for number in (1, 2)
    ]


def _think(scale: Scale) -> list[dict[str, Any]]:
    fields = {"think": True, "max_think_tokens": scale.text_tokens}
    return [
        _job("think", number, scale.side // 2, prompt=f"Isometric station {number}", **fields)
        for number in (1, 2)
    ]


def _edit(scale: Scale) -> list[dict[str, Any]]:
    fields = {"task": "edit", "image": "input.png"}
    thinks = {"think": True, "max_think_tokens": scale.text_tokens}
    half = scale.side // 2
    return [
        _job("edit", 1, scale.side, prompt="Make the disc green", **fields),
        _job("edit", 2, scale.side, prompt="Turn it by half and add a blue ring", **fields),
        _job("edit", 3, half, prompt="Make it evening", img_cfg_scale=1.5, **fields),
        _job("edit", 4, half, prompt="Make it night", **fields, **thinks),
    ]


def _stories(scale: Scale) -> list[dict[str, Any]]:
    images = 3
    fields = {
        "task": "interleave",
        "prompt": "Explain how a boat is built, in three steps with an image for each",
        "max_images": images,
        "max_new_tokens": images * scale.text_tokens,
    }
    height = scale.side // 2
    return [_job("interleave", n, scale.side, height=height, **fields) for n in (1, 2)]


def _questions(scale: Scale) -> list[dict[str, Any]]:
    fields = {"task": "ask", "prompt": "What is in the image?"}
    return [
        {"id": "ask-1", **fields, "image": "input.png", "max_new_tokens": scale.text_tokens},
        {"id": "ask-2", **fields, "image": "input.png", "choices": ["a disc", "a ring"]},
    ]


def _draw_input(side: int, path: Path) -> None:
    """Writes an image whose every square differs, so that an exchanged or shifted one shows."""
    rows, columns = np.mgrid[0:side, 0:side]
    pixels = np.stack((rows * 255 // side, columns * 255 // side, (rows ^ columns) % 256), -1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_lora(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a LoRA that changes two matrices of the generation expert's first layer."""
    tensors: dict[str, np.ndarray] = {}
    for name, shape in _changed(checkpoint).items():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        key = name.removesuffix(".weight")
        rows, columns = shape
        down = generator.standard_normal((LORA_RANK, columns), np.float32) / columns**0.5
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = generator.standard_normal((rows, LORA_RANK), np.float32)
        tensors[f"{key}.alpha"] = np.array(LORA_RANK / 4, np.float32)
    save_file(tensors, path)


def _changed(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return {
        name: shape
        for name, shape in shapes.items()
        if ".layers.0." in name and name.endswith(LORA_PARTS)
    }


def check_side(side: int) -> None:
    """Makes sure that images of a side, and of a quarter of it, can be drawn.

    Raises:
        ResolutionError: They cannot.
    """
    Resolution(height=side // 4, width=side // 4)
    Resolution(height=side, width=side)
