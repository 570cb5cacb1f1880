"""Meta-training and what follows it: θ brought about, validated, tested, reported."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger

from metaseg.algos import Algorithm
from metaseg.card import write_card
from metaseg.checkpoints import BestCheckpoint, CheckpointFiles, LastCheckpoint, StopOnSignal
from metaseg.config import device_of, training_values
from metaseg.data.datamodule import EpisodeData
from metaseg.data.episodes import TrainingEpisodes
from metaseg.data.source import SPLITS, Split
from metaseg.errors import ConfigError
from metaseg.evaluate import Evaluation, evaluate
from metaseg.initialisation import About, load_initialisation, save_initialisation
from metaseg.job import Job, create, describe, load, scoring, splits_to_score
from metaseg.module import MetaModule
from metaseg.ranks import leads
from metaseg.report import MetaProgressBar, report
from metaseg.update import Update


def train_and_test(job: Job, loggers: Sequence[Logger], folder: Path) -> float:
    """Bring θ about, estimate its error with ω, report both; returns the headline metric."""
    started = time.perf_counter()
    about = initialise(job, loggers, folder)
    return headline(test(job, about, loggers, folder, started)[0])


def test(
    job: Job, about: About, loggers: Sequence[Logger], folder: Path, started: float, **more: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Estimate the error of the θ in `job.net` with ω, and report both.

    Args:
        job: what ran.
        about: what is known of θ.
        loggers: of the run.
        folder: of the run.
        started: when, by `time.perf_counter`.
        more: for the head of results.json.

    Returns:
        What results.json and per_task.csv hold; of the former the splits' numbers alone on ranks that do not lead.
    """
    if leads(job.config):
        save_initialisation(job.net, about, folder / "init.safetensors")  # already now: testing may be interrupted
    job.net.to(device_of(job.config))
    update, validations, evaluations = score(job)
    rows = list(evaluations.values())[-1].rows()
    if not leads(job.config):
        return {split: evaluations[split].summary() if split in evaluations else None for split in SPLITS}, rows
    about = replace(about, update={**about.update, "lr": update.lr})
    save_initialisation(job.net, about, folder / "init.safetensors")
    head = {
        **describe(job, about),
        "wall_s": round(time.perf_counter() - started, 1),
        "val_iou_by_lr": {f"{lr:g}": evaluation.iou for lr, evaluation in validations.items()},
        **more,
    }
    results = report(head, evaluations, loggers, folder)
    write_card(folder / "init.safetensors")
    return results, rows


def headline(results: Mapping[str, Any]) -> float:
    """Mean IoU on the test tasks of a results.json; on the validation tasks if it has none. In [0, 1]."""
    return float((results["test"] or results["val"])["iou"]["mean"])


def initialise(job: Job, loggers: Sequence[Logger], folder: Path) -> About:
    """Bring θ into `job.net`: meta-train it, or load it, or leave it as it is; returns what is known of it then."""
    if job.algo and job.inner:
        last = LastCheckpoint(folder / "checkpoints", job.config.checkpoint_every)
        stop = StopOnSignal(folder / "checkpoints")
        return load_initialisation(job.net, fit(job, job.algo, job.inner, loggers, folder, last, stop), job.about.model)
    return load(job)


def fit(job: Job, algo: Algorithm, inner: Update, loggers: Sequence[Logger], folder: Path, *more: Callback) -> Path:
    """Meta-train, with `more` callbacks; returns the checkpoint with the best validation IoU."""
    config, steps = job.config, job.config.trainer.max_steps
    module = MetaModule(
        job.net,
        algo,
        inner=inner,
        engine=job.engine,
        outer=create(config.algo.outer),
        final_lr=config.algo.final_lr,
        meta_steps=steps,
        meta_batch=config.algo.meta_batch,
        max_dropped=config.max_dropped,
        about=asdict(job.about),
        training=training_values(config),
    )
    data = EpisodeData(
        TrainingEpisodes(partial(algo.episode, job.source, inner, config.seed), steps * config.algo.meta_batch),
        scoring(job, "val", job.update),
        meta_batch=config.algo.meta_batch,
        workers=config.workers,
    )
    best = BestCheckpoint(folder / "checkpoints")
    for leftover in (folder / "checkpoints").glob("*.partial"):
        leftover.unlink(missing_ok=True)  # of a process that was killed while it wrote
    trainer = create(
        config.trainer,
        callbacks=[best, *more, MetaProgressBar()],
        plugins=[CheckpointFiles()],
        logger=loggers,
        default_root_dir=folder,
        use_distributed_sampler=False,  # ours knows the ranks
        check_val_every_n_epoch=None,
        val_check_interval=validation_interval(steps, config.evaluate.validations),
        num_sanity_val_steps=0,
        inference_mode=False,  # validation adapts, which needs gradients
        enable_model_summary=False,
    )
    if trainer.world_size > config.algo.meta_batch:
        raise ConfigError(
            f"{trainer.world_size} processes share a meta-batch of algo.meta_batch={config.algo.meta_batch} episodes: "
            f"give algo.meta_batch={trainer.world_size} or more, or fewer trainer.devices"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated")  # its successor is too new
        warnings.filterwarnings("ignore", message=".*sync_dist=True")  # every rank has the scores of all tasks
        # ours is: the sampler starts from the trainer's meta-step
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
        warnings.filterwarnings("ignore", module="pytorch_lightning.utilities._pytree")  # Lightning's own affair
        trainer.fit(module, data, ckpt_path=config.ckpt_path, weights_only=True)
    return Path(best.best_model_path)


def validation_interval(steps: int, validations: int) -> int:
    """Meta-steps from one validation to the next: at most `validations` in all, the last one at the very end."""
    return next(n for n in range(math.ceil(steps / validations), steps + 1) if steps % n == 0)


def score(job: Job) -> tuple[Update, dict[float, Evaluation], dict[Split, Evaluation]]:
    """Validate each candidate for ω's learning rate, and estimate Err(θ, ω) of the best on all splits.

    Returns:
        ω with the chosen learning rate, the validations by learning rate, and the evaluations by split.
    """
    config = job.config

    def on(split: Split, candidate: Update) -> Evaluation:
        title = f"{split}, update.lr={candidate.lr:g}"
        scored = scoring(job, split, candidate, config.evaluate.rungs)
        return evaluate(scored, title=title, examples=config.evaluate.panels)

    splits = splits_to_score(config, job.source)
    candidates = [replace(job.update, lr=lr) for lr in config.evaluate.lrs or [job.update.lr]]
    validations = {candidate.lr: on("val", candidate) for candidate in candidates if "val" in splits}
    chosen = candidates[0]
    if validations:
        chosen = max(candidates, key=lambda candidate: validations[candidate.lr].iou)
    done = {split: validations[chosen.lr] if split == "val" else on(split, chosen) for split in splits}
    return chosen, validations, done
