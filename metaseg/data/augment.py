"""The original's augmentation of support images, on albumentations."""

from functools import lru_cache
from typing import Any

import albumentations as A
import cv2
import numpy as np

from metaseg.data.source import UInt8


def augment(images: UInt8, masks: UInt8, rate: float, rng: np.random.Generator) -> tuple[UInt8, UInt8]:
    """Augment each image with probability `rate`: shuffle six operations and apply the first U{1 … 6} of them.

    Eraser, shift, mirror, noise, exposure and rotation, with the original's ranges; its pixels are of 224, ours in
    proportion. Masks move with their images by nearest neighbour, so they stay {0, 1}; what is erased, or comes in
    from outside by a constant border, is background.

    Args:
        images: shape (n, h, w, 3); not changed.
        masks: shape (n, h, w), {0, 1}; not changed.
        rate: in [0, 1].
        rng: draws which images, operations and parameters.

    Returns:
        New images and masks of the same shapes.
    """
    images, masks = images.copy(), masks.copy()
    operations = _operations(images.shape[1])
    for i in range(len(images)):
        if rng.random() >= rate:
            continue
        for j in rng.permutation(len(operations))[: rng.integers(1, len(operations) + 1)]:
            variants = operations[j]
            operation = variants[rng.integers(len(variants))]
            operation.set_random_seed(int(rng.integers(2**32)))
            result = operation(image=images[i], mask=masks[i])
            images[i], masks[i] = result["image"], result["mask"]
    return images, masks


class Noise(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations has no types
    """Adds Gaussian noise of deviation |N(5.1, 1)| to every channel of every pixel."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the noise."""
        sigma = abs(self.random_generator.normal(5.1, 1.0))
        noise = self.random_generator.standard_normal(params["shape"], dtype=np.float32)
        return {"noise": np.float32(sigma) * noise}

    def apply(self, img: UInt8, noise: Any, **params: Any) -> UInt8:
        """Add it, rounded and clipped."""
        return np.asarray(cv2.add(img, noise, dtype=cv2.CV_8U))


class Exposure(A.ImageOnlyTransform):  # type: ignore[misc]
    """Adds one scalar, N(0, |N(12.75, 1)|), to the whole image."""

    def get_params(self) -> dict[str, Any]:
        """Draw the scalar."""
        return {"offset": self.random_generator.normal(0.0, abs(self.random_generator.normal(12.75, 1.0)))}

    def apply(self, img: UInt8, offset: Any, **params: Any) -> UInt8:
        """Add it, rounded and clipped."""
        table = np.clip(np.rint(np.arange(256) + offset), 0, 255).astype(np.uint8)
        return np.asarray(cv2.LUT(img, table))


@lru_cache
def _operations(image_size: int) -> list[list[Any]]:
    """The six operations, each as its variants, of which one is drawn."""
    shift = max(1, round(23 / 224 * image_size))
    rotations = (cv2.BORDER_REFLECT, cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT_101, cv2.BORDER_WRAP)
    return [
        [A.Erasing(scale=(0.02, 0.1), ratio=(0.3, 3.3), fill=grey, fill_mask=0, p=1) for grey in range(0, 256, 17)],
        [
            A.Affine(translate_px=(-shift, shift), interpolation=cv2.INTER_NEAREST, border_mode=border, p=1)
            for border in (cv2.BORDER_WRAP, cv2.BORDER_CONSTANT)
        ],
        [A.HorizontalFlip(p=1)],
        [Noise(p=1)],
        [Exposure(p=1)],
        [A.Rotate(limit=45, border_mode=border, p=1) for border in rotations],
    ]
