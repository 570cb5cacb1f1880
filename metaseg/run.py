"""The entry: compose → check → meta-train → test → report. `python -m metaseg.run algo=reptile`."""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import Logger
from torch import nn

from metaseg.adapt import Engine
from metaseg.algos import Algorithm
from metaseg.checkpoints import BestCheckpoint, LastCheckpoint
from metaseg.config import check, check_overrides, config_dir, config_sha256, inner_config, make_update, trains
from metaseg.data.datamodule import EpisodeData
from metaseg.data.episodes import EvaluationEpisodes, TrainingEpisodes, choose_tasks
from metaseg.data.source import Split, TaskSource, splits_sha256
from metaseg.errors import UserError
from metaseg.evaluate import Evaluation, Scoring, evaluate
from metaseg.initialisation import About, check_resumable, load_initialisation, save_initialisation
from metaseg.module import MetaModule
from metaseg.report import MetaProgressBar, close_loggers, make_loggers, report
from metaseg.seeding import torch_seed
from metaseg.update import Update


@dataclass(frozen=True)
class Job:
    """What a configuration asks for, built and checked before anything is written.

    Attributes:
        config: composed.
        source: the data set.
        net: θ's network, as initialised.
        update: ω, but for the choice of its learning rate.
        algo: None if there is nothing to train.
        inner: ω while meta-training; None likewise.
        engine: how inner steps are computed.
        about: what is known of θ.
    """

    config: DictConfig
    source: TaskSource
    net: nn.Module
    update: Update
    algo: Algorithm | None
    inner: Update | None
    engine: Engine
    about: About


def run(config: DictConfig, folder: Path) -> float:
    """Do what a composed configuration says, and leave the results in `folder`.

    Returns:
        The headline metric: mean IoU on the test tasks; on the validation tasks for mode=fit. In [0, 1].

    Raises:
        UserError: saying what to change; before anything is written, if it could be known.
    """
    started = time.perf_counter()
    job = build(config)
    (folder / "results.json").unlink(missing_ok=True)  # of an earlier run here: what stands there shall be this one's
    loggers = make_loggers(config, folder)
    exit_code = 1
    try:
        about = initialise(job, loggers, folder)
        save_initialisation(job.net, about, folder / "init.safetensors")  # already now: testing may be interrupted
        job.net.to(device_of(config))
        update, validations, test = score(job)
        about = replace(about, update={**about.update, "lr": update.lr})
        head = {
            "config_sha256": config_sha256(config),
            "algo": about.algo,
            "dataset": job.source.name,
            "splits_sha256": splits_sha256(job.source),
            "shots": config.evaluate.shots,
            "episodes": {  # with the splits and the shots, what they were drawn from
                "seed": config.evaluate.seed,
                "queries": config.evaluate.queries,
                "draws": config.evaluate.draws,
                "image_size": job.source.image_size,
                "images": sum(
                    job.source.count(task)
                    for split in splits_to_score(config, job.source)
                    for task in job.source.names(split)
                ),
                "data_seed": config.dataset.get("seed"),  # of data that are drawn themselves
            },
            "update": about.update,
            "batchnorm": update.batchnorm,
            "seed": about.seed,
            "meta_steps": about.meta_steps,
            "device": device_of(config).type,
            "engine": plain(config.engine),
            "wall_s": round(time.perf_counter() - started, 1),
            "val_iou_by_lr": {f"{lr:g}": evaluation.iou for lr, evaluation in validations.items()},
        }
        save_initialisation(job.net, about, folder / "init.safetensors")
        report(head, validations.get(update.lr), test, loggers, folder)
        exit_code = 0
    finally:
        close_loggers(loggers, exit_code)
    headline = test or validations[update.lr]
    return headline.iou


def build(config: DictConfig) -> Job:
    """Check a configuration, and make what it names."""
    check(config)
    source: TaskSource = create(config.dataset)
    update = make_update(config["update"])
    for split in splits_to_score(config, source):
        evaluation_episodes(config, source, split, update)  # scarce data fail now, not when the split is reached
    algo = inner = None
    if trains(config):
        algo, inner = create(config.algo.method), make_update(inner_config(config), "algo.inner")
        algo.check(source, inner)
    with torch_seed(config.seed):
        # a checkpoint brings its weights along: no need for those that training began with
        weights = {} if config.ckpt_path is None else {"weights": None}
        net = create(config.model, **weights)
    about = About(
        model=plain(config.model),
        algo=config.algo.name,
        dataset=source.name,
        splits_sha256=splits_sha256(source),
        seed=config.seed,
        meta_steps=0,
        update=plain(config["update"]),
    )
    if algo and config.ckpt_path is not None:
        check_resumable(Path(config.ckpt_path), about)
    return Job(config, source, net, update, algo, inner, create(config.engine), about)


def initialise(job: Job, loggers: Sequence[Logger], folder: Path) -> About:
    """Bring θ into `job.net`: meta-train it, or load it, or leave it as it is; returns what is known of it then."""
    if job.algo and job.inner:
        return load_initialisation(job.net, fit(job, job.algo, job.inner, loggers, folder), job.about.model)
    if job.config.ckpt_path is not None:
        about = load_initialisation(job.net, Path(job.config.ckpt_path), job.about.model)
        return replace(about, update=job.about.update)
    return job.about


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
    trainer = create(
        config.trainer,
        callbacks=[best, last, MetaProgressBar()],
        logger=loggers,
        default_root_dir=folder,
        check_val_every_n_epoch=None,
        val_check_interval=validation_interval(steps, config.evaluate.validations),
        num_sanity_val_steps=0,
        inference_mode=False,  # validation adapts, which needs gradients
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # ours is: the sampler starts from the trainer's meta-step
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
        warnings.filterwarnings("ignore", module="pytorch_lightning.utilities._pytree")  # Lightning's own affair
        trainer.fit(module, data, ckpt_path=config.ckpt_path, weights_only=True)
    return Path(best.best_model_path)


def splits_to_score(config: DictConfig, source: TaskSource) -> list[Split]:
    """The splits whose episodes the run needs: test unless mode=fit; val unless it is empty and decides nothing."""
    needs_val = trains(config) or config.evaluate.lrs or source.names("val")
    splits: dict[Split, bool] = {"val": bool(needs_val), "test": config.mode != "fit"}
    return [split for split, needed in splits.items() if needed]


def validation_interval(steps: int, validations: int) -> int:
    """Meta-steps from one validation to the next: at most `validations` in all, the last one at the very end."""
    return next(n for n in range(math.ceil(steps / validations), steps + 1) if steps % n == 0)


def score(job: Job) -> tuple[Update, dict[float, Evaluation], Evaluation | None]:
    """Validate each candidate for ω's learning rate, and test the best.

    Returns:
        ω with the chosen learning rate, the validations by learning rate, and the test (None for mode=fit).
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
    return chosen, validations, on("test", chosen) if "test" in splits else None


def evaluation_episodes(config: DictConfig, source: TaskSource, split: Split, update: Update) -> EvaluationEpisodes:
    """The split's fixed episodes."""
    e = config.evaluate
    tasks = choose_tasks(source, split, e.val_tasks if split == "val" else e.test_tasks, e.seed)
    return EvaluationEpisodes(
        source, split, tasks, update, shots=e.shots, queries=e.queries, draws=e.draws, seed=e.seed
    )


def scoring(job: Job, split: Split, update: Update) -> Scoring:
    """The evaluation of θ on a split by ω, yet to be iterated over."""
    config = job.config
    return Scoring(
        job.net,
        evaluation_episodes(config, job.source, split, update),
        update,
        job.engine,
        processes=config.evaluate.processes,
        workers=config.workers,
    )


def device_of(config: DictConfig) -> torch.device:
    """Where the trainer would put the network."""
    wants = config.trainer.accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if wants and torch.cuda.is_available() else "cpu")


def create(config: DictConfig, **more: Any) -> Any:
    """Instantiate, raising what the constructor raised instead of Hydra's wrapping of it."""
    try:
        return instantiate(config, **more)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration in plain containers."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(config: DictConfig) -> float:
    # launchers pickle this function by value: it must not close over anything of this module
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from metaseg.run import run

    return run(config, Path(HydraConfig.get().runtime.output_dir))


def launch(hydra_main: Callable[[], Any]) -> None:
    """Run a Hydra main; what the user can mend ends in its message alone, anything else in its whole traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors come out of Hydra as they are
    try:
        check_overrides(sys.argv[1:])
        hydra_main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"metaseg: {error}")


def main() -> None:
    """Run from the command line."""
    launch(_hydra_main)


if __name__ == "__main__":
    main()
