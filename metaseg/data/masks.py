"""Mask files of data sets: what they hold, and what can be read as a binary mask but is none.

That is a photograph, or a map of several classes. Both are told by their colours, and so that soft, noisy and
anti-aliased masks pass: what is left out costs a class an image, and perhaps the data set a class. In doubt, a mask is
sound.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metaseg.data.source import UInt8

NEAR = 32  # levels of 255 that noise stays below
FEW = 16  # colours of a mask that was drawn without soft edges; they, and JPEG, bring more
LEAST_SHARE = 0.001  # of the image's pixels that a class fills
ENOUGH = 2**22  # pixels by which a mask is judged; of a larger one every second row and column, third, …

Colour = tuple[int, int, int]


def mask_values(file: Image.Image) -> NDArray[np.integer]:
    """An opened file's pixels: grey (height, width), of 8 or 16 bits; or RGB (height, width, 3), of 8.

    A palette is looked up, transparency is ignored, and RGB that is grey is grey.
    """
    if file.mode in ("L", "I", "I;16"):
        return np.asarray(file)
    # as it is if it can be: large masks need the memory
    values = np.asarray(file if file.mode == "RGB" else file.convert("L" if file.mode == "1" else "RGBA"))
    if values.ndim == 3:
        red, green, blue = values[..., 0], values[..., 1], values[..., 2]
        grey = (red == green).all() and (red == blue).all()
        values = np.ascontiguousarray(red if grey else values[..., :3])
    return values


def binary(values: NDArray[np.integer]) -> UInt8:
    """1 where the brightest channel exceeds `half_of` the values, 0 elsewhere; (height, width)."""
    return (brightest(values) > half_of(values)).astype(np.uint8)


def half_of(values: NDArray[np.integer]) -> int:
    """Half of the greatest value, above which the object is: in masks of 0 and 1, of 0 and 255, of a colour on black.

    But what stays below a quarter of the range (0 … 1, 0 … 255 or 0 … 65535, told by the greatest value) is no object:
    it may be noise, or the number of a class. Then it is half of the range.
    """
    most = int(values.max())
    full = 1 if most <= 1 else 255 if most <= 255 else 65535
    return (most if 4 * most > full else full) // 2


def levels_of(values: NDArray[np.integer]) -> UInt8:
    """The values in 8 bits: as they are if they fit, else their upper 8 of 16."""
    return (values >> 8 if values.dtype != np.uint8 and values.max() > 255 else values).astype(np.uint8, copy=False)


def resize_mask(mask: UInt8, image_size: int) -> UInt8:
    """A mask or a map of class numbers, shape (height, width), as (image_size, image_size), by nearest neighbour."""
    if mask.shape == (image_size, image_size):
        return mask
    return np.asarray(Image.fromarray(mask).resize((image_size, image_size), Image.Resampling.NEAREST))


def is_photograph(levels: UInt8) -> bool:
    """Whether most pixels are neither dark nor bright, of many shades, and not nearly all of one.

    A grey or coloured object that JPEG has worn has many shades, but 3 of 4 pixels, and more, are within 8 levels.

    Args:
        levels: grey (height, width), or RGB (height, width, 3).
    """
    pixels = np.bincount(brightest(_sample(levels)).ravel(), minlength=256)
    between = pixels[NEAR:-NEAR]
    many, alike = between.sum(), np.convolve(between, np.ones(8, int)).max()
    return bool(2 * many > pixels.sum() and np.count_nonzero(between) > NEAR and 4 * alike < 3 * many)


def class_colours(levels: UInt8) -> list[Colour]:
    """The colours that stand for a class each, besides the darkest, the background's; of a binary mask at most one.

    A colour stands for a class if it fills areas: at least half of its pixels, and 0.1 % of all, have the same colour
    all around. What is within 32 levels of another class is no other one; in a mask of up to 16 colours that holds for
    bright ones only, so that {0, 254, 255} is one class, but {0, 1, 2} and {0, 1, 255} are two.

    Args:
        levels: grey (height, width), or RGB (height, width, 3).

    Returns:
        red, green and blue of each, dark ones first.
    """
    levels = _sample(levels)
    numbers, colours = _numbered(levels)
    pixels = np.bincount(numbers.ravel(), minlength=len(colours))
    surrounded = np.bincount(numbers[_is_surrounded(levels)], minlength=len(colours))
    few = bool(np.count_nonzero(pixels) <= FEW)
    fills = surrounded >= np.maximum(pixels / 2, numbers.size * LEAST_SHARE)
    found: list[Colour] = []
    for red, green, blue in sorted(colours[fills].tolist(), key=max):
        if not any(_are_one((red, green, blue), other, few) for other in found):
            found.append((red, green, blue))
    return found[1:]


def brightest(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """The brightest channel, (height, width), of grey (height, width) or RGB (height, width, 3)."""
    return values if values.ndim == 2 else np.maximum(np.maximum(values[..., 0], values[..., 1]), values[..., 2])


def _sample(levels: UInt8) -> UInt8:
    """The levels, or so many rows and columns of them, evenly spread, that there are `ENOUGH` pixels at most."""
    step = math.isqrt((levels.shape[0] * levels.shape[1] - 1) // ENOUGH) + 1
    return levels if step == 1 else np.ascontiguousarray(levels[::step, ::step])


def _numbered(levels: UInt8) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """A number for each pixel's colour, (height, width), and the colours by number, (n, 3)."""
    if levels.ndim == 2:
        return levels, np.repeat(np.arange(256)[:, None], 3, axis=1)
    wide = levels.astype(np.int32)
    packed = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    known = np.unique(packed)
    return np.searchsorted(known, packed), known[:, None] >> [16, 8, 0] & 255


def _is_surrounded(levels: UInt8) -> NDArray[np.bool_]:
    """Where the 3 × 3 pixels around are all of one colour, (height, width)."""
    around = np.ones((3, 3), np.uint8)
    same = np.equal(cv2.erode(levels, around), cv2.dilate(levels, around))
    return np.asarray(same if levels.ndim == 2 else same.all(axis=2), bool)


def _are_one(one: Colour, other: Colour, few: bool) -> bool:
    apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
    return apart < NEAR and not (few and min(max(one), max(other)) < 128)
