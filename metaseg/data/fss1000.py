"""FSS-1000: 1,000 classes of ten images each (Li, Wei, Chen, Tai, Tang 2020, arXiv 1907.12347).

The data are not part of this package and nothing is downloaded; the class splits are. Test is the authors' own list of
240; their other 760 are parted into 520 for meta-training and 240 for meta-validation.
"""

import os
from importlib.resources import files
from pathlib import Path

from metaseg.data.folder import FolderSource
from metaseg.data.source import SPLITS, Split
from metaseg.errors import DataError

NESTED = "fewshot_data"  # the public archive holds its folder of classes inside a folder of the same name
CURE = (
    "fetch FSS-1000 by way of its authors' page, https://github.com/HKUSTCV/FSS-1000, unpack it, and name the folder "
    f"with the 1,000 class folders, or a folder that has it as {NESTED}/ inside: dataset.root=/path/to/{NESTED}"
)


class Fss1000Source(FolderSource):
    """FSS-1000 as a `TaskSource`: `root/<class>/1.jpg … 10.jpg` with masks `1.png … 10.png`, in the shipped splits.

    Args:
        root: the folder of class folders, or one that holds it as `fewshot_data/`.
        image_size: height and width that everything is resized to; the files' own is 224.
        min_images: a class with fewer sound images is left out; five shots and five queries need all ten.
    """

    name = "fss1000"

    def __init__(self, root: str | os.PathLike[str], image_size: int = 224, min_images: int = 10) -> None:
        splits = fss1000_splits()
        super().__init__(_class_root(Path(root).expanduser(), splits), splits, image_size, min_images)


def fss1000_splits() -> dict[Split, list[str]]:
    """The shipped class names: 520 train, 240 val and 240 test, each sorted."""
    folder = files("metaseg") / "data" / "fss1000_splits"
    return {split: (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines() for split in SPLITS}


def _class_root(root: Path, splits: dict[Split, list[str]]) -> Path:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: {CURE}")
    for folder in (root, root / NESTED):
        if any((folder / task).is_dir() for names in splits.values() for task in names):
            return folder
    raise DataError(f"{root} holds no class folder of FSS-1000: {CURE}")
