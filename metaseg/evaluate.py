"""The meta-test error of (θ, ω) on fixed episodes: adapt to each support set, score the query set."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metaseg.adapt import Adapter, predict
from metaseg.episode import Episode
from metaseg.losses import segmentation_loss
from metaseg.metrics import Floats, bootstrap_ci95, counts, iou


@dataclass(frozen=True)
class Score:
    """What one episode gave.

    Attributes:
        task: the episode's task.
        counts: pixel counts of `metrics.counts`, shape (queries, 4), after adaptation.
        counts_before: the same before it.
        loss: the query set's loss after adaptation, without L2.
    """

    task: str
    counts: Floats
    counts_before: Floats
    loss: float

    @property
    def iou(self) -> float:
        """Mean IoU of the query images' objects, in [0, 1]."""
        return float(iou(self.counts[:, 0], self.counts[:, 1]).mean())

    @property
    def iou_before(self) -> float:
        """The same without any inner step; under the policy `support`, batch norm has seen the support set."""
        return float(iou(self.counts_before[:, 0], self.counts_before[:, 1]).mean())


@dataclass(frozen=True)
class Example:
    """An episode to look at, on the CPU.

    Attributes:
        episode: support and query, without the mini-batches.
        prediction: object masks of the query images, shape (queries, h, w), {0, 1}.
        score: of the episode.
    """

    episode: Episode
    prediction: Tensor
    score: Score


@dataclass(frozen=True)
class Evaluation:
    """Scores of all episodes, task by task in each draw, and their summaries, each named for what it is.

    Attributes:
        scores: of all episodes.
        examples: the first few, with their images.
    """

    scores: Sequence[Score]
    examples: Sequence[Example] = ()

    @cached_property
    def by_task(self) -> dict[str, list[Score]]:
        """The draws of each task."""
        tasks: dict[str, list[Score]] = {}
        for score in self.scores:
            tasks.setdefault(score.task, []).append(score)
        return tasks

    @property
    def task_ious(self) -> Floats:
        """Each task's IoU, mean over draws and images; shape (tasks,)."""
        return np.array([np.mean([score.iou for score in draws]) for draws in self.by_task.values()])

    @property
    def iou(self) -> float:
        """Mean of per-image object IoU: the original's number."""
        return float(self.task_ious.mean())

    @property
    def iou_before(self) -> float:
        """The same before adaptation."""
        return float(np.mean([np.mean([s.iou_before for s in draws]) for draws in self.by_task.values()]))

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % bootstrap interval of `iou` over tasks."""
        return bootstrap_ci95(self.task_ious)

    @property
    def miou_class(self) -> float:
        """Class-accumulated mIoU (HSNet and others): Σ∩ / Σ∪ over a class's images, then the mean over classes."""
        totals = [np.sum([s.counts.sum(0) for s in draws], axis=0) for draws in self.by_task.values()]
        return float(np.mean([iou(total[0], total[1]) for total in totals]))

    @property
    def fb_iou(self) -> float:
        """FB-IoU: Σ∩ / Σ∪ over all images, of the object and of the background, and the mean of the two."""
        total = np.sum([score.counts.sum(0) for score in self.scores], axis=0)
        return float((iou(total[0], total[1]) + iou(total[2], total[3])) / 2)

    def metrics(self) -> dict[str, float]:
        """The summaries as one level of numbers in [0, 1], for loggers."""
        low, high = self.ci95
        return {
            "iou": self.iou,
            "iou_low": low,
            "iou_high": high,
            "miou_class": self.miou_class,
            "fb_iou": self.fb_iou,
            "iou_before_adaptation": self.iou_before,
        }

    def summary(self) -> dict[str, object]:
        """The numbers of `results.json`, in [0, 1]."""
        return {
            "tasks": len(self.by_task),
            "draws": len(self.scores) // len(self.by_task),
            "iou": {"mean": self.iou, "ci95": list(self.ci95)},
            "miou_class": self.miou_class,
            "fb_iou": self.fb_iou,
            "iou_before_adaptation": self.iou_before,
        }

    def rows(self) -> list[dict[str, str | int | float]]:
        """One row an episode."""
        drawn: dict[str, int] = {}
        rows: list[dict[str, str | int | float]] = []
        for score in self.scores:
            task = score.task
            drawn[task] = drawn.get(task, -1) + 1
            rows.append(
                {
                    "task": task,
                    "draw": drawn[task],
                    "iou": score.iou,
                    "iou_before_adaptation": score.iou_before,
                    "loss": score.loss,
                }
            )
        return rows

    def write_csv(self, path: Path) -> None:
        """Write `rows` as CSV."""
        rows = self.rows()
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def score_episode(theta: nn.Module, episode: Episode, adapt: Adapter) -> Example:
    """Adapt θ to the support set and score the query set; the same before adaptation."""
    query, update = episode.query, adapt.update
    before = predict(theta, query.images, update, episode.support).argmax(dim=1)
    logits = predict(adapt(theta, episode), query.images, update, episode.support)
    prediction = logits.argmax(dim=1)
    score = Score(
        task=episode.task,
        counts=counts(prediction, query.masks).cpu().numpy().astype(np.float64),
        counts_before=counts(before, query.masks).cpu().numpy().astype(np.float64),
        loss=float(segmentation_loss(logits, query.masks)),
    )
    return Example(replace(episode, batches=()).to(torch.device("cpu")), prediction.cpu(), score)


def evaluate(
    theta: nn.Module, episodes: DataLoader[list[Episode]], adapt: Adapter, *, title: str, examples: int = 0
) -> Evaluation:
    """Score all episodes of a loader, one at a time, with a progress bar; keep the first `examples` to look at."""
    device = next(theta.parameters()).device
    scores: list[Score] = []
    kept: list[Example] = []
    for few in track(episodes, description=title):
        for episode in few:
            example = score_episode(theta, episode.to(device), adapt)
            scores.append(example.score)
            if len(kept) < examples:
                kept.append(example)
    return Evaluation(scores, kept)
