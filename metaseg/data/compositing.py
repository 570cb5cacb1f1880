"""Composite pictures with exact masks: procedural backgrounds, cut-out artwork in random poses, layers, jitter.

Pure functions of their arguments and a NumPy generator. Artwork is kept premultiplied by its alpha, so that resampling
never mixes in the colour of transparent pixels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from metaseg.data.source import UInt8

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Where = Literal["inside", "cut", "anywhere"]

PYRAMID_LEVELS = 4
MARGIN = 3  # transparent pixels around a posed cut-out: what bilinear sampling may spread beyond the outline

MAX_ROTATION = math.radians(40)
MAX_SHEAR = 0.15
MAX_STRETCH = 0.12  # log of the aspect's square root
MAX_TILT = 0.12  # change of scale from the centre to the edge, by perspective

# ---------------------------------------------------------------------------------------------------------- backgrounds


def _colours(rng: np.random.Generator, count: int) -> Float32:
    """Random RGB colours of shape (count, 3), 0 … 1."""
    return rng.random((count, 3), dtype=np.float32)


def _axes(rng: np.random.Generator, size: int) -> tuple[Float32, Float32]:
    """Coordinates (u, v) of every pixel along two perpendicular axes at a random angle, the picture spanning 1."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) - (size - 1) / 2) / size
    angle = rng.uniform(0, 2 * math.pi)
    return (
        (x * math.cos(angle) + y * math.sin(angle)).astype(np.float32),
        (y * math.cos(angle) - x * math.sin(angle)).astype(np.float32),
    )


def _fractal(rng: np.random.Generator, size: int) -> Float32:
    """Noise with detail at every scale, shape (size, size), spread over 0 … 1."""
    field = np.zeros((size, size), np.float32)
    roughness = rng.uniform(0.4, 0.75)
    cells = int(rng.integers(2, 5))
    for octave in range(4):
        grid = rng.random((cells * 2**octave + 1,) * 2, dtype=np.float32)
        field += roughness**octave * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    field -= field.min()
    field /= field.max()
    return field


def _blend(ramp: Float32, colours: Float32) -> Float32:
    """Colours interpolated along `ramp` (0 … 1), the given colours evenly spaced on it."""
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(ramp, stops, channel) for channel in colours.T], axis=-1).astype(np.float32)


def _pick(colours: Float32, which: NDArray[np.intp]) -> Float32:
    return np.asarray(colours[which], np.float32)


def _gradient(rng: np.random.Generator, size: int) -> Float32:
    u, v = _axes(rng, size)
    if rng.random() < 0.5:
        ramp = u + 0.5
    else:
        ramp = np.hypot(u - np.float32(rng.uniform(-0.5, 0.5)), v - np.float32(rng.uniform(-0.5, 0.5)))
    return _blend(ramp.clip(0, 1), _colours(rng, int(rng.integers(2, 5))))


def _noise(rng: np.random.Generator, size: int) -> Float32:
    return _blend(_fractal(rng, size), _colours(rng, int(rng.integers(2, 5))))


def _voronoi(rng: np.random.Generator, size: int) -> Float32:
    seeds = rng.random((int(rng.integers(5, 25)), 2), dtype=np.float32) - 0.5
    u, v = _axes(rng, size)
    distance = (u[..., None] - seeds[:, 0]) ** 2 + (v[..., None] - seeds[:, 1]) ** 2
    return _pick(_colours(rng, len(seeds)), distance.argmin(-1))


def _stripes(rng: np.random.Generator, size: int) -> Float32:
    u, v = _axes(rng, size)
    bend = rng.uniform(0, 0.06) * np.sin(2 * math.pi * rng.uniform(1, 3) * v)
    colours = _colours(rng, int(rng.integers(2, 5)))
    band = np.floor((u + bend) * rng.uniform(4, 14)).astype(np.intp)
    return _pick(colours, band % len(colours))


def _checks(rng: np.random.Generator, size: int) -> Float32:
    u, v = _axes(rng, size)
    u_count, v_count = rng.uniform(3, 12, 2)
    tile = (np.floor(u * u_count) + np.floor(v * v_count)).astype(np.intp)
    return _pick(_colours(rng, 2), tile % 2)


def _discs(rng: np.random.Generator, size: int) -> Float32:
    picture = _gradient(rng, size)
    for colour in _colours(rng, int(rng.integers(6, 20))):
        centre = rng.integers(0, size, 2)
        radius = int(size * rng.uniform(0.04, 0.2))
        cv2.circle(picture, (int(centre[0]), int(centre[1])), radius, colour.tolist(), -1, cv2.LINE_AA)
    return picture


BACKGROUNDS = (_gradient, _noise, _voronoi, _stripes, _checks, _discs)


def background(rng: np.random.Generator, size: int) -> Float32:
    """A picture without an object, shape (size, size, 3), 0 … 1."""
    picture = BACKGROUNDS[rng.integers(len(BACKGROUNDS))](rng, size)
    # Uneven light: without it, most kinds would have perfectly flat regions, which no photograph has.
    light = 1 + rng.uniform(0, 0.4) * (_fractal(rng, size) - 0.5)
    return (picture * light[..., None]).clip(0, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- cut-outs


@dataclass(frozen=True, eq=False)
class CutOut:
    """Artwork without its surroundings.

    `levels` are premultiplied RGBA pictures, each half the size of the one before; `outline` is the convex hull of
    the first one's non-transparent pixels, shape (points, 2), (x, y); `area` is its summed alpha in pixels.
    """

    levels: tuple[UInt8, ...]
    outline: Float64
    area: float


def cut_out(rgba: UInt8) -> CutOut:
    """Cut out the non-transparent part of a picture (straight alpha, shape (height, width, 4))."""
    x, y, width, height = cv2.boundingRect((rgba[..., 3] > 0).astype(np.uint8))
    crop = rgba[y : y + height, x : x + width]
    alpha = crop[..., 3:].astype(np.float32) / 255
    premultiplied = np.concatenate([np.rint(crop[..., :3] * alpha).astype(np.uint8), crop[..., 3:]], axis=-1)

    step = 2 ** (PYRAMID_LEVELS - 1)  # halving exactly needs sides that are multiples of it
    level = np.pad(premultiplied, ((0, -height % step), (0, -width % step), (0, 0)))
    levels = [level]
    while len(levels) < PYRAMID_LEVELS:
        level = cv2.resize(level, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA).astype(np.uint8)
        levels.append(level)

    outline = cv2.convexHull(cv2.findNonZero(crop[..., 3]))[:, 0].astype(np.float64)
    return CutOut(tuple(levels), outline, float(alpha.sum()))


def _apply(homography: Float64, points: Float64) -> Float64:
    return np.asarray(cv2.perspectiveTransform(points[None], homography)[0], np.float64)


def _shift(x: float, y: float) -> Float64:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _random_pose(rng: np.random.Generator, outline: Float64) -> Float64:
    """Homography that mirrors, stretches, shears, rotates and tilts an outline around its centre, now at (0, 0)."""
    centre = (outline.min(0) + outline.max(0)) / 2
    radius = float(np.ptp(outline, axis=0).max()) / 2 + 0.5
    angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    stretch = math.exp(rng.uniform(-MAX_STRETCH, MAX_STRETCH))
    mirror = rng.choice((-1, 1))
    shear = rng.uniform(-MAX_SHEAR, MAX_SHEAR)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    pose = np.eye(3)
    pose[:2, :2] = rotation @ np.array([[mirror * stretch, shear], [0, 1 / stretch]])
    pose[2] = [*rng.uniform(-MAX_TILT, MAX_TILT, 2) / radius, 1]
    return pose @ _shift(-centre[0], -centre[1])


def pose(rng: np.random.Generator, artwork: CutOut, area: float, longest: float) -> UInt8:
    """Show a cut-out in a random pose, `area` pixels large but at most `longest` pixels high and wide.

    Returns:
        premultiplied RGBA picture, just large enough for the object and a transparent margin of `MARGIN` pixels.
    """
    homography = _random_pose(rng, artwork.outline)
    outline = _apply(homography, artwork.outline)
    growth = cv2.contourArea(outline.astype(np.float32)) / cv2.contourArea(artwork.outline.astype(np.float32))
    extent = np.ptp(outline, axis=0)
    scale = min(math.sqrt(area / (artwork.area * growth)), longest / extent.max())

    homography = np.diag([scale, scale, 1]) @ homography
    corner = outline.min(0) * scale
    width, height = np.rint(extent * scale).astype(int) + 2 * MARGIN
    # Sampling from the level just above the final size keeps thin strokes from being skipped.
    level = min(max(int(-math.log2(scale)), 0), PYRAMID_LEVELS - 1)
    step, offset = 2.0**level, (2.0**level - 1) / 2
    from_level = np.array([[step, 0, offset], [0, step, offset], [0, 0, 1]])
    warp = _shift(MARGIN - corner[0], MARGIN - corner[1]) @ homography @ from_level
    picture = cv2.warpPerspective(artwork.levels[level], warp, (int(width), int(height)), flags=cv2.INTER_LINEAR)
    return picture.astype(np.uint8)


def corner(rng: np.random.Generator, posed: UInt8, size: int, where: Where) -> tuple[int, int]:
    """Where to put a posed cut-out's top left corner (row, column) in a square picture of side `size`.

    "inside": all of the object is in the picture; "cut": one border cuts it; "anywhere": its centre is in the picture.
    """
    extent = np.array(posed.shape[:2]) - 2 * MARGIN
    if where == "anywhere":
        first = rng.uniform(-extent / 2, size - extent / 2)
    else:
        first = rng.uniform(0, np.maximum(size - extent, 0))
    if where == "cut":
        axis = rng.integers(2)
        beyond = rng.uniform(0.1, 0.45) * extent[axis]
        first[axis] = rng.choice((-beyond, size - extent[axis] + beyond))
    row, column = np.rint(first).astype(int) - MARGIN
    return int(row), int(column)


def place(posed: UInt8, size: int, row: int, column: int) -> UInt8:
    """Layer of shape (size, size, 4), transparent but for the posed cut-out whose top left corner is given."""
    layer = np.zeros((size, size, 4), np.uint8)
    height, width = posed.shape[:2]
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + height, size), min(column + width, size)
    layer[top:bottom, left:right] = posed[top - row : bottom - row, left - column : right - column]
    return layer


# --------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True, eq=False)
class Scene:
    """A background with objects before it, from back to front; one of them is the target.

    `background` has shape (size, size, 3), 0 … 1; each of `layers` is premultiplied RGBA, shape (size, size, 4);
    `names` says what is on them; `target` is the target's position in both.
    """

    background: Float32
    names: tuple[str, ...]
    layers: tuple[UInt8, ...]
    target: int

    def image(self) -> Float32:
        """The picture, shape (size, size, 3), 0 … 1."""
        picture = self.background.copy()
        for layer in self.layers:
            over = layer / np.float32(255)
            picture *= 1 - over[..., 3:]
            picture += over[..., :3]
        return picture

    def mask(self) -> UInt8:
        """1 where the target makes up at least half of the pixel, else 0, shape (size, size)."""
        visible = self.layers[self.target][..., 3] / np.float32(255)
        for layer in self.layers[self.target + 1 :]:
            visible *= 1 - layer[..., 3] / np.float32(255)
        return (visible >= 0.5).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- photometry

_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def _recolour(rng: np.random.Generator) -> Float32:
    """3×3 matrix that turns the hue a little and changes the saturation, and keeps the luminance."""
    turn, saturation = rng.uniform(-0.3, 0.3), rng.uniform(0.6, 1.3)
    chroma = np.eye(3)
    chroma[1:, 1:] = saturation * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return np.asarray(np.linalg.inv(_YIQ) @ chroma @ _YIQ, np.float32)


def jitter(rng: np.random.Generator, picture: Float32) -> UInt8:
    """What a camera does: other light and colours, sometimes mild blur, sometimes noise; 0 … 1 in, 0 … 255 out."""
    picture = picture @ _recolour(rng).T
    contrast, brightness = rng.uniform(0.7, 1.2), rng.uniform(-0.12, 0.12)
    picture = (picture - 0.5) * np.float32(contrast) + np.float32(0.5 + brightness)
    if rng.random() < 0.4:
        sigma = rng.uniform(0.3, 0.8) * picture.shape[0] / 64
        picture = cv2.GaussianBlur(picture, (0, 0), sigma).astype(np.float32)
    if rng.random() < 0.5:
        grain = np.float32(rng.uniform(0.01, 0.05))
        picture = picture + grain * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.asarray(np.rint(picture.clip(0, 1) * 255), np.uint8)
