"""The one inner loop: φ = U(θ, D_S; ω). Training, validation, test and prediction all adapt through it."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from metaseg.episode import Batch, Episode
from metaseg.losses import segmentation_loss
from metaseg.seeding import derive_seed, torch_seed
from metaseg.update import Update


class Adapter:
    """Adapts a working copy φ of a network θ by an update procedure ω; θ is never changed.

    Args:
        net: a network of θ's architecture; copied.
        update: ω.
    """

    def __init__(self, net: nn.Module, update: Update) -> None:
        self.update = update
        self.phi = copy.deepcopy(net)
        self.last_loss = torch.tensor(float("nan"))

    def __call__(self, theta: nn.Module, episode: Episode) -> nn.Module:
        """Adapt to an episode, step by step over `episode.batches`; returns φ, ours until the next call."""
        self.start(theta, episode.seed)
        for batch in episode.batches:
            self.step(batch)
        return self.phi

    def start(self, theta: nn.Module, seed: int) -> None:
        """φ ← θ, with a fresh optimizer; `seed` is for dropout."""
        self.phi.to(next(theta.parameters()).device)
        with torch.no_grad():
            for ours, theirs in zip(_tensors(self.phi), _tensors(theta), strict=True):
                ours.copy_(theirs)
        self.phi.requires_grad_(False)
        for parameter in self.update.select(self.phi):
            parameter.requires_grad_(True)
        for module in self.phi.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.update.dropout
        self.optimizer = self.update.make_optimizer(self.phi)
        self.taken, self.seed = 0, seed

    def step(self, batch: Batch) -> None:
        """One inner step on a mini-batch; `last_loss` is then the loss before it, without L2."""
        factor = self.update.schedule(self.taken / self.update.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.update.lr * factor
        self.phi.train()
        with torch.enable_grad(), torch_seed(derive_seed(self.seed, "step", self.taken)):
            loss = segmentation_loss(self.phi(batch.images), batch.masks)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.taken += 1
        self.last_loss = loss.detach()


@torch.no_grad()
def predict(net: nn.Module, images: Tensor, update: Update, support: Batch) -> Tensor:
    """Logits (n, 2, h, w) of images (n, 3, h, w), with ω's batch-norm policy.

    The network's running statistics are as they were afterwards.
    """
    with _statistics(net, update, support):
        logits: Tensor = net(images)
    return logits


@contextmanager
def _statistics(net: nn.Module, update: Update, support: Batch) -> Iterator[None]:
    """Put the batch-norm statistics that `update.batchnorm` asks for in force inside the block."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net.eval()
    if update.batchnorm == "running":
        yield
        return
    saved = [(m.momentum, copy.deepcopy(list(m.buffers()))) for m in norms]
    for norm in norms:
        norm.train()
        if update.batchnorm == "support":
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the forward passes that follow
    try:
        if update.batchnorm == "support":
            for images in support.images.tensor_split(math.ceil(len(support) / update.batch_size)):
                net(images)
            net.eval()
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        net.eval()


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from net.buffers()
