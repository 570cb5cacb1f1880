"""The meta-training loop in Lightning: the outer step, its schedule, and resuming."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from test_adapt import Net
from torch.optim import SGD, Adam

from metaseg.algos import Reptile
from metaseg.data.datamodule import EpisodeData
from metaseg.data.episodes import EvaluationEpisodes, TrainingEpisodes
from metaseg.engine import Fast, auto
from metaseg.engine.flat import flat, flat_statistics
from metaseg.evaluate import Scoring
from metaseg.module import MetaModule, linear
from metaseg.update import Update

META_BATCH, STEPS = 2, 6
INNER = Update(partial(SGD), lr=0.1, steps=2, batch_size=3, dropout=0.5, augment=0.5)


class Source:
    """Three tasks a split of random images; the object is where a channel of its own is bright."""

    name, image_size = "random", 32

    def names(self, split: str) -> list[str]:
        return [f"{split}-{i}" for i in range(3)]

    def count(self, task: str) -> int:
        return 6

    def load(self, task: str, which: list[int]) -> tuple[np.ndarray, np.ndarray]:
        channel = int(task[-1])
        rngs = [np.random.default_rng([channel, i]) for i in which]
        images = np.stack([rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for rng in rngs])
        return images, (images[..., channel] > 128).astype(np.uint8)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def make_module(net: Net, outer: object = partial(Adam, lr=0.01), max_dropped: float = 0.0) -> MetaModule:
    return MetaModule(
        net,
        Reptile(shots=4),
        inner=INNER,
        engine=auto,
        outer=outer,
        final_lr=0.0,
        meta_steps=STEPS,
        meta_batch=META_BATCH,
        max_dropped=max_dropped,
        about={},
        training={},
    )


def make_data(net: Net, workers: int = 0) -> EpisodeData:
    source = Source()
    training = TrainingEpisodes(partial(Reptile(shots=4).episode, source, INNER, 7), STEPS * META_BATCH)
    held_out = EvaluationEpisodes(source, "val", ["val-0"], INNER, shots=2, queries=2, draws=1, seed=0)
    return EpisodeData(training, Scoring(net, held_out, INNER, auto), meta_batch=META_BATCH, workers=workers)


def fit(
    folder: Path, steps: int, resume: Path | None = None, workers: int = 0, **module: object
) -> tuple[MetaModule, Path]:
    learner = make_module(make_net(), **module)
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=2,
        num_sanity_val_steps=0,
        inference_mode=False,
    )
    trainer.fit(learner, make_data(learner.net, workers), ckpt_path=resume, weights_only=True)
    return learner, folder


def test_meta_step_size_falls_linearly_to_its_end() -> None:
    factor = linear(start=0.1, end=1e-5, steps=50)
    assert 0.1 * factor(0) == pytest.approx(0.1)
    assert 0.1 * factor(49) == pytest.approx(1e-5)
    assert 0.1 * factor(7) - 0.1 * factor(8) == pytest.approx((0.1 - 1e-5) / 49)
    assert linear(start=1.0, end=0.0, steps=1)(0) == 1.0


def test_a_meta_step_moves_theta_by_epsilon_to_the_mean_of_the_adapted_weights(tmp_path: Path) -> None:
    learner, _ = fit(tmp_path, steps=1, outer=partial(SGD, lr=0.25))
    theta, adapt, data = make_net(), Fast(make_net(), INNER), make_data(make_net())
    adapted, statistics = [], []
    for i in range(META_BATCH):
        adapt(theta, data.training[i])
        adapted.append(adapt.vector().clone())
        statistics.append(adapt.statistics().clone())
    start = flat(theta)
    torch.testing.assert_close(flat(learner.net), start + 0.25 * (torch.stack(adapted).mean(0) - start))
    torch.testing.assert_close(flat_statistics(learner.net), torch.stack(statistics).mean(0))


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", STEPS)
    for stop in (1, 3, 5):
        _, folder = fit(tmp_path / str(stop), stop)
        resumed, _ = fit(tmp_path / f"{stop}-on", STEPS, resume=folder / f"step={stop}.ckpt")
        for (name, ours), theirs in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), (stop, name)


def test_loader_workers_change_nothing(tmp_path: Path) -> None:
    alone, _ = fit(tmp_path / "0", 2)
    helped, _ = fit(tmp_path / "2", 2, workers=2)
    assert torch.equal(flat(alone.net), flat(helped.net))


def test_working_copies_are_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    _, folder = fit(tmp_path, 1)
    state = torch.load(folder / "step=1.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"net.{key}" for key in make_net().state_dict()}
