"""FSS-1000: 1,000 classes of ten images each (Li, Wei, Chen, Tai, Tang 2020, arXiv 1907.12347).

The data are not part of this package and nothing is downloaded; the class splits are. Test is the authors' own list of
240; their other 760 are parted into 520 for meta-training and 240 for meta-validation.
"""

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from metaseg.data.folder import FolderSource, check_known
from metaseg.data.source import SPLITS, Split
from metaseg.data.tree import check_folder
from metaseg.errors import DataError

NESTED = "fewshot_data"  # the public archive holds its folder of classes inside a folder of the same name
CURE = (
    "fetch FSS-1000 by way of its authors' page, https://github.com/HKUSTCV/FSS-1000, unpack it, and name the folder "
    f"with the 1,000 class folders, or a folder that has it as {NESTED}/ inside: "
)


class Fss1000Source(FolderSource):
    """FSS-1000 as a `TaskSource`: `root/<class>/1.jpg … 10.jpg` with masks `1.png … 10.png`, in the shipped splits.

    Args:
        root: the folder of class folders, or one that holds it as `fewshot_data/`.
        image_size: height and width that everything is resized to; the files' own is 224.
        min_images: a class with fewer sound images is left out; five shots and five queries need all ten.
        exclude: names of classes that are left out of every split, to be held out of meta-training.

    Raises:
        DataError: if `exclude` names a class that FSS-1000 does not have, or the folder cannot be used.
    """

    name = family = "fss1000"

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int = 224,
        min_images: int = 10,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(class_root(root), fss1000_splits(exclude), image_size, min_images)


def fss1000_splits(exclude: Sequence[str] = ()) -> dict[Split, list[str]]:
    """The shipped class names, 520 train, 240 val and 240 test, each sorted, without those in `exclude`."""
    folder = files("metaseg") / "data" / "fss1000_splits"
    splits = {split: (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines() for split in SPLITS}
    if isinstance(exclude, str):
        raise DataError(f"exclude is {exclude!r}: give a list of class names, dataset.exclude=[{exclude}]")
    check_known(exclude, [task for names in splits.values() for task in names], "FSS-1000")
    return {split: [task for task in names if task not in exclude] for split, names in splits.items()}


def class_root(root: str | os.PathLike[str], key: str = "root") -> Path:
    """The folder of class folders: `root` itself, or its `fewshot_data/`; `key` is the root's name in the config.

    Raises:
        DataError: if there is none.
    """
    top, cure = Path(root).expanduser(), f"{CURE}dataset.{key}=/path/to/{NESTED}"
    check_folder(top, cure)
    tasks = [task for names in fss1000_splits().values() for task in names]
    for folder in (top, top / NESTED):
        if any(os.path.isdir(folder / task) for task in tasks):
            return folder
    raise DataError(f"{top} holds no class folder of FSS-1000: {cure}")
