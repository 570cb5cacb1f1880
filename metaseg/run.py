"""The entry: compose → check → meta-train → test → report. `python -m metaseg.run algo=reptile`."""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import Logger

from metaseg.algos import Algorithm
from metaseg.card import write_card
from metaseg.checkpoints import LAST, AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, StopOnSignal
from metaseg.config import check_overrides, config_dir, expand_update, trains
from metaseg.curves import curves
from metaseg.data.datamodule import EpisodeData
from metaseg.data.episodes import TrainingEpisodes
from metaseg.data.source import Split
from metaseg.errors import ConfigError, UserError
from metaseg.evaluate import Evaluation, evaluate
from metaseg.initialisation import About, load_initialisation, save_initialisation
from metaseg.job import Job, build, create, describe, device_of, load, scoring, splits_to_score
from metaseg.module import MetaModule
from metaseg.ranks import leads
from metaseg.report import MetaProgressBar, close_loggers, make_loggers, report
from metaseg.uho import uho
from metaseg.update import Update


def run(config: DictConfig, folder: Path) -> float:
    """Do what a composed configuration says, and leave the results in `folder`.

    Returns:
        The headline metric: mean IoU on the test tasks; on the validation tasks for mode=fit. In [0, 1].

    Raises:
        UserError: saying what to change; before anything is written, if it could be known.
    """
    config = resumed(config, folder)
    job = build(config)
    for name in ("results.json", "card.md") if leads(config) else ():
        (folder / name).unlink(missing_ok=True)  # of an earlier run here: what stands there shall be this one's
    loggers = make_loggers(config, folder) if leads(config) else []
    exit_code = 1
    try:
        headline = MODES[config.mode](job, loggers, folder)
        exit_code = 0
    finally:
        close_loggers(loggers, exit_code)
    return headline


def resumed(config: DictConfig, folder: Path) -> DictConfig:
    """The configuration, with `ckpt_path=last` as the folder's last checkpoint, or as null if there is none yet.

    Raises:
        ConfigError: if the run does not meta-train.
    """
    if config.ckpt_path != "last":
        return config
    if not trains(config):
        raise ConfigError(
            f"ckpt_path=last resumes meta-training, but mode={config.mode} of this algo has none: name a file"
        )
    last = folder / "checkpoints" / LAST
    return OmegaConf.merge(config, {"ckpt_path": str(last) if last.is_file() else None})  # type: ignore[return-value]


def train_and_test(job: Job, loggers: Sequence[Logger], folder: Path) -> float:
    """Bring θ about, estimate its error with ω, report both; returns the headline metric."""
    started = time.perf_counter()
    about = initialise(job, loggers, folder)
    if leads(job.config):
        save_initialisation(job.net, about, folder / "init.safetensors")  # already now: testing may be interrupted
    job.net.to(device_of(job.config))
    update, validations, evaluations = score(job)
    about = replace(about, update={**about.update, "lr": update.lr})
    headline = evaluations["test" if "test" in evaluations else "val"].iou
    if not leads(job.config):
        return headline
    save_initialisation(job.net, about, folder / "init.safetensors")
    head = {
        **describe(job, about),
        "wall_s": round(time.perf_counter() - started, 1),
        "val_iou_by_lr": {f"{lr:g}": evaluation.iou for lr, evaluation in validations.items()},
    }
    report(head, evaluations, loggers, folder)
    write_card(folder / "init.safetensors")
    return headline


def initialise(job: Job, loggers: Sequence[Logger], folder: Path) -> About:
    """Bring θ into `job.net`: meta-train it, or load it, or leave it as it is; returns what is known of it then."""
    if job.algo and job.inner:
        return load_initialisation(job.net, fit(job, job.algo, job.inner, loggers, folder), job.about.model)
    return load(job)


def fit(job: Job, algo: Algorithm, inner: Update, loggers: Sequence[Logger], folder: Path) -> Path:
    """Meta-train; returns the checkpoint with the best validation IoU."""
    config, steps = job.config, job.config.trainer.max_steps
    module = MetaModule(
        job.net,
        algo,
        inner=inner,
        engine=job.engine,
        outer=create(config.algo.outer),
        final_lr=config.algo.final_lr,
        meta_steps=steps,
        about=asdict(job.about),
    )
    data = EpisodeData(
        TrainingEpisodes(partial(algo.episode, job.source, inner, config.seed), steps * config.algo.meta_batch),
        scoring(job, "val", job.update),
        meta_batch=config.algo.meta_batch,
        workers=config.workers,
    )
    best = BestCheckpoint(folder / "checkpoints")
    last = LastCheckpoint(folder / "checkpoints", config.checkpoint_every)
    for leftover in (folder / "checkpoints").glob("*.partial"):
        leftover.unlink(missing_ok=True)  # of a process that was killed while it wrote
    trainer = create(
        config.trainer,
        callbacks=[best, last, StopOnSignal(folder / "checkpoints"), MetaProgressBar()],
        plugins=[AtomicCheckpointIO()],
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
        return evaluate(scoring(job, split, candidate), title=title, examples=config.evaluate.panels)

    splits = splits_to_score(config, job.source)
    candidates = [replace(job.update, lr=lr) for lr in config.evaluate.lrs or [job.update.lr]]
    validations = {candidate.lr: on("val", candidate) for candidate in candidates if "val" in splits}
    chosen = candidates[0]
    if validations:
        chosen = max(candidates, key=lambda candidate: validations[candidate.lr].iou)
    done = {split: validations[chosen.lr] if split == "val" else on(split, chosen) for split in splits}
    return chosen, validations, done


MODES: dict[str, Callable[[Job, Sequence[Logger], Path], float]] = {
    "fit_test": train_and_test,
    "fit": train_and_test,
    "test": train_and_test,
    "uho": uho,
    "curves": curves,
}


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(config: DictConfig) -> float:
    # launchers pickle this function by value: it must not close over anything of this module
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from metaseg.run import run
    from metaseg.sweep import recorded, sweep_job

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    return sweep_job(config, folder) if hydra.mode == RunMode.MULTIRUN else recorded(run, config, folder)


def launch(hydra_main: Callable[[], Any]) -> None:
    """Run a Hydra main; what the user can mend ends in its message alone, anything else in its whole traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors come out of Hydra as they are
    # of a launcher's preset that has the plugin's own name, which is the name that people know
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    try:
        sys.argv[1:] = expand_update(sys.argv[1:])
        check_overrides(sys.argv[1:])
        hydra_main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"metaseg: {error}")


def main() -> None:
    """Run from the command line."""
    launch(_hydra_main)


if __name__ == "__main__":
    main()
