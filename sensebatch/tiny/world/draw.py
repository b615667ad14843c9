"""Draws scenes with signed distances, by one function for the CPU and, in batches, for a GPU.

Knows the outlines of shapes, but neither captions nor the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sensebatch.tiny.world.scene import (
    COLOURS,
    MAX_THINGS,
    SHAPES,
    SOFT_COLOURS,
    Pattern,
    Scene,
)

STRIPE_PIXELS = 16
"""Width of a stripe, in pixels."""
RING_HOLE = 0.55
"""Radius of a ring's hole, in units of the ring's."""
SQUARE_HALF = 0.87
"""Half the side of a square, in units of its radius."""
TRIANGLE_RADIUS = 1.25
"""Distance of a triangle's corners from its middle, in units of its radius."""
STAR_RADIUS, STAR_WAIST = 1.15, 0.47
"""Distances from a star's middle: of its tips, in units of the radius, and of its inner corners, in
units of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Scenes of one size, as arrays."""

    height: int
    width: int
    shape: np.ndarray
    """int64 `[scenes, things]`, the shape; -1 where there is no thing."""
    geometry: np.ndarray
    """float32 `[scenes, things, (y, x, radius)]` in pixels."""
    colour: np.ndarray
    """float32 `[scenes, things, 3]` in [0, 1]."""
    pattern: np.ndarray
    """int64 `[scenes]`, the index of the background's pattern in `Pattern`."""
    soft: np.ndarray
    """float32 `[scenes, 2, 3]` in [0, 1], the background's colours; equal if it is plain."""


def plan_drawing(scenes: Sequence[Scene]) -> Drawing:
    """Returns the arrays from which `draw` makes the images of scenes of one size."""
    count = len(scenes)
    shape = np.full((count, MAX_THINGS), -1, dtype=np.int64)
    geometry = np.ones((count, MAX_THINGS, 3), dtype=np.float32)
    colour = np.zeros((count, MAX_THINGS, 3), dtype=np.float32)
    pattern = np.zeros(count, dtype=np.int64)
    soft = np.zeros((count, 2, 3), dtype=np.float32)
    for index, scene in enumerate(scenes):
        assert scene.resolution == scenes[0].resolution
        for slot, thing in enumerate(scene.things):
            shape[index, slot] = SHAPES.index(thing.shape)
            geometry[index, slot] = (*scene.centre(thing), scene.radius(thing))
            colour[index, slot] = COLOURS[thing.colour]
        pattern[index] = tuple(Pattern).index(scene.background.pattern)
        names = scene.background.colours
        soft[index] = [SOFT_COLOURS[names[0]], SOFT_COLOURS[names[-1]]]
    size = scenes[0].resolution
    return Drawing(
        height=size.height,
        width=size.width,
        shape=shape,
        geometry=geometry,
        colour=colour / 255,
        pattern=pattern,
        soft=soft / 255,
    )


def shape_distances(y: torch.Tensor, x: torch.Tensor, radius: torch.Tensor) -> list[torch.Tensor]:
    """Returns the signed distance to each shape in turn, in pixels and negative inside.

    Args:
        y: Pixels below the centre, in any shape.
        x: Pixels to the right of the centre, in the same shape.
        radius: Radius in pixels; broadcasts against `y`.
    """
    length = torch.sqrt(x * x + y * y + 1e-6)
    circle = length - radius
    square = torch.maximum(x.abs(), y.abs()) - SQUARE_HALF * radius
    corner = TRIANGLE_RADIUS * radius
    down = y - corner / 4  # the middle of the outline's box, not of its corners, is the centre
    triangle = torch.maximum(down, x.abs() * math.cos(math.pi / 6) - down / 2) - corner / 2
    ring = torch.maximum(circle, RING_HOLE * radius - length)
    return [circle, square, triangle, _star(y, x, radius), ring]


def _star(y: torch.Tensor, x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Returns the signed distance to a five-pointed star, folded into one half of one point."""
    tip = STAR_RADIUS * radius
    y = y - 0.095 * tip  # centres the outline's box
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y) + sector / 2
    angle = (angle - sector * torch.floor(angle / sector) - sector / 2).abs()
    length = torch.sqrt(x * x + y * y + 1e-6)
    inner_y, inner_x = STAR_WAIST * math.cos(sector / 2), STAR_WAIST * math.sin(sector / 2)
    edge = math.hypot(inner_y - 1, inner_x)
    normal_y, normal_x = inner_x / edge, (1 - inner_y) / edge
    return (length * torch.cos(angle) - tip) * normal_y + length * torch.sin(angle) * normal_x


def background_weight(pattern: Pattern, height: int, width: int) -> torch.Tensor:
    """Returns how much of the second colour each pixel has, float32 `[height, width]`."""
    y = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width)
    x = torch.arange(width, dtype=torch.float32)[None, :].expand(height, width)
    match pattern:
        case Pattern.PLAIN:
            return torch.zeros(height, width)
        case Pattern.ROWS:
            return torch.floor(y / STRIPE_PIXELS) % 2
        case Pattern.COLUMNS:
            return torch.floor(x / STRIPE_PIXELS) % 2
        case Pattern.DOWN:
            return (y + 0.5) / height
        case Pattern.ACROSS:
            return (x + 0.5) / width


def draw(drawing: Drawing) -> torch.Tensor:
    """Returns the images, float32 `[scenes, 3, height, width]` in [0, 1], anti-aliased."""
    weights = torch.stack([background_weight(p, drawing.height, drawing.width) for p in Pattern])
    arrays = (drawing.soft, drawing.shape, drawing.geometry, drawing.colour)
    return paint(weights[torch.from_numpy(drawing.pattern)], *map(torch.from_numpy, arrays))


def paint(
    weight: torch.Tensor,
    soft: torch.Tensor,
    shape: torch.Tensor,
    geometry: torch.Tensor,
    colour: torch.Tensor,
) -> torch.Tensor:
    """Returns the images of a drawing whose arrays are already on one device.

    Args:
        weight: Share of the background's second colour, `[scenes, height, width]`.
        soft: `[scenes, 2, 3]`.
        shape: `[scenes, things]`.
        geometry: `[scenes, things, 3]`.
        colour: `[scenes, things, 3]`.
    """
    height, width = weight.shape[1:]
    y = torch.arange(height, device=weight.device, dtype=torch.float32)[:, None] + 0.5
    x = torch.arange(width, device=weight.device, dtype=torch.float32)[None, :] + 0.5
    second = weight[:, None]
    image = soft[:, 0, :, None, None] * (1 - second) + soft[:, 1, :, None, None] * second
    for slot in range(shape.shape[1]):
        centre_y, centre_x, radius = geometry[:, slot, :, None, None].unbind(1)
        below, beside = torch.broadcast_tensors(y - centre_y, x - centre_x)
        distances = shape_distances(below, beside, radius)
        coverage = torch.zeros_like(weight)
        for kind, distance in enumerate(distances):
            chosen = (shape[:, slot] == kind)[:, None, None]
            coverage = torch.where(chosen, (0.5 - distance).clamp(0, 1), coverage)
        coverage = coverage[:, None]
        image = image * (1 - coverage) + colour[:, slot, :, None, None] * coverage
    return image


def draw_uint8(scene: Scene) -> np.ndarray:
    """Returns the image of one scene as 8-bit RGB `[height, width, 3]`."""
    image = draw(plan_drawing([scene]))[0]
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
