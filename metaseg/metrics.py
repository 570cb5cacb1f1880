"""Intersection over union, as the different papers count it, and an interval over tasks."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

EPS = 1e-7  # makes the IoU of two empty masks 1 (*orig*)

MOST_RESAMPLED = 2**22  # values at once

Floats = NDArray[np.float64]


def predicted(logits: Tensor) -> Tensor:
    """Object masks (n, h, w), uint8, {0, 1}, of logits (n, 2, h, w): where channel 1 is higher; NaN is not."""
    return (logits[:, 1] > logits[:, 0]).to(torch.uint8)


def counts(prediction: Tensor, masks: Tensor) -> Tensor:
    """Pixels per image in intersections and unions.

    Args:
        prediction: shape (n, h, w), {0, 1}.
        masks: shape (n, h, w), {0, 1}.

    Returns:
        Shape (n, 4), int64: object intersection, object union, background intersection, background union.
    """
    p, m = prediction.bool().flatten(1), masks.bool().flatten(1)
    both, either = (p & m).sum(1), (p | m).sum(1)
    pixels = p.shape[1]
    # what is in neither is the background's intersection; what is not in both, its union
    return torch.stack([both, either, pixels - either, pixels - both], dim=1)


def iou(intersection: ArrayLike, union: ArrayLike) -> Floats:
    """(∩ + 1e-7) / (∪ + 1e-7), element by element; 1 where both masks are empty."""
    return np.asarray((np.asarray(intersection) + EPS) / (np.asarray(union) + EPS), dtype=np.float64)


def mean_iou(pixels: Tensor) -> float:
    """Mean over images of the object's IoU, of the `counts` (n, 4) of a prediction; in [0, 1]."""
    both, either = pixels[:, 0].double(), pixels[:, 1].double()
    return float(((both + EPS) / (either + EPS)).mean())


def bootstrap_ci95(task_means: ArrayLike, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of whole tasks; its random numbers are fixed.

    Args:
        task_means: shape (tasks,); a task's draws and images are averaged first, for they are not independent.
        resamples: number of bootstrap samples.
    """
    samples = _resampled(task_means, resamples, np.random.default_rng(0))
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_difference_ci95(first: ArrayLike, second: ArrayLike, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of mean(first) − mean(second) of two groups of tasks, resampled apart.

    Args:
        first: shape (tasks,).
        second: shape (other tasks,).
        resamples: number of bootstrap samples.
    """
    rng = np.random.default_rng(0)
    means = [_resampled(values, resamples, rng) for values in (first, second)]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)


def _resampled(values: ArrayLike, resamples: int, rng: np.random.Generator) -> Floats:
    """The mean of each resample, shape (resamples,); drawn some at a time, or they would fill the memory."""
    values = np.asarray(values, dtype=np.float64)
    at_once = max(1, MOST_RESAMPLED // len(values))
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    return np.concatenate([values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in sizes])


def for_json(value: float) -> float | None:
    """The number, or None for one that JSON does not have, such as the loss of an adaptation that diverged."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)  # NumPy's are not JSON
