"""The search for values to meta-train by: algo.outer.lr and whatever else `search.space` holds, θ made anew each time.

Bayesian optimisation as UHO's, one meta-training a trial; a trial's value is its best IoU on validation tasks.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import Trial
from pytorch_lightning.loggers import Logger

from metaseg.atomic import write_json
from metaseg.card import write_card
from metaseg.checkpoints import StopOnSignal
from metaseg.config import config_sha256
from metaseg.errors import ConfigError, DivergedError, Stopped
from metaseg.fit import fit, headline, test
from metaseg.initialisation import load_initialisation, save_initialisation
from metaseg.job import Job, build, evaluation_episodes, fingerprint
from metaseg.panels import log_picture
from metaseg.report import write_results
from metaseg.seeding import derive_seed
from metaseg.space import ALONE, check_trial, training_distributions, with_values
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
    lose,
    masked,
    open_storage,
    open_study,
    value_of,
    work,
)
from metaseg.texts import say
from metaseg.tracking import make_loggers

LEFT = ("search.json", "best.txt", "search.png", "per_task.csv", "init.safetensors")  # by the worker that tests


def search(job: Job, loggers: Sequence[Logger], folder: Path) -> float:
    """Search on validation tasks, then test the best trial's θ once; returns the test tasks' mean IoU, in [0, 1].

    Leaves search.json, best.txt (the best values as overrides), search.png and what every run leaves; and a folder
    study-…/trial-N of each trial of this worker's, with its checkpoint if it was the best then. The study goes on from
    its storage, and is tested once, as UHO's; of several workers one tests, and the others return the best IoU on
    validation tasks.
    """
    started = time.perf_counter()
    config, place = job.config, masked(str(job.config.search.storage))
    storage = open_storage(str(config.search.storage), "search.storage")
    study = open_study(storage, fingerprint(job), (config.seed, "search"), config.search.random)
    searches = len(finished(study)) < config.search.trials
    if searches:
        clear(folder, LEFT, config)
        space = training_distributions(config)
        default = {key: OmegaConf.select(config, key) for key in space}
        try:
            work(
                study,
                config.search.trials,
                space,
                default,
                lambda t: take_trial(job, study, t, folder),
                loggers,
                "search",
            )
        except Stopped:
            sys.stderr.write(
                "metaseg: stopped; this trial is lost, the study is not: the same command goes on with it\n"
            )
            raise
    if not best_trials(study):
        raise DivergedError("all trials have diverged: lower the learning rates of search.space, and those configured")
    best = best_trials(study)[0]
    check_trial(best, training_distributions(config), "search.storage")
    checkpoint = Path(str(best.user_attrs.get("checkpoint")))
    if not checkpoint.is_file():
        raise ConfigError(
            f"the checkpoint {checkpoint} of the best trial is gone: put it back, or begin another study with "
            "search.storage=PATH"
        )
    winner = build(with_values(config, best.params))
    about = load_initialisation(winner.net, checkpoint, winner.about.model)

    def tested() -> dict[str, Any]:
        record = summarise(study, place)
        alone = with_values(config, {**best.params, "mode": "fit_test"})  # as best.txt makes a run of it
        told = {key: record[key] for key in ("trials", "val_iou")} | {"config_sha256": config_sha256(alone)}
        of = config_sha256(config)  # the command's, not the winner's
        results, rows = test(winner, about, loggers, folder, started, search=told, config_sha256=of)
        return {"record": record | {"test": results["test"]}, "results": results, "rows": rows}

    tasks = evaluation_episodes(config, job.source, "test", winner.update).tasks
    left = close(storage, study, f"{derive_seed(*tasks)}", searches or bool(config.worker), tested)
    if left is None:
        clear(folder, LEFT, config)
        say(f"the study in {place} has its trials; another worker tests the best")
        return value_of(best)
    if not searches:
        say(f"the study in {place} has its trials; search.trials={config.search.trials} asks for no more")
        save_initialisation(winner.net, about, folder / "init.safetensors")
        write_results(left["results"], left["rows"], folder)
        write_card(folder / "init.safetensors")
    write_json(folder / "search.json", left["record"])
    # without blanks, at which a shell would split them
    overrides = (f"{key}={json.dumps(value, separators=(',', ':'))}\n" for key, value in best.params.items())
    (folder / "best.txt").write_text("".join(overrides))
    draw(study, folder / "search.png")
    log_picture(loggers, "search", folder / "search.png")
    say(f"search.json, search.png, best.txt (use it with $(cat best.txt)): {folder}")
    return headline(left["results"])


def take_trial(job: Job, study: Study, trial: Trial, folder: Path) -> None:
    """Meta-train by the trial's values in `trial-N` of the worker's folder, and tell the best validation IoU."""
    one = build(with_values(job.config, {**ALONE, **trial.params, "logger": None}))  # curves as CSV, no W&B run each
    assert one.algo
    assert one.inner
    place = folder / f"study-{study.study_name[:8]}" / f"trial-{trial.number}"  # the folder may serve other studies
    loggers = make_loggers(one.config, place)
    course = Course(study, trial)
    try:
        checkpoint = fit(one, one.algo, one.inner, loggers, place, StopTrial(place), course)
    except Stopped:
        shutil.rmtree(place, ignore_errors=True)
        raise
    except DivergedError as error:
        say(f"trial {trial.number} is lost: {error}")
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        lose(study, trial)
        return
    for logger in loggers:
        logger.finalize("success")
    trial.set_user_attr("checkpoint", str(checkpoint.resolve()))
    if course.given_up:
        give_up(study, trial, *course.given_up)
    else:
        study.tell(trial, course.best, skip_if_finished=True)
    if best_trials(study)[0].number != trial.number:  # nor will it be the best one
        shutil.rmtree(checkpoint.parent)


class StopTrial(StopOnSignal):
    """Ends the process as it does a run's, but saves nothing: a trial cannot go on."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """At the next meta-step."""
        self.on_validation_start(trainer)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        raise Stopped


class Course(pl.Callback):
    """Reports each validation to a trial's study, which may end the training; and signs of life.

    Attributes:
        best: validation IoU, in [0, 1].
        given_up: the best IoU and the number of validations until then, if the trial was hopeless; else None.
    """

    def __init__(self, study: Study, trial: Trial) -> None:
        self.study, self.trial, self.beat = study, trial, Beat(trial)
        self.best, self.validations = 0.0, 0
        self.given_up: tuple[float, int] | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        """A sign of life."""
        self.beat()

    def on_validation_batch_end(self, *_: Any) -> None:
        """Likewise."""
        self.beat()

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Report the best so far, by the number of validations: trials may differ in their meta-steps."""
        self.best = max(self.best, float(trainer.callback_metrics["val/iou"]))
        self.validations += 1
        if hopeless(self.study, self.trial, self.best, self.validations) and trainer.global_step < trainer.max_steps:
            self.given_up = self.best, self.validations
            trainer.should_stop = True


def summarise(study: Study, place: str) -> dict[str, Any]:
    """The numbers of search.json: validation IoUs in [0, 1], the best values, and all trials.

    The value of a trial that was given up is an estimate, that of one that diverged is 0.
    """
    trials, whole, first = finished(study), best_trials(study), default_trial(study)
    return {
        "trials": len(trials),
        "given_up": len(trials) - len(whole),
        "val_iou": whole[0].value,
        "default_val_iou": first and first.value,
        "values": whole[0].params,
        "storage": place,
        "history": history(study),
    }


def draw(study: Study, path: Path) -> None:
    """The best IoU so far by trial, and each trial's IoU by each of its values."""
    whole = best_trials(study)
    of: Mapping[str, BaseDistribution] = whole[0].distributions
    figure = Figure(figsize=(3.6 * (1 + len(of)), 3.4), layout="constrained")
    course, *others = figure.subplots(1, 1 + len(of), squeeze=False)[0]
    draw_course(course, study)
    for ax, (key, distribution) in zip(others, of.items(), strict=True):
        values = [trial.params[key] for trial in whole]
        if not all(isinstance(value, int | float) for value in values):
            values = [str(value) for value in values]
        ax.plot(values, [value_of(trial) for trial in whole], "o", color="#9aa5b1", markersize=4)
        ax.plot(values[:1], [value_of(whole[0])], "r*", markersize=13)
        ax.set(xlabel=key, title="★: best", xscale="log" if getattr(distribution, "log", False) else "linear")
    figure.savefig(path, dpi=120)
