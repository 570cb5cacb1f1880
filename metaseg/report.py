"""What a run leaves behind: results.json, per_task.csv, a table on the console, loggers opened and closed."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from metaseg.config import trains
from metaseg.data.source import SPLITS, Split
from metaseg.evaluate import Evaluation, across_tasks, write_csv
from metaseg.panels import log_to_wandb, write_panels
from metaseg.study import to_log

SCHEMA = 1
META_STEP = "meta_step"
METRICS = ("train", "val", "test", "train_tasks")  # first parts of the names of what W&B shows over the meta-step
AXES = {
    "adaptation": "inner_step",
    "uho": "trial",
    "search": "trial",
    "curves": "shots",
}  # and of the others, with what they are over
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
    if config.logger:
        loggers.append(instantiate(config.logger, save_dir=str(folder)))
    for logger in loggers:
        logger.log_hyperparams(to_log(config))
    return loggers


class AxesLogger(WandbLogger):
    """Lightning's W&B logger, which would call every axis `trainer/global_step`: here each has the name of `AXES`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of one axis."""
        prefixes = [name.partition("/")[0] for name in metrics]
        axis = next((AXES[prefix] for prefix in prefixes if prefix in AXES), META_STEP)
        self.experiment.log({**metrics} if step is None else {**metrics, axis: step})


def wandb_logger(save_dir: str, facts: Sequence[str | None], tags: Sequence[str], **init: Any) -> WandbLogger:
    """Lightning's W&B logger on a run of its own, online if the user is logged in; a resumed online run goes on.

    Args:
        save_dir: where W&B keeps its files: the run's folder.
        facts: tags that the configuration gives; null ones are left out.
        tags: the user's own.
        init: what else `wandb.init` takes: project, name, group and so on.
    """
    mode, known = _wandb_mode(), Path(save_dir, WANDB_ID)
    if known.is_file() and (mode or os.environ["WANDB_MODE"]) == "online":  # offline files of one id do not merge
        init = {**init, "id": known.read_text(), "resume": "allow"}
    # the logger alone would merge this run into one that the process has not finished
    run = wandb.init(
        dir=save_dir,
        mode=mode,
        reinit="finish_previous",
        tags=[*dict.fromkeys(tag for tag in (*facts, *tags) if tag)],
        **init,
    )
    if not run.offline and not run.disabled:
        known.write_text(run.id)
    for axis in (META_STEP, *AXES.values()):
        run.define_metric(axis, hidden=True)
    for metric in METRICS:
        run.define_metric(f"{metric}/*", step_metric=META_STEP, step_sync=True)
    for metric, axis in AXES.items():
        run.define_metric(f"{metric}/*", step_metric=axis)
    # the best, as its checkpoint is chosen; and the last, as W&B would have it without being told
    run.define_metric("val/iou", step_metric=META_STEP, step_sync=True, summary="max,last")
    run.define_metric("val/loss", step_metric=META_STEP, step_sync=True, summary="min,last")
    return AxesLogger(experiment=run)


def close_loggers(loggers: Sequence[Logger], exit_code: int) -> None:
    """Finish all loggers, so that the next run of this process starts its own; W&B learns how this one ended."""
    for logger in loggers:
        logger.finalize("success" if exit_code == 0 else "failed")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=exit_code)


def _wandb_mode() -> Literal["online", "offline"] | None:
    """What `wandb.init` shall do; None leaves it to WANDB_MODE. Says which, and how to change it."""
    console = Console()
    if "WANDB_MODE" in os.environ:
        console.print(f"W&B: {os.environ['WANDB_MODE']}, as WANDB_MODE says")
        return None
    try:
        online = wandb.login(prompt=False)
    except Exception as error:  # there is a key, but the server refuses it or is out of reach
        console.print(f"W&B: offline, for the login failed ({error})")
        return "offline"
    console.print("W&B: online" if online else "W&B: offline; `wandb login` for online runs, `wandb sync DIR` for this")
    return "online" if online else "offline"


class MetaProgressBar(RichProgressBar):
    """Lightning's bar, which would speak of epochs; there is one, of all meta-steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "meta-training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss and validation IoU, without the logger's version."""
        metrics: dict[str, Any] = {**super().get_metrics(trainer, pl_module)}
        metrics.pop("v_num", None)
        return metrics


def git_commit() -> str | None:
    """The checkout's commit, "-dirty" behind it if files differ; None for an installed package."""
    here = Path(__file__).parents[1]
    if not (here / ".git").exists():
        return None
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def report(
    head: Mapping[str, Any], evaluations: Mapping[Split, Evaluation], loggers: Sequence[Logger], folder: Path
) -> dict[str, Any]:
    """Write results.json, per_task.csv and panels into `folder`, log the numbers, print the table.

    Args:
        head: what ran, for the head of results.json.
        evaluations: by split, at least one; the last one's tasks are shown one by one.
        loggers: of the run.
        folder: of the run.

    Returns:
        What results.json holds.
    """
    gaps = across_tasks(evaluations)
    summaries: dict[str, object] = dict.fromkeys(SPLITS)
    summaries |= {split: evaluation.summary() for split, evaluation in evaluations.items()}
    results = {"schema": SCHEMA, **head, "git_commit": git_commit(), **summaries, "gap_across_tasks": gaps}
    split, shown = list(evaluations.items())[-1]
    write_results(results, shown.rows(), folder)
    write_panels(shown.examples, folder / "panels")
    for logger in loggers:
        for name, evaluation in evaluations.items():
            prefix = "train_tasks" if name == "train" else name  # train/loss is the inner steps'
            metrics = {f"{prefix}/{key}": value for key, value in evaluation.metrics().items()}
            logger.log_metrics(metrics, step=head["meta_steps"])
            for at in [] if isinstance(logger, CSVLogger) else evaluation.course:  # CSV's steps are meta-steps
                way = {f"adaptation/{prefix}/{key}": at[key] for key in ("iou", "loss")}
                logger.log_metrics(way, step=int(at["step"]))
        if isinstance(logger, WandbLogger):
            log_to_wandb(logger.experiment, shown, split)
    _print_table(head, evaluations, folder)
    return results


def write_results(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write results.json, and per_task.csv with a row an episode."""
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_csv(rows, folder / "per_task.csv")


def _print_table(head: Mapping[str, Any], evaluations: Mapping[Split, Evaluation], folder: Path) -> None:
    title = f"{head['algo']} on {head['dataset']}, {head['shots']} shots, batch norm: {head['batchnorm']}"
    headings = "split", "tasks", "IoU", "95 %", "before", "on support", "loss", "mIoU (class)", "FB-IoU"
    table = Table(*headings, title=title)
    for split, e in evaluations.items():
        on_support = e.iou + e.within_task["iou"].mean()
        values = (e.iou, *e.ci95, e.iou_before, on_support, e.loss, e.miou_class, e.fb_iou)
        iou, low, high, *others = (f"{value:.3f}" for value in values)
        table.add_row(split, str(len(e.by_task)), iou, f"{low} … {high}", *others)
    console = Console()
    console.print(table)
    console.print(f"results.json, per_task.csv, init.safetensors, checkpoints, panels: {folder}", soft_wrap=True)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
