"""The loggers of a run: CSV always, and what is configured. W&B may fail at any time; the run goes on without it."""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import wandb
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from metaseg.config import trains
from metaseg.study import to_log
from metaseg.texts import say

META_STEP = "meta_step"
METRICS = ("train", "val", "test", "train_tasks")  # first parts of the names of what W&B shows over the meta-step
AXES = {
    "adaptation": "inner_step",
    "uho": "trial",
    "search": "trial",
    "curves": "shots",
}  # and of the others, with what they are over
UPLOAD_S = 600  # that the end of a run waits for W&B to have all, at most: the network may be gone
WANDB_ID = Path("wandb", "run_id.txt")  # in a run's folder: of its online W&B run, which a resumed run goes on with


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """The CSV logger and the configured one, each given the run's whole configuration."""
    version = "csv"
    earlier = [path for path in folder.glob("csv*") if path.is_dir() and re.fullmatch(r"csv\d*", path.name)]
    if config.ckpt_path is not None and trains(config):  # resumed: the curves from before stay
        version += f"{len(earlier) + 1}" if earlier else ""
    else:
        (folder / WANDB_ID).unlink(missing_ok=True)  # of an earlier run here
        for path in earlier:
            shutil.rmtree(path)
    loggers: list[Logger] = [CSVLogger(folder, name="", version=version)]
    configured = instantiate(config.logger, save_dir=str(folder)) if config.logger else None
    if configured is not None:  # W&B may not have started
        loggers.append(configured)
    for logger in loggers:
        logger.log_hyperparams(to_log(config))
    return loggers


class AxesLogger(WandbLogger):
    """Lightning's W&B logger, which would call every axis `trainer/global_step`: here each has the name of `AXES`.

    Attributes:
        lost: whether W&B has failed: nothing more is sent to it then.
    """

    lost = False

    def attempt(self, action: Callable[["wandb.Run"], object]) -> None:
        """Do something with the W&B run, unless W&B is lost; if that fails, it is, and the run goes on without it."""
        if self.lost:
            return
        try:
            action(self.experiment)
        except Exception as error:  # of its service, its network or its disk: each has its own
            self._give_up(error)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of one axis."""
        prefixes = [name.partition("/")[0] for name in metrics]
        axis = next((AXES[prefix] for prefix in prefixes if prefix in AXES), META_STEP)
        self.attempt(lambda run: run.log({**metrics} if step is None else {**metrics, axis: step}))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]  # no namespaces here
        """Log the configuration."""
        log = super().log_hyperparams
        self.attempt(lambda run: log(params))

    def close(self, exit_code: int) -> None:
        """Finish the W&B run, which learns how this one ended, or W&B itself, so that the next may start its own."""
        try:
            self.experiment.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)
            with suppress(Exception):
                wandb.teardown(exit_code=exit_code)

    def _give_up(self, error: Exception) -> None:
        if not self.lost:
            _say(f"W&B has failed ({type(error).__name__}: {error})", "; what it has until now: `wandb sync`")
        self.lost = True


def to_wandb(loggers: Sequence[Logger], action: Callable[["wandb.Run"], object]) -> None:
    """Do something with the W&B run of those of the loggers that have one; it may fail without harm."""
    for logger in loggers:
        if isinstance(logger, AxesLogger):
            logger.attempt(action)


def wandb_logger(save_dir: str, facts: Sequence[str | None], tags: Sequence[str], **init: Any) -> AxesLogger | None:
    """The W&B logger on a run of its own, online if the user is logged in; a resumed online run goes on.

    Args:
        save_dir: where W&B keeps its files: the run's folder.
        facts: tags that the configuration gives; null ones are left out.
        tags: the user's own.
        init: what else `wandb.init` takes: project, name, group and so on.

    Returns:
        None if W&B cannot be started, which the console says: it is not worth a run.
    """
    mode, known = _wandb_mode(), Path(save_dir, WANDB_ID)
    if known.is_file() and (mode or os.environ["WANDB_MODE"]) == "online":  # offline files of one id do not merge
        init = {**init, "id": known.read_text(), "resume": "allow"}
    try:
        # the logger alone would merge this run into one that the process has not finished
        run = wandb.init(
            dir=save_dir,
            mode=mode,
            reinit="finish_previous",
            tags=[*dict.fromkeys(tag for tag in (*facts, *tags) if tag)],
            **{"settings": wandb.Settings(finish_timeout=UPLOAD_S, finish_timeout_raises=True), **init},
        )
        if not run.offline and not run.disabled:
            known.write_text(run.id)
        _define_axes(run)
    except Exception as error:  # as in `attempt`
        _say(f"W&B has not started ({type(error).__name__}: {error})")
        with suppress(Exception):  # of what did start
            wandb.teardown(exit_code=1)
        return None
    return AxesLogger(experiment=run)


def _define_axes(run: "wandb.Run") -> None:
    for axis in (META_STEP, *AXES.values()):
        run.define_metric(axis, hidden=True)
    for metric in METRICS:
        run.define_metric(f"{metric}/*", step_metric=META_STEP, step_sync=True)
    for metric, axis in AXES.items():
        run.define_metric(f"{metric}/*", step_metric=axis)
    # the best, as its checkpoint is chosen; and the last, as W&B would have it without being told
    run.define_metric("val/iou", step_metric=META_STEP, step_sync=True, summary="max,last")
    run.define_metric("val/loss", step_metric=META_STEP, step_sync=True, summary="min,last")


def close_loggers(loggers: Sequence[Logger], exit_code: int) -> None:
    """Finish all loggers, so that the next run of this process starts its own; W&B's before those that may raise."""
    for logger in reversed(loggers):
        logger.finalize("success" if exit_code == 0 else "failed")
        if isinstance(logger, AxesLogger):
            logger.close(exit_code)


def _wandb_mode() -> Literal["online", "offline"] | None:
    """What `wandb.init` shall do; None leaves it to WANDB_MODE. Says which, and how to change it."""
    if "WANDB_MODE" in os.environ:
        say(f"W&B: {os.environ['WANDB_MODE']}, as WANDB_MODE says")
        return None
    try:
        online = wandb.login(prompt=False)
    except Exception as error:  # there is a key, but the server refuses it or is out of reach
        say(f"W&B: offline, for the login failed ({error})")
        return "offline"
    say("W&B: online" if online else "W&B: offline; `wandb login` for online runs, `wandb sync DIR` for this")
    return "online" if online else "offline"


def _say(what: str, more: str = "") -> None:
    said = f"{what}: this run goes on without it, its numbers are in csv/ and results.json{more}"
    say(said, stderr=True)
