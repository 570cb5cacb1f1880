"""What a configuration asks for, built and checked before any work begins."""

import hashlib
import json
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from metaseg.adapt import Engine
from metaseg.algos import Algorithm
from metaseg.config import check, config_sha256, device_of, inner_config, make_update, plain, training_values, trains
from metaseg.data.episodes import EvaluationEpisodes, choose_tasks
from metaseg.data.source import SPLITS, Split, TaskSource, image_counts, splits_sha256, task_ids
from metaseg.errors import ConfigError, UserError, WeightsError
from metaseg.evaluate import Scoring
from metaseg.initialisation import About, check_about, check_held_out, check_resumable, load_initialisation, read_about
from metaseg.seeding import torch_seed
from metaseg.space import distributions, ends, training_distributions
from metaseg.update import Update

# what Python and its libraries raise over values that they cannot work with
_OF_WRONG_KINDS = (
    InstantiationException,
    TypeError,
    ValueError,
    AttributeError,
    ImportError,
    RuntimeError,
    OverflowError,
)


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


def build(config: DictConfig) -> Job:
    """Check a configuration, and make what it names."""
    check(config)
    source: TaskSource = create(config.dataset)
    update = make_update(config["update"])
    for split in splits_to_score(config, source):
        evaluation_episodes(config, source, split, update)  # scarce data fail now, not when the split is reached
    largest = searched_largest(config, update)
    algo = inner = None
    if trains(config):
        algo, inner = create(config.algo.method), make_update(inner_config(config), "algo.inner")
        algo.check(source, inner)
    with torch_seed(config.seed):
        # a checkpoint brings its weights along, and curves theirs: no need for those that training began with
        weights = {} if config.ckpt_path is None and config.mode != "curves" else {"weights": None}
        net = create(config.model, **weights)
    about = About(
        model=plain(config.model),
        algo=config.algo.name,
        dataset=source.name,
        splits_sha256=splits_sha256(source),
        seed=config.seed,
        meta_steps=0,
        update=plain(config["update"]),
        seen=tasks_seen(config, source),
        image_size=source.image_size,
    )
    try:
        for values in ({}, largest):
            check_about(replace(about, update={**about.update, **values}))
    except ValueError as error:
        raise ConfigError(f"a file of this run's θ could not be read again: {error}") from error
    for init in config.curves.inits.values() if config.mode == "curves" else ():
        if init not in ("imagenet", "random"):
            load_initialisation(net, Path(str(init)), about.model)  # again later; now what does not fit costs nothing
    tested, theta = about, f"model.weights={config.model.get('weights')}"
    if config.ckpt_path is not None:
        path = Path(config.ckpt_path)
        if algo:
            check_resumable(path, about, training_values(config))
        loaded = load_initialisation(net, path, about.model)  # likewise
        if not algo:
            tested, theta = loaded, f"ckpt_path={path}"
    check_held_out(tested, source, splits_to_score(config, source), theta)
    return Job(config, source, net, update, algo, inner, create(config.engine), about)


def searched_largest(config: DictConfig, update: Update) -> dict[str, int]:
    """The steps and the batch size, at most, of the ω that a search may find; empty if they are not searched.

    Raises:
        ConfigError: if its space is none.
    """
    if config.mode == "uho":
        space = distributions(config.uho.space, update)
        sizes = ends(space["batch_size"]) if "batch_size" in space else [update.batch_size]
        return {"steps": max(*config.uho.steps, update.steps), "batch_size": max(sizes)}
    if config.mode == "search":
        space = training_distributions(config)
        return {
            name: max(ends(space[f"update.{name}"])) for name in ("steps", "batch_size") if f"update.{name}" in space
        }
    return {}


def tasks_seen(config: DictConfig, source: TaskSource) -> dict[str, list[str]]:
    """`About.seen` of a θ that this run makes: its own tasks, and those of the θ that it begins from."""
    seen: dict[str, list[str]] = {"train": [], "val": []}
    if config.model.get("weights") not in (None, "imagenet"):
        with suppress(WeightsError):  # weights that are not metaseg's own saw none of its tasks
            seen |= read_about(Path(config.model.weights).expanduser()).seen or {}
    if trains(config):
        seen = {split: sorted({*seen[split], *task_ids(source, split)}) for split in ("train", "val")}
    return seen


def load(job: Job) -> About:
    """Bring the weights of `ckpt_path` into `job.net`, if there is one; returns what is known of θ."""
    if job.config.ckpt_path is None:
        return job.about
    about = load_initialisation(job.net, Path(job.config.ckpt_path), job.about.model)
    return replace(about, update=job.about.update)


def splits_to_score(config: DictConfig, source: TaskSource) -> list[Split]:
    """The splits whose error the run estimates.

    Train if θ learned from tasks that there are, and ω is not searched; val unless it is empty and decides nothing;
    test unless mode=fit.
    """
    if config.mode == "curves":
        return []  # it has episodes of its own
    wanted = config.algo.method is not None and config.evaluate.train_tasks != 0 and config.mode != "uho"
    learned = wanted and source.names("train")
    needs_val = trains(config) or config.evaluate.lrs or config.mode == "uho" or source.names("val")
    splits: dict[Split, bool] = {"train": bool(learned), "val": bool(needs_val), "test": config.mode != "fit"}
    return [split for split, needed in splits.items() if needed]


def evaluation_episodes(config: DictConfig, source: TaskSource, split: Split, update: Update) -> EvaluationEpisodes:
    """The split's fixed episodes."""
    e = config.evaluate
    tasks = choose_tasks(source, split, e[f"{split}_tasks"], e.seed)
    return EvaluationEpisodes(
        source, split, tasks, update, shots=e.shots, queries=e.queries, draws=e.draws, seed=e.seed
    )


def scoring(job: Job, split: Split, update: Update, rungs: Sequence[int] = ()) -> Scoring:
    """The evaluation of θ on a split by ω, yet to be iterated over; scored at `rungs` on the way, too."""
    return scoring_of(job, job.net, evaluation_episodes(job.config, job.source, split, update), update, rungs)


def scoring_of(
    job: Job, net: nn.Module, episodes: EvaluationEpisodes, update: Update, rungs: Sequence[int] = ()
) -> Scoring:
    """Likewise of any network, on any episodes, with the job's engine."""
    processes, workers = job.config.evaluate.processes, job.config.workers
    return Scoring(net, episodes, update, job.engine, rungs=rungs, processes=processes, workers=workers)


def describe(job: Job, about: About) -> dict[str, Any]:
    """What ran on what, for the head of results.json.

    `dataset` and `splits_sha256` are of the tested source; what θ was meta-trained on, if it was, is `trained_on`.
    """
    config, e = job.config, job.config.evaluate
    trained_on = {"dataset": about.dataset, "splits_sha256": about.splits_sha256} if about.meta_steps else None
    return {
        "config_sha256": config_sha256(config),
        "mode": config.mode,
        "algo": about.algo,
        "dataset": job.source.name,
        "splits_sha256": splits_sha256(job.source),
        "trained_on": trained_on,
        "episodes": {  # with the splits and the shots, what they were drawn from
            "seed": e.seed,
            "queries": e.queries,
            "draws": e.draws,
            "image_size": job.source.image_size,
            "images": sum(int(image_counts(job.source, split).sum()) for split in SPLITS),
            "data_seed": config.dataset.get("seed"),  # of data that are drawn themselves
        },
        "shots": e.shots,
        "update": about.update,
        "batchnorm": about.update["batchnorm"],
        "seed": about.seed,
        "meta_steps": about.meta_steps,
        "device": device_of(config).type,
        "engine": plain(config.engine),
    }


def fingerprint(job: Job) -> str:
    """SHA-256 (hex) of what decides a search's numbers: θ and its network, tasks and episodes, ω, engine and space.

    For mode=search meta-training too. Not of how long the search shall go on and by how many workers, where it is
    kept, and which test tasks are met at its end.
    """
    config = plain(job.config)
    mode, e = config["mode"], config["evaluate"]
    named = {key: config[key] for key in ("dataset", "update", "engine")}
    named["model"] = {key: value for key, value in config["model"].items() if key != "weights"}
    named[mode] = {key: value for key, value in config[mode].items() if key not in ("trials", "storage", "workers")}
    named["evaluate"] = {key: e[key] for key in ("shots", "queries", "draws", "val_tasks", "seed")}
    if mode == "search":
        named |= {key: config[key] for key in ("algo", "seed")}
        named |= {"validations": e["validations"], "max_steps": config["trainer"]["max_steps"]}
    named["splits"] = job.about.splits_sha256
    named["images"] = {
        task: count
        for split in SPLITS
        for task, count in zip(job.source.names(split), image_counts(job.source, split).tolist(), strict=True)
    }
    named["dataset"] = {  # the same data may lie elsewhere
        key: value
        for key, value in named["dataset"].items()
        if key not in ("cache_dir", "workers") and not key.endswith("root")
    } | {"image_size": job.source.image_size}  # which a configuration may leave to the data
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    for name, tensor in sorted(job.net.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def create(config: DictConfig, **more: Any) -> Any:
    """Instantiate, raising what the constructor raised instead of Hydra's wrapping of it.

    Raises:
        ConfigError: in place of Python's own errors over values of wrong kinds.
    """
    try:
        return instantiate(config, **more)
    except (InstantiationException, TypeError) as error:  # TypeError: a flag as _partial_ is none
        cause = error.__cause__ or error
        if isinstance(cause, UserError) or not isinstance(cause, _OF_WRONG_KINDS):
            raise cause from None
        place = traceback.extract_tb(cause.__traceback__)[-1]
        raise ConfigError(
            f"{config.get('_target_')} cannot be made of {plain(config)}: mend what is of a wrong kind or names "
            f"nothing ({type(cause).__name__}: {cause}; {Path(place.filename).name}:{place.lineno})"
        ) from cause
