"""The meta-training loop: a meta-batch of episodes → the mean pseudo-gradient → one outer optimizer step."""

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from metaseg import ranks
from metaseg.adapt import Adapter, Engine
from metaseg.algos import Algorithm
from metaseg.engine.flat import flat, flat_statistics
from metaseg.episode import Episode
from metaseg.evaluate import Example
from metaseg.update import Update


class MetaModule(pl.LightningModule):
    """Learns θ, the parameters of `net`, with manual optimization.

    Running batch-norm statistics of θ become, at each meta-step, the mean of those that its episodes ended with.

    Args:
        net: θ's network.
        algo: gives an episode's pseudo-gradient.
        inner: ω while meta-training.
        engine: how its steps are computed.
        outer: makes the outer optimizer of θ's parameters; its lr is the first meta-step size ε.
        final_lr: ε at the last meta-step; it is linear in between.
        meta_steps: number of meta-steps, ≥ 1.
        about: what is known about θ (`initialisation.About`), in plain containers, kept in the checkpoint.
        training: what decides the run (`config.training_values`), likewise.
    """

    def __init__(
        self,
        net: nn.Module,
        algo: Algorithm,
        *,
        inner: Update,
        engine: Engine,
        outer: Callable[..., Optimizer],
        final_lr: float,
        meta_steps: int,
        about: dict[str, Any],
        training: dict[str, Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters({"about": about, "training": training}, logger=False)
        self.net, self.algo, self.outer = net, algo, outer
        self.inner, self.engine = inner, engine
        self.final_lr, self.meta_steps = final_lr, meta_steps

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The outer optimizer of θ as one vector, and ε's linear course to `final_lr`."""
        self.theta = flat(self.net)  # now, since Lightning has just moved the network to its device
        flat_statistics(self.net)
        self.lanes = self.engine(self.net, self.inner)
        optimizer = self.outer([self.theta])
        schedule = linear(optimizer.param_groups[0]["lr"], self.final_lr, self.meta_steps)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, schedule)}

    def training_step(self, meta_batch: list[Episode], batch_idx: int) -> None:
        """One meta-step, on this rank's episodes of the meta-batch."""
        started = time.perf_counter()
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        assert isinstance(schedule, LambdaLR)

        # 1. each episode's pseudo-gradient, the running statistics that it ended with, and its last loss
        learned = zip(*self.lanes.map(self._learn, meta_batch), strict=True)

        # 2. their means, over all ranks; the first written where any torch optimizer looks for a gradient
        self.theta.grad, statistics, loss = ranks.means(*learned)

        # 3. the outer step
        self.log("train/meta_step_size", optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        flat_statistics(self.net).copy_(statistics)

        # as Python numbers, for which a GPU is waited for: so the seconds are of the work, not of queueing it
        self.log("train/loss", float(loss), prog_bar=True)  # of the last inner steps
        self.log("train/meta_gradient_norm", float(self.theta.grad.norm()))
        self.log("train/seconds", time.perf_counter() - started)

    def _learn(self, adapt: Adapter, episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        gradient = self.algo.meta_gradient(self.net, episode, adapt)
        return gradient, adapt.statistics().clone(), adapt.last_loss

    def validation_step(self, example: Example, batch_idx: int) -> None:
        """Log the score of an episode of a held-out task; `evaluate.Scoring` has adapted to it."""
        self.log("val/iou", example.score.iou, prog_bar=True, on_epoch=True, batch_size=1)
        self.log("val/loss", example.score.loss, on_epoch=True, batch_size=1)


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """Factors on `start`, for LambdaLR: 1 at step 0, end / start at step `steps` − 1 and behind it."""
    last = max(steps - 1, 1)
    return lambda step: 1 + (end / start - 1) * min(step, last) / last
