"""Any folder of images with masks, one class a folder, as a data set: `root/<class>/<stem>.jpg` + `<stem>.png`.

Every file of the splits is decoded once at construction, in threads (FSS-1000: some 10 s on two cores), because a
run should meet a broken file before its first step and not in its third hour. What is unsound is left out, with one
warning that lists it and says what to do; the rest is used. `tree.py` says what is sound.
"""

import difflib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from metaseg.data.archive import unpacked
from metaseg.data.faults import Fault, fault_lines, first, warn_of
from metaseg.data.masks import binary, mask_values, resize_mask
from metaseg.data.opening import TREE_FORMATS, opened
from metaseg.data.source import SPLITS, Split, UInt8
from metaseg.data.tree import Pair, check_folder, sound_pairs
from metaseg.errors import DataError, printable

SPLITS_CURE = 'write a JSON file {"train": [...], "val": [...], "test": [...]} of class names: dataset.splits=FILE'


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
    rotation is not applied. Where it leaves open on what the mask was drawn, the image is used, and named.

    Raises:
        DataError: if the root or the splits cannot be used, or no class of a split can.
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
        check_folder(self.root, "dataset.root names the one that holds a folder per class")
        self._listed = read_splits(splits)
        tasks = [task for split in SPLITS for task in self._listed[split]]
        self._pairs, faults = sound_pairs(self.root, tasks, image_size, min_images)
        self.faults = tuple(faults)
        check_filled(self._listed, self._pairs, self.faults, self.root)
        warn_of(self.faults, str(self.root))

    def report(self) -> str:
        """Classes and images of each split, then each kind of fault with its count, first places and cure."""
        lines = [printable(str(self.root))]
        for split in SPLITS:
            names = self.names(split)
            images = sum(self.count(task) for task in names)
            lines.append(f"{split}: {len(names)} of {len(self._listed[split])} classes, {images} images")
        return "\n".join(lines + fault_lines(self.faults))

    def _read(self, task: str, pair: Pair) -> tuple[UInt8, UInt8]:
        folder, size = self.root / task, self.image_size
        return read_image(folder / pair.image, size), read_mask(folder / pair.mask, size)


def read_image(path: Path, image_size: int) -> UInt8:
    """An image file as RGB, shape (image_size, image_size, 3); shrinking averages over the area, as it should."""
    with opened(path, TREE_FORMATS) as file:
        return np.asarray(file.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR))


def read_mask(path: Path, image_size: int) -> UInt8:
    """A mask file as 0 and 1, shape (image_size, image_size), resized by nearest neighbour.

    The object is where the brightest colour channel exceeds half of the file's greatest value (`masks.half_of`): in
    {0, 1} files from 1 on, in {0, 255} files from 128. A palette is looked up, transparency is ignored.
    """
    with opened(path, TREE_FORMATS) as file:
        return resize_mask(binary(mask_values(file)), image_size)


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
        return json.loads(path.read_text(encoding="utf-8-sig"))  # some editors of Windows begin with a mark
    except OSError as error:
        raise DataError(f"the splits file {path} cannot be read ({error.strerror}): {SPLITS_CURE}") from error
    except (ValueError, RecursionError) as error:
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
    outside = [repr(task) for names in listed.values() for task in names if not _is_inside(task)]
    if outside:
        raise DataError(f"the splits name no folders inside the root, give its class folders' names: {first(outside)}")
    times = Counter(task for names in listed.values() for task in names)
    twice = sorted(task for task, n in times.items() if n > 1)
    if twice:
        raise DataError(f"listed more than once in the splits, keep each class in one place: {first(twice)}")
    return listed


def _is_inside(name: str) -> bool:
    """Whether a class's name leads to a folder below the one that it is joined to."""
    path = PurePath(name)
    return bool(path.parts) and not path.anchor and ".." not in path.parts and "\0" not in name
