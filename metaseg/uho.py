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
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.progress import Progress

from metaseg.card import write_card
from metaseg.evaluate import Evaluation, Score, evaluate
from metaseg.initialisation import About, save_initialisation
from metaseg.job import Job, describe, device_of, evaluation_episodes, fingerprint, load, scoring
from metaseg.metrics import Floats
from metaseg.panels import log_picture
from metaseg.report import report, write_results
from metaseg.seeding import derive_seed
from metaseg.space import distributions, point
from metaseg.update import Update

LEAST_TASKS = 4  # of which a trial may be given up


def uho(job: Job, loggers: Sequence[Logger], folder: Path) -> float:
    """Search ω* on validation tasks, then test it once; returns the test tasks' mean IoU, in [0, 1].

    Leaves uho.json, update.yaml (ω*, for `update=PATH`), uho.png and what every run leaves. An interrupted study goes
    on from its storage; one that has its trials and was tested on these tasks is neither searched nor tested again.
    One process at a time works on a study.
    """
    started = time.perf_counter()
    config = job.config
    about = load(job)
    job.net.to(device_of(config))
    storage = Path(config.uho.storage or _beside(config))
    study = open_study(storage, fingerprint(job), config)
    searched = len(finished(study)) < config.uho.trials
    if searched:
        search(job, study, distributions(config.uho.space, job.update), loggers)
    update, about = chosen(study, job.update, about)
    save_initialisation(job.net, about, folder / "init.safetensors")
    tasks = evaluation_episodes(config, job.source, "test", update).tasks
    if searched or study.user_attrs.get("tested") != list(tasks):
        evaluation = evaluate(scoring(job, "test", update), title="test, ω*", examples=config.evaluate.panels)
        wall_s = round(time.perf_counter() - started, 1)
        record = summarise(study, about.update, job.update) | {"storage": str(storage), "test": evaluation.summary()}
        head = {**describe(job, about), "wall_s": wall_s, "uho": {key: record[key] for key in ("trials", "val_iou")}}
        results = report(head, {"test": evaluation}, loggers, folder)
        for name, value in (("record", record), ("results", results), ("rows", evaluation.rows())):
            study.set_user_attr(name, value)
        study.set_user_attr("tested", list(tasks))  # last: a study that is killed before has not been tested
    else:
        Console().print(f"the study in {storage} has its trials; uho.trials={config.uho.trials} asks for no more")
        write_results(study.user_attrs["results"], study.user_attrs["rows"], folder)
    write_card(folder / "init.safetensors")
    record = study.user_attrs["record"]
    (folder / "uho.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    OmegaConf.save(OmegaConf.create(about.update), folder / "update.yaml")
    draw(study, folder / "uho.png")
    log_picture(loggers, "uho", folder / "uho.png")
    Console().print(f"uho.json, uho.png, update.yaml (use it with update=PATH): {folder}", soft_wrap=True)
    return float(record["test"]["iou"]["mean"])


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
    study = optuna.create_study(
        storage=journal, sampler=sampler, pruner=pruner, study_name=name, direction="maximize", load_if_exists=True
    )
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)  # a killed run's: the sampler would wait for its value
    return study


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have a value, be it an estimate; not those that a killed run has left."""
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def scored_on_all(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were not given up."""
    return [trial for trial in finished(study) if not trial.user_attrs.get("given_up")]


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The one of the highest IoU, of those scored on all tasks."""
    return max(scored_on_all(study), key=_value)


def default_trial(study: optuna.Study) -> FrozenTrial | None:
    """The trial of ω as configured, waiting or taken."""
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.WAITING])
    return next((trial for trial in trials if trial.user_attrs.get("default")), None)


def search(job: Job, study: optuna.Study, space: Mapping[str, BaseDistribution], loggers: Sequence[Logger]) -> None:
    """Take trials until the study has `uho.trials` of them, with a progress bar over their episodes."""
    if default_trial(study) is None:
        study.enqueue_trial(point(space, job.update), user_attrs={"default": True})
    trials, episodes = job.config.uho.trials, len(scoring(job, "val", job.update))
    with Progress() as progress:
        bar = progress.add_task("UHO", total=trials * episodes)
        while (taken := len(finished(study))) < trials:
            best = max(map(_value, scored_on_all(study)), default=0.0)
            description = f"UHO, trial {taken + 1}/{trials}, best IoU {best:.3f}"
            progress.update(bar, completed=taken * episodes, description=description)
            value = take_trial(job, study, study.ask(dict(space)), lambda: progress.advance(bar))
            if value is not None:
                for logger in loggers:
                    logger.log_metrics({"uho/iou": value, "uho/best_iou": max(best, value)}, step=taken)
        progress.update(bar, completed=trials * episodes)


def take_trial(job: Job, study: optuna.Study, trial: optuna.Trial, advance: Callable[[], None]) -> float | None:
    """Score one ω on the validation tasks; returns its IoU at the step count that is best for all.

    After a quarter of them it is given up, and None returned, if its IoU then is below the median of earlier trials'.
    """
    ladder = steps_ladder(job)
    omega = replace(job.update, **trial.params, steps=max(ladder))
    scores: list[Score] = []
    scored = scoring(job, "val", omega, rungs=ladder)
    quarter = max(LEAST_TASKS, math.ceil(len(scored) / 4))
    for example in scored:
        scores.append(example.score)
        advance()
        if len(scores) == quarter < len(scored):
            partial = float(_ious(scores, ladder).mean(axis=0).max())
            trial.report(partial, step=quarter)
            if trial.should_prune():
                give_up(study, trial, partial, quarter)
                return None
    ious = _ious(scores, ladder)
    shared = ious.mean(axis=0)
    trial.set_user_attr("steps", ladder[int(shared.argmax())])
    trial.set_user_attr("iou_by_steps", dict(zip(map(str, ladder), shared.tolist(), strict=True)))
    trial.set_user_attr("oracle_iou", float(ious.max(axis=1).mean()))
    study.tell(trial, float(shared.max()))
    return float(shared.max())


def give_up(study: optuna.Study, trial: optuna.Trial, partial: float, tasks: int) -> None:
    """Tell an estimate of a trial's IoU: the default's on all tasks, and how the two differ on the first `tasks`.

    Told as pruned, the Gaussian process would learn nothing from it, and ask for the same ω for ever.
    """
    default = default_trial(study)
    assert default is not None  # the first trial, and never given up
    trial.set_user_attr("given_up", True)
    study.tell(trial, _value(default) + partial - default.intermediate_values[tasks])


def steps_ladder(job: Job) -> list[int]:
    """The step counts at which an adaptation is scored: the configured ones, and ω's own."""
    return sorted({*job.config.uho.steps, job.update.steps})


def chosen(study: optuna.Study, update: Update, about: About) -> tuple[Update, About]:
    """ω* of a study, and what is known of θ with it."""
    best = best_trial(study)
    values = {**best.params, "steps": best.user_attrs["steps"]}
    return replace(update, **values), replace(about, update={**about.update, **values})


def summarise(study: optuna.Study, update: Mapping[str, Any], default: Update) -> dict[str, Any]:
    """The numbers of uho.json: validation IoUs in [0, 1], ω* as configured, and all trials.

    `default_val_iou` is of ω as it was configured, its steps included. The value of a trial that was given up is an
    estimate.
    """
    trials, best, first = finished(study), best_trial(study), default_trial(study)
    assert first is not None
    return {
        "trials": len(trials),
        "given_up": len(trials) - len(scored_on_all(study)),
        "val_iou": best.value,
        "val_iou_oracle_steps": best.user_attrs["oracle_iou"],
        "default_val_iou": first.user_attrs["iou_by_steps"][str(default.steps)],
        "update": dict(update),
        "history": [{"value": trial.value, "params": trial.params, **trial.user_attrs} for trial in trials],
    }


def draw(study: optuna.Study, path: Path) -> None:
    """The best IoU so far by trial; and, if lr was searched, each complete trial's IoU by lr and steps."""
    complete = scored_on_all(study)
    values = np.array([trial.value for trial in complete])
    given_up = [(trial.number, trial.value) for trial in finished(study) if trial not in complete]
    points = [
        (trial.params["lr"], int(steps), iou)
        for trial in complete
        for steps, iou in trial.user_attrs["iou_by_steps"].items()
        if "lr" in trial.params
    ]
    figure = Figure(figsize=(9 if points else 4.5, 3.4), layout="constrained")
    course, *surface = figure.subplots(1, 2 if points else 1, squeeze=False)[0]
    numbers = [trial.number for trial in complete]
    course.plot(numbers, values, "o", color="#9aa5b1", markersize=4, label="trial")
    if given_up:
        course.plot(*zip(*given_up, strict=True), "x", color="#9aa5b1", markersize=4, label="given up, estimate")
    course.step(numbers, np.maximum.accumulate(values), where="post", color="#2f7fb8", label="best so far")
    course.set(xlabel="trial", ylabel="IoU on validation tasks")
    course.legend(frameon=False)
    for ax in surface:
        lrs, steps, ious = zip(*points, strict=True)
        shown = ax.scatter(lrs, steps, c=ious, s=30)
        best = best_trial(study)
        ax.plot(best.params["lr"], best.user_attrs["steps"], "r*", markersize=13)
        ax.set(xscale="log", yscale="log", xlabel="lr", ylabel="steps", title="★: ω*")
        ladder = sorted(set(steps))
        ax.set_yticks(ladder, map(str, ladder), minor=False)
        ax.set_yticks([], minor=True)
        figure.colorbar(shown, ax=ax, label="IoU")
    figure.savefig(path, dpi=120)


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None  # it is complete
    return trial.value


def _ious(scores: Sequence[Score], ladder: Sequence[int]) -> Floats:
    """Each task's IoU, mean over its draws, at each step count; shape (tasks, rungs)."""
    of = Evaluation(scores)
    return np.stack([of.per_task(lambda score, step=step: score.iou_at(step)) for step in ladder], axis=1)  # type: ignore[misc]


def _beside(config: DictConfig) -> Path:
    """Where the same command finds its study again: beside the initialisation, if that is a file."""
    return (Path(config.ckpt_path).parent if config.ckpt_path else Path("runs")) / "uho.journal"
