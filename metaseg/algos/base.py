"""What an algorithm is: where its episodes come from, and the pseudo-gradient that one of them gives for θ."""

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from metaseg.adapt import Adapter
from metaseg.data.episodes import check_counts, sample_episode
from metaseg.data.source import TaskSource, image_counts
from metaseg.episode import Batch, Episode
from metaseg.errors import ConfigError
from metaseg.seeding import derive_seed, generator
from metaseg.update import Update


class Algorithm(ABC):
    """Meta-learning of an initialisation θ. A new algorithm is a subclass with `meta_gradient`, and a YAML.

    Args:
        shots: images of a training episode, ≥ 1; all of them are support.
    """

    def __init__(self, shots: int) -> None:
        if not isinstance(shots, int) or shots < 1:
            raise ConfigError(f"algo.method.shots={shots}: give 1 or more, a whole number")
        self.shots = shots

    @abstractmethod
    def meta_gradient(self, theta: nn.Module, episode: Episode, adapt: Adapter) -> Tensor:
        """The pseudo-gradient g that the episode gives: the outer optimizer steps along −g.

        Args:
            theta: the initialisation; not changed.
            episode: drawn by `episode`, on θ's device.
            adapt: the inner loop under the training ω. Its φ's running statistics become a part of θ's.

        Returns:
            Shape (parameters of θ,), in the order of `engine.flat.flat`.
        """

    def episode(self, source: TaskSource, update: Update, seed: int, index: int) -> Episode:
        """Draw training episode `index` of a run: one random training task, with its mini-batches."""
        rng = generator(seed, "train", index)
        names = source.names("train")
        task = names[int(rng.integers(len(names)))]
        episode = sample_episode(source, task, self.shots, 0, derive_seed(seed, "train", index), rng)
        return replace(episode, batches=self.minibatches(episode.support, update, rng))

    def minibatches(self, support: Batch, update: Update, rng: np.random.Generator) -> tuple[Batch, ...]:
        """What the inner steps see."""
        return update.minibatches(support, rng)

    def check(self, source: TaskSource, update: Update) -> None:
        """Refuse a data set or a training ω that this algorithm can't work with.

        Raises:
            ConfigError: saying what to change.
        """
        names = source.names("train")
        if not names:
            raise ConfigError("the train split has no task to meta-train on; put classes into it, or use mode=test")
        check_counts(names, image_counts(source, "train"), self.shots, ["algo.method.shots"])
