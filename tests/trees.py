"""Small trees in the layouts of FSS-1000, PASCAL VOC and SBD for tests.

FSS-1000's are coloured shapes on noise, so that a small network can learn them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

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


def write_data(folder: Path) -> list[str]:
    """Write a tree of two classes a split into `folder`; returns the overrides that name it, at 32 pixels."""
    names = [f"class_{i}" for i in range(6)]
    root = write_tree(folder / "tree", names)
    splits = write_splits(folder / "splits.json", names[:2], names[2:4], names[4:])
    return ["dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}", "dataset.image_size=32"]


def write_splits(path: Path, train: Sequence[str], val: Sequence[str], test: Sequence[str]) -> Path:
    path.write_text(json.dumps({"train": list(train), "val": list(val), "test": list(test)}))
    return path


def stripes(*classes: int, height: int = 40, width: int = 60) -> UInt8:
    """A map of class numbers, shape (height, width): a tenth of background at the left, then the classes in stripes."""
    labels = np.zeros((height, width), np.uint8)
    for labelled, columns in zip(classes, np.array_split(np.arange(width // 10, width), len(classes)), strict=True):
        labels[:, columns] = labelled
    return labels


def write_voc(root: Path, images: Mapping[str, UInt8]) -> Path:
    """Write `root/VOCdevkit/VOC2012` with an image and a palette mask for each map of class numbers; returns it."""
    voc = root / "VOCdevkit" / "VOC2012"
    lists = voc / "ImageSets" / "Segmentation"
    for folder in (voc / "JPEGImages", voc / "SegmentationClass", lists):
        folder.mkdir(parents=True)
    for stem, labels in images.items():
        _photograph(labels).save(voc / "JPEGImages" / f"{stem}.jpg")
        mask = Image.fromarray(labels, mode="P")
        mask.putpalette(_voc_palette())
        mask.save(voc / "SegmentationClass" / f"{stem}.png")
    _photograph(stripes(1)).save(voc / "JPEGImages" / "2008_000001.jpg")  # as most of VOC's: for detection only
    for name in ("train", "val", "trainval"):
        (lists / f"{name}.txt").write_text("\n".join(images) + "\n")
    return voc


def write_sbd(root: Path, images: Mapping[str, UInt8]) -> Path:
    """Write `root/benchmark_RELEASE/dataset` with an image and a MATLAB mask for each map; returns it."""
    sbd = root / "benchmark_RELEASE" / "dataset"
    for folder in (sbd / "img", sbd / "cls"):
        folder.mkdir(parents=True)
    for stem, labels in images.items():
        _photograph(labels).save(sbd / "img" / f"{stem}.jpg")
        boundaries = np.empty((20, 1), object)
        for row in range(20):
            boundaries[row, 0] = csc_matrix(labels.shape, dtype=bool)
        present = np.setdiff1d(labels, [0])[:, None]
        savemat(
            sbd / "cls" / f"{stem}.mat",
            {"GTcls": {"Boundaries": boundaries, "Segmentation": labels, "CategoriesPresent": present}},
            do_compression=True,
        )
    for name in ("train", "val"):
        (sbd / f"{name}.txt").write_text("\n".join(images) + "\n")
    return sbd


def _photograph(labels: UInt8) -> Image.Image:
    """An image in which a class has a grey of its own, so that a map and its image can be told to belong together."""
    return Image.fromarray(np.stack([labels % 64 * np.uint8(10)] * 3, axis=-1))


def _voc_palette() -> list[int]:
    """VOC's colours: the bits of the number, dealt out to red, green and blue from the highest bit down."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    return [
        int(sum(bits[n, 3 * i + c] << (7 - i) for i in range(3) if 3 * i + c < 8)) for n in range(256) for c in range(3)
    ]


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
