"""The update procedure ω: everything that says how an initialisation is adapted to a support set."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from metaseg.data.augment import augment
from metaseg.episode import Batch, Episode
from metaseg.errors import ConfigError, DataError
from metaseg.losses import segmentation_loss
from metaseg.seeding import derive_seed, generator

BatchNormPolicy = Literal["running", "support", "batch"]
Part = Literal["all", "decoder", "head", "batchnorm"]


class Schedule(Protocol):
    """The learning rate's course over an adaptation."""

    def __call__(self, progress: float) -> float:
        """Factor on the learning rate at `progress` = step / steps, from 0 to just under 1."""


@dataclass(frozen=True)
class Constant:
    """No change."""

    def __call__(self, progress: float) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 down to `final`."""

    final: float = 0.0

    def __call__(self, progress: float) -> float:
        """The factor final + (1 − final) · (1 + cos π·progress) / 2."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Step:
    """Multiplied by `factor` each time that another `every` (a share of the adaptation) is over."""

    every: float = 0.5
    factor: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a share that never passes."""
        if not 0 < self.every <= 1:
            raise ConfigError(f"update.schedule.every={self.every}: give a share of the steps, above 0 and up to 1")

    def __call__(self, progress: float) -> float:
        """The factor factor^⌊progress / every⌋."""
        return float(self.factor ** math.floor(progress / self.every + 1e-9))


@dataclass(frozen=True)
class EarlyStopping:
    """Stop where a held-out share of the support is segmented best, then adapt afresh to all of it (*orig*).

    Attributes:
        share: of the support that is held out, in (0, 1).
        patience: inner steps without a higher IoU after which the search ends, ≥ 1.
        every: inner steps from one score to the next, ≥ 1; the original scores each.
        least: shots below which nothing is held out, ≥ 2.
        steps_below: inner steps with so few shots, ≥ 1, at most ω's; None takes all of ω's.
    """

    share: float = 0.2
    patience: int = 50
    every: int = 5
    least: int = 10
    steps_below: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        rules: dict[str, tuple[bool, str]] = {
            "share": (0 < self.share < 1, "a share of the support, above 0 and below 1"),
            "patience": (self.patience >= 1, "1 or more steps"),
            "every": (self.every >= 1, "1 or more steps"),
            "least": (self.least >= 2, "2 or more shots: one to adapt to, one to hold out"),
            "steps_below": (self.steps_below is None or self.steps_below >= 1, "1 or more steps, or null for all"),
        }
        _refuse("update.stopping", self, rules)


@dataclass(frozen=True)
class Update:
    """ω. What generalises to new tasks is the pair (θ, ω).

    Attributes:
        optimizer: makes a torch optimizer of parameter groups; a fresh one for each adaptation.
        lr: learning rate, > 0.
        steps: inner steps, ≥ 1; with `stopping`, at most.
        batch_size: images in a mini-batch; more than there are shots makes images repeat.
        schedule: the learning rate's course.
        weight_decay: L2 factor λ, for ½λ Σw² over weights and biases except batch norm's, as the optimizer takes it.
        l1: L1 factor λ, for λ Σ|w| over the same; part of the gradient, whatever the optimizer.
        loss: maps logits (n, 2, h, w) and masks (n, h, w) to the scalar that inner steps descend.
        dropout: rate in front of the head, in [0, 1).
        augment: the share of images that are augmented, in [0, 1].
        batchnorm: which statistics predict: `running`, the running averages, which the inner steps move on;
            `support`, re-estimated on the support set after the last step; `batch`, those of the query images, all
            predicted together (transductive). The inner steps themselves always use their mini-batch's.
        adapts: which parameters move: all, the decoder (with the head), the head, or batch norm's scales and offsets.
        stopping: how the number of steps is chosen for each support set; None takes all, and so does meta-training.
    """

    optimizer: Callable[..., Optimizer]
    lr: float
    steps: int
    batch_size: int = 8
    schedule: Schedule = Constant()
    weight_decay: float = 5e-4
    dropout: float = 0.5
    augment: float = 0.5
    batchnorm: BatchNormPolicy = "support"
    adapts: Part = "all"
    stopping: EarlyStopping | None = None
    l1: float = 0.0
    loss: Callable[[Tensor, Tensor], Tensor] = segmentation_loss

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        rules: dict[str, tuple[bool, str]] = {
            "optimizer": (callable(self.optimizer), "one with its _target_ and _partial_=true, as torch.optim.SGD"),
            "lr": (0 < self.lr < math.inf, "a number above 0"),
            "steps": (isinstance(self.steps, int) and self.steps >= 1, "1 or more, a whole number"),
            "batch_size": (isinstance(self.batch_size, int) and self.batch_size >= 1, "1 or more, a whole number"),
            "schedule": (callable(self.schedule), "one with its _target_, as metaseg.update.Constant"),
            "stopping": (
                isinstance(self.stopping, EarlyStopping | None),
                "null, or a rule with its _target_, metaseg.update.EarlyStopping",
            ),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "l1": (0 <= self.l1 < math.inf, "0 or more"),
            "loss": (callable(self.loss), "a loss with its _target_, as metaseg.losses.SegmentationLoss"),
            "dropout": (0 <= self.dropout < 1, "0 or more, below 1"),
            "augment": (0 <= self.augment <= 1, "a rate from 0 to 1"),
            "batchnorm": (self.batchnorm in get_args(BatchNormPolicy), f"one of {get_args(BatchNormPolicy)}"),
            "adapts": (self.adapts in get_args(Part), f"one of {get_args(Part)}"),
        }
        _refuse("update", self, rules)
        _refuse("update", self, {"schedule": (self._has_rates(), "one whose rates are finite and not below 0")})

    def _has_rates(self) -> bool:
        """Whether the learning rate can be one at each step; of many steps a thousand are asked."""
        asked = {*range(0, self.steps, max(1, self.steps // 1000)), self.steps - 1}
        try:
            return all(0 <= self.lr_at(step) < math.inf for step in asked)
        except OverflowError:
            return False

    def lr_at(self, step: int) -> float:
        """The learning rate of inner step number `step`, from 0."""
        return self.lr * self.schedule(step / self.steps)

    def prepare(self, episode: Episode, *key: int | str) -> Episode:
        """The episode with what the inner steps see, drawn by a generator of `key`.

        Under early stopping and with shots enough, `rehearsal` is the part of the support that is not held out,
        with its own mini-batches, and what is held out as its query.
        """
        batches = self.minibatches(episode.support, generator(*key, "batches"))
        shots, rehearsal = len(episode.support), None
        if self.stopping is not None and shots < self.stopping.least:
            batches = batches[: self.stopping.steps_below]
        elif self.stopping is not None:
            kept = shots - min(max(1, round(self.stopping.share * shots)), shots - 1)
            fit, held_out = episode.support[:kept], episode.support[kept:]
            seen = self.minibatches(fit, generator(*key, "rehearsal"))
            rehearsal = Episode(episode.task, derive_seed(*key, "rehearsal"), fit, held_out, seen)
        return replace(episode, batches=batches, rehearsal=rehearsal)

    def minibatches(self, support: Batch, rng: np.random.Generator) -> tuple[Batch, ...]:
        """Draw the mini-batches of one adaptation: `steps` of `batch_size`, shuffled and augmented.

        The support is shuffled, and shuffled again each time that it is used up; a batch may span two rounds.
        """
        if not len(support):
            raise DataError("an empty support set: give at least one image to adapt to")
        images, masks = support.numpy()
        order = _rounds(len(support), rng)
        drawn = []
        for _ in range(self.steps):
            which = [next(order) for _ in range(self.batch_size)]
            drawn.append(augment(images[which], masks[which], self.augment, rng))
        # in one piece of memory, which travels from a loader worker as one
        stacked = (np.stack(part) for part in zip(*drawn, strict=True))
        return tuple(Batch.from_numpy(*pair) for pair in zip(*stacked, strict=True))

    def make_optimizer(self, weights: Sequence[Tensor], norms: Sequence[Tensor], **options: Any) -> Optimizer:
        """A fresh optimizer of `weights`, with L2, and of batch norms' parameters, without.

        Which of them move is up to their gradients: without one they are held still.
        """
        groups = [
            {"params": list(weights), "weight_decay": self.weight_decay},
            {"params": list(norms), "weight_decay": 0.0},
        ]
        return self.optimizer([group for group in groups if group["params"]], lr=self.lr, **options)

    def select(self, net: nn.Module) -> list[nn.Parameter]:
        """The parameters that adapt."""
        if self.adapts == "all":
            return list(net.parameters())
        if self.adapts == "batchnorm":
            return batchnorm_parameters(net)
        parts = ["head"] if self.adapts == "head" else ["decoders", "head"]
        return [p for part in parts for p in net.get_submodule(part).parameters()]


def batchnorm_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Scales and offsets of all batch norms."""
    return [p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)]


def _refuse(node: str, values: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raise ConfigError for the first of the fields whose rule does not hold, with its cure."""
    for name, (holds, cure) in rules.items():
        if not holds:
            raise ConfigError(f"{node}.{name}={getattr(values, name)}: give {cure}")


def _rounds(n: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(n).tolist()
