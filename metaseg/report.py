"""What a run leaves behind: results.json, per_task.csv, a table on the console."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from rich.console import Console
from rich.table import Table

from metaseg.atomic import write_json
from metaseg.data.source import SPLITS, Split
from metaseg.evaluate import Evaluation, across_tasks, write_csv
from metaseg.panels import log_to_wandb, write_panels
from metaseg.texts import say
from metaseg.tracking import to_wandb

SCHEMA = 1


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
    to_wandb(loggers, lambda run: log_to_wandb(run, shown, split))
    _print_table(head, evaluations, folder)
    return results


def write_results(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write results.json, and per_task.csv with a row an episode."""
    write_csv(rows, folder / "per_task.csv")
    write_json(folder / "results.json", results)  # after the table of its episodes


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
    say(f"results.json, per_task.csv, init.safetensors, checkpoints, panels: {folder}")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
