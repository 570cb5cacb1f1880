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
from metaseg.evaluate import Scoring, evaluate
from metaseg.panels import overlay


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


def test_an_overlay_shows_the_object_and_pales_the_rest() -> None:
    image = np.full((7, 7, 3), 100, np.uint8)
    mask = np.zeros((7, 7), np.uint8)
    mask[1:6, 1:6] = 1
    shown = overlay(image, mask, (255, 0, 0))
    assert (shown[2:5, 2:5] == 100).all()
    assert (shown[1, 1:6] == (255, 0, 0)).all()
    assert (shown[0] == int(0.3 * 100 + 0.7 * 255)).all()
    assert (image == 100).all()
