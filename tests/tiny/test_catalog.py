"""The catalog's input images are of the world that the embedded checkpoint knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sensebatch.resolutions import BUCKETS_TINY
from sensebatch.tiny.world.draw import draw_uint8
from sensebatch.tiny.world.scene import Background, Pattern, Scene, Thing

IMAGES = Path(__file__).parents[2] / "manifests" / "images"
SCENES = {
    "red-circle.png": Scene(
        resolution=BUCKETS_TINY["1:1"],
        background=Background(),
        things=(Thing(shape="circle", colour="red", size="large", row=1, column=1),),
    ),
    "stripes.png": Scene(
        resolution=BUCKETS_TINY["1:1"],
        background=Background(pattern=Pattern.ROWS, colours=("mint", "white")),
        things=(Thing(shape="ring", colour="purple", size="medium", row=0, column=0),),
    ),
    "three-shapes.png": Scene(
        resolution=BUCKETS_TINY["16:9"],
        background=Background(pattern=Pattern.DOWN, colours=("sky", "cream")),
        things=(
            Thing(shape="star", colour="yellow", size="medium", row=0, column=2),
            Thing(shape="square", colour="navy", size="large", row=1, column=0),
            Thing(shape="triangle", colour="green", size="medium", row=2, column=1),
        ),
    ),
}


def test_input_images_are_what_the_world_draws() -> None:
    for name, scene in SCENES.items():
        with Image.open(IMAGES / name) as image:
            given = np.asarray(image).astype(int)
        assert np.abs(given - draw_uint8(scene)).max() <= 1, name
