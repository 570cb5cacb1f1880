"""The meta-test error of (θ, ω) on fixed episodes: adapt to each support set, score the query set."""

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from metaseg.adapt import Adapter, Engine, Lanes
from metaseg.data.episodes import EvaluationEpisodes, episode_loader, one_thread
from metaseg.episode import Episode
from metaseg.losses import segmentation_loss
from metaseg.metrics import Floats, bootstrap_ci95, counts, iou
from metaseg.update import Update


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


class Scoring:
    """Iterates over episodes, adapts θ as it is then to each, and gives what that scored.

    On the CPU whole episodes are shared out among processes of one thread each, which lose less than threads that
    share a step; on CUDA the engine's lanes run side by side.

    Args:
        theta: the network; not changed.
        episodes: with their mini-batches.
        update: ω.
        engine: computes the steps.
        processes: how many on the CPU, on Linux without a GPU; None takes as many as torch has threads.
        workers: loader processes on CUDA.
    """

    def __init__(
        self,
        theta: nn.Module,
        episodes: EvaluationEpisodes,
        update: Update,
        engine: Engine,
        *,
        processes: int | None = None,
        workers: int = 0,
    ) -> None:
        self.theta, self.episodes, self.update, self.engine = theta, episodes, update, engine
        self.processes, self.workers = processes, workers

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[Example]:
        lanes = self.engine(self.theta, self.update)
        device = next(self.theta.parameters()).device
        if device.type == "cpu":
            yield from self._in_processes(lanes)
            return
        loader = iter(episode_loader(self.episodes, self.workers, pin_memory=True))
        while few := [episode for (episode,) in islice(loader, len(lanes))]:
            score = partial(_adapt_and_predict, self.theta)
            for episode, parts in zip(few, lanes.map(score, [e.to(device) for e in few]), strict=True):
                yield _example(episode, *(part.cpu() for part in parts))

    def _in_processes(self, lanes: Lanes) -> Iterator[Example]:
        processes = min(self.processes or torch.get_num_threads(), len(self))
        # other ways to start would share φ among the processes; autograd with CUDA's threads cannot be forked
        if processes == 1 or torch.cuda.is_available() or not sys.platform.startswith("linux"):
            processes = 0
        yield from DataLoader(
            _Scored(self.theta, self.episodes, lanes),
            batch_size=None,
            num_workers=processes,
            worker_init_fn=one_thread,
            multiprocessing_context="fork" if processes else None,
        )


class _Scored(Dataset[Example]):
    """Item i is what episode i scored, computed where it is asked for."""

    def __init__(self, theta: nn.Module, episodes: EvaluationEpisodes, lanes: Lanes) -> None:
        self.theta, self.episodes, self.lanes = theta, episodes, lanes

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Example:
        episode = self.episodes[index]
        (parts,) = self.lanes.map(partial(_adapt_and_predict, self.theta), [episode])
        return _example(episode, *parts)


def _adapt_and_predict(theta: nn.Module, adapt: Adapter, episode: Episode) -> tuple[Tensor, Tensor]:
    """The query set's object masks before adaptation, and its logits after."""
    adapt.start(theta, episode.seed)
    before = adapt.predict(episode.query.images, episode.support).argmax(dim=1)
    for batch in episode.batches:
        adapt.step(batch)
    return before, adapt.predict(episode.query.images, episode.support)


def _example(episode: Episode, before: Tensor, logits: Tensor) -> Example:
    query, prediction = episode.query, logits.argmax(dim=1)
    score = Score(
        task=episode.task,
        counts=counts(prediction, query.masks).numpy().astype(np.float64),
        counts_before=counts(before, query.masks).numpy().astype(np.float64),
        loss=float(segmentation_loss(logits, query.masks)),
    )
    return Example(replace(episode, batches=()), prediction, score)


def evaluate(scoring: Scoring, *, title: str, examples: int = 0) -> Evaluation:
    """Score all episodes, with a progress bar; keep the first `examples` to look at."""
    scores: list[Score] = []
    kept: list[Example] = []
    for example in track(scoring, description=title):
        scores.append(example.score)
        if len(kept) < examples:
            kept.append(example)
    return Evaluation(scores, kept)
