"""What a mask file holds, and the line between soft or noisy masks, which are used, and those of several classes."""

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter

from metaseg.data import masks
from metaseg.data.masks import binary, class_colours, is_photograph, levels_of
from metaseg.data.source import UInt8

SIDES = (48, 224)


def shapes(side: int) -> Iterator[Image.Image]:
    """Objects in white on black, four times as large as `side`: round, slanted, thin, in JPEG's blocks, many, large."""
    s = 4 * side
    drawn = {
        "ellipse": [(0.2 * s, 0.3 * s, 0.7 * s, 0.6 * s)],
        "polygon": [(0.1 * s, 0.2 * s, 0.9 * s, 0.4 * s, 0.5 * s, 0.95 * s, 0.3 * s, 0.5 * s)],
        "line": [(0, 0.1 * s, s, 0.8 * s), (0.3 * s, 0, 0.2 * s, s), (0, 0.9 * s, s, 0.85 * s)],
        "rectangle": [(64, 64, s // 2 - 1, s // 3)],
    }
    for what, boxes in drawn.items():
        image = Image.new("L", (s, s))
        for box in boxes:
            getattr(ImageDraw.Draw(image), what)(box, fill=255, **({"width": s // 30} if what == "line" else {}))
        yield image
    dots = Image.new("L", (s, s))
    for i in range(40):
        x, y, r = (i * 37 % 100) / 100 * s, (i * 61 % 100) / 100 * s, (1 + i % 5) / 100 * s
        ImageDraw.Draw(dots).ellipse((x, y, x + r, y + r), fill=255)
    yield dots
    yield dots.point(lambda level: 255 - level)


def disc(side: int, radius: float, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    image, middle = Image.new("RGB", (side, side)), side / 2
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def looks(large: Image.Image, side: int) -> Iterator[tuple[str, Image.Image]]:
    """The object as files show it: at one size, with the edges and the noise that tools leave."""
    hard = large.resize((side, side), Image.Resampling.NEAREST)
    smooth = large.resize((side, side), Image.Resampling.BOX)  # each pixel of 4 × 4
    yield "hard", hard
    yield "supersampled", smooth
    yield "of 0 and 1", hard.point(lambda level: level // 255)
    yield "of 0 and 128", hard.point(lambda level: level // 255 * 128)
    yield "red", Image.merge("RGB", (smooth, smooth.point(lambda level: level // 8), hard.point(lambda level: 0)))
    for how in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        yield f"shrunk by {how.name}", large.resize((side, side), how)
        yield (
            f"enlarged by {how.name}",
            smooth.resize((side // 2, side // 2), Image.Resampling.BOX).resize((side, side), how),
        )
    small = smooth.resize((side // 2, side // 2), Image.Resampling.BOX)
    yield "enlarged by pixels", small.resize((side, side), Image.Resampling.NEAREST)
    for radius in (1, 2, 4, 8):
        yield f"blurred by {radius}", smooth.filter(ImageFilter.GaussianBlur(radius * side / 224))
    for quality in (5, 30, 40, 50, 70, 75, 85, 90, 95, 100):
        yield f"JPEG {quality}", through_jpeg(hard, quality)
        yield f"smooth JPEG {quality}", through_jpeg(smooth, quality)
        yield f"colour JPEG {quality}", through_jpeg(hard.convert("RGB"), quality)
    levels, chance = np.asarray(hard), np.random.default_rng(0)
    yield (
        "254 and 255 at random",
        Image.fromarray(levels - (levels > 0) * chance.integers(0, 2, levels.shape).astype("u1")),
    )
    yield "254 and 255 by halves", Image.fromarray(levels - ((levels > 0) & (np.arange(side) < side // 2)).astype("u1"))
    noise = np.clip(np.asarray(smooth).astype(int) + chance.integers(-3, 4, levels.shape), 0, 255)
    yield "noise of 3 levels", Image.fromarray(noise.astype(np.uint8))


@pytest.mark.parametrize("side", SIDES)
def test_one_object_is_one_class_however_soft_or_noisy(side: int) -> None:
    wrong = {
        (number, look): class_colours(np.asarray(image))
        for number, large in enumerate(shapes(side))
        for look, image in looks(large, side)
        if len(class_colours(np.asarray(image))) > 1 or is_photograph(np.asarray(image))
    }
    assert not wrong


@pytest.mark.parametrize("quality", [20, 40, 60, 90])
@pytest.mark.parametrize(
    "colour", [(200, 30, 90), (220, 20, 60), (0, 128, 0), (0, 0, 205), (64, 0, 0), (128, 128, 128), (90, 90, 90)]
)
def test_an_object_of_any_colour_is_found_behind_jpeg(colour: tuple[int, int, int], quality: int) -> None:
    """Small, and larger than half of the image, when most pixels are neither dark nor bright."""
    for radius in (60, 110):
        values = np.asarray(through_jpeg(disc(224, radius, colour), quality))
        drawn = np.asarray(disc(224, radius))[..., 0] > 0
        assert not is_photograph(values)
        assert len(class_colours(values)) <= 1
        assert (binary(values) & drawn).sum() / (binary(values) | drawn).sum() > 0.95


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([0, 1], [0, 1]),
        ([0, 2, 63], [0, 0, 0]),
        ([0, 32, 33, 64], [0, 0, 1, 1]),
        ([0, 127, 128, 255], [0, 0, 1, 1]),
        ([0, 300, 16383], [0, 0, 0]),
        ([0, 8192, 8193, 16384], [0, 0, 1, 1]),
        ([0, 32767, 32768, 65535], [0, 0, 1, 1]),
    ],
)
def test_the_object_is_above_half_of_the_greatest_value_unless_that_is_dark(
    values: list[int], counts: list[int]
) -> None:
    assert binary(np.array([values], np.uint16)).tolist() == [counts]


def test_a_soft_mask_with_wide_edges_is_one_class() -> None:
    """Wide enough for its darkest levels to fill areas of their own."""
    for large in shapes(112):
        for radius in (16, 32):
            assert len(class_colours(np.asarray(large.filter(ImageFilter.GaussianBlur(radius))))) <= 1


COLOURS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [255, 255, 255]], np.uint8)


def discs(side: int, classes: int, share: float) -> UInt8:
    """A map of class numbers, shape (side, side): discs of a share of the image each, side by side on 0."""
    y, x = np.mgrid[:side, :side]
    numbers = np.zeros((side, side), np.uint8)
    for number in range(1, classes + 1):
        inside = (x - side * number / (classes + 1)) ** 2 + (y - side / 2) ** 2 <= share * side**2 / np.pi
        numbers[inside] = number
    return numbers


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_several_classes_are_found_as_numbers_as_greys_and_as_colours(side: int, classes: int) -> None:
    numbers = discs(side, classes, share=0.05)
    assert class_colours(numbers) == [(n, n, n) for n in range(1, classes + 1)]
    spread = (numbers * (255 // classes)).astype(np.uint8)
    assert len(class_colours(spread)) == classes
    with_void = np.where(numbers == classes, 255, numbers).astype(np.uint8)
    assert len(class_colours(with_void)) == classes
    assert set(class_colours(COLOURS[numbers])) == {tuple(colour) for colour in COLOURS[1 : classes + 1].tolist()}
    assert not is_photograph(spread)


@pytest.mark.parametrize("classes", [2, 3])
def test_several_classes_are_found_behind_soft_edges_and_jpeg(classes: int) -> None:
    large = Image.fromarray(COLOURS[discs(448, classes, share=0.06)])
    smooth = large.resize((224, 224), Image.Resampling.BOX)
    assert len(np.unique(np.asarray(smooth.resize((149, 149), Image.Resampling.BICUBIC)))) > 16
    for image in (smooth, smooth.resize((149, 149), Image.Resampling.BICUBIC), through_jpeg(smooth, 90)):
        assert len(class_colours(np.asarray(image))) == classes


def test_specks_and_outlines_are_no_classes() -> None:
    mask = discs(224, 1, share=0.2) * np.uint8(255)
    mask[5:10, 5:12] = 128  # a slip of the brush
    edge = np.asarray(Image.fromarray(mask).filter(ImageFilter.FIND_EDGES)) > 0
    mask[edge] = 100
    assert class_colours(mask) == [(255, 255, 255)]


def test_a_photograph_is_no_mask_but_a_photo_of_a_mask_may_be() -> None:
    with Image.open(Path(get_data_path(), "sample_data", "grace_hopper.jpg")) as file:
        photo = file.convert("RGB").resize((224, 224))
    assert is_photograph(np.asarray(photo))
    assert not is_photograph(np.asarray(photo.convert("L").point(lambda level: 255 * (level > 128))))


def test_few_shades_between_dark_and_bright_are_no_photograph() -> None:
    """Though they fill the mask: 21 of them; as many as a photograph has do not pass."""
    shades = np.arange(40, 201)
    assert not is_photograph(np.resize(shades[::8], (64, 64)).astype(np.uint8))
    assert is_photograph(np.resize(shades, (64, 64)).astype(np.uint8))


def test_a_large_mask_is_judged_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which finds the same, and needs the memory of a small one."""
    large = COLOURS[discs(1500, 3, share=0.05)]
    monkeypatch.setattr(masks, "ENOUGH", 2**15)
    tracemalloc.start()
    try:
        found = class_colours(large), class_colours(large[..., 0]), is_photograph(large), is_photograph(large[..., 0])
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert found == ([(0, 128, 0), (128, 0, 0), (128, 128, 0)], [(128, 128, 128)], False, False)


def test_values_of_16_bits_are_told_by_their_upper_8_if_they_need_them() -> None:
    small = np.array([[0, 1, 255]], np.uint16)
    assert levels_of(small).tolist() == [[0, 1, 255]]
    assert levels_of(np.array([[0, 255, 256, 65535]], np.int32)).tolist() == [[0, 0, 1, 255]]
    assert levels_of(small).dtype == np.uint8
