"""PASCAL VOC 2012 and its extension SBD as binary tasks, one for each of the 20 classes (`binary_pascal`).

VOC: Everingham, Van Gool, Williams, Winn, Zisserman 2010, 2,913 images with masks. SBD: Hariharan, Arbeláez, Bourdev,
Maji, Malik 2011, 11,355 images of VOC 2011 with masks. They overlap: an image of both is used once, with VOC's mask.
Neither is part of this package, and nothing is downloaded. The lists of images that both publish (train, val) play no
part: here a split is a set of classes, and every image that has a mask serves.
"""

import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from metaseg.data.archive import unpacked
from metaseg.data.faults import Fault, fault_lines, inspect_each, warn_of
from metaseg.data.folder import FileSource, check_filled, check_known, read_image, read_splits
from metaseg.data.masks import resize_mask
from metaseg.data.opening import TREE_FORMATS, by_turns, fault_of, opened
from metaseg.data.source import SPLITS, Split, UInt8
from metaseg.data.tree import RIGHTS_CURE, check_folder, may_be_file
from metaseg.errors import DataError, printable

PASCAL_CLASSES = (  # class c of a mask is PASCAL_CLASSES[c - 1]; 0 is the background
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
MI_UINT8, MI_MATRIX, MI_COMPRESSED = 2, 14, 15  # types of a MATLAB file's elements
MX_UINT8, MX_CLASS, MX_LOGICAL = 9, 0xFF, 0x200  # of a matrix's flags: a class, the bits of it, and that of booleans
MOST_BYTES = 2**24  # of a MATLAB file, and of what it becomes; SBD's have less than one million
VOID = 255  # VOC's outlines and doubtful spots; SBD has none

VOC_CURE = (
    "unpack VOCtrainval_11-May-2012.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and give its "
    "VOCdevkit/VOC2012: dataset.voc_root=/path/to/VOCdevkit/VOC2012"
)
SBD_CURE = (
    "unpack benchmark.tgz of the Semantic Boundaries Dataset (Berkeley) and give its dataset folder: "
    "dataset.sbd_root=/path/to/benchmark_RELEASE/dataset; or dataset.sbd_root=null to do without"
)


class Pair(NamedTuple):
    """The paths of an image and of its map of class numbers."""

    image: Path
    labels: Path


class _Finding(NamedTuple):
    """What an image shows."""

    all: frozenset[str]
    """The classes that at least one pixel has."""
    large: frozenset[str]
    """Those that are large enough to be a task's object."""


class PascalSource(FileSource):
    """The PASCAL classes as a `TaskSource`: a task's images show its class, and its masks are that class's pixels.

    VOC's void pixels (255: outlines, doubtful spots) count as background, as do all other classes.

    An image that shows classes of several splits serves only the last of them (test before val before train), for
    whatever it shows of that split: no image that training saw comes back in a test, and no training image has a
    held-out object in its background. Within a split, an image belongs to every task that it shows. A task's images are
    in the order of VOC's names (2007_000032 first).

    Args:
        voc_root: `VOC2012`, which holds `JPEGImages/*.jpg` and `SegmentationClass/*.png`; or a folder around it,
            or the archive (see `archive.unpacked`).
        sbd_root: SBD's `dataset`, which holds `img/*.jpg` and `cls/*.mat`; or a folder around it, or the archive; None:
            VOC alone.
        splits: a JSON file `{"train": [...], "val": [...], "test": [...]}` of PASCAL classes, or such a mapping.
        image_size: height and width that everything is resized to, whatever its proportions were.
        min_share: share of an image's pixels that a class must cover for the image to be in its task. 0.001 is 50
            pixels at 224², three cells of the features at stride 4 that the network sharpens its masks with; in
            anything smaller, IoU measures the resizing. It is no higher, since FP-k's curves need 420 images a task.
        min_images: a class with fewer images is left out.

    Every file is decoded once at construction, as `FolderSource` does it. What is unsound is left out with one
    warning that lists it.

    Raises:
        DataError: if a root, the splits or all images of a split's classes are unusable.
    """

    name = family = "binary_pascal"

    def __init__(
        self,
        voc_root: str | os.PathLike[str],
        sbd_root: str | os.PathLike[str] | None,
        splits: str | os.PathLike[str] | Mapping[Split, Sequence[str]],
        image_size: int = 224,
        min_share: float = 0.001,
        min_images: int = 10,
    ) -> None:
        if not 0 <= min_share < 1:
            raise DataError(f"min_share is {min_share}: give a share of the pixels from 0 to below 1, such as 0.001")
        self.image_size, self.min_share = image_size, min_share
        self._listed = read_splits(splits)
        check_known([task for names in self._listed.values() for task in names], PASCAL_CLASSES, "PASCAL VOC")
        voc = _folder("voc_root", voc_root, ("JPEGImages", "SegmentationClass"), ("VOC2012", "VOCdevkit"), VOC_CURE)
        sbd = None
        if sbd_root is not None:
            sbd = _folder("sbd_root", sbd_root, ("img", "cls"), ("dataset", "benchmark_RELEASE"), SBD_CURE)
        self._where = " and ".join(str(root) for root in (voc, sbd) if root)
        self._pairs, self.faults, self._left_out = self._sound_pairs(voc, sbd, min_images)
        check_filled(self._listed, self._pairs, self.faults, self._where)
        warn_of(self.faults, self._where)

    def report(self) -> str:
        """Images of each class, how many the rules left out, then each kind of fault with its places and its cure."""
        lines = [printable(self._where)]
        for split in SPLITS:
            names = self.names(split)
            counts = [f"{task} {self.count(task)}" for task in names]
            lines.append(", ".join([f"{split}: {len(names)} of {len(self._listed[split])} classes", *counts]))
        return "\n".join([*lines, self._left_out, *fault_lines(self.faults)])

    def _read(self, task: str, pair: Pair) -> tuple[UInt8, UInt8]:
        is_task = resize_mask(read_labels(pair.labels), self.image_size) == PASCAL_CLASSES.index(task) + 1
        return read_image(pair.image, self.image_size), is_task.astype(np.uint8)

    def _sound_pairs(
        self, voc: Path, sbd: Path | None, min_images: int
    ) -> tuple[dict[str, tuple[Pair, ...]], tuple[Fault, ...], str]:
        """The pairs of each class that has enough of them, all faults, and how many images the rules left out."""
        faults: list[Fault] = []
        by_stem = _pair_up(sbd / "img", sbd / "cls", ".mat", faults) if sbd else {}
        by_stem |= _pair_up(voc / "JPEGImages", voc / "SegmentationClass", ".png", faults)
        pairs = [by_stem[stem] for stem in sorted(by_stem)]

        later: Counter[str] = Counter()
        small: Counter[str] = Counter()
        sound: dict[str, list[Pair]] = {task: [] for names in self._listed.values() for task in names}
        for pair, finding in zip(pairs, inspect_each(self._look, pairs), strict=True):
            if isinstance(finding, Fault):
                faults.append(finding)
                continue
            served = [names for names in self._listed.values() if not finding.all.isdisjoint(names)]
            for task in finding.all & sound.keys():
                if task not in served[-1]:
                    later[task] += 1
                elif task not in finding.large:
                    small[task] += 1
                else:
                    sound[task].append(pair)

        for task, found in sound.items():
            if len(found) < min_images:
                cure = "add sbd_root, take the class out of the splits, or lower min_share or min_images"
                few = f"{len(found)} of at least {min_images}, {small[task]} too small, {later[task]} of a later split"
                faults.append(Fault("class with too few images", Path(task), cure, few))
        left_out = (
            f"of their images, {small.total()} show too little of the class, {later.total()} are of a later split"
        )
        enough = {task: tuple(found) for task, found in sound.items() if len(found) >= min_images}
        return enough, tuple(faults), left_out

    def _look(self, pair: Pair) -> _Finding | Fault:
        at = pair.image
        try:
            with opened(pair.image, TREE_FORMATS) as file, by_turns(file):
                file.load()  # a truncated file shows only when it is decoded
                width, height = file.size
            at = pair.labels
            labels = read_labels(pair.labels)
        except Exception as error:  # Pillow's are of all kinds
            return fault_of(error, at, at, "unpack it again from the archive it came in")
        if labels.shape != (height, width):
            sizes = f"{labels.shape[1]}×{labels.shape[0]}, its image {width}×{height}"
            return Fault("mask of another size than its image", at, "unpack both again from their archive", sizes)
        counts = np.array(Image.fromarray(labels).histogram())  # NumPy's would take eight times the memory
        strange = np.flatnonzero(counts[len(PASCAL_CLASSES) + 1 : VOID])
        if strange.size:
            cure = "use the published masks, whose pixels are 0 … 20, or 255 for void"
            value = f"value {strange[0] + len(PASCAL_CLASSES) + 1}"
            return Fault("mask with values that are no class", at, cure, value)
        stays = np.bincount(resize_mask(labels, self.image_size).ravel(), minlength=256) > 0
        large = stays & (counts > 0) & (counts >= self.min_share * labels.size)
        return _Finding(_named(counts > 0), _named(large))


def read_labels(path: Path) -> UInt8:
    """A map of class numbers, shape (height, width): VOC's PNG, whose palette indices they are, or SBD's MATLAB file.

    Raises:
        Exception: of all kinds, if the file is damaged or holds something else.
    """
    if path.suffix == ".png":
        with opened(path, ["PNG"]) as file:
            if file.mode not in ("P", "L"):
                raise ValueError(f"an image of mode {file.mode} instead of a palette of class numbers")
            return np.asarray(file)
    try:
        with path.open("rb") as file:
            return _segmentation(file.read(MOST_BYTES + 1))
    except Exception as error:  # over a damaged file, of many kinds
        raise ValueError(f"no GTcls.Segmentation can be read ({type(error).__name__}: {error})") from error


def _segmentation(content: bytes) -> UInt8:
    """`GTcls.Segmentation` of a MATLAB file (version 5, of a PC), and nothing else of it.

    SciPy's reader makes room for whatever a few bytes claim, a struct of 2**31 elements, or compressed zeros.
    """
    if content[126:128] != b"IM" or len(content) > MOST_BYTES:
        raise ValueError(f"it is no MATLAB file of version 5, or more than {MOST_BYTES >> 20} MiB")
    for kind, part in _elements(content[128:]):
        if kind == MI_COMPRESSED:
            inflating = zlib.decompressobj()
            inflated = inflating.decompress(part, MOST_BYTES)
            if inflating.unconsumed_tail:  # not `eof`: MATLAB leaves some without an end
                raise ValueError(f"it becomes more than {MOST_BYTES >> 20} MiB")
            kind, part = next(_elements(inflated))
        if kind != MI_MATRIX:
            continue
        elements = _elements(part)
        _flags, _shape, (_, name) = islice(elements, 3)
        if name == b"GTcls":
            (_, width), (_, names) = islice(elements, 2)  # of the fields
            places = range(0, len(names), int.from_bytes(width, "little"))
            for at, (_, field) in zip(places, elements, strict=False):
                if names[at : at + places.step].partition(b"\0")[0] == b"Segmentation":
                    return _uint8_matrix(field)
    raise ValueError("there is none")


def _uint8_matrix(part: bytes) -> UInt8:
    (_, flags), (_, shape), _, (kind, values) = _elements(part)
    if struct.unpack_from("<I", flags)[0] & (MX_CLASS | MX_LOGICAL) != MX_UINT8 or kind != MI_UINT8 or len(shape) != 8:
        raise ValueError("it is no matrix of uint8")
    return np.frombuffer(values, np.uint8).reshape(struct.unpack("<2i", shape), order="F")


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements of a MATLAB file, or of a matrix in it: of what type each is, and what it holds."""
    at = 0
    while at < len(content):
        kind, length = struct.unpack_from("<II", content, at)
        if kind >> 16:  # up to four bytes, in place of the length
            yield kind & 0xFFFF, content[at + 4 : at + 4 + (kind >> 16)]
            at += 8
            continue
        at += 8
        if at + length > len(content):
            raise ValueError("it is cut off")
        yield kind, content[at : at + length]
        at += length if kind == MI_COMPRESSED else length + -length % 8


def _named(which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> frozenset[str]:
    """The classes that are marked in an array of 256."""
    return frozenset(name for name, marked in zip(PASCAL_CLASSES, which[1:], strict=False) if marked)


def _folder(key: str, root: str | os.PathLike[str], parts: Sequence[str], inner: Sequence[str], cure: str) -> Path:
    """The folder that holds all `parts`: the root itself, or one that archives put inside it."""
    top = unpacked(root)
    check_folder(top, cure, key)
    last, around = inner
    for folder in (top, top / last, top / around / last):
        if all(os.path.isdir(folder / part) for part in parts):
            return folder
    raise DataError(f"{key}: {top} does not hold {' and '.join(parts)}: {cure}")


def _pair_up(images: Path, labels: Path, suffix: str, faults: list[Fault]) -> dict[str, Pair]:
    """Each mask with its image, by stem; most of VOC's images have no mask, which is no fault."""
    try:
        with os.scandir(labels) as entries:
            masks = sorted(Path(entry) for entry in entries if entry.name.endswith(suffix) and may_be_file(entry))
    except PermissionError as error:
        raise DataError(f"{labels} may not be read: {RIGHTS_CURE}") from error
    check_folder(images, "unpack it again from the archive it came in")
    pairs = {}
    for path in masks:
        image = images / f"{path.stem}.jpg"
        if path.name.startswith("."):  # macOS archives bring along a `._2007_000032.png` that is no mask
            continue
        if os.path.isfile(image):
            pairs[path.stem] = Pair(image, path)
        else:
            faults.append(Fault("mask without an image", path, f"unpack {images.name}/{image.name} again"))
    return pairs
