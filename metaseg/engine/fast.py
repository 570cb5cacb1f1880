"""The fast engine: the plain loop's numbers from flat storage, channels_last and exact shortcuts."""

from collections.abc import Iterator
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from metaseg.adapt import Adapter
from metaseg.engine.flat import flat, flat_statistics, in_memory_order, ordered_parameters
from metaseg.episode import Batch
from metaseg.errors import ConfigError
from metaseg.seeding import torch_seed
from metaseg.update import Update, batchnorm_parameters

OPTIMIZERS: tuple[type[Optimizer], ...] = (SGD, Adam, AdamW)  # treat each element alone, and begin from zeros


class Run(NamedTuple):
    """Neighbours in the vector that move together, with their stretch of φ and of the gradient."""

    parameters: list[nn.Parameter]
    values: Tensor
    gradient: Tensor
    moves: bool
    norm: bool


class Fast(Adapter):
    """One task at a time on the device that θ is on: the CPU's engine, and the step that `cuda.Graphs` captures.

    φ, its gradient and its running statistics are a vector each, so a fresh start, an optimizer's step and a
    meta-gradient take an operation or two; the optimizer's state stays where it is.

    Raises:
        ConfigError: if ω's optimizer is none of `OPTIMIZERS`.
    """

    def __init__(self, net: nn.Module, update: Update) -> None:
        check_optimizer(update)
        super().__init__(net, update)
        self._vector, self._statistics = flat(self.phi), flat_statistics(self.phi)
        self._gradient = torch.zeros_like(self._vector)
        self._runs = list(self._find_runs())
        self.optimizer = self._make_optimizer()

    def vector(self) -> Tensor:
        """φ itself."""
        return self._vector

    def statistics(self) -> Tensor:
        """φ's own."""
        return self._statistics

    def _reset(self, theta: nn.Module) -> None:
        self._vector.copy_(flat(theta))
        self._statistics.copy_(flat_statistics(theta))
        for tensor in self._optimizer_state():
            tensor.zero_()

    def _step(self, batch: Batch, lr: float, seed: int, everything: bool) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch_seed(seed):
            return self._compute(batch.images, batch.masks, everything)

    @torch.no_grad()
    def _compute(self, images: Tensor, masks: Tensor, everything: bool) -> Tensor:
        """Forward, loss, backward and update, in the same memory every time; returns the loss."""
        for run in self._runs:
            used = run.moves or everything
            run.values.grad = run.gradient if used else None
            for parameter in run.parameters:
                parameter.requires_grad_(used)
        runs = [run for run in self._runs if run.values.grad is not None]
        self.phi.train()
        with torch.enable_grad(), self.computing():
            loss = self.update.loss(self.phi(images), masks)
        parameters = [parameter for run in runs for parameter in run.parameters]
        gradients = iter(torch.autograd.grad(loss, parameters, materialize_grads=True))
        for run in runs:
            torch.cat([in_memory_order(g) for g in islice(gradients, len(run.parameters))], out=run.gradient)
            if self.update.l1 and not run.norm:
                run.gradient.add_(run.values.sign(), alpha=self.update.l1)
        self.optimizer.step()
        return loss.detach()

    def _find_runs(self) -> Iterator[Run]:
        moving = {id(p) for p in self.update.select(self.phi)}
        norms = {id(p) for p in batchnorm_parameters(self.phi)}
        start = 0
        for (moves, norm), group in groupby(ordered_parameters(self.phi), lambda p: (id(p) in moving, id(p) in norms)):
            parameters = list(group)
            end = start + sum(p.numel() for p in parameters)
            yield Run(parameters, self._vector[start:end], self._gradient[start:end], moves, norm)
            start = end

    def _make_optimizer(self) -> Optimizer:
        weights = [run.values for run in self._runs if not run.norm]
        norms = [run.values for run in self._runs if run.norm]
        optimizer = self.update.make_optimizer(weights, norms, fused=True)
        # a step along a gradient of zero has the optimizer make its state; `_reset` empties it
        before = self._vector.clone()
        for run in self._runs:
            run.values.grad = run.gradient
        optimizer.step()
        self._vector.copy_(before)
        return optimizer

    def _optimizer_state(self) -> list[Tensor]:
        states = self.optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def check_optimizer(update: Update) -> None:
    """Refuse an optimizer that flat storage would change.

    Raises:
        ConfigError: naming those that can be had, and the engine for the others.
    """
    kind = getattr(update.optimizer, "func", update.optimizer)
    given = getattr(update.optimizer, "keywords", {})
    if kind not in OPTIMIZERS or given.get("dampening") or given.get("foreach") or given.get("differentiable"):
        names = ", ".join(optimizer.__name__ for optimizer in OPTIMIZERS)
        raise ConfigError(
            f"the fast engine has {names} (without dampening, foreach or differentiable) as inner optimizers, not "
            f"{getattr(kind, '__name__', kind)}{given or ''}: choose one of them, or engine=reference"
        )
