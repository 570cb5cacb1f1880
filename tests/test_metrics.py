"""IoU in its three ways of counting, and the interval, against cases worked out by hand."""

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from metaseg import metrics
from metaseg.evaluate import Evaluation, Score, write_csv
from metaseg.metrics import bootstrap_ci95, bootstrap_difference_ci95, counts, iou

# Counts


def test_counts_of_masks_drawn_by_hand() -> None:
    prediction = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]])
    masks = torch.tensor([[[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]]], dtype=torch.uint8)
    # object: 2 in both, 4 + 6 − 2 in either; background: 4 in both, 12 − 2 in either
    result = counts(prediction, masks)
    assert result.tolist() == [[2, 8, 4, 10]]
    assert result.dtype == torch.int64


def test_counts_are_per_image() -> None:
    full, empty = torch.ones(3, 3), torch.zeros(3, 3)
    prediction = torch.stack([full, empty, full])
    masks = torch.stack([full, empty, empty])
    assert counts(prediction, masks).tolist() == [[9, 9, 0, 0], [0, 0, 9, 9], [0, 9, 0, 9]]


def test_iou_of_empty_masks() -> None:
    empty_empty, empty_full, half = iou([0, 0, 2], [0, 100, 4])
    assert empty_empty == 1
    assert empty_full == pytest.approx(0, abs=1e-8)
    assert half == pytest.approx(0.5, abs=1e-7)


# Interval


def test_the_interval_of_a_constant_is_a_point() -> None:
    assert bootstrap_ci95([0.7] * 30) == pytest.approx((0.7, 0.7))
    assert bootstrap_ci95([0.4]) == pytest.approx((0.4, 0.4))


def test_the_interval_of_many_tasks_is_the_normal_approximation() -> None:
    means = np.random.default_rng(1).beta(5, 2, size=400)
    half = 1.96 * means.std() / np.sqrt(len(means))
    low, high = bootstrap_ci95(means)
    assert low == pytest.approx(means.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(means.mean() + half, abs=0.06 * half)


def test_the_interval_of_zeros_and_ones_is_the_binomials() -> None:
    """A resample's sum is binomial(100, ½), whose 2.5 % and 97.5 % points are 40 and 60."""
    assert bootstrap_ci95([0.0, 1.0] * 50) == pytest.approx((0.4, 0.6), abs=0.0101)


def test_the_interval_is_deterministic_and_leaves_numpys_state_alone() -> None:
    means = np.random.default_rng(2).random(20)
    np.random.seed(0)  # noqa: NPY002  # the global state is what must not matter
    first, drawn = bootstrap_ci95(means), np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert drawn == np.random.random()  # noqa: NPY002
    assert bootstrap_ci95(means) == first


def test_an_interval_takes_memory_for_some_resamples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is that of all drawn at once."""
    rng = np.random.default_rng(1)
    first, second = rng.random(50), rng.random(7)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(10_000, len(values)))].mean(axis=1) for values in (first, second)]
    monkeypatch.setattr(metrics, "MOST_RESAMPLED", 1_000)
    tracemalloc.start()
    found = bootstrap_ci95(first), bootstrap_difference_ci95(first, second)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == tuple(tuple(np.percentile(of, [2.5, 97.5])) for of in (means[0], means[0] - means[1]))
    assert peak < 2**20  # at once they would be 8 MB


# Summaries

PIXELS = 16


def score(task: str, *intersections_unions: tuple[int, int], before: tuple[int, int] = (0, 4)) -> Score:
    """A score of images of 16 pixels with these object intersections and unions."""

    def rows(pairs: list[tuple[int, int]]) -> np.ndarray:
        return np.array([[i, u, PIXELS - u, PIXELS - i] for i, u in pairs], dtype=np.float64)

    after = rows(list(intersections_unions))
    return Score(
        task=task,
        steps=(0, 3),
        counts=np.stack([rows([before] * len(intersections_unions)), after]),
        losses=np.array([9.0, 0.25]),
        support_counts=after,
        support_loss=0.125,
    )


@pytest.fixture
def evaluation() -> Evaluation:
    """Task a in two draws, b in one, so that tasks and images weigh differently."""
    return Evaluation(
        [
            score("a", (1, 2), (0, 4)),  # IoU 1/2 and 0
            score("b", (2, 8), (2, 8), before=(4, 4)),  # 1/4 and 1/4
            score("a", (4, 4), (1, 4)),  # 1 and 1/4
        ]
    )


def test_iou_averages_images_then_draws_then_tasks(evaluation: Evaluation) -> None:
    task_a = ((1 / 2 + 0) / 2 + (1 + 1 / 4) / 2) / 2
    assert evaluation.task_ious == pytest.approx([task_a, 1 / 4], abs=1e-6)
    assert evaluation.iou == pytest.approx((task_a + 1 / 4) / 2, abs=1e-6)  # 0.34375, not the images' 0.375


def test_iou_before_adaptation(evaluation: Evaluation) -> None:
    assert evaluation.iou_before == pytest.approx((0 + 1) / 2, abs=1e-6)


def test_miou_class_accumulates_pixels_within_a_class(evaluation: Evaluation) -> None:
    assert evaluation.miou_class == pytest.approx((6 / 14 + 4 / 16) / 2, abs=1e-6)


def test_fb_iou_accumulates_pixels_over_everything(evaluation: Evaluation) -> None:
    object_, background = 10 / 30, (6 * PIXELS - 30) / (6 * PIXELS - 10)
    assert evaluation.fb_iou == pytest.approx((object_ + background) / 2, abs=1e-6)


def test_the_three_differ(evaluation: Evaluation) -> None:
    found = evaluation.metrics()
    assert len({round(found[name], 3) for name in ("iou", "miou_class", "fb_iou")}) == 3


def test_the_interval_resamples_tasks(evaluation: Evaluation) -> None:
    """Of two tasks, a quarter of the resamples has each of them twice: the interval ends at their means."""
    assert evaluation.ci95 == pytest.approx((0.25, 0.4375), abs=1e-6)


def test_the_order_of_the_episodes_does_not_matter(evaluation: Evaluation) -> None:
    backwards = Evaluation(evaluation.scores[::-1])
    for name in ("iou", "miou_class", "fb_iou", "iou_before_adaptation"):
        assert backwards.metrics()[name] == pytest.approx(evaluation.metrics()[name])


def test_the_summary_is_what_results_json_asks_for() -> None:
    result = Evaluation([score(task, (2, 4)) for _ in range(2) for task in ("a", "b", "c")]).summary()
    assert (result["tasks"], result["draws"]) == (3, 2)
    assert result["iou"] == {"mean": pytest.approx(0.5), "ci95": [pytest.approx(0.5), pytest.approx(0.5)]}
    assert result["loss"] == {"mean": 0.25, "ci95": [0.25, 0.25]}
    assert result["gap_within_task"]["loss"] == {"mean": 0.125, "ci95": [0.125, 0.125]}
    numbers = {"tasks", "draws", "iou", "loss", "miou_class", "fb_iou", "iou_before_adaptation", "steps"}
    assert result.keys() == numbers | {"gap_within_task", "course", "diverged"}


def test_one_row_an_episode(evaluation: Evaluation, tmp_path: Path) -> None:
    write_csv(evaluation.rows(), tmp_path / "per_task.csv")
    with (tmp_path / "per_task.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["draw"]) for row in rows] == [("a", "0"), ("b", "0"), ("a", "1")]
    assert [float(row["iou"]) for row in rows] == pytest.approx([0.25, 0.25, 0.625], abs=1e-6)
    assert [float(row["iou_before_adaptation"]) for row in rows] == pytest.approx([0, 1, 0], abs=1e-6)
    assert [float(row["loss"]) for row in rows] == [0.25] * 3
    assert [(row["support_loss"], row["steps"]) for row in rows] == [("0.125", "3")] * 3
