"""First-order MAML (Finn, Abbeel, Levine 2017, arXiv 1703.03400), as a difference of weights.

The last inner step's move, φ_{K−1} − φ_K, is the inner learning rate × the gradient at φ_{K−1} (weight decay included).
The factor stays in, as in Reptile and in the original's code: otherwise meta-step sizes are not comparable.
"""

import numpy as np
from torch import Tensor, nn

from metaseg.adapt import Adapter
from metaseg.algos.base import Algorithm
from metaseg.data.source import TaskSource
from metaseg.episode import Batch, Episode
from metaseg.errors import ConfigError
from metaseg.update import Update


class Fomaml(Algorithm):
    """g = φ_{K−1} − φ_K, the last mini-batch drawn like the others, so overlapping them."""

    def meta_gradient(self, theta: nn.Module, episode: Episode, adapt: Adapter) -> Tensor:
        """φ_{K−1} − φ_K over all parameters, also those that ω holds still, so that ANIL is a choice of ω."""
        adapt.start(theta, episode.seed)
        for batch in episode.batches[:-1]:
            adapt.step(batch)
        before = adapt.vector().clone()
        adapt.step(episode.batches[-1], everything=True)
        return before - adapt.vector()


class FomamlStar(Fomaml):
    """FOMAML*: the last mini-batch is a disjoint tail of the shots, as it is, without augmentation.

    The paper's best: of 10 shots, K − 1 augmented mini-batches from a random five, then one of the other five.

    Args:
        shots: images of a training episode, more than `tail`.
        tail: images kept for the last step, ≥ 1.
    """

    def __init__(self, shots: int, tail: int) -> None:
        super().__init__(shots)
        if not isinstance(tail, int) or not 1 <= tail < shots:
            raise ConfigError(f"algo.method.tail={tail}: give 1 … {shots - 1}, fewer than algo.method.shots={shots}")
        self.tail = tail

    def minibatches(self, support: Batch, update: Update, rng: np.random.Generator) -> tuple[Batch, ...]:
        """K − 1 mini-batches of the head of the support, then its tail."""
        head, tail = support[: -self.tail], support[-self.tail :]
        return (*update.minibatches(head, rng)[:-1], tail)

    def check(self, source: TaskSource, update: Update) -> None:
        """As every algorithm; and the tail alone would be plain joint training on tails."""
        super().check(source, update)
        if update.steps < 2:
            raise ConfigError(f"algo.inner.steps={update.steps}: fomaml_star needs 2 or more, the last is the tail's")
