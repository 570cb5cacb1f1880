"""Any folder of images with masks, one class a folder, as a data set: `root/<class>/<stem>.jpg` + `<stem>.png`.

Every file of the splits is decoded once at construction, in threads (FSS-1000: 8 s on two cores), because a
run should meet a broken file before its first step and not in its third hour. What is unsound is left out, with one
warning that lists it and says what to do; the rest is used.
"""

import difflib
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from metaseg.data.archive import unpacked
from metaseg.data.faults import STRAY, UNREADABLE, Fault, fault_lines, first, inspect_each, warn_of
from metaseg.data.source import SPLITS, Split, UInt8
from metaseg.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg")
MASK_SUFFIX = ".png"

SPLITS_CURE = 'write a JSON file {"train": [...], "val": [...], "test": [...]} of class names: dataset.splits=FILE'


class Pair(NamedTuple):
    """The file names of an image and its mask inside their class folder."""

    image: str
    mask: str


class FileSource(ABC):
    """A `TaskSource` over pairs of files. A subclass finds the sound ones in its constructor, and reads one."""

    image_size: int
    faults: tuple[Fault, ...]
    _listed: Mapping[Split, Sequence[str]]
    _pairs: Mapping[str, Sequence[Any]]  # of each class that has enough of them

    def names(self, split: Split) -> Sequence[str]:
        """Names of the split's classes that have enough sound images, sorted."""
        return sorted(task for task in self._listed[split] if task in self._pairs)

    def count(self, task: str) -> int:
        """Number of sound images that the class has."""
        return len(self._pairs[task])

    def load(self, task: str, which: Sequence[int]) -> tuple[UInt8, UInt8]:
        """Decode and resize the class's images number `which`; see `TaskSource.load`."""
        size = self.image_size
        images = np.empty((len(which), size, size, 3), np.uint8)
        masks = np.empty((len(which), size, size), np.uint8)
        for row, number in enumerate(which):
            images[row], masks[row] = self._read(task, self._pairs[task][number])
        return images, masks

    @abstractmethod
    def _read(self, task: str, pair: Any) -> tuple[UInt8, UInt8]:
        """One of the class's images, shape (image_size, image_size, 3), and its mask, (image_size, image_size)."""


class FolderSource(FileSource):
    """A `TaskSource` over `root/<class>/`, where each image `<stem>.jpg` or `.jpeg` has its mask in `<stem>.png`.

    Args:
        root: the folder that holds one folder a class, or a zip or tar file of it (see `archive.unpacked`); what else
            lies in it is ignored.
        splits: a JSON file `{"train": [...], "val": [...], "test": [...]}` of class names, or such a mapping.
        image_size: height and width that everything is resized to, whatever its proportions were.
        min_images: a class with fewer sound images is left out: an episode draws its support and its query from one.

    Images are counted in natural order of their stems (2 before 10), and read as they are stored: a JPEG's EXIF
    rotation is not applied.
    """

    name = family = "folder"

    def __init__(
        self,
        root: str | os.PathLike[str],
        splits: str | os.PathLike[str] | Mapping[Split, Sequence[str]],
        image_size: int = 224,
        min_images: int = 10,
    ) -> None:
        self.root = unpacked(root)
        self.image_size = image_size
        if not self.root.is_dir():
            raise DataError(f"{self.root} is not a folder: dataset.root names the one that holds a folder per class")
        self._listed = read_splits(splits)
        self._pairs, faults = self._sound_pairs(min_images)
        self.faults = tuple(faults)
        check_filled(self._listed, self._pairs, self.faults, self.root)
        warn_of(self.faults, str(self.root))

    def report(self) -> str:
        """Classes and images of each split, then each kind of fault with its count, first places and cure."""
        lines = [str(self.root)]
        for split in SPLITS:
            names = self.names(split)
            images = sum(self.count(task) for task in names)
            lines.append(f"{split}: {len(names)} of {len(self._listed[split])} classes, {images} images")
        return "\n".join(lines + fault_lines(self.faults))

    def _read(self, task: str, pair: Pair) -> tuple[UInt8, UInt8]:
        folder, size = self.root / task, self.image_size
        return read_image(folder / pair.image, size), read_mask(folder / pair.mask, size)

    def _sound_pairs(self, min_images: int) -> tuple[dict[str, tuple[Pair, ...]], list[Fault]]:
        """The pairs that can be used, for each class that has enough of them, and the faults of all the others."""
        found: dict[str, list[Pair]] = {}
        faults: list[Fault] = []
        for task in (task for split in SPLITS for task in self._listed[split]):
            if (self.root / task).is_dir():
                found[task] = _pair_up(self.root, task, faults)
            else:
                faults.append(Fault("class without a folder", Path(task), "add it, or take it out of the splits"))

        sound: dict[str, list[Pair]] = {task: [] for task in found}
        candidates = [(task, pair) for task, pairs in found.items() for pair in pairs]
        findings = inspect_each(lambda candidate: _fault(self.root, self.image_size, *candidate), candidates)
        for (task, pair), fault in zip(candidates, findings, strict=True):
            if fault:
                faults.append(fault)
            else:
                sound[task].append(pair)

        for task, pairs in sound.items():
            if len(pairs) < min_images:
                cure = "add or mend images, take the class out of the splits, or lower dataset.min_images"
                few = f"{len(pairs)} sound of at least {min_images}"
                faults.append(Fault("class with too few images", Path(task), cure, few))
        return {task: tuple(pairs) for task, pairs in sound.items() if len(pairs) >= min_images}, faults


def read_image(path: Path, image_size: int) -> UInt8:
    """An image file as RGB, shape (image_size, image_size, 3); shrinking averages over the area, as it should."""
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR))


def read_mask(path: Path, image_size: int) -> UInt8:
    """A mask file as 0 and 1, shape (image_size, image_size), resized by nearest neighbour.

    The object is where the brightest colour channel exceeds half of the range that the file uses: 0 … 1, 0 … 255 or
    0 … 65535, told apart by the file's maximum. So {0, 1} files count from 1 and {0, 255} files from 128. A palette
    is looked up, transparency is ignored.
    """
    with Image.open(path) as file:
        return resize_mask(_binary(file), image_size)


def _binary(file: Image.Image) -> UInt8:
    values = np.asarray(file if file.mode in ("1", "L", "I", "I;16") else file.convert("RGBA"))
    if values.ndim == 3:
        values = np.maximum(np.maximum(values[..., 0], values[..., 1]), values[..., 2])
    most = values.max()
    full = 1 if most <= 1 else 255 if most <= 255 else 65535
    return (values > full // 2).astype(np.uint8)


def resize_mask(mask: UInt8, image_size: int) -> UInt8:
    """A mask or a map of class numbers, shape (height, width), as (image_size, image_size), by nearest neighbour."""
    if mask.shape == (image_size, image_size):
        return mask
    return np.asarray(Image.fromarray(mask).resize((image_size, image_size), Image.Resampling.NEAREST))


def _fault(root: Path, image_size: int, task: str, pair: Pair) -> Fault | None:
    image, mask = Path(task, pair.image), Path(task, pair.mask)
    at = image
    try:
        with Image.open(root / image) as file:
            file.load()  # a truncated file shows only when it is decoded
            width, height = file.size
        at = mask
        with Image.open(root / mask) as file:
            binary = _binary(file)
    except UNREADABLE as error:
        return Fault("unreadable file", at, "fetch or export it again, or remove the image and its mask", str(error))
    if binary.shape != (height, width):
        cure = "export the mask at its image's size (of a photo with an EXIF rotation: as the pixels are stored)"
        sizes = f"{binary.shape[1]}×{binary.shape[0]}, its image {width}×{height}"
        return Fault("mask of another size than its image", mask, cure, sizes)
    if not resize_mask(binary, image_size).any():
        cure = f"draw the object as 1 or 255 on 0, large enough to be seen at {image_size} pixels, or remove the pair"
        return Fault("mask without an object", mask, cure)
    return None


def _pair_up(root: Path, task: str, faults: list[Fault]) -> list[Pair]:
    """The class's pairs in natural order of their stems; what has no partner or no business there joins `faults`."""
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    for path in sorted((root / task).iterdir()):
        place, suffix = Path(task, path.name), path.suffix.lower()
        # ".": macOS archives bring along a `._1.jpg` that is no image.
        if suffix not in (*IMAGE_SUFFIXES, MASK_SUFFIX) or path.name.startswith(".") or not path.is_file():
            faults.append(Fault(STRAY, place, "nothing to do; it is ignored"))
            continue
        files = masks if suffix == MASK_SUFFIX else images
        if path.stem in files:
            cure = "give each a stem of its own, with its own partner"
            faults.append(Fault("second file of one stem", place, cure, f"{files[path.stem]} is used"))
            continue
        files[path.stem] = path.name

    for stem in sorted(images.keys() - masks.keys(), key=natural):
        cure = "add the mask as <stem>.png, or remove the image"
        faults.append(Fault("image without a mask", Path(task, images[stem]), cure))
    for stem in sorted(masks.keys() - images.keys(), key=natural):
        cure = "add the image as <stem>.jpg, or remove the mask"
        faults.append(Fault("mask without an image", Path(task, masks[stem]), cure))
    return [Pair(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys(), key=natural)]


def natural(stem: str) -> tuple[list[str | int], str]:
    """A sort key that puts 2 before 10; texts and numbers alternate, so that like is compared with like."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", stem)], stem


def read_splits(splits: str | os.PathLike[str] | Mapping[Split, Sequence[str]]) -> dict[Split, tuple[str, ...]]:
    """The class names of each split, in the order of a JSON file or a mapping.

    Raises:
        DataError: if it cannot be read, is not three lists of names, or has a name twice.
    """
    return _checked(splits if isinstance(splits, Mapping) else _read(Path(splits).expanduser()))


def check_known(names: Sequence[str], known: Sequence[str], where: str) -> None:
    """Refuse names of classes that a data set of fixed classes does not have.

    Raises:
        DataError: on the first one, with the name that is spelt most like it.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise DataError(f"{where} has no class {name!r}; did you mean {near}?")


def check_filled(
    listed: Mapping[Split, Sequence[str]], sound: Container[str], faults: Sequence[Fault], root: str | Path
) -> None:
    """Refuse a data set in which all classes of a split fell away; a split that lists none is empty by choice.

    Raises:
        DataError: with all faults.
    """
    for split, names in listed.items():
        if names and not any(task in sound for task in names):
            what = f"the {split} split has no sound class in {root}; mend these, or the splits:"
            raise DataError("\n".join([what, *fault_lines(faults)]))


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the splits file {path} cannot be read ({error.strerror}): {SPLITS_CURE}") from error
    except ValueError as error:
        raise DataError(f"the splits file {path} is not JSON ({error}): {SPLITS_CURE}") from error


def _checked(splits: object) -> dict[Split, tuple[str, ...]]:
    """The splits as listed, once it is sure that they are three lists of names and no name comes twice."""
    if not isinstance(splits, Mapping) or set(splits) != set(SPLITS):
        found = sorted(map(str, splits)) if isinstance(splits, Mapping) else type(splits).__name__
        raise DataError(f"splits must be exactly {', '.join(SPLITS)}, found {found}: {SPLITS_CURE}")
    for split in SPLITS:
        names = splits[split]
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise DataError(f"the {split} split is not a list of class names: {SPLITS_CURE}")
    listed = {split: tuple(splits[split]) for split in SPLITS}
    times = Counter(task for names in listed.values() for task in names)
    twice = sorted(task for task, n in times.items() if n > 1)
    if twice:
        raise DataError(f"listed more than once in the splits, keep each class in one place: {first(twice)}")
    return listed
