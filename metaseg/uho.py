"""UHO: the search for the update procedure ω* = argmin_ω Err(θ, ω) over validation tasks, θ fixed (arXiv 1912.06290).

Bayesian optimisation: a Gaussian process with expected improvement, Optuna's `GPSampler`. An adaptation is scored at a
ladder of step counts on its way, so a trial's value is its mean IoU at the count that is best for all tasks together.
Each task's own best count, by which the original scored, is an oracle; it is reported apart.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.progress import Progress

from metaseg.errors import ConfigError
from metaseg.evaluate import Score, evaluate
from metaseg.initialisation import save_initialisation
from metaseg.job import Job, describe, device_of, fingerprint, load, plain, scoring
from metaseg.report import report
from metaseg.seeding import derive_seed
from metaseg.update import Update

SEARCHABLE = ("lr", "batch_size", "weight_decay", "dropout", "augment", "batchnorm", "adapts")
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def uho(job: Job, loggers: Sequence[Logger], folder: Path) -> float:
    """Search ω* on validation tasks, then test it once; returns the test tasks' mean IoU, in [0, 1].

    Leaves uho.json, update.yaml (ω*, for `update=PATH`), uho.png and what every run leaves. An interrupted study goes
    on from its storage; one that has its trials is neither searched nor tested again.
    """
    started = time.perf_counter()
    config, space = job.config, distributions(job.config.uho.space)
    default = default_parameters(space, job.update)
    about = load(job)
    job.net.to(device_of(config))
    storage = Path(config.uho.storage or _beside(config, folder))
    study = open_study(storage, fingerprint(job, "uho"), config)
    record: dict[str, Any] | None = study.user_attrs.get("record")
    if record is None or record["trials"] < config.uho.trials:
        search(job, study, space, default)
        best = study.best_trial
        chosen = {**best.params, "steps": best.user_attrs["steps"]}
        update = replace(job.update, **chosen)
        about = replace(about, update={**about.update, **chosen})
        save_initialisation(job.net, about, folder / "init.safetensors")
        panels = config.evaluate.panels
        evaluations = {
            split: evaluate(scoring(job, split, update), title=f"{split}, ω*", examples=panels)
            for split in ("val", "test")
        }
        record = summarise(study, about.update, default) | {
            "storage": str(storage),
            "test": evaluations["test"].summary(),
        }
        study.set_user_attr("record", record)
        head = {**describe(job, about), "wall_s": round(time.perf_counter() - started, 1)}
        report({**head, "uho": record}, evaluations, loggers, folder)  # type: ignore[arg-type]  # keys are splits
    else:
        Console().print(f"the study in {storage} has its trials; uho.trials={config.uho.trials} asks for no more")
    (folder / "uho.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    OmegaConf.save(OmegaConf.create(record["update"]), folder / "update.yaml")
    draw(study, folder / "uho.png")
    Console().print(f"uho.json, uho.png, update.yaml (use it with update=PATH): {folder}", soft_wrap=True)
    return float(record["test"]["iou"]["mean"])


def distributions(space: DictConfig) -> dict[str, BaseDistribution]:
    """Optuna's distributions of a configured space.

    Raises:
        ConfigError: if a name cannot be searched, or a range is none.
    """
    made: dict[str, BaseDistribution] = {}
    for name, entry in plain(space).items():
        if name not in SEARCHABLE:
            raise ConfigError(f"uho.space.{name}: choose from {', '.join(SEARCHABLE)}; steps come from uho.steps")
        try:
            if "choices" in entry:
                made[name] = CategoricalDistribution(entry["choices"])
            elif all(isinstance(entry[end], int) for end in ("low", "high")):
                made[name] = IntDistribution(**entry)
            else:
                made[name] = FloatDistribution(**entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"uho.space.{name}={entry}: give low and high (and log: true), or choices ({error})"
            ) from error
    return made


def default_parameters(space: Mapping[str, BaseDistribution], update: Update) -> dict[str, Any]:
    """The configured ω as a point of the space: the first trial, so that the search never ends below it.

    Raises:
        ConfigError: if it lies outside.
    """
    values = {name: getattr(update, name) for name in space}
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            inside = values[name] in distribution.choices
        else:
            assert isinstance(distribution, FloatDistribution | IntDistribution)
            inside = distribution.low <= values[name] <= distribution.high
        if not inside:
            raise ConfigError(f"uho.space.{name} does not hold update.{name}={values[name]}: widen it, or change that")
    return values


def open_study(storage: Path, name: str, config: DictConfig) -> optuna.Study:
    """The study in a journal file, new or as an earlier run left it.

    Args:
        storage: the file; other studies may lie in it.
        name: what the trials' values depend on.
        config: the run's.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage.parent.mkdir(parents=True, exist_ok=True)
    journal = JournalStorage(JournalFileBackend(str(storage)))
    known = {study.study_name for study in journal.get_all_studies()}
    taken = len(finished(optuna.load_study(study_name=name, storage=journal))) if name in known else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(
            seed=derive_seed(config.seed, "uho", taken) % 2**32,  # a resumed search must not draw what it has drawn
            n_startup_trials=config.uho.random,
            deterministic_objective=True,
        )
    pruner = optuna.pruners.MedianPruner(n_startup_trials=config.uho.random)
    return optuna.create_study(
        storage=journal, sampler=sampler, pruner=pruner, study_name=name, direction="maximize", load_if_exists=True
    )


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have come to their end; not those that a killed run has left."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def search(job: Job, study: optuna.Study, space: Mapping[str, BaseDistribution], default: Mapping[str, Any]) -> None:
    """Take trials until the study has `uho.trials` of them, with a progress bar over their episodes."""
    settings = job.config.uho
    if not any(trial.params == default for trial in finished(study)):
        study.enqueue_trial(dict(default))
    episodes = len(scoring(job, "val", job.update))
    with Progress() as progress:
        bar = progress.add_task("UHO", total=settings.trials * episodes)
        while (taken := len(finished(study))) < settings.trials:
            best = max((trial.value or 0.0 for trial in study.get_trials(states=[TrialState.COMPLETE])), default=0.0)
            description = f"UHO, trial {taken + 1}/{settings.trials}, best IoU {best:.3f}"
            progress.update(bar, completed=taken * episodes, description=description)
            take_trial(job, study, study.ask(dict(space)), lambda: progress.advance(bar))
        progress.update(bar, completed=settings.trials * episodes)


def take_trial(job: Job, study: optuna.Study, trial: optuna.Trial, advance: Callable[[], None]) -> None:
    """Score one ω on the validation tasks; give it up at a quarter of them if its IoU is below the median's then."""
    ladder: list[int] = list(job.config.uho.steps)
    omega = replace(job.update, **trial.params, steps=max(ladder))
    scores: list[Score] = []
    scored = scoring(job, "val", omega, rungs=ladder)
    quarter = math.ceil(len(scored) / 4)
    for example in scored:
        scores.append(example.score)
        advance()
        if len(scores) % quarter == 0 and len(scores) < len(scored):
            trial.report(float(_ious(scores, ladder).mean(axis=0).max()), len(scores))
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                return
    ious = _ious(scores, ladder)
    shared = ious.mean(axis=0)
    trial.set_user_attr("steps", ladder[int(shared.argmax())])
    trial.set_user_attr("iou_by_steps", dict(zip(map(str, ladder), shared.tolist(), strict=True)))
    trial.set_user_attr("oracle_iou", float(ious.max(axis=1).mean()))
    study.tell(trial, float(shared.max()))


def summarise(study: optuna.Study, update: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of uho.json: validation IoUs in [0, 1], ω* as configured, and all trials."""
    trials, best = finished(study), study.best_trial
    first = next(trial for trial in trials if trial.params == default)
    return {
        "trials": len(trials),
        "pruned": sum(trial.state == TrialState.PRUNED for trial in trials),
        "val_iou": best.value,
        "val_iou_oracle_steps": best.user_attrs["oracle_iou"],
        "default_val_iou": first.value,
        "update": dict(update),
        "history": [{"state": t.state.name, "value": t.value, "params": t.params, **t.user_attrs} for t in trials],
    }


def draw(study: optuna.Study, path: Path) -> None:
    """The best IoU so far by trial; and, if lr was searched, each complete trial's IoU by lr and steps."""
    complete = study.get_trials(states=[TrialState.COMPLETE])
    values = np.array([trial.value for trial in complete])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    course, surface = figure.subplots(1, 2)
    numbers = [trial.number for trial in complete]
    course.plot(numbers, values, "o", color="#9aa5b1", markersize=4, label="trial")
    course.step(numbers, np.maximum.accumulate(values), where="post", color="#2f7fb8", label="best so far")
    course.set(xlabel="trial", ylabel="IoU on validation tasks")
    course.legend(frameon=False)
    points = [
        (trial.params["lr"], int(steps), iou)
        for trial in complete
        for steps, iou in trial.user_attrs["iou_by_steps"].items()
        if "lr" in trial.params
    ]
    if points:
        lrs, steps, ious = zip(*points, strict=True)
        shown = surface.scatter(lrs, steps, c=ious, s=30)
        best = study.best_trial
        surface.plot(best.params["lr"], best.user_attrs["steps"], "r*", markersize=13, label="ω*")
        surface.set(xscale="log", yscale="log", xlabel="lr", ylabel="steps")
        surface.legend(frameon=False)
        figure.colorbar(shown, ax=surface, label="IoU")
    figure.savefig(path, dpi=120)


def _ious(scores: Sequence[Score], ladder: Sequence[int]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Shape (episodes, rungs)."""
    return np.array([[score.iou_at(step) for step in ladder] for score in scores])


def _beside(config: DictConfig, folder: Path) -> Path:
    """Where the same command finds its study again: beside the initialisation, if that is a file."""
    return (Path(config.ckpt_path).parent if config.ckpt_path else folder) / "uho.journal"
