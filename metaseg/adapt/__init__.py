"""The one inner loop: φ = U(θ, D_S; ω). Training, validation, test and prediction all adapt through it.

How a step is computed is an engine's affair (`metaseg.engine`); which steps are taken is written here alone.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor, nn

from metaseg.episode import Batch, Episode
from metaseg.metrics import counts, mean_iou, predicted
from metaseg.seeding import derive_seed
from metaseg.update import Update

T = TypeVar("T")


class Adapter(ABC):
    """Adapts a working copy φ of a network θ by an update procedure ω; θ is never changed.

    Args:
        net: a network of θ's architecture, on θ's device; copied.
        update: ω.

    Attributes:
        phi: φ, ours until the next `start`.
        losses: of the mini-batches since `start`, each before its step, without L2 and L1; scalars, on θ's device.
        on_score: told, under early stopping, each score of the rehearsal: its step and the held-out share's IoU.
    """

    on_score: Callable[[int, float], None] = staticmethod(lambda step, iou: None)

    def __init__(self, net: nn.Module, update: Update) -> None:
        self.update = update
        self.phi = copy.deepcopy(net)
        for module in self.phi.modules():
            if isinstance(module, nn.Dropout):
                module.p = update.dropout
        self.losses: list[Tensor] = []

    def __call__(self, theta: nn.Module, episode: Episode) -> nn.Module:
        """Adapt to an episode, step by step over its mini-batches, or as many as early stopping chooses; returns φ."""
        batches = self.batches(theta, episode)
        self.start(theta, episode.seed)
        for batch in batches:
            self.step(batch)
        return self.phi

    def batches(self, theta: nn.Module, episode: Episode) -> tuple[Batch, ...]:
        """The mini-batches to take: all; or, if there is a rehearsal, as many as served it best (φ is lost then)."""
        stopping, rehearsal = self.update.stopping, episode.rehearsal
        if stopping is None or rehearsal is None:
            return episode.batches
        best, best_iou, last = 0, -1.0, len(rehearsal.batches)
        self.start(theta, rehearsal.seed)
        for batch in rehearsal.batches:
            self.step(batch)
            if self.taken % stopping.every == 0 or self.taken == last:
                logits = self.predict(rehearsal.query.images, rehearsal.support)
                iou = mean_iou(counts(predicted(logits), rehearsal.query.masks))
                self.on_score(self.taken, iou)
                if iou > best_iou:
                    best, best_iou = self.taken, iou
                elif self.taken - best >= stopping.patience:
                    break
        return episode.batches[:best]

    def start(self, theta: nn.Module, seed: int) -> None:
        """φ ← θ, with a fresh optimizer; `seed` is for dropout."""
        self._reset(theta)
        self.losses, self.seed = [], seed

    @property
    def taken(self) -> int:
        """Inner steps since `start`."""
        return len(self.losses)

    def step(self, batch: Batch, *, everything: bool = False) -> None:
        """One inner step on a mini-batch; `everything` moves all parameters, also those that ω holds still."""
        seed = derive_seed(self.seed, "step", self.taken)
        self.losses.append(self._step(batch, self.update.lr_at(self.taken), seed, everything))

    def finite(self) -> Tensor:
        """Whether losses, parameters and statistics since `start` are all finite; a boolean scalar on θ's device.

        A tensor, so that a GPU is not waited for: another adapter's work may be queued behind this one's.
        """
        losses = [torch.stack(self.losses)] if self.losses else []
        return torch.stack([torch.isfinite(t).all() for t in (*losses, self.vector(), self.statistics())]).all()

    @abstractmethod
    def vector(self) -> Tensor:
        """φ's parameters in the order of `engine.flat.flat`, shape (n,); valid until the next step."""

    @abstractmethod
    def statistics(self) -> Tensor:
        """φ's running batch-norm statistics in the order of `engine.flat.flat_statistics`; valid likewise."""

    @torch.no_grad()
    def predict(self, images: Tensor, support: Batch) -> Tensor:
        """Logits (n, 2, h, w), float, of images (n, 3, h, w), with ω's batch-norm policy.

        The network's running statistics are as they were afterwards.
        """
        with self.computing(), _statistics(self.phi, self.update, support):
            logits: Tensor = self.phi(images)
            return logits

    @torch.no_grad()
    def network(self, support: Batch) -> nn.Module:
        """A copy of φ in eval mode, ω's batch-norm statistics in its buffers: its plain forward is `predict`.

        Under `batch`, whose statistics are those of images yet to come, its buffers are the running ones.
        """
        with self.computing(), _statistics(self.phi, self.update, support):
            return copy.deepcopy(self.phi).eval()

    def queue(self) -> AbstractContextManager[None]:
        """Inside it, work is queued in order, but beside that of other adapters if the device can do so."""
        return nullcontext()

    def join(self) -> None:  # noqa: B027  # nothing to wait for, where nothing is queued
        """Have what is queued from now on wait for what was queued inside `queue`."""

    def computing(self) -> AbstractContextManager[None]:
        """The precision of forward passes."""
        return nullcontext()

    @abstractmethod
    def _reset(self, theta: nn.Module) -> None:
        """φ ← θ, parameters and running statistics; the optimizer as new."""

    @abstractmethod
    def _step(self, batch: Batch, lr: float, seed: int, everything: bool) -> Tensor:
        """One optimizer step at learning rate `lr`, random numbers from `seed`; returns the loss before it."""


class Lanes:
    """A few adapters, whose work runs side by side where the device can do that.

    Args:
        adapters: of one ω, at least one.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = adapters

    def __len__(self) -> int:
        return len(self.adapters)

    def map(self, function: Callable[[Adapter, Episode], T], episodes: Sequence[Episode]) -> list[T]:
        """`function` of each episode and one of the adapters; its results must not be parts of the adapter."""
        results = []
        try:
            for adapter, episode in zip(cycle(self.adapters), episodes, strict=False):
                with adapter.queue():
                    results.append(function(adapter, episode))
        finally:
            for adapter in self.adapters:
                adapter.join()
        return results


Engine = Callable[[nn.Module, Update], Lanes]  # makes the lanes that adapt copies of a network by ω


@contextmanager
def _statistics(net: nn.Module, update: Update, support: Batch) -> Iterator[None]:
    """Put the batch-norm statistics that `update.batchnorm` asks for in force inside the block."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net.eval()
    if update.batchnorm == "running":
        yield
        return
    saved = [(m.momentum, [buffer.clone() for buffer in m.buffers()]) for m in norms]
    for norm in norms:
        norm.train()
    try:
        if update.batchnorm == "support":
            parts = support.images.tensor_split(math.ceil(len(support) / update.batch_size))
            for i, images in enumerate(parts):
                for norm in norms:
                    norm.momentum = 1 / (i + 1)  # a plain average over the parts
                net(images)
            net.eval()
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        net.eval()
