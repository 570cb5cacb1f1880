"""Small trees in FSS-1000's layout for tests: coloured shapes on noise, so that a small network can learn them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from metaseg.data.source import UInt8
from metaseg.seeding import generator


def write_tree(root: Path, classes: Sequence[str], images: int = 10, size: int = 48) -> Path:
    """Write `root/<class>/1.jpg … N.jpg` with masks `1.png … N.png` of 0 and 255; a class has its colour and shape."""
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True)
        look = generator("tree", name)
        colour, shape = look.integers(0, 256, 3), look.integers(3)
        for number in range(1, images + 1):
            draw = generator("tree", name, number)
            mask = _shape(draw, shape, size)
            image = draw.integers(0, 256, (size, size, 3)) // 2 + 64
            image[mask == 1] = colour
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.jpg", quality=95)
            Image.fromarray(mask * np.uint8(255)).save(folder / f"{number}.png")
    return root


def write_splits(path: Path, train: Sequence[str], val: Sequence[str], test: Sequence[str]) -> Path:
    path.write_text(json.dumps({"train": list(train), "val": list(val), "test": list(test)}))
    return path


def _shape(draw: np.random.Generator, shape: int, size: int) -> UInt8:
    """A disc, a square or a triangle of a quarter to a half of the side, wholly inside; shape (size, size), 0 and 1."""
    radius = draw.uniform(size / 8, size / 4)
    row, column = draw.uniform(radius, size - 1 - radius, 2)
    y, x = np.mgrid[:size, :size]
    down, across = y - row, abs(x - column)
    inside = (
        down**2 + across**2 <= radius**2,
        np.maximum(abs(down), across) <= radius,
        (abs(down) <= radius) & (across <= (down + radius) / 2),
    )[shape]
    return inside.astype(np.uint8)
