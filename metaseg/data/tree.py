"""What of a tree `root/<class>/<stem>.jpg` + `<stem>.png` can be used, and what is wrong with the rest.

Every file of the classes is opened and decoded once. Nothing that lies in the tree stops the look: it costs a pair of
files, a class, or nothing, and becomes a `Fault` with a cure.
"""

import difflib
import os
import re
import unicodedata
from collections.abc import Container, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from metaseg.data.faults import MOST_TOLD, Cost, Fault, first, inspect_each, stray
from metaseg.data.masks import binary, class_colours, half_of, is_photograph, levels_of, mask_values, resize_mask
from metaseg.data.opening import LINK_CURE, TREE_FORMATS, by_turns, fault_of, leads_nowhere, opened
from metaseg.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg")
MASK_SUFFIX = ".png"
OTHER_SUFFIXES = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2", ".jfif")

RIGHTS_CURE = "chmod u+rx it and the folders above it, or ask their owner to"
OTHER_FORMAT = "image of a format that is not read here"
FORMAT_CURE = "save the image as <stem>.jpg, its mask as <stem>.png"


class Pair(NamedTuple):
    """The file names of an image and its mask inside their class folder."""

    image: str
    mask: str


def sound_pairs(
    root: Path, tasks: Sequence[str], image_size: int, min_images: int
) -> tuple[dict[str, tuple[Pair, ...]], list[Fault]]:
    """Look a tree over.

    Args:
        root: the folder that holds one folder a class.
        tasks: the classes; of two that are one folder, or one name but for case, the first counts.
        image_size: height and width at which an object has to be seen.
        min_images: a class with fewer sound images is left out.

    Returns:
        the pairs of each class that is used, in natural order of their stems; and all faults.
    """
    faults: list[Fault] = []
    folders = _class_folders(root, tasks, faults)
    found = {task: _pair_up(root, Path(task), files, faults) for task, files in folders.items()}

    sound: dict[str, list[Pair]] = {task: [] for task in found}
    candidates = [(task, pair) for task, pairs in found.items() for pair in pairs]
    findings = inspect_each(lambda candidate: _fault(root, image_size, *candidate), candidates)
    for (task, pair), fault in zip(candidates, findings, strict=True):
        if fault:
            faults.append(fault)
        if not fault or fault.cost is Cost.DOUBT:
            sound[task].append(pair)

    for task, pairs in sound.items():
        if len(pairs) < min_images:
            cure = "add or mend images, take the class out of the splits, or lower dataset.min_images"
            few = f"{len(pairs)} sound of at least {min_images}"
            faults.append(Fault("class with too few images", Path(task), cure, few))
    return {task: tuple(pairs) for task, pairs in sound.items() if len(pairs) >= min_images}, faults


def check_folder(folder: Path, cure: str, key: str = "") -> None:
    """Refuse what is no folder, or may not be entered.

    Args:
        folder: the root of a data set.
        cure: of one that is none.
        key: that names it in the configuration, to tell several roots apart.

    Raises:
        DataError: saying what to do.
    """
    named = f"{key}: {folder}" if key else str(folder)
    try:
        os.stat(os.path.join(folder, "."))
    except PermissionError as error:
        raise DataError(f"{named} may not be read: {RIGHTS_CURE}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{named} is not a folder: {cure}") from error


def natural(stem: str) -> tuple[list[str | int], str]:
    """A sort key that puts 2 before 10; texts and numbers alternate, so that like is compared with like."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", stem)], stem


# ------------------------------------------------------------------------------------------------------------- folders


def _class_folders(root: Path, tasks: Sequence[str], faults: list[Fault]) -> dict[str, list[os.DirEntry[str]]]:
    """What lies in each class's folder, sorted by name; classes without one of their own join `faults`."""
    found: dict[str, list[os.DirEntry[str]]] = {}
    missing: list[str] = []
    places: dict[tuple[int, int], str] = {}
    spellings: dict[str, str] = {}
    for task in tasks:
        try:
            status = os.stat(root / task)
            with os.scandir(root / task) as entries:
                files = sorted(entries, key=attrgetter("name"))
        except PermissionError:
            faults.append(Fault("folder that may not be read", Path(task), RIGHTS_CURE))
        except (OSError, ValueError) as error:
            if leads_nowhere(error, root / task):
                faults.append(Fault("link that leads nowhere", Path(task), LINK_CURE))
            else:
                missing.append(task)
        else:
            same = places.setdefault((status.st_dev, status.st_ino), task)
            alike = spellings.setdefault(unicodedata.normalize("NFC", task).casefold(), task)
            if same != task:
                cure = "take one of the names out of the splits: training would meet what is kept for tests"
                faults.append(Fault("second name of one folder", Path(task), cure, f"of {same}"))
            elif alike != task:
                cure = "rename one of them, or put both into one folder"
                faults.append(Fault("second class of one name but for case", Path(task), cure, f"{alike} is used"))
            else:
                found[task] = files
    faults.extend(_without_folder(root, missing, tasks))
    return found


def _without_folder(root: Path, missing: Sequence[str], listed: Container[str]) -> list[Fault]:
    """The fault of each missing class; those that are told name the folder that may be meant."""
    cure = "add it, or take it out of the splits"
    unlisted: list[str] = []
    if missing:
        with suppress(OSError), os.scandir(root) as entries:
            unlisted = sorted(e.name for e in entries if e.name not in listed and e.is_dir())
    faults = []
    for number, task in enumerate(missing):
        near = _nearest(task, unlisted) if number < MOST_TOLD else None
        faults.append(Fault("class without a folder", Path(task), cure, f"did you mean {near}?" if near else ""))
    return faults


def _nearest(task: str, folders: Sequence[str]) -> str | None:
    """The folder that is named most like the class, if one is; best the one that differs by case alone."""
    alike = [name for name in folders if name.casefold() == task.casefold()]
    return next(iter(alike or difflib.get_close_matches(task, folders, n=1)), None)


# --------------------------------------------------------------------------------------------------------------- files


def _pair_up(root: Path, task: Path, files: Sequence[os.DirEntry[str]], faults: list[Fault]) -> list[Pair]:
    """The class's pairs in natural order of their stems; what has no partner or no business there joins `faults`."""
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    others: list[Path] = []
    for entry in files:
        place = task / entry.name
        suffix = place.suffix.lower()
        # ".": macOS archives bring along a `._1.jpg` that is no image.
        if entry.name.startswith(".") or not may_be_file(entry):
            faults.append(stray(place))
        elif suffix in (*IMAGE_SUFFIXES, MASK_SUFFIX):
            same_kind = masks if suffix == MASK_SUFFIX else images
            used = same_kind.setdefault(place.stem, entry.name)
            if used != entry.name:
                cure = "give each a stem of its own, with its own partner"
                faults.append(Fault("second file of one stem", place, cure, f"{used} is used"))
        elif suffix in OTHER_SUFFIXES:
            others.append(place)
        else:
            faults.append(stray(place))

    for place in others:  # which are missed where the stem has no pair without them
        paired = place.stem in images and place.stem in masks
        faults.append(stray(place) if paired else Fault(OTHER_FORMAT, place, FORMAT_CURE))
    known = {place.stem for place in others}
    for stem in sorted(images.keys() - masks.keys() - known, key=natural):
        cure = "add the mask as <stem>.png, or remove the image"
        faults.append(Fault("image without a mask", task / images[stem], cure))
    for stem in sorted(masks.keys() - images.keys() - known, key=natural):
        place = task / masks[stem]
        if _is_photograph_file(root / place):
            faults.append(Fault(OTHER_FORMAT, place, FORMAT_CURE))
        else:
            cure = "add the image as <stem>.jpg, or remove the mask"
            faults.append(Fault("mask without an image", place, cure))
    return [Pair(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys(), key=natural)]


def may_be_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link that leads nowhere, perhaps to one: opening it will tell.

    Pipes and devices are none: to open one might wait for ever.
    """
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # over a link to itself, or to where one may not look
        return True


def _is_photograph_file(path: Path) -> bool:
    with suppress(Exception), opened(path, TREE_FORMATS) as file:
        return is_photograph(levels_of(mask_values(file)))
    return False


def _fault(root: Path, image_size: int, task: str, pair: Pair) -> Fault | None:
    image, mask = Path(task, pair.image), Path(task, pair.mask)
    at = image
    try:
        with opened(root / image, TREE_FORMATS) as file, by_turns(file):
            file.load()  # a truncated file shows only when it is decoded
            width, height = file.size
            deep, rotation = file.mode.startswith("I"), _rotation(file)
        at = mask
        with opened(root / mask, TREE_FORMATS) as file, by_turns(file):
            drawn = file.size
            fault = _mask_fault(mask, mask_values(file), image_size)
    except Exception as error:
        return fault_of(error, root / at, at, "fetch or export it again, or remove the image and its mask")
    if deep:
        return Fault("image of more than 8 bits", image, "save it with 8 bits a channel")
    if drawn != (width, height):
        cure = "export the mask at its image's size (of a photo with an EXIF rotation: as the pixels are stored)"
        sizes = f"{drawn[0]}×{drawn[1]}, its image {width}×{height}"
        return Fault("mask of another size than its image", mask, cure, sizes)
    # a quarter turn of an oblong image would show in the mask's size; of other turns nobody knows what it was drawn on
    if not fault and (rotation in (2, 3, 4) or (rotation in (5, 6, 7, 8) and width == height)):
        cure = "save it upright, without the rotation, and its mask likewise"
        return Fault("image with an EXIF rotation, read as it is stored", image, cure, cost=Cost.DOUBT)
    return fault


def _rotation(file: Image.Image) -> int:
    """The EXIF orientation, 1 … 8; 1 if there is none that can be read."""
    try:
        return int(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data cost nothing
        return 1


def _mask_fault(mask: Path, values: NDArray[np.integer], image_size: int) -> Fault | None:
    levels, inside = levels_of(values), binary(values)
    if is_photograph(levels):
        return Fault("mask that is a photograph", mask, "swap it with its image, if they are swapped; or draw a mask")
    colours = class_colours(levels)
    if len(colours) > 1:
        cure = "make a class of each, with masks of 0 and 255"
        return Fault("mask of several classes", mask, cure, f"colours {first([*map(str, colours)], 3)}")
    if not resize_mask(inside, image_size).any():
        cure = f"draw the object as 1 or 255 on 0, large enough to be seen at {image_size} pixels, or remove the pair"
        return Fault("mask without an object", mask, cure)
    if inside.all():
        cure = "draw what is not the object as 0 (in the colours: transparency is ignored), or remove the pair"
        return Fault("mask without a background", mask, cure)
    if colours and max(colours[0]) <= half_of(levels):
        cure = "draw the object in white, and all that is not the object in black"
        return Fault("mask with an area too dark for an object, read as background", mask, cure, cost=Cost.DOUBT)
    return None
