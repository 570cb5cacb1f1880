"""UHO: the search for the update procedure ω* = argmin_ω Err(θ, ω) over validation tasks, θ fixed (arXiv 1912.06290).

Bayesian optimisation: a Gaussian process with expected improvement, Optuna's `GPSampler`. An adaptation is scored at a
ladder of step counts on its way, so a trial's value is its mean IoU at the count that is best for all tasks together.
Each task's own best count, by which the original scored, is an oracle; it is reported apart.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import Trial
from pytorch_lightning.loggers import Logger
from rich.progress import Progress

from metaseg.atomic import write_json
from metaseg.card import write_card
from metaseg.config import device_of
from metaseg.evaluate import Evaluation, Score, evaluate
from metaseg.initialisation import About, save_initialisation
from metaseg.job import Job, describe, evaluation_episodes, fingerprint, load, scoring
from metaseg.metrics import Floats
from metaseg.panels import log_picture
from metaseg.report import report, write_results
from metaseg.seeding import derive_seed
from metaseg.space import check_trial, distributions, point
from metaseg.study import (
    Beat,
    best_trials,
    clear,
    close,
    default_trial,
    draw_course,
    finished,
    give_up,
    history,
    hopeless,
    masked,
    open_storage,
    open_study,
    value_of,
    work,
)
from metaseg.texts import say
from metaseg.update import Update

LEAST_TASKS = 4  # of which a trial may be given up
LEFT = ("uho.json", "uho.png", "update.yaml", "per_task.csv", "init.safetensors")  # by the worker that tests


def uho(job: Job, loggers: Sequence[Logger], folder: Path) -> float:
    """Search ω* on validation tasks, then test it once; returns the test tasks' mean IoU, in [0, 1].

    Leaves uho.json, update.yaml (ω*, for `update=PATH`), uho.png and what every run leaves. An interrupted study goes
    on from its storage; one that has its trials and was tested on these tasks is neither searched nor tested again.
    Of several workers on a study one tests; the others leave no results, and return the validation tasks' IoU.
    """
    started = time.perf_counter()
    config = job.config
    about = load(job)
    job.net.to(device_of(config))
    place = str(config.uho.storage or _beside(config))
    storage, said = open_storage(place, "uho.storage"), masked(place)
    study = open_study(storage, fingerprint(job), (config.seed, "uho"), config.uho.random)
    searches = len(finished(study)) < config.uho.trials
    if searches:
        clear(folder, LEFT, config)
        search(job, study, distributions(config.uho.space, job.update), loggers)
    check_trial(best_trials(study)[0], distributions(config.uho.space, job.update), "uho.storage")
    update, about = chosen(study, job.update, about)
    tasks = evaluation_episodes(config, job.source, "test", update).tasks

    def test() -> dict[str, Any]:
        save_initialisation(job.net, about, folder / "init.safetensors")
        evaluation = evaluate(scoring(job, "test", update), title="test, ω*", examples=config.evaluate.panels)
        wall_s = round(time.perf_counter() - started, 1)
        record = summarise(study, about.update, job.update) | {"storage": said, "test": evaluation.summary()}
        head = {**describe(job, about), "wall_s": wall_s, "uho": {key: record[key] for key in ("trials", "val_iou")}}
        results = report(head, {"test": evaluation}, loggers, folder)
        return {"record": record, "results": results, "rows": evaluation.rows()}

    left = close(storage, study, f"{derive_seed(*tasks)}", searches or bool(config.worker), test)
    if left is None:
        clear(folder, LEFT, config)
        say(f"the study in {said} has its trials; another worker tests ω*")
        return value_of(best_trials(study)[0])
    if not searches:
        say(f"the study in {said} has its trials; uho.trials={config.uho.trials} asks for no more")
        save_initialisation(job.net, about, folder / "init.safetensors")
    write_results(left["results"], left["rows"], folder)
    write_card(folder / "init.safetensors")
    write_json(folder / "uho.json", left["record"])
    OmegaConf.save(OmegaConf.create(about.update), folder / "update.yaml")
    draw(study, folder / "uho.png")
    log_picture(loggers, "uho", folder / "uho.png")
    say(f"uho.json, uho.png, update.yaml (use it with update=PATH): {folder}")
    return float(left["record"]["test"]["iou"]["mean"])


def search(job: Job, study: Study, space: Mapping[str, BaseDistribution], loggers: Sequence[Logger]) -> None:
    """Take trials until the study has `uho.trials` of them, with a progress bar over their episodes."""
    trials, episodes = job.config.uho.trials, len(scoring(job, "val", job.update))
    with Progress() as progress:
        bar = progress.add_task("UHO", total=trials * episodes)

        def take(trial: Trial) -> None:
            taken, best = len(finished(study)), max(map(value_of, best_trials(study)), default=0.0)
            description = f"UHO, trial {taken + 1}/{trials}, best IoU {best:.3f}"
            progress.update(bar, completed=taken * episodes, description=description)
            beat = Beat(trial)

            def advance() -> None:
                progress.advance(bar)
                beat()

            take_trial(job, study, trial, advance)

        work(study, trials, space, point(space, job.update), take, loggers, "uho")
        progress.update(bar, completed=trials * episodes)


def take_trial(job: Job, study: Study, trial: Trial, advance: Callable[[], None]) -> None:
    """Score one ω on the validation tasks, and tell its IoU at the step count that is best for all.

    After a quarter of them it is given up if its IoU then is below the median of earlier trials'.
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
            if hopeless(study, trial, partial, quarter):
                give_up(study, trial, partial, quarter)
                return
    ious = _ious(scores, ladder)
    shared = ious.mean(axis=0)
    trial.set_user_attr("steps", ladder[int(shared.argmax())])
    trial.set_user_attr("iou_by_steps", dict(zip(map(str, ladder), shared.tolist(), strict=True)))
    trial.set_user_attr("oracle_iou", float(ious.max(axis=1).mean()))
    study.tell(trial, float(shared.max()), skip_if_finished=True)


def steps_ladder(job: Job) -> list[int]:
    """The step counts at which an adaptation is scored: the configured ones, and ω's own."""
    return sorted({*job.config.uho.steps, job.update.steps})


def chosen(study: Study, update: Update, about: About) -> tuple[Update, About]:
    """ω* of a study, and what is known of θ with it."""
    best = best_trials(study)[0]
    values = {**best.params, "steps": best.user_attrs["steps"]}
    return replace(update, **values), replace(about, update={**about.update, **values})


def summarise(study: Study, update: Mapping[str, Any], default: Update) -> dict[str, Any]:
    """The numbers of uho.json: validation IoUs in [0, 1], ω* as configured, and all trials.

    `default_val_iou` is of ω as it was configured, its steps included. The value of a trial that was given up is an
    estimate.
    """
    trials, whole, first = finished(study), best_trials(study), default_trial(study)
    assert first is not None
    return {
        "trials": len(trials),
        "given_up": len(trials) - len(whole),
        "val_iou": whole[0].value,
        "val_iou_oracle_steps": whole[0].user_attrs["oracle_iou"],
        "default_val_iou": first.user_attrs["iou_by_steps"][str(default.steps)],
        "update": dict(update),
        "history": history(study),
    }


def draw(study: Study, path: Path) -> None:
    """The best IoU so far by trial; and, if lr was searched, each complete trial's IoU by lr and steps."""
    points = [
        (trial.params["lr"], int(steps), iou)
        for trial in best_trials(study)
        for steps, iou in trial.user_attrs["iou_by_steps"].items()
        if "lr" in trial.params
    ]
    figure = Figure(figsize=(9 if points else 4.5, 3.4), layout="constrained")
    course, *surface = figure.subplots(1, 2 if points else 1, squeeze=False)[0]
    draw_course(course, study)
    for ax in surface:
        lrs, steps, ious = zip(*points, strict=True)
        shown = ax.scatter(lrs, steps, c=ious, s=30)
        best = best_trials(study)[0]
        ax.plot(best.params["lr"], best.user_attrs["steps"], "r*", markersize=13)
        ax.set(xscale="log", yscale="log", xlabel="lr", ylabel="steps", title="★: ω*")
        ladder = sorted(set(steps))
        ax.set_yticks(ladder, map(str, ladder), minor=False)
        ax.set_yticks([], minor=True)
        figure.colorbar(shown, ax=ax, label="IoU")
    figure.savefig(path, dpi=120)


def _ious(scores: Sequence[Score], ladder: Sequence[int]) -> Floats:
    """Each task's IoU, mean over its draws, at each step count; shape (tasks, rungs)."""
    of = Evaluation(scores)
    return np.stack([of.per_task(lambda score, step=step: score.iou_at(step)) for step in ladder], axis=1)  # type: ignore[misc]


def _beside(config: DictConfig) -> Path:
    """Where the same command finds its study again: beside the initialisation, if that is a file."""
    return (Path(config.ckpt_path).parent if config.ckpt_path else Path("runs")) / "uho.journal"
