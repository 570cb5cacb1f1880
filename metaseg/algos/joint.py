"""Joint training: the conventional baseline, on mixed batches of all training classes, before fine-tuning.

With one class-agnostic object channel. The paper's variant, one softmax over all classes, needs class-indexed masks.
"""

import numpy as np
from torch.optim import SGD

from metaseg.algos.reptile import Reptile
from metaseg.data.augment import augment
from metaseg.data.source import TaskSource
from metaseg.episode import Batch, Episode
from metaseg.errors import ConfigError
from metaseg.seeding import derive_seed, generator
from metaseg.update import Update


class Joint(Reptile):
    """g = the gradient of a mixed batch: each image is one of a random class; ω's batch size says how many.

    One inner step of plain SGD at learning rate 1 moves φ by exactly that gradient, L2 included, so θ − φ_1 is it.
    """

    def __init__(self) -> None:
        super().__init__(shots=1)

    def episode(self, source: TaskSource, update: Update, seed: int, index: int) -> Episode:
        """Draw mixed batch `index` of a run."""
        rng = generator(seed, "train", index)
        names = source.names("train")
        chosen = rng.choice(len(names), update.batch_size, replace=update.batch_size > len(names))
        drawn = [source.load(names[i], [int(rng.integers(source.count(names[i])))]) for i in chosen]
        images, masks = (np.concatenate(part) for part in zip(*drawn, strict=True))
        batch = Batch.from_numpy(*augment(images, masks, update.augment, rng))
        return Episode("mixed", derive_seed(seed, "train", index), support=batch, query=batch[:0], batches=(batch,))

    def check(self, source: TaskSource, update: Update) -> None:
        """As every algorithm; and θ − φ must be the gradient."""
        super().check(source, update)
        optimizer = update.optimizer
        if update.steps != 1 or update.lr != 1 or getattr(optimizer, "func", optimizer) is not SGD:
            raise ConfigError(
                "algo=joint takes one inner step of plain SGD at lr 1: leave algo.inner.steps=1, algo.inner.lr=1 and "
                "algo.inner.optimizer as they are; the training's learning rate is algo.outer.lr"
            )
