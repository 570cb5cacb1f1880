"""Augmentation: masks go exactly where their images go, and the original's rates and ranges hold."""

from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest

from metaseg.data import augment as augment_module
from metaseg.data.augment import Exposure, Noise, _operations, augment

SIZE = 64
SHIFT = 7  # 23 of 224 pixels, at 64
ERASE, MOVE, FLIP, NOISE, EXPOSE, ROTATE = range(6)
MARKER = 255

Array = np.ndarray[Any, Any]


def noise_images(n: int, size: int = SIZE) -> tuple[Array, Array]:
    """Random images with random masks."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8), rng.integers(0, 2, (n, size, size), dtype=np.uint8)


def marked_image() -> tuple[Array, Array]:
    """An image whose red channel is 255 exactly on the object, an L off the centre, and below 128 elsewhere."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[10:50, 14:26] = 1
    mask[40:50, 26:44] = 1
    image = np.random.default_rng(1).integers(0, 128, (SIZE, SIZE, 3), dtype=np.uint8)
    image[mask == 1, 0] = MARKER
    return image, mask


def apply(number: int, image: Array, mask: Array, seed: int) -> tuple[Array, Array]:
    variants = _operations(SIZE)[number]
    operation = variants[seed % len(variants)]
    operation.set_random_seed(seed)
    result = operation(image=image.copy(), mask=mask.copy())
    return result["image"], result["mask"]


# Rate and purity


def test_rate_0_changes_nothing() -> None:
    images, masks = noise_images(20)
    new_images, new_masks = augment(images, masks, 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(new_images, images)
    np.testing.assert_array_equal(new_masks, masks)


def test_rate_1_changes_every_image() -> None:
    images, masks = noise_images(40)
    new_images, _ = augment(images, masks, 1.0, np.random.default_rng(0))
    assert (new_images != images).any(axis=(1, 2, 3)).all()


def test_about_the_rate_of_the_images_changes() -> None:
    n, rate = 1000, 0.5
    images, masks = noise_images(n, size=16)
    new_images, _ = augment(images, masks, rate, np.random.default_rng(0))
    changed = (new_images != images).any(axis=(1, 2, 3)).sum()
    assert abs(changed - rate * n) < 5 * np.sqrt(n * rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_arguments_are_not_changed(rate: float) -> None:
    images, masks = noise_images(10)
    before = images.copy(), masks.copy()
    new_images, new_masks = augment(images, masks, rate, np.random.default_rng(0))
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(masks, before[1])
    assert not np.shares_memory(images, new_images)
    assert not np.shares_memory(masks, new_masks)


def test_read_only_arguments_are_welcome() -> None:
    images, masks = noise_images(4)
    images.flags.writeable = masks.flags.writeable = False
    new_images, new_masks = augment(images, masks, 1.0, np.random.default_rng(0))
    assert new_images.flags.writeable
    assert new_masks.flags.writeable


@pytest.mark.parametrize("size", [16, 33, 64])
def test_shapes_dtypes_and_binary_masks_remain(size: int) -> None:
    images, masks = noise_images(60, size)
    new_images, new_masks = augment(images, masks, 1.0, np.random.default_rng(0))
    assert (new_images.shape, new_images.dtype) == (images.shape, np.uint8)
    assert (new_masks.shape, new_masks.dtype) == (masks.shape, np.uint8)
    assert set(np.unique(new_masks)) == {0, 1}


def test_the_generator_decides() -> None:
    images, masks = noise_images(20)
    first, again, other = (augment(images, masks, 0.5, np.random.default_rng(seed)) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[0] != other[0]).any()


def test_numpys_and_pythons_global_states_do_not_matter() -> None:
    import random

    images, masks = noise_images(10)
    results = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # the global state is what must not matter
        results.append(augment(images, masks, 1.0, np.random.default_rng(0)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_copies_of_one_image_are_augmented_differently() -> None:
    images, masks = (part.repeat(8, axis=0) for part in noise_images(1))
    new_images, _ = augment(images, masks, 1.0, np.random.default_rng(0))
    assert len({image.tobytes() for image in new_images}) == 8


class Probe:
    """An operation that notes that it ran."""

    def __init__(self, number: int, log: list[int]) -> None:
        self.number, self.log = number, log

    def set_random_seed(self, seed: int) -> None:
        """Nothing is random."""

    def __call__(self, image: Array, mask: Array) -> dict[str, Array]:
        self.log.append(self.number)
        return {"image": image, "mask": mask}


def test_one_to_six_operations_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[int] = []
    monkeypatch.setattr(augment_module, "_operations", lambda size: [[Probe(number, log)] for number in range(6)])
    rng, runs = np.random.default_rng(0), []
    for _ in range(1200):
        log.clear()
        augment(*noise_images(1, size=2), 1.0, rng)
        runs.append(tuple(log))
    assert all(len(set(run)) == len(run) for run in runs)  # none twice
    for counted in (Counter(map(len, runs)), Counter(run[0] for run in runs)):  # each with probability 1/6
        assert len(counted) == 6
        assert all(abs(count - 200) < 5 * np.sqrt(1200 * 1 / 6 * 5 / 6) for count in counted.values())
    assert len({run for run in runs if len(run) == 2}) == 30


def test_each_variant_of_an_operation_is_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[int] = []
    monkeypatch.setattr(augment_module, "_operations", lambda size: [[Probe(number, log) for number in range(4)]])
    augment(*noise_images(1000, size=2), 1.0, np.random.default_rng(0))
    counted = Counter(log)
    assert len(counted) == 4
    assert all(abs(count - 250) < 5 * np.sqrt(1000 * 1 / 4 * 3 / 4) for count in counted.values())


# Each operation


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("level", [0, 255])
def test_operations_keep_range_dtype_and_shape(number: int, level: int) -> None:
    image, mask = np.full((SIZE, SIZE, 3), level, np.uint8), np.ones((SIZE, SIZE), np.uint8)
    for seed in range(20):
        new_image, new_mask = apply(number, image, mask, seed)
        assert (new_image.shape, new_image.dtype) == (image.shape, np.uint8)
        assert (new_mask.shape, new_mask.dtype) == (mask.shape, np.uint8)
        assert set(np.unique(new_mask)) <= {0, 1}
        if number in (NOISE, EXPOSE):  # no wrap-around from 0 to 255 or back
            assert abs(new_image.astype(int) - level).max() < 100


@pytest.mark.parametrize("number", [MOVE, FLIP])
def test_moves_take_the_mask_along_exactly(number: int) -> None:
    image, mask = marked_image()
    for seed in range(40):
        new_image, new_mask = apply(number, image, mask, seed)
        np.testing.assert_array_equal(new_image[..., 0] == MARKER, new_mask == 1)


def test_rotations_take_the_mask_along() -> None:
    """The image is interpolated, so that the two may differ by a pixel at the object's edge, but not elsewhere."""
    image, mask = marked_image()
    image[mask == 0, 0] = 0
    square = np.ones((3, 3), np.uint8)
    for seed in range(40):
        new_image, new_mask = apply(ROTATE, image, mask, seed)
        seen = new_image[..., 0] >= 128
        assert not (cv2.erode(new_mask, square).astype(bool) & ~seen).any()
        assert not (seen & ~cv2.dilate(new_mask, square).astype(bool)).any()
        assert (new_mask != mask).any()


def test_flip_mirrors_left_and_right() -> None:
    images, masks = noise_images(1)
    image, mask = apply(FLIP, images[0], masks[0], seed=0)
    np.testing.assert_array_equal(image, images[0, :, ::-1])
    np.testing.assert_array_equal(mask, masks[0, :, ::-1])


def rolled(x: Array, down: int, right: int) -> Array:
    return np.roll(x, (down, right), axis=(0, 1))


def pushed(x: Array, down: int, right: int) -> Array:
    """Like `rolled`, with zeros where nothing comes in."""
    padded = np.zeros((3 * SIZE, 3 * SIZE, *x.shape[2:]), x.dtype)
    padded[SIZE + down : 2 * SIZE + down, SIZE + right : 2 * SIZE + right] = x
    return padded[SIZE : 2 * SIZE, SIZE : 2 * SIZE]


def test_shifts_roll_or_fill_by_at_most_their_range() -> None:
    images, masks = noise_images(1)
    image, mask = images[0], masks[0]
    corner = {}  # (how, shift) by a 2×2 patch of the middle, which no shift within range pushes out
    for down in range(-SHIFT - 2, SHIFT + 3):
        for right in range(-SHIFT - 2, SHIFT + 3):
            corner[image[32 - down : 34 - down, 32 - right : 34 - right].tobytes()] = down, right
    hows, downs, rights = set(), set(), set()
    for seed in range(150):
        new_image, new_mask = apply(MOVE, image, mask, seed)
        shift = corner[new_image[32:34, 32:34].tobytes()]
        how = rolled if (new_image == rolled(image, *shift)).all() else pushed
        np.testing.assert_array_equal(new_image, how(image, *shift))
        np.testing.assert_array_equal(new_mask, how(mask, *shift))
        hows.add(how)
        downs.add(shift[0])
        rights.add(shift[1])
    assert hows == {rolled, pushed}
    assert (min(downs), max(downs), min(rights), max(rights)) == (-SHIFT, SHIFT, -SHIFT, SHIFT)


def test_the_shift_is_in_proportion_to_the_image() -> None:
    for size, limit in ((224, 23), (112, 12), (16, 2), (4, 1)):
        image = np.zeros((size, size, 3), np.uint8)
        image[size // 2, size // 2] = MARKER
        moved = set()
        variants = _operations(size)[MOVE]
        for seed in range(300):
            operation = variants[seed % len(variants)]
            operation.set_random_seed(seed)
            place = np.argwhere(operation(image=image, mask=image[..., 0])["image"][..., 0])
            moved |= {int(x) - size // 2 for x in place.flatten()}
        assert (min(moved), max(moved)) == (-limit, limit)


def test_the_eraser_paints_one_grey_rectangle_and_makes_it_background() -> None:
    image, mask = noise_images(1)[0][0], np.ones((SIZE, SIZE), np.uint8)
    greys, areas = set(), []
    for seed in range(150):
        new_image, new_mask = apply(ERASE, image, mask, seed)
        erased = new_mask == 0
        rows, columns = np.nonzero(erased.any(axis=1))[0], np.nonzero(erased.any(axis=0))[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert erased.sum() == height * width
        assert len(np.unique(new_image[erased])) == 1
        np.testing.assert_array_equal(new_image[~erased], image[~erased])
        assert 0.3 / 1.1 < width / height < 3.3 * 1.1  # whole pixels stretch it a little
        greys.add(int(new_image[erased][0, 0]))
        areas.append(erased.mean())
    assert 0.018 < min(areas) < 0.03
    assert 0.09 < max(areas) < 0.105
    assert min(greys) < 50
    assert max(greys) > 200


def test_the_eraser_leaves_background_background() -> None:
    image, mask = marked_image()
    for seed in range(20):
        _, new_mask = apply(ERASE, image, mask, seed)
        assert not (new_mask & ~mask).any()


def test_noise_is_gaussian_per_channel_and_leaves_the_mask() -> None:
    image, (_, masks) = np.full((SIZE, SIZE, 3), 128, np.uint8), noise_images(1)
    deviations = []
    for seed in range(60):
        new_image, new_mask = apply(NOISE, image, masks[0], seed)
        offset = new_image.astype(float) - 128
        np.testing.assert_array_equal(new_mask, masks[0])
        assert abs(offset.mean()) < 0.5
        assert abs(np.corrcoef(offset[..., 0].ravel(), offset[..., 1].ravel())[0, 1]) < 0.1
        deviations.append(offset.std())
    assert np.mean(deviations) == pytest.approx(5.1, abs=4 / np.sqrt(60))  # σ = |N(5.1, 1)|
    assert np.std(deviations) == pytest.approx(1.0, abs=0.4)


def test_exposure_is_one_offset_for_the_image_and_leaves_the_mask() -> None:
    image, (_, masks) = np.full((SIZE, SIZE, 3), 128, np.uint8), noise_images(1)
    offsets = []
    for seed in range(200):
        new_image, new_mask = apply(EXPOSE, image, masks[0], seed)
        np.testing.assert_array_equal(new_mask, masks[0])
        assert len(np.unique(new_image)) == 1
        offsets.append(float(new_image[0, 0, 0]) - 128)
    assert np.std(offsets) == pytest.approx(12.8, abs=4 * 12.8 / np.sqrt(2 * 200))
    assert abs(np.mean(offsets)) < 4 * 12.8 / np.sqrt(200)


@pytest.mark.parametrize("operation", [Noise(p=1), Exposure(p=1)])
def test_what_leaves_the_range_is_clipped(operation: Any) -> None:
    for level in (0, 255):
        image = np.full((8, 8, 3), level, np.uint8)
        for seed in range(10):
            operation.set_random_seed(seed)
            assert abs(operation(image=image)["image"].astype(int) - level).max() < 100


def test_rotations_stay_within_45_degrees() -> None:
    """The angle at which a dot right of the centre comes to lie."""
    middle = (SIZE - 1) / 2
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[31:33, 48:50] = MARKER
    angles = []
    for seed in range(150):
        new_image, _ = apply(ROTATE, image, image[..., 0] // MARKER, seed)
        y, x = np.mgrid[:SIZE, :SIZE] - middle
        near = np.hypot(y, x) < 24  # not the border's reflections
        weights = new_image[..., 0] * near
        angles.append(np.degrees(np.arctan2((y * weights).sum(), (x * weights).sum())))
    assert -46 < min(angles) < -40
    assert 40 < max(angles) < 46
