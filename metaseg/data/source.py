"""What a data set is to metaseg: named tasks in three splits, each a stack of images with binary masks."""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

UInt8 = NDArray[np.uint8]


class TaskSource(Protocol):
    """A data set. A new one is a class with these members and a YAML in `conf/dataset/` that names it.

    Implementations are picklable (loader workers get a copy) and stateless: the same call gives the same bytes.
    """

    name: str
    """Of the data set, for reports."""
    family: str
    """Data sets of one family have the same class under the same name; names of two families are not compared."""
    image_size: int
    """Height and width, in pixels, of everything that `load` returns."""

    def names(self, split: Split) -> Sequence[str]:
        """Names of the split's tasks, sorted; no name is in two splits."""

    def count(self, task: str) -> int:
        """Number of images that the task has."""

    def load(self, task: str, which: Sequence[int]) -> tuple[UInt8, UInt8]:
        """Load the task's images number `which`, each in 0 … count − 1.

        Returns:
            images, RGB, shape (len(which), image_size, image_size, 3), 0 … 255; and masks, shape (len(which),
            image_size, image_size), 1 on the object and 0 elsewhere.
        """


@runtime_checkable
class ManyTasks(Protocol):
    """What a `TaskSource` of so many tasks has, too, that asking for them one by one would take seconds."""

    def counts(self, split: Split) -> NDArray[np.int64]:
        """`count` of all of the split's tasks, in the order of their names."""


def image_counts(source: TaskSource, split: Split) -> NDArray[np.int64]:
    """`count` of all of the split's tasks, in the order of their names; a source of very many has them at hand."""
    if isinstance(source, ManyTasks):
        return source.counts(split)
    return np.array([source.count(task) for task in source.names(split)], np.int64)


def task_ids(source: TaskSource, split: Split) -> list[str]:
    """The split's tasks as family/name: two data sets that share one share a class."""
    return [f"{source.family}/{task}" for task in source.names(split)]


def splits_sha256(source: TaskSource) -> str:
    """SHA-256 (hex) of which task is in which split: two reports with one hash speak of the same tasks."""
    splits = {split: sorted(source.names(split)) for split in SPLITS}
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
