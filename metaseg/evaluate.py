"""The meta-test error of (θ, ω) on fixed episodes: adapt to each support set, score the query set."""

import csv
import math
import sys
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from metaseg import ranks
from metaseg.adapt import Adapter, Engine, Lanes
from metaseg.data.episodes import EvaluationEpisodes, episode_loader, one_thread
from metaseg.data.source import Split
from metaseg.divergence import divergence, first_bad
from metaseg.episode import Batch, Episode
from metaseg.losses import segmentation_loss
from metaseg.metrics import Floats, bootstrap_ci95, bootstrap_difference_ci95, counts, for_json, iou, predicted
from metaseg.update import Update


@dataclass(frozen=True)
class Score:
    """What one episode gave, on its way through the inner steps.

    Attributes:
        task: the episode's task.
        steps: inner steps taken when it was scored: 0, the rungs on the way, and the last; ascending.
        counts: pixel counts of `metrics.counts` on the query set at each of these, shape (steps, queries, 4).
        losses: the query set's loss at each of these, without L2; shape (steps,).
        support_counts: pixel counts after the last step on support images, as many as there are query images, at
            most all; shape (images, 4).
        support_loss: their loss then.
        diverged: where the numbers of the adaptation, or of its loss on query images, stopped being finite
            (`divergence`), "" if they did not. It counts as finding no object, and its loss is no number.
    """

    task: str
    steps: tuple[int, ...]
    counts: Floats
    losses: Floats
    support_counts: Floats
    support_loss: float
    diverged: str = ""

    @cached_property
    def ious(self) -> Floats:
        """Mean IoU of the query images' objects at each of `steps`, in [0, 1]; shape (steps,)."""
        means: Floats = iou(self.counts[..., 0], self.counts[..., 1]).mean(axis=1)
        return means

    @property
    def iou(self) -> float:
        """The same after the last step."""
        return float(self.ious[-1])

    @property
    def iou_before(self) -> float:
        """The same without any inner step; under the policy `support`, batch norm has seen the support set."""
        return float(self.ious[0])

    @property
    def loss(self) -> float:
        """The query set's loss after the last step."""
        return float(self.losses[-1])

    @property
    def support_iou(self) -> float:
        """Mean IoU of the support images' objects after the last step, in [0, 1]."""
        return float(iou(self.support_counts[:, 0], self.support_counts[:, 1]).mean())

    def iou_at(self, step: int) -> float:
        """The IoU at the last of `steps` that is not beyond `step`: what stopped earlier stays as it was."""
        return float(self.ious[bisect_right(self.steps, step) - 1])

    def loss_at(self, step: int) -> float:
        """The loss likewise."""
        return float(self.losses[bisect_right(self.steps, step) - 1])

    def steps_to(self, share: float) -> int:
        """The first of `steps` at which the IoU is at least `share` of the last one's; if that is 0, the last."""
        found = self.iou > 1e-6  # the metric's ε keeps it from being 0
        return self.steps[int(np.argmax(self.ious >= share * self.iou))] if found else self.steps[-1]


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

    def per_task(self, value: Callable[[Score], float]) -> Floats:
        """Each task's mean of a value over its draws; shape (tasks,)."""
        return np.array([np.mean([value(score) for score in draws]) for draws in self.by_task.values()])

    @property
    def task_ious(self) -> Floats:
        """Each task's IoU, mean over draws and images; shape (tasks,)."""
        return self.per_task(lambda score: score.iou)

    @property
    def task_losses(self) -> Floats:
        """Each task's loss, likewise."""
        return self.per_task(lambda score: score.loss)

    @property
    def iou(self) -> float:
        """Mean of per-image object IoU: the original's number."""
        return float(self.task_ious.mean())

    @property
    def iou_before(self) -> float:
        """The same before adaptation."""
        return float(self.per_task(lambda score: score.iou_before).mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % bootstrap interval of `iou` over tasks."""
        return bootstrap_ci95(self.task_ious)

    @property
    def loss(self) -> float:
        """Mean of the query sets' losses: Err(θ, ω) with ℓ the loss."""
        return float(self.task_losses.mean())

    @property
    def within_task(self) -> dict[str, Floats]:
        """Each task's error on its query minus that on its support, with ℓ = 1 − IoU (`iou`) and the loss (`loss`)."""
        return {
            "iou": self.per_task(lambda score: score.support_iou - score.iou),
            "loss": self.per_task(lambda score: score.loss - score.support_loss),
        }

    @property
    def miou_class(self) -> float:
        """Class-accumulated mIoU (HSNet and others): Σ∩ / Σ∪ over a class's images, then the mean over classes."""
        totals = [np.sum([s.counts[-1].sum(0) for s in draws], axis=0) for draws in self.by_task.values()]
        return float(np.mean([iou(total[0], total[1]) for total in totals]))

    @property
    def fb_iou(self) -> float:
        """FB-IoU: Σ∩ / Σ∪ over all images, of the object and of the background, and the mean of the two."""
        total = np.sum([score.counts[-1].sum(0) for score in self.scores], axis=0)
        return float((iou(total[0], total[1]) + iou(total[2], total[3])) / 2)

    @property
    def steps(self) -> float:
        """Mean number of inner steps taken: ω's, or what early stopping chose."""
        return float(np.mean([score.steps[-1] for score in self.scores]))

    @property
    def course(self) -> list[dict[str, int | float]]:
        """The adaptation's way: IoU and loss, mean over tasks, at each inner `step` at which any episode was scored."""
        steps = sorted({step for score in self.scores for step in score.steps})
        return [
            {
                "step": step,
                "iou": float(self.per_task(lambda score, step=step: score.iou_at(step)).mean()),  # type: ignore[misc]
                "loss": float(self.per_task(lambda score, step=step: score.loss_at(step)).mean()),  # type: ignore[misc]
            }
            for step in steps
        ]

    @property
    def diverged(self) -> list[Score]:
        """Scores of the episodes whose adaptation diverged."""
        return [score for score in self.scores if score.diverged]

    def metrics(self) -> dict[str, float]:
        """The summaries as one level of numbers, for loggers."""
        low, high = self.ci95
        return {
            "iou": self.iou,
            "iou_low": low,
            "iou_high": high,
            "loss": self.loss,
            "miou_class": self.miou_class,
            "fb_iou": self.fb_iou,
            "iou_before_adaptation": self.iou_before,
            "gap_within_task": float(self.within_task["iou"].mean()),
        }

    def summary(self) -> dict[str, object]:
        """The numbers of `results.json`; IoUs in [0, 1], each `ci95` a bootstrap over tasks; None if not finite."""
        return {
            "tasks": len(self.by_task),
            "draws": len(self.scores) // len(self.by_task),
            "diverged": len(self.diverged),
            "iou": _estimate(self.task_ious),
            "loss": _estimate(self.task_losses),
            "gap_within_task": {name: _estimate(gaps) for name, gaps in self.within_task.items()},
            "miou_class": self.miou_class,
            "fb_iou": self.fb_iou,
            "iou_before_adaptation": self.iou_before,
            "steps": self.steps,
            "course": [{key: for_json(value) for key, value in at.items()} for at in self.course],
        }

    def rows(self) -> list[dict[str, str | int | float]]:
        """One row an episode."""
        drawn: Counter[str] = Counter()
        rows: list[dict[str, str | int | float]] = []
        for score in self.scores:
            rows.append(
                {
                    "task": score.task,
                    "draw": drawn[score.task],
                    "iou": score.iou,
                    "iou_before_adaptation": score.iou_before,
                    "loss": score.loss,
                    "support_iou": score.support_iou,
                    "support_loss": score.support_loss,
                    "steps": score.steps[-1],
                    "diverged": int(bool(score.diverged)),
                }
            )
            drawn[score.task] += 1
        return rows


def across_tasks(evaluations: Mapping[Split, Evaluation]) -> dict[str, dict[str, object]]:
    """The gaps between splits: how much larger the error on the later one's tasks is, from train to val to test.

    Returns:
        By `train_val`, `val_test` and `train_test`, of those that there are: `iou` (ℓ = 1 − IoU) and `loss`, each with
        `mean` and `ci95`, a bootstrap over the tasks of both splits.
    """
    gaps: dict[str, dict[str, object]] = {}
    pairs_of_splits: tuple[tuple[Split, Split], ...] = (("train", "val"), ("val", "test"), ("train", "test"))
    for near, far in pairs_of_splits:
        a, b = evaluations.get(near), evaluations.get(far)
        if a and b:
            pairs = {"iou": (a.task_ious, b.task_ious), "loss": (b.task_losses, a.task_losses)}
            gaps[f"{near}_{far}"] = {
                name: _with_interval(float(x.mean() - y.mean()), bootstrap_difference_ci95(x, y))
                for name, (x, y) in pairs.items()
            }
    return gaps


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows of the same columns as CSV, with a head."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _estimate(task_values: Floats) -> dict[str, object]:
    return _with_interval(float(task_values.mean()), bootstrap_ci95(task_values))


def _with_interval(mean: float, ci95: tuple[float, float]) -> dict[str, object]:
    return {"mean": for_json(mean), "ci95": [for_json(bound) for bound in ci95]}


class Scoring:
    """Iterates over episodes, adapts θ as it is then to each, and gives what that scored.

    On the CPU whole episodes are shared out among processes of one thread each, which lose less than threads that
    share a step; on CUDA the engine's lanes run side by side. Of several ranks each takes its share, and has all.

    Args:
        theta: the network; not changed.
        episodes: with their mini-batches.
        update: ω.
        engine: computes the steps.
        rungs: inner steps on the way at which to score, too.
        processes: how many on the CPU, on Linux without a GPU; None takes as many as torch has threads,
            or one if there are several ranks, which are processes already.
        workers: loader processes on CUDA.
    """

    def __init__(
        self,
        theta: nn.Module,
        episodes: EvaluationEpisodes,
        update: Update,
        engine: Engine,
        *,
        rungs: Sequence[int] = (),
        processes: int | None = None,
        workers: int = 0,
    ) -> None:
        self.theta, self.episodes, self.update, self.engine = theta, episodes, update, engine
        self.rungs, self.processes, self.workers = frozenset(rungs), processes, workers

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[Example]:
        yield from ranks.in_turns(self._own())

    def _own(self) -> Iterator[Example]:
        lanes = self.engine(self.theta, self.update)
        device = next(self.theta.parameters()).device
        episodes = Subset(self.episodes, ranks.share(len(self)))
        if device.type == "cpu":
            yield from self._in_processes(lanes, episodes)
            return
        loader = iter(episode_loader(episodes, self.workers, pin_memory=True))
        while few := [episode for (episode,) in islice(loader, len(lanes))]:
            score = partial(_adapt_and_score, self.theta, self.rungs)
            for episode, scored in zip(few, lanes.map(score, [e.to(device) for e in few]), strict=True):
                yield _example(episode, scored, self.update)

    def _in_processes(self, lanes: Lanes, episodes: Subset[Episode]) -> Iterator[Example]:
        usual = torch.get_num_threads() if ranks.size() == 1 else 1
        processes = min(self.processes or usual, len(episodes))
        # other ways to start would share φ among the processes; autograd with CUDA's threads cannot be forked
        if processes == 1 or torch.cuda.is_available() or not sys.platform.startswith("linux"):
            processes = 0
        yield from DataLoader(
            _Scored(self.theta, episodes, self.update, self.rungs, lanes),
            batch_size=None,
            num_workers=processes,
            worker_init_fn=one_thread,
            multiprocessing_context="fork" if processes else None,
        )


class _Scored(Dataset[Example]):
    """Item i is what episode i scored, computed where it is asked for."""

    def __init__(
        self, theta: nn.Module, episodes: Subset[Episode], update: Update, rungs: Set[int], lanes: Lanes
    ) -> None:
        self.theta, self.episodes, self.update, self.rungs, self.lanes = theta, episodes, update, rungs, lanes

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Example:
        episode = self.episodes[index]
        (scored,) = self.lanes.map(partial(_adapt_and_score, self.theta, self.rungs), [episode])
        return _example(episode, scored, self.update)


class _Measured(NamedTuple):
    """Of a few images, on the network's device: pixel counts (n, 4), the loss, predicted masks (n, h, w)."""

    counts: Tensor
    loss: Tensor
    prediction: Tensor


class _Raw(NamedTuple):
    """What `Score` is made of: the query at each of `steps`, the support at the end, and how the inner loop went."""

    steps: list[int]
    query: list[_Measured]
    support: _Measured
    losses: Tensor
    finite: Tensor


def _adapt_and_score(theta: nn.Module, rungs: Set[int], adapt: Adapter, episode: Episode) -> _Raw:
    def measure(batch: Batch) -> _Measured:
        logits = adapt.predict(batch.images, episode.support)
        prediction = predicted(logits)
        return _Measured(counts(prediction, batch.masks), segmentation_loss(logits, batch.masks), prediction)

    batches = adapt.batches(theta, episode)
    adapt.start(theta, episode.seed)
    steps, query = [0], [measure(episode.query)]
    for batch in batches:
        adapt.step(batch)
        if adapt.taken in rungs or adapt.taken == len(batches):
            steps.append(adapt.taken)
            query.append(measure(episode.query))
    support = measure(episode.support[: len(episode.query)])
    finite = adapt.finite() & torch.isfinite(query[-1].loss)
    return _Raw(steps, query, support, torch.stack(adapt.losses), finite)


def _example(episode: Episode, raw: _Raw, update: Update) -> Example:
    inner = raw.losses.tolist()
    found, losses = (
        torch.stack(part).cpu().numpy().astype(np.float64)
        for part in ([m.counts for m in raw.query], [m.loss for m in raw.query])
    )
    support, support_loss = raw.support.counts.cpu().numpy().astype(np.float64), float(raw.support.loss)
    prediction, bad = raw.query[-1].prediction.cpu(), first_bad(inner)
    wrong = ~np.isfinite(losses) | (np.array(raw.steps) >= (math.inf if bad is None else bad))
    if not raw.finite:
        wrong[-1] = True
        support, support_loss = _nothing(episode.support[: len(episode.query)]), math.nan
        prediction = torch.zeros_like(prediction)
    found[wrong], losses[wrong] = _nothing(episode.query), math.nan
    score = Score(
        task=episode.task,
        steps=tuple(raw.steps),
        counts=found,
        losses=losses,
        support_counts=support,
        support_loss=support_loss,
        diverged="" if raw.finite else divergence(update, inner),
    )
    return Example(replace(episode, batches=(), rehearsal=None), prediction, score)


def _nothing(batch: Batch) -> Floats:
    """The pixel counts of finding no object, whatever a network that is none any more may predict; (images, 4)."""
    return counts(torch.zeros_like(batch.masks), batch.masks).numpy().astype(np.float64)


def evaluate(scoring: Scoring, *, title: str, examples: int = 0) -> Evaluation:
    """Score all episodes, with a progress bar; keep the first `examples` to look at. Warns if adaptations diverged."""
    scores: list[Score] = []
    kept: list[Example] = []
    for example in track(scoring, description=title, disable=ranks.rank() > 0):
        scores.append(example.score)
        if len(kept) < examples:
            kept.append(example)
    evaluation = Evaluation(scores, kept)
    if evaluation.diverged and ranks.rank() == 0:
        first = evaluation.diverged[0]
        warnings.warn(
            f"{title}: {len(evaluation.diverged)} of {len(scores)} adaptations diverged, and count as finding no "
            f"object; the first, task {first.task}: {first.diverged}. Lower update.lr",
            stacklevel=2,
        )
    return evaluation
