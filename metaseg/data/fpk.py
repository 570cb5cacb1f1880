"""FP-k: five classes that FSS-1000 and PASCAL VOC share, with hundreds of images each, for many-shot learning curves.

From Hendryx, Leach, Hein, Morrison 2020 (arXiv 1912.06290). Each test task is the union of an FSS-1000 class, ten
images, and its PASCAL counterpart (VOC 2012 and SBD). All five classes are held out of meta-training, wherever
FSS-1000's own splits have them. Whether a photograph is in both data sets, under two names, is not checked.

The hold-out is by name, as in the paper, and near classes stay: meta-training has FSS-1000's monitor (PASCAL's
tvmonitor shows monitors, too), trolleybus, motor_scooter and flowerpot, and validation has school_bus.
"""

import os
from collections.abc import Sequence

import numpy as np

from metaseg.data.faults import Fault
from metaseg.data.folder import FolderSource
from metaseg.data.fss1000 import class_root, fss1000_splits
from metaseg.data.pascal import PascalSource
from metaseg.data.source import Split, UInt8
from metaseg.errors import DataError

FPK_CLASSES = {  # FSS-1000's names, which are the tasks', and PASCAL's
    "airliner": "aeroplane",
    "bus": "bus",
    "motorbike": "motorbike",
    "potted_plant": "pottedplant",
    "television": "tvmonitor",
}


class FpkSource:
    """FP-k as a `TaskSource`: test is its five tasks; train and val are FSS-1000's without these five classes.

    A test task's images are FSS-1000's, then PASCAL's.

    Args:
        fss_root: FSS-1000's folder of class folders, or one that holds it as `fewshot_data/`, or the archive.
        voc_root: PASCAL VOC's `VOC2012`, or a folder around it, or the archive.
        sbd_root: SBD's `dataset`, or a folder around it, or the archive; None does without: far fewer images a task.
        image_size: height and width that everything is resized to.
        min_share: share of a PASCAL image's pixels that the class must cover.
        min_images: a class of train or val with fewer sound images is left out.

    Raises:
        DataError: if a root cannot be used, or one of the five classes has no sound image in one of the data sets.
    """

    name, family = "fpk", "fss1000"  # whose names the tasks have

    def __init__(
        self,
        fss_root: str | os.PathLike[str],
        voc_root: str | os.PathLike[str],
        sbd_root: str | os.PathLike[str] | None,
        image_size: int = 224,
        min_share: float = 0.001,
        min_images: int = 10,
    ) -> None:
        self.image_size = image_size
        root, meta = class_root(fss_root, "fss_root"), fss1000_splits(exclude=list(FPK_CLASSES))
        fss_test: dict[Split, list[str]] = {"train": [], "val": [], "test": list(FPK_CLASSES)}
        pascal_test: dict[Split, list[str]] = {"train": [], "val": [], "test": list(FPK_CLASSES.values())}
        self._pascal = PascalSource(voc_root, sbd_root, pascal_test, image_size, min_share, min_images=1)
        self._fss = FolderSource(root, fss_test, image_size, min_images=1)
        self._meta = FolderSource(root, {**meta, "test": []}, image_size, min_images)
        missing = [
            *(f"{task} of FSS-1000" for task in FPK_CLASSES if task not in self._fss.names("test")),
            *(f"{task} of PASCAL" for task in FPK_CLASSES.values() if task not in self._pascal.names("test")),
        ]
        if missing:
            raise DataError(
                f"FP-k needs all of its five classes, but these have no sound image: {', '.join(missing)}. Unpack them "
                "again; for other classes use dataset=binary_pascal or dataset=fss1000"
            )

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What was left out of the three."""
        return self._meta.faults + self._fss.faults + self._pascal.faults

    def names(self, split: Split) -> Sequence[str]:
        """Names of the split's tasks, FSS-1000's, sorted."""
        return sorted(FPK_CLASSES) if split == "test" else self._meta.names(split)

    def count(self, task: str) -> int:
        """Number of images that the task has, of both data sets together."""
        if task not in FPK_CLASSES:
            return self._meta.count(task)
        return self._fss.count(task) + self._pascal.count(FPK_CLASSES[task])

    def load(self, task: str, which: Sequence[int]) -> tuple[UInt8, UInt8]:
        """Load the task's images number `which`; see `TaskSource.load`."""
        if task not in FPK_CLASSES:
            return self._meta.load(task, which)
        numbers, first = np.asarray(which, int), self._fss.count(task)
        size, of_fss = self.image_size, numbers < first
        images = np.empty((len(numbers), size, size, 3), np.uint8)
        masks = np.empty((len(numbers), size, size), np.uint8)
        images[of_fss], masks[of_fss] = self._fss.load(task, numbers[of_fss].tolist())
        pascal = FPK_CLASSES[task]
        images[~of_fss], masks[~of_fss] = self._pascal.load(pascal, (numbers[~of_fss] - first).tolist())
        return images, masks

    def report(self) -> str:
        """Images of each test task, then the reports of the parts."""
        counts = ", ".join(f"{task} {self.count(task)}" for task in self.names("test"))
        parts: dict[str, FolderSource | PascalSource] = {
            "FSS-1000 for train and val": self._meta,
            "FSS-1000 for test": self._fss,
            "PASCAL for test": self._pascal,
        }
        return "\n".join([f"test: {counts}", *(f"{what}: {part.report()}" for what, part in parts.items())])
