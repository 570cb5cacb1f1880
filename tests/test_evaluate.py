"""Evaluation over a loader."""

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_adapt import Net
from test_module import INNER, Source

from metaseg.data.episodes import EvaluationEpisodes
from metaseg.engine import auto, reference
from metaseg.evaluate import Evaluation, Score, Scoring, across_tasks, evaluate
from metaseg.pictures import overlay
from metaseg.update import EarlyStopping


def test_many_episodes_from_a_worker_hold_no_files_open() -> None:
    """What a worker sends lies in shared memory, a file each, for as long as anything refers to it."""
    episodes = EvaluationEpisodes(Source(), "val", ["val-0"], INNER, shots=2, queries=2, draws=60, seed=0)
    net = Net()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        done = evaluate(Scoring(net, episodes, INNER, auto, processes=2), title="test", examples=3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(done.scores) == 60
    assert len(done.examples) == 3
    assert torch.equal(done.examples[1].episode.query.images, episodes[1].query.images)


def test_processes_and_engines_score_alike() -> None:
    omega = replace(INNER, dropout=0.0)  # torch's own Dropout, in Net, draws by layout
    episodes = EvaluationEpisodes(Source(), "val", ["val-0", "val-1"], omega, shots=2, queries=2, draws=2, seed=0)
    torch.manual_seed(0)
    net = Net()
    alone, helped = (Scoring(net, episodes, omega, auto, processes=n) for n in (1, 2))
    plain = Scoring(net, episodes, omega, reference)
    rows = [evaluate(scoring, title="test").rows() for scoring in (alone, helped, plain)]
    assert rows[0] == rows[1]
    for ours, truth in zip(rows[0], rows[2], strict=True):
        assert ours["iou"] == pytest.approx(truth["iou"], abs=0.01)
        assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-3)


def counted(*ious: float) -> np.ndarray:
    """Pixel counts of images of these IoUs, shape (images, 4)."""
    return np.array([[1000 * iou, 1000, 500, 1000] for iou in ious])


def score(task: str, before: float, after: float, support: float, losses: tuple[float, float, float]) -> Score:
    counts = np.stack([counted(before, before), counted(after, after)])
    return Score(task, (0, 4), counts, np.array(losses[:2]), counted(support), losses[2])


def test_gaps_are_differences_of_errors() -> None:
    near = Evaluation([score("a", 0.1, 0.8, 0.9, (3, 1, 0.5)), score("b", 0.1, 0.6, 0.9, (3, 2, 0.5))])
    far = Evaluation([score("c", 0.1, 0.5, 0.9, (3, 2.5, 0.5))])
    assert near.within_task["iou"] == pytest.approx([0.1, 0.3])
    assert near.within_task["loss"] == pytest.approx([0.5, 1.5])
    gaps = across_tasks({"train": near, "test": far})
    assert gaps.keys() == {"train_test"}
    gap = gaps["train_test"]["iou"]
    assert gap["mean"] == pytest.approx(0.2)
    assert gap["ci95"] == pytest.approx([0.1, 0.3])  # the resamples of two tasks: both of one, or one each
    assert gaps["train_test"]["loss"]["mean"] == pytest.approx(1.0)


def test_a_score_between_its_steps_is_the_one_before() -> None:
    ious = (0.1, 0.5, 0.96, 1.0)
    counts = np.stack([counted(value) for value in ious])
    one = Score("a", (0, 5, 10, 20), counts, np.zeros(4), counted(1.0), 0.0)
    assert [one.iou_at(step) for step in (0, 4, 5, 12, 500)] == pytest.approx([0.1, 0.1, 0.5, 0.96, 1.0])
    assert one.steps_to(0.95) == 10
    assert one.steps_to(0.97) == 20
    nothing = Score("a", (0, 5, 10), np.stack([counted(0.0)] * 3), np.zeros(3), counted(0.0), 0.0)
    assert nothing.steps_to(0.95) == 10  # what never finds the object is not the quickest


def test_the_course_of_an_adaptation_is_the_mean_over_tasks_at_each_step() -> None:
    """Task a has two draws; b stopped after 2 steps, and stays there."""

    def way(task: str, steps: tuple[int, ...], *ious: float) -> Score:
        losses = np.array([1 - iou for iou in ious])
        return Score(task, steps, np.stack([counted(value) for value in ious]), losses, counted(1.0), 0.0)

    a = [way("a", (0, 2, 6), 0.1, 0.4, 0.8), way("a", (0, 2, 6), 0.3, 0.6, 1.0)]
    course = Evaluation([*a, way("b", (0, 2), 0.0, 0.3)]).course
    assert [at["step"] for at in course] == [0, 2, 6]
    ious = [(0.2 + 0.0) / 2, (0.5 + 0.3) / 2, (0.9 + 0.3) / 2]
    assert [at["iou"] for at in course] == pytest.approx(ious, abs=1e-6)
    assert [at["loss"] for at in course] == pytest.approx([1 - iou for iou in ious], abs=1e-6)


@pytest.mark.parametrize("batchnorm", ["running", "support", "batch"])
def test_a_rung_scores_what_an_adaptation_of_as_many_steps_does(batchnorm: str) -> None:
    """So that one adaptation gives honest scores for all of the shorter ones."""
    torch.manual_seed(0)
    net = Net()
    long, short = (replace(INNER, steps=steps, batchnorm=batchnorm) for steps in (4, 2))
    way, end = (
        evaluate(
            Scoring(
                net,
                EvaluationEpisodes(Source(), "val", ["val-0"], omega, shots=2, queries=2, draws=2, seed=0),
                omega,
                auto,
                rungs=[2],
                processes=1,
            ),
            title="test",
        )
        for omega in (long, short)
    )
    for ladder, direct in zip(way.scores, end.scores, strict=True):
        assert ladder.steps == (0, 2, 4)
        assert direct.steps == (0, 2)
        np.testing.assert_array_equal(ladder.counts[:2], direct.counts)
        np.testing.assert_array_equal(ladder.losses[:2], direct.losses)


def test_early_stopping_reports_the_steps_it_chose() -> None:
    torch.manual_seed(0)
    omega = replace(INNER, steps=6, stopping=EarlyStopping(every=2, patience=2, least=2))
    episodes = EvaluationEpisodes(Source(), "val", ["val-0", "val-1"], omega, shots=4, queries=2, draws=1, seed=0)
    done = evaluate(Scoring(Net(), episodes, omega, auto, rungs=[1], processes=1), title="test")
    for row, score in zip(done.rows(), done.scores, strict=True):
        assert row["steps"] == score.steps[-1]
        assert score.steps[-1] in (2, 4, 6)
        assert score.steps[:2] == (0, 1)
    assert done.steps == np.mean([score.steps[-1] for score in done.scores])


def test_an_overlay_shows_the_object_and_pales_the_rest() -> None:
    image = np.full((7, 7, 3), 100, np.uint8)
    mask = np.zeros((7, 7), np.uint8)
    mask[1:6, 1:6] = 1
    shown = overlay(image, mask, (255, 0, 0))
    assert (shown[2:5, 2:5] == 100).all()
    assert (shown[1, 1:6] == (255, 0, 0)).all()
    assert (shown[0] == int(0.3 * 100 + 0.7 * 255)).all()
    assert (image == 100).all()
