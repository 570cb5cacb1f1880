"""The meta-training loop: a meta-batch of episodes → the mean pseudo-gradient → one outer optimizer step."""

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from metaseg.adapt import Adapter
from metaseg.algos import Algorithm
from metaseg.episode import Episode
from metaseg.evaluate import score_episode
from metaseg.update import Update


class MetaModule(pl.LightningModule):
    """Learns θ, the parameters of `net`, with manual optimization.

    Running batch-norm statistics of θ become, at each meta-step, the mean of those that its episodes ended with.

    Args:
        net: θ's network.
        algo: gives an episode's pseudo-gradient.
        inner: ω while meta-training.
        update: ω at validation.
        outer: makes the outer optimizer of θ's parameters; its lr is the first meta-step size ε.
        final_lr: ε at the last meta-step; it is linear in between.
        meta_steps: number of meta-steps, ≥ 1.
        about: what is known about θ (`initialisation.About`), in plain containers, kept in the checkpoint.
    """

    def __init__(
        self,
        net: nn.Module,
        algo: Algorithm,
        *,
        inner: Update,
        update: Update,
        outer: Callable[..., Optimizer],
        final_lr: float,
        meta_steps: int,
        about: dict[str, Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters({"about": about}, logger=False)
        self.net, self.algo, self.outer = net, algo, outer
        self.final_lr, self.meta_steps = final_lr, meta_steps
        # plain attributes behind a dict: φ is scratch space, neither a parameter of this module nor in its checkpoint
        self.adapters = {"train": Adapter(net, inner), "val": Adapter(net, update)}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The outer optimizer, and ε's linear course to `final_lr`."""
        optimizer = self.outer(self.net.parameters())
        schedule = linear(optimizer.param_groups[0]["lr"], self.final_lr, self.meta_steps)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, schedule)}

    def training_step(self, meta_batch: list[Episode], batch_idx: int) -> None:
        """One meta-step."""
        started = time.perf_counter()
        adapt, optimizer, schedule = self.adapters["train"], self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        assert isinstance(schedule, LambdaLR)

        # 1. the mean pseudo-gradient, and the mean of the running statistics that the episodes ended with
        direction = torch.zeros(sum(p.numel() for p in self.net.parameters()), device=self.device)
        loss = torch.zeros((), device=self.device)
        statistics = [torch.zeros_like(buffer) for buffer in running_statistics(self.net)]
        for episode in meta_batch:
            direction += self.algo.meta_gradient(self.net, episode, adapt) / len(meta_batch)
            loss += adapt.last_loss / len(meta_batch)
            for mean, buffer in zip(statistics, running_statistics(adapt.phi), strict=True):
                mean += buffer / len(meta_batch)

        # 2. written where any torch optimizer looks for a gradient
        parameters = list(self.net.parameters())
        for parameter, part in zip(parameters, torch.split(direction, [p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view(parameter.shape)

        # 3. the outer step
        self.log("train/meta_step_size", optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        for buffer, mean in zip(running_statistics(self.net), statistics, strict=True):
            buffer.copy_(mean)

        self.log("train/loss", loss, prog_bar=True)  # of the last inner steps
        self.log("train/meta_gradient_norm", direction.norm())
        self.log("train/seconds", time.perf_counter() - started)

    def validation_step(self, episodes: list[Episode], batch_idx: int) -> None:
        """Adapt to a held-out task and score it."""
        for episode in episodes:
            score = score_episode(self.net, episode, self.adapters["val"]).score
            self.log("val/iou", score.iou, prog_bar=True, on_epoch=True, batch_size=1)
            self.log("val/loss", score.loss, on_epoch=True, batch_size=1)


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """Factors on `start`, for LambdaLR: 1 at step 0, end / start at step `steps` − 1 and behind it."""
    last = max(steps - 1, 1)
    return lambda step: 1 + (end / start - 1) * min(step, last) / last


def running_statistics(net: nn.Module) -> list[Tensor]:
    """Running means and variances of all batch norms."""
    return [
        buffer
        for module in net.modules()
        if isinstance(module, nn.BatchNorm2d)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
