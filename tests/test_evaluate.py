"""Evaluation over a loader."""

import resource

import torch
from test_adapt import Net
from test_module import INNER, Source

from metaseg.adapt import Adapter
from metaseg.data.episodes import EvaluationEpisodes, episode_loader
from metaseg.evaluate import evaluate


def test_many_episodes_from_a_worker_hold_no_files_open() -> None:
    """What a worker sends lies in shared memory, a file each, for as long as anything refers to it."""
    episodes = EvaluationEpisodes(Source(), "val", ["val-0"], INNER, shots=2, queries=2, draws=60, seed=0)
    net = Net()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        done = evaluate(net, episode_loader(episodes, workers=1), Adapter(net, INNER), title="test", examples=3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(done.scores) == 60
    assert len(done.examples) == 3
    assert torch.equal(done.examples[1].episode.query.images, episodes[1].query.images)
