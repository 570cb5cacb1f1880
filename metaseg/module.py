"""The meta-training loop: a meta-batch of episodes → the mean pseudo-gradient → one outer optimizer step."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from metaseg import ranks
from metaseg.adapt import Adapter, Engine
from metaseg.algos import Algorithm
from metaseg.checkpoints import check_state
from metaseg.divergence import DroppedEpisodes, divergence
from metaseg.engine.flat import flat, flat_statistics
from metaseg.episode import Episode
from metaseg.errors import DivergedError
from metaseg.evaluate import Example
from metaseg.update import Update


class Learned(NamedTuple):
    """What an episode gives: its pseudo-gradient, the statistics and losses it ended with, and if all is finite."""

    gradient: Tensor
    statistics: Tensor
    losses: Tensor
    finite: Tensor


class MetaModule(pl.LightningModule):
    """Learns θ, the parameters of `net`, with manual optimization.

    Running batch-norm statistics of θ become, at each meta-step, the mean of those that its episodes ended with. An
    episode whose inner loop diverges is dropped: the means are over the others, and without any θ stays as it is.

    Args:
        net: θ's network.
        algo: gives an episode's pseudo-gradient.
        inner: ω while meta-training.
        engine: how its steps are computed.
        outer: makes the outer optimizer of θ's parameters; its lr is the first meta-step size ε.
        final_lr: ε at the last meta-step; it is linear in between.
        meta_steps: number of meta-steps, ≥ 1.
        meta_batch: episodes of a meta-step, of all ranks together.
        max_dropped: see `DroppedEpisodes`.
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
        meta_batch: int,
        max_dropped: float,
        about: dict[str, Any],
        training: dict[str, Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters({"about": about, "training": training}, logger=False)
        self.net, self.algo, self.outer = net, algo, outer
        self.inner, self.engine = inner, engine
        self.final_lr, self.meta_steps, self.meta_batch = final_lr, meta_steps, meta_batch
        self.dropped = DroppedEpisodes(max_dropped, meta_batch, meta_steps)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The outer optimizer of θ as one vector, and ε's linear course to `final_lr`."""
        self.theta = flat(self.net)  # now, since Lightning has just moved the network to its device
        flat_statistics(self.net)
        self.lanes = self.engine(self.net, self.inner)
        optimizer, schedule = self._optimizer(self.theta)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _optimizer(self, theta: Tensor) -> tuple[Optimizer, LambdaLR]:
        optimizer = self.outer([theta])
        course = linear(optimizer.param_groups[0]["lr"], self.final_lr, self.meta_steps)
        return optimizer, LambdaLR(optimizer, course)

    def training_step(self, meta_batch: list[Episode], batch_idx: int) -> None:
        """One meta-step, on this rank's episodes of the meta-batch."""
        started = time.perf_counter()
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        assert isinstance(schedule, LambdaLR)

        # 1. each episode's pseudo-gradient, the running statistics and the losses that it ended with
        learned = self.lanes.map(self._learn, meta_batch)
        gradients, all_statistics, losses, finite = zip(*learned, strict=True)
        sound = torch.stack(finite).tolist()

        # 2. their means, over all ranks; the first written where any torch optimizer looks for a gradient
        last = [loss[-1] for loss in losses]
        (gradient, statistics, loss), count = ranks.means(sound, gradients, all_statistics, last)
        self.theta.grad = gradient if count else None  # without one no optimizer moves θ, be it by its momentum
        if count < self.meta_batch:
            self._note_dropped(self.meta_batch - count, meta_batch, learned)
        self.dropped.check(self.global_step + 1)

        # 3. the outer step
        size = optimizer.param_groups[0]["lr"]
        self.log("train/meta_step_size", size)
        optimizer.step()
        schedule.step()
        if count:
            flat_statistics(self.net).copy_(statistics)
        kept = [part for part in optimizer.optimizer.state[self.theta].values() if isinstance(part, Tensor)]
        if not all(torch.isfinite(part).all() for part in (self.theta, statistics, *kept)):
            raise DivergedError(
                f"θ, or what the outer optimizer keeps of it, is not finite any more after meta-step "
                f"{self.global_step}, of size {size:g}: lower algo.outer.lr or algo.inner.lr"
            )

        # as Python numbers, for which a GPU is waited for: so the seconds are of the work, not of queueing it
        self.log("train/loss", float(loss) if count else float("nan"), prog_bar=True)  # of the last inner steps
        self.log("train/meta_gradient_norm", float(gradient.norm()))
        self.log("train/dropped_episodes", float(self.dropped.count))  # of the run so far
        self.log("train/seconds", time.perf_counter() - started)

    def _learn(self, adapt: Adapter, episode: Episode) -> Learned:
        gradient = self.algo.meta_gradient(self.net, episode, adapt)
        finite = adapt.finite() & torch.isfinite(gradient).all()
        return Learned(gradient, adapt.statistics().clone(), torch.stack(adapt.losses), finite)

    def _note_dropped(self, new: int, meta_batch: Sequence[Episode], learned: Sequence[Learned]) -> None:
        here = [
            f"task {episode.task}: {divergence(self.inner, one.losses.tolist())}"
            for episode, one in zip(meta_batch, learned, strict=True)
            if not one.finite
        ]
        self.dropped.note(self.global_step + 1, new, here)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many episodes were dropped."""
        checkpoint["dropped_episodes"] = self.dropped.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting; earlier versions' checkpoints have no count.

        Raises:
            WeightsError: if training cannot go on from what it holds: Lightning restores the rest later, unseen.
        """
        theta = torch.zeros(sum(p.numel() for p in self.net.parameters()), device=self.trainer.strategy.root_device)
        check_state(self.trainer.ckpt_path, checkpoint, *self._optimizer(theta), self.trainer.fit_loop.state_dict())
        if "dropped_episodes" in checkpoint:
            self.dropped.restore(checkpoint["dropped_episodes"])

    def validation_step(self, example: Example, batch_idx: int) -> None:
        """Log the score of an episode of a held-out task; `evaluate.Scoring` has adapted to it."""
        self.log("val/iou", example.score.iou, prog_bar=True, on_epoch=True, batch_size=1)
        self.log("val/loss", example.score.loss, on_epoch=True, batch_size=1)


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """Factors on `start`, for LambdaLR: 1 at step 0, end / start at step `steps` − 1 and behind it."""
    last = max(steps - 1, 1)
    return lambda step: 1 + (end / start - 1) * min(step, last) / last
