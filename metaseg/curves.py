"""Many-shot learning curves: IoU, and inner steps to 95 % of it, against the number of shots (arXiv 1912.06290, FP-k).

Every initialisation meets the same query images, and supports of which the larger contain the smaller.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.table import Table
from torch import nn

from metaseg.atomic import write_json
from metaseg.config import config_sha256, device_of, plain
from metaseg.data.episodes import EvaluationEpisodes, choose_tasks
from metaseg.errors import ConfigError, WeightsError
from metaseg.evaluate import Evaluation, evaluate, write_csv
from metaseg.initialisation import check_held_out, load_initialisation, read_about
from metaseg.job import Job, create, scoring_of
from metaseg.metrics import Floats, bootstrap_ci95
from metaseg.panels import log_picture
from metaseg.report import SCHEMA, git_commit
from metaseg.seeding import torch_seed
from metaseg.texts import say
from metaseg.update import Update

SHARE = 0.95  # of the final IoU, for the steps to reach it
NAMED = {"imagenet": "imagenet", "random": None}  # initialisations without a file: `weights` of the network

Row = dict[str, str | int | float]


def curves(job: Job, loggers: Sequence[Logger], folder: Path) -> float:
    """Score all initialisations at all shots; returns the first one's mean IoU at the most shots, in [0, 1].

    Leaves curves.csv (a row an episode), summary.csv (a row an initialisation and number of shots), curves.png and
    results.json.
    """
    started = time.perf_counter()
    settings = job.config.curves
    # all are read, and the most shots asked for, before any work: a mistake shall not cost an afternoon
    inits = {name: initialisation(job, str(path)) for name, path in settings.inits.items()}
    episodes(job, job.update, max(settings.k))
    first = next(iter(inits))
    if settings.baseline is not None:
        inits = {settings.baseline: inits[settings.baseline]} | inits  # gains are over it, so it comes first
    ious: dict[tuple[str, int], Floats] = {}
    rows: list[Row] = []
    summary: list[Row] = []
    for name, (net, update) in inits.items():
        net.to(device_of(job.config))
        for k in settings.k:
            scoring = scoring_of(job, net, episodes(job, update, k), update, settings.steps)
            evaluation = evaluate(scoring, title=f"{name}, {k} shots")
            to_share = [{"steps_to_95": score.steps_to(SHARE)} for score in evaluation.scores]
            rows += [
                {"init": name, "k": k, "lr": update.lr, **row, **more}
                for row, more in zip(evaluation.rows(), to_share, strict=True)
            ]
            ious[name, k] = evaluation.task_ious
            summary.append({"init": name, "k": k, "lr": update.lr, **summarise(evaluation)})
            if settings.baseline is not None:
                summary[-1] |= gain(ious[name, k] - ious[settings.baseline, k])
            for logger in loggers:
                logger.log_metrics({f"curves/{name}/iou": evaluation.iou}, step=k)
            write_csv(rows, folder / "curves.csv")  # after each: a run that is stopped leaves what it has
            write_csv(summary, folder / "summary.csv")
    head = describe_curves(job) | {"wall_s": round(time.perf_counter() - started, 1)}
    write_json(folder / "results.json", {**head, "curves": summary})
    draw(summary, folder / "curves.png")
    log_picture(loggers, "curves", folder / "curves.png")
    show(summary, folder)
    return next(float(row["iou"]) for row in summary if (row["init"], row["k"]) == (first, max(settings.k)))


def describe_curves(job: Job) -> dict[str, Any]:
    """What ran on what, for the head of results.json."""
    config, settings = job.config, plain(job.config.curves)
    files = {name: Path(str(init)) for name, init in settings.pop("inits").items() if init not in NAMED}
    abouts = {name: {"path": str(path), **asdict(read_about(path))} for name, path in files.items()}
    for about in abouts.values():
        del about["seen"]  # hundreds of classes, which the file itself names
    return {
        "schema": SCHEMA,
        "config_sha256": config_sha256(config),
        "mode": config.mode,
        "dataset": job.source.name,
        "splits_sha256": job.about.splits_sha256,
        "episodes": {"seed": config.evaluate.seed, "image_size": job.source.image_size, **settings},
        "inits": {name: abouts.get(name, init) for name, init in config.curves.inits.items()},
        "update": job.about.update,
        "seed": config.seed,
        "device": device_of(config).type,
        "git_commit": git_commit(),
    }


def initialisation(job: Job, path: str) -> tuple[nn.Module, Update]:
    """θ out of a file, or one of `NAMED`; and ω with the learning rate that the file's metadata recommend for it."""
    with torch_seed(job.config.seed):
        net = create(job.config.model, weights=NAMED.get(path))
    if path in NAMED:
        return net, job.update
    about = load_initialisation(net, Path(path), job.about.model)
    check_held_out(about, job.source, ["test"], f"{path} of curves.inits")
    theirs, ours = (update.get("optimizer") for update in (about.update, job.about.update))
    if theirs != ours:
        raise ConfigError(
            f"{path} recommends a learning rate for {_name(theirs)}: give the update=… of that optimizer, not of "
            f"{_name(ours)}"
        )
    lr = about.update.get("lr")
    if not isinstance(lr, int | float) or not lr > 0:
        raise WeightsError(f"{path} recommends no learning rate, but {lr}: give the init.safetensors that a run left")
    return net, replace(job.update, lr=lr)


def _name(optimizer: Any) -> Any:
    return optimizer.get("_target_") if isinstance(optimizer, dict) else optimizer


def episodes(job: Job, update: Update, k: int) -> EvaluationEpisodes:
    """Those of `k` shots on the test tasks."""
    settings, seed = job.config.curves, job.config.evaluate.seed
    tasks = choose_tasks(job.source, "test", settings.tasks, seed)
    return EvaluationEpisodes(
        job.source,
        "test",
        tasks,
        update,
        shots=k,
        queries=settings.queries,
        draws=settings.draws,
        seed=seed,
        keys=["curves.k", "curves.queries"],
    )


def summarise(evaluation: Evaluation) -> Row:
    """Mean IoU and steps to `SHARE` of it, with 95 % intervals over tasks."""
    low, high = evaluation.ci95
    steps = evaluation.per_task(lambda score: score.steps_to(SHARE))
    steps_low, steps_high = bootstrap_ci95(steps)
    return {
        "tasks": len(evaluation.by_task),
        "iou": evaluation.iou,
        "iou_low": low,
        "iou_high": high,
        "steps": evaluation.steps,
        "steps_to_95": float(steps.mean()),
        "steps_to_95_low": steps_low,
        "steps_to_95_high": steps_high,
    }


def gain(differences: Floats) -> Row:
    """Mean of the tasks' differences in IoU, with its 95 % interval over tasks."""
    low, high = bootstrap_ci95(differences)
    return {"gain": float(differences.mean()), "gain_low": low, "gain_high": high}


def draw(summary: Sequence[Row], path: Path) -> None:
    """IoU, its gain over the baseline if there is one, and steps to 95 % of it, against shots."""
    panels = {"iou": "IoU", "gain": "gain in IoU, paired", "steps_to_95": "inner steps to 95 % of the final IoU"}
    panels = {value: label for value, label in panels.items() if value in summary[0]}
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for ax, (value, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in dict.fromkeys(row["init"] for row in summary):
            line: dict[str, list[Any]] = {
                key: [row[key] for row in summary if row["init"] == name]
                for key in ("k", value, f"{value}_low", f"{value}_high")
            }
            (drawn,) = ax.plot(line["k"], line[value], "o-", markersize=4, label=name)
            ax.fill_between(line["k"], line[f"{value}_low"], line[f"{value}_high"], alpha=0.15, color=drawn.get_color())
        ax.set(xscale="log", xlabel="shots k", ylabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def show(summary: Sequence[Row], folder: Path) -> None:
    """Print the table."""
    table = Table("init", "k", "lr", "tasks", "IoU", "95 %", "gain", "steps", "to 95 %", title="Learning curves")
    for row in summary:
        interval = f"{row['iou_low']:.3f} … {row['iou_high']:.3f}"
        cells = (row["init"], row["k"], f"{row['lr']:g}", row["tasks"], f"{row['iou']:.3f}", interval)
        gained = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]" if "gain" in row else ""
        table.add_row(*map(str, cells), gained, f"{row['steps']:.0f}", f"{row['steps_to_95']:.0f}")
    console = Console()
    console.print(table)
    say(f"curves.csv, summary.csv, curves.png, results.json: {folder}")
