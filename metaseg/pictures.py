"""People's own images and masks: whatever files they have, read by written rules, and every failure with a cure.

An image is what any viewer shows: turned as its EXIF data say, palette and CMYK as RGB, transparency on white, the
first of several frames. More than 8 bits are scaled by the full range of the fewest bits (10, 12, 14, 16) that hold the
image's maximum.

A mask's object is what is not black, whatever its colour or number, with two exceptions: pixels more than half
transparent are background; and in a mask without a palette whose commonest value besides black is white (255 in 8 bits,
65535 in 16), as a soft brush leaves it, the object is what is brighter than half. So {0, 1}, {0, 255}, labels, palettes
and instance numbers all count.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from metaseg.data.faults import Fault, first, stray
from metaseg.data.opening import fault_of, opened
from metaseg.data.source import UInt8
from metaseg.data.tree import natural
from metaseg.errors import ConfigError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")  # Pillow's names of them

PREDICTION, TRUTH = (230, 60, 40), (30, 160, 90)  # colours of outlines

Pixels: TypeAlias = NDArray[Any] | Image.Image | torch.Tensor


class PictureError(DataError):
    """A picture that cannot be used: a `Fault` before its place is known; `path` is the file, if it is one's."""

    def __init__(self, kind: str, cure: str, detail: str = "") -> None:
        super().__init__(f"{kind}{detail and f' ({detail})'}: {cure}")
        self.kind, self.cure, self.detail = kind, cure, detail
        self.path: Path | None = None

    def at(self, path: Path) -> Fault:
        """The fault of the file at `path`."""
        return Fault(self.kind, path, self.cure, self.detail)


class Polygons(NamedTuple):
    """A mask drawn as polygons.

    Attributes:
        outlines: each (n, 2), x and y in pixels from the image's upper left corner; the object is their union.
        size: height and width of the image that they were drawn on, where known.
    """

    outlines: Sequence[NDArray[np.float64]]
    size: tuple[int, int] | None


class Labelled(NamedTuple):
    """An image file and its mask: a file, or polygons."""

    image: Path
    mask: Path | Polygons

    def read(self) -> tuple[UInt8, UInt8]:
        """The image (h, w, 3), and the mask (h, w), {0, 1}, of the same size.

        Raises:
            PictureError: if one cannot be used.
        """
        image = read_picture(self.image)
        size = (image.shape[0], image.shape[1])
        if isinstance(self.mask, Path):
            mask = read_mask(self.mask)
            check_sizes(size, (mask.shape[0], mask.shape[1]))
            return image, mask
        check_sizes(size, self.mask.size or size)  # before any memory is taken at the size that a file claims
        filled = np.zeros(size, bool)
        for outline in self.mask.outlines:
            _fill_in(filled, outline)
        return image, filled.astype(np.uint8)


def read_picture(path: Path) -> UInt8:
    """An image file as RGB, shape (h, w, 3).

    Raises:
        PictureError: if it is unreadable, too large, or of floating-point pixels.
    """
    return _decode(path, as_picture)


def read_mask(path: Path) -> UInt8:
    """A mask file, shape (h, w), {0, 1}.

    Raises:
        PictureError: if it is unreadable or too large.
    """
    return _decode(path, as_mask)


def as_picture(image: Pixels) -> UInt8:
    """An image as RGB, shape (h, w, 3), uint8, in 0 … 255.

    Args:
        image: a PIL image; an array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4); or a tensor of one of these with the
            channels first. Integers are in 0 … 255 or more, as in files; floating-point numbers in 0 … 1, or, if there
            is one above 1, in 0 … 255.

    Raises:
        PictureError: if it is none of these.
    """
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise PictureError("floating-point image file", "export it with 8 or 16 bits a channel")
        if not image.mode.startswith("I"):
            return _on_white(image.convert("RGBA")) if image.has_transparency_data else np.asarray(image.convert("RGB"))
    values = _eight_bits(_channels_last(image))
    if values.shape[2] == 4:
        return _on_white(Image.fromarray(values))
    return values if values.shape[2] == 3 else np.asarray(np.repeat(values, 3, axis=2))


def as_mask(mask: Pixels) -> UInt8:
    """A mask as 0 and 1, shape (h, w), uint8, by this module's rule.

    Args:
        mask: a PIL image, an array or a tensor, shaped as `as_picture` takes them; booleans are themselves, and of
            floating-point numbers, which are in 0 … 1, the object is what is above 0.5.

    Raises:
        PictureError: if it is none of these.
    """
    palette = False
    if isinstance(mask, Image.Image):
        mask = ImageOps.exif_transpose(mask)
        palette = mask.mode in ("P", "PA")
        if mask.mode not in ("1", "L", "RGB", "F") and not mask.mode.startswith("I"):
            mask = mask.convert("RGBA")
    values = _channels_last(mask)
    if values.dtype == bool or values.dtype.kind == "f":
        return np.asarray(values[..., :3].max(axis=2) > 0.5).astype(np.uint8)
    shown = values[..., :3].max(axis=2)
    if values.shape[2] == 4:
        shown = np.where(values[..., 3] > np.iinfo(values.dtype).max // 2, shown, 0)
    there, times = np.unique(shown[shown > 0], return_counts=True)
    white = 255 if shown.max() <= 255 else 65535
    soft = not palette and len(there) > 0 and there[times.argmax()] == white
    return np.asarray(shown > (white // 2 if soft else 0)).astype(np.uint8)


def check_sizes(image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Refuse a mask (height, width) of another size than its image's.

    Raises:
        PictureError: naming both.
    """
    if image != mask:
        cure = "export the mask at its image's size; a photo counts as its EXIF rotation turns it, upright"
        detail = f"mask {mask[1]}×{mask[0]}, image {image[1]}×{image[0]}"
        raise PictureError("mask of another size than its image", cure, detail)


def fill(outline: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """The pixels (height, width) whose centres lie inside a polygon (n, 2), by the even-odd rule.

    The drawing functions of OpenCV and Pillow would count the pixels that the outline touches, too.
    """
    filled = np.zeros((height, width), bool)
    _fill_in(filled, outline)
    return filled


def overlay(image: UInt8, mask: NDArray[np.integer], colour: tuple[int, int, int]) -> UInt8:
    """An image (h, w, 3) that is itself where the mask (h, w) is 1, outlined in `colour`, and pale elsewhere."""
    inside = (mask > 0).astype(np.uint8)
    grey = image.mean(axis=2, keepdims=True, dtype=np.float32)
    pale = np.broadcast_to((0.3 * grey + 0.7 * 255).astype(np.uint8), image.shape)
    shown = np.where(inside[..., None] == 1, image, pale)
    shown[(inside - cv2.erode(inside, np.ones((3, 3), np.uint8), borderValue=1)) == 1] = colour
    return shown


def find_pictures(place: Path) -> tuple[list[Path], list[Fault]]:
    """The image at `place`, or those in that folder or its `images/`, in natural order, and the faults of what else.

    What is named as the mask of an image beside it (see `find_labelled`) is taken for one, and is such a fault.

    Raises:
        DataError: if there is no such place.
    """
    if place.is_file():
        return [place], []
    files = _scan(place)
    owners = {image.stem: image for image in reversed(files.images)}  # the first of a stem
    cure = "rename it, or put all images into images/"
    taken = [
        Fault("taken for a mask", mask.relative_to(place), cure, f"of {owners[stem].name}")
        for stem, mask in files.masks.items()
        if mask.parent == owners[stem].parent
    ]
    return files.images, files.faults + taken


def find_labelled(folder: Path, category: str | None = None) -> tuple[list[Labelled], list[Fault]]:
    """The images of a folder that have masks, in natural order, and the faults of what lies there else.

    Masks are `name.png` beside `name.jpg` (or any other suffix), `name_mask.png` beside `name.png`; or the files of
    one stem in `masks/` with their images in `images/`; or polygons in a COCO JSON or labelme JSONs in the folder, its
    `images/` or its `annotations/`. A mask file goes before polygons.

    An annotation that cannot be used, such as a box or a circle, costs its image, if it is of the category that is the
    object or of none; one of an image that its COCO file does not list is a fault that costs nothing else.

    Args:
        folder: where they are.
        category: the polygons' category (COCO) or label (labelme) that is the object; None if there is but one.

    Raises:
        DataError: if there is no such folder.
        ConfigError: if it must be said which category is the object.
    """
    files = _scan(folder)
    faults = list(files.faults)
    drawn = _read_drawings(files.drawings, folder, category, faults)
    names = {path.name for path in files.images}
    for name in drawn.keys() - names:
        faults.append(Fault("polygons without an image", Path(name), "add the image, or take it out of the JSON file"))
    labelled: dict[str, Labelled] = {}
    for image in files.images:
        place = image.relative_to(folder)
        mask = files.masks.get(image.stem, drawn.get(image.name))
        if image.stem in labelled and image.stem in files.masks:
            cure = "give each a stem of its own, with its own mask"
            faults.append(Fault("second image of one stem", place, cure, f"{labelled[image.stem].image.name} is used"))
        elif isinstance(mask, PictureError):
            faults.append(mask.at(place))
        elif mask is None:
            cure = f"add its mask as {image.stem}{'_mask' if image.suffix.lower() == '.png' else ''}.png, or remove it"
            faults.append(Fault("image without a mask", place, cure))
        else:
            labelled[image.stem if image.stem in files.masks else image.name] = Labelled(image, mask)
    return list(labelled.values()), faults


class _Files(NamedTuple):
    """What a folder holds: images, masks by the stem of their image, JSON files, and what has no business there."""

    images: list[Path]
    masks: dict[str, Path]
    drawings: list[Path]
    faults: list[Fault]


def _scan(folder: Path) -> _Files:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    apart = (folder / "images").is_dir() and not any(path.suffix.lower() in SUFFIXES for path in _listed(folder))
    base = folder / "images" if apart else folder
    found = _listed(base)
    pictures = [path for path in found if path.suffix.lower() in SUFFIXES]
    places = {folder: None, base: None, folder / "annotations": None}
    drawings = [path for place in places for path in _listed(place) if path.suffix.lower() == ".json"]
    strays = [path for path in found if path not in pictures and path not in drawings]
    faults = [stray(path.relative_to(folder)) for path in strays]
    if apart:
        images = pictures
        masks = [path for path in _listed(folder / "masks") if path.suffix.lower() in SUFFIXES]
    else:
        stems, others = {path.stem for path in pictures}, {p.stem for p in pictures if p.suffix.lower() != ".png"}
        owned = others | {f"{stem}_mask" for stem in stems}
        masks = [path for path in pictures if path.suffix.lower() == ".png" and path.stem in owned]
        images = [path for path in pictures if path not in masks]
    mask_of: dict[str, Path] = {}
    stems = {path.stem for path in images}
    for path in masks:
        stem = path.stem if path.stem in stems else path.stem.removesuffix("_mask")
        place = path.relative_to(folder)
        if stem not in stems:
            faults.append(Fault("mask without an image", place, "add its image, or remove the mask"))
        elif stem in mask_of:
            faults.append(Fault("second mask of one image", place, "keep one", f"{mask_of[stem].name} is used"))
        else:
            mask_of[stem] = path
    return _Files(images, mask_of, drawings, faults)


def _listed(folder: Path) -> list[Path]:
    """The files of a folder in natural order, without hidden ones, such as the `._1.jpg` of macOS archives."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: (natural(path.stem), path.suffix))


def _decode(path: Path, convert: Callable[[Image.Image], UInt8]) -> UInt8:
    Image.init()  # AVIF and HEIF are not in every Pillow
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about large images and odd EXIF data
            with opened(path, formats) as file:
                return convert(file)
    except Exception as error:  # of damaged files Pillow raises errors of all kinds
        broken = _told(error, path)
        broken.path = path
        raise broken from error


def _told(error: Exception, path: Path) -> PictureError:
    if isinstance(error, PictureError):
        return error
    fault = fault_of(error, path, path, "export it again as JPEG or PNG, or remove it")
    return PictureError(fault.kind, fault.cure, fault.detail)


def _channels_last(image: Pixels) -> NDArray[Any]:
    """An array or tensor, or a PIL image whose values are to be taken as they are, as (h, w, 1, 3 or 4)."""
    values = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    shape = values.shape
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and isinstance(image, torch.Tensor):
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or 0 in values.shape or values.dtype.kind not in "biuf":
        cure = "give numbers of shape (h, w) or (h, w, channels) as an array, (h, w) or (channels, h, w) as a tensor"
        raise PictureError("no picture", cure, f"{values.dtype} of shape {shape}")
    if values.dtype.kind in "if" and not values.min() >= 0:  # and NaN, which is not
        raise PictureError("negative or undefined pixels", "give 0 or more", f"least {values.min()}")
    return values


def _eight_bits(values: NDArray[Any]) -> UInt8:
    if values.dtype == np.uint8:
        return values
    most, full = values.max(), 255.0
    if values.dtype.kind == "f":
        full = 1.0 if most <= 1 else 255.0
        if most > 255:
            raise PictureError("pixels above 255", "give floating-point numbers in 0 … 1 or 0 … 255", f"most {most}")
    elif most > 255:
        bits = int(most).bit_length()
        full = 2.0 ** (bits + bits % 2) - 1
    return np.asarray(np.rint(values * (255 / full))).astype(np.uint8)


def _fill_in(mask: NDArray[np.bool_], outline: NDArray[np.float64]) -> None:
    """Set what `fill` says in a mask (height, width), at the cost of the outline's own rows and columns alone."""
    if not len(outline):
        return
    most = mask.shape[1], mask.shape[0]
    corners = np.stack([outline.min(axis=0), outline.max(axis=0)])
    (left, top), (right, bottom) = np.clip(np.ceil(corners - 0.5), 0, most).astype(int).tolist()
    toggles = np.zeros((bottom - top, right - left + 1), bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        low, high = (int(np.clip(np.ceil(y - 0.5), top, bottom)) for y in sorted((y0, y1)))
        rows = np.arange(low, high)  # whose centres the edge passes
        at = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0) if len(rows) else rows
        toggles[rows - top, np.clip(np.ceil(at - 0.5), left, right).astype(int) - left] ^= True
    mask[top:bottom, left:right] |= np.logical_xor.accumulate(toggles, axis=1)[:, :-1]


def _on_white(image: Image.Image) -> UInt8:
    """What an RGBA image looks like on white, (h, w, 3)."""
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


# An outline or why it cannot be used, and its category, None if that is unknown.
_Shape: TypeAlias = tuple[str | None, NDArray[np.float64] | PictureError]


class _Drawn(NamedTuple):
    """What is drawn on one image, and the size of what it was drawn on."""

    shapes: list[_Shape]
    size: tuple[int, int] | None

    def of(self, category: str | None) -> Polygons | PictureError:
        """The polygons of a category, of all for None; or the first error among these and those of unknown category."""
        chosen = [shape for name, shape in self.shapes if category is None or name in (None, category)]
        errors = [shape for shape in chosen if isinstance(shape, PictureError)]
        return errors[0] if errors else Polygons([o for o in chosen if not isinstance(o, PictureError)], self.size)


def _read_drawings(
    paths: Sequence[Path], folder: Path, category: str | None, faults: list[Fault]
) -> dict[str, Polygons | PictureError]:
    """The polygons of each image, by its file name, of all JSON files; what else they hold joins `faults`."""
    drawn: dict[str, _Drawn] = {}
    for path in paths:
        place = path.relative_to(folder)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "annotations" in content and "images" in content:
                drawn |= _read_coco(content, place, faults)
            elif isinstance(content, dict) and "shapes" in content:
                drawn |= _read_labelme(content, path)
            else:
                faults.append(stray(place, "nothing to do; it is neither COCO's nor labelme's and ignored"))
        except (OSError, LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            cure = "export it again as COCO or labelme JSON"
            faults.append(Fault("unreadable file", place, cure, f"{type(error).__name__}: {error}"))
    names = sorted({name for one in drawn.values() for name, _ in one.shapes if name is not None})
    if (category is None and len(names) > 1) or (category is not None and names and category not in names):
        said = f"category={category} is none of the polygons'" if category else "the polygons have several categories"
        raise ConfigError(f"{said}: choose one of these as the object, category=…: {', '.join(names)}")
    return {image: one.of(category) for image, one in drawn.items()}


def _read_coco(content: Mapping[str, Any], place: Path, faults: list[Fault]) -> dict[str, _Drawn]:
    names = {one["id"]: str(one["name"]) for one in content.get("categories", ())}
    drawn = {one["id"]: _Drawn([], _size(one.get("height"), one.get("width"))) for one in content["images"]}
    unlisted: dict[str, None] = {}  # each once, in their order
    for one in content["annotations"]:
        image = one.get("image_id") if isinstance(one, dict) else None
        if isinstance(image, int | float | str) and image in drawn:
            drawn[image].shapes.extend(_coco_shapes(one, names))
        else:
            unlisted[f"image_id {image}"] = None
    if unlisted:
        cure = "list the image in the file, or take the annotation out"
        faults.append(Fault("annotation of an image that its file does not list", place, cure, first([*unlisted])))
    return {Path(one["file_name"]).name: drawn[one["id"]] for one in content["images"]}


def _coco_shapes(annotation: Mapping[str, Any], names: Mapping[Any, str]) -> list[_Shape]:
    name, outlines = None, annotation.get("segmentation")
    try:
        name = names.get(annotation["category_id"], str(annotation["category_id"]))
        cure = "export it as polygons, or the masks as PNG files"
        if not outlines or outlines == [[]]:
            return [(name, PictureError("annotation without an outline", cure))]
        if not isinstance(outlines, list):
            return [(name, PictureError("run-length annotation", cure))]
        return [(name, _outline(np.reshape(flat, (-1, 2)))) for flat in outlines]
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        cure = "export it again, as polygons with a category"
        return [(name, PictureError("broken annotation", cure, f"{type(error).__name__}: {error}"))]


def _read_labelme(content: Mapping[str, Any], path: Path) -> dict[str, _Drawn]:
    drawn = _Drawn([], _size(content.get("imageHeight"), content.get("imageWidth")))
    for shape in content["shapes"]:
        kind, label = shape.get("shape_type") or "polygon", str(shape["label"])
        if kind == "rectangle":
            (x0, y0), (x1, y1) = _outline(shape["points"])
            drawn.shapes.append((label, _outline([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])))
        elif kind == "polygon":
            drawn.shapes.append((label, _outline(shape["points"])))
        else:
            error = PictureError("shape that is no polygon", "draw it as a polygon or a rectangle", str(kind))
            drawn.shapes.append((label, error))
    # its own path may be of another machine, a Windows one too
    return {str(content.get("imagePath") or f"{path.stem}.jpg").replace("\\", "/").rpartition("/")[2]: drawn}


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    return (int(height), int(width)) if height and width else None


def _outline(points: Any) -> NDArray[np.float64]:
    outline = np.asarray(points, dtype=np.float64)
    if outline.ndim != 2 or outline.shape[1] != 2 or not (np.abs(outline) < 1e9).all():
        raise ValueError("a polygon is pairs of numbers, in pixels")
    return outline
