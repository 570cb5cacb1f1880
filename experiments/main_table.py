"""The main table: one row an algorithm, all on the same test episodes, with a picture of the rows and of predictions.

    python experiments/main_table.py --rows imagenet reptile fomaml_star --tasks 40 --seeds 0 --out runs/demo

Each row and seed is one `python -m metaseg.run` in a folder of its own under --runs; one that has finished with the
same configuration is not repeated. Words behind `--` go to every run: `-- dataset.image_size=96 evaluate.queries=5`.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from metaseg.compare import compare, read_run, task_means
from metaseg.config import config_dir, config_sha256, make_update
from metaseg.job import create, evaluation_episodes
from metaseg.metrics import bootstrap_ci95
from metaseg.panels import PREDICTION, TRUTH, overlay

ROWS = {
    "random": ["algo=finetune", "model.weights=null"],
    "imagenet": ["algo=finetune"],
    "joint": ["algo=joint"],
    "reptile": ["algo=reptile"],
    "fomaml": ["algo=fomaml"],
    "fomaml_star": ["algo=fomaml_star"],
}
BASELINE = "imagenet"
LRS = "[0.02,0.05,0.1]"  # each row adapts with the one that is best for it on validation tasks


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: str
    seed: int
    folder: Path
    overrides: list[str]

    def done(self) -> bool:
        """Whether it has finished with this very configuration."""
        if not (self.folder / "results.json").is_file():
            return False
        found = self.results()
        # an older version did not write down which episodes they were: those cannot be compared
        return found.get("config_sha256") == config_sha256(composed(self.overrides)) and "episodes" in found

    def results(self) -> dict:
        """Of results.json."""
        return json.loads((self.folder / "results.json").read_text())


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    common = [f"evaluate.test_tasks={args.tasks}", f"evaluate.lrs={LRS}", *args.overrides]
    runs = [
        Run(row, seed, args.runs / f"{row}-s{seed}", [*ROWS[row], f"seed={seed}", *common])
        for row in args.rows
        for seed in args.seeds
    ]
    create(composed(common).dataset)  # built once, before the runs need it side by side
    execute([run for run in runs if not run.done()], args.jobs)
    table = [summarise(row, [run for run in runs if run.row == row], runs) for row in args.rows]
    write_csv(table, args.out / "main_table.csv")
    draw_bars(table, args.out / "main_table.png")
    draw_predictions([run for run in runs if run.seed == args.seeds[0]], common, args.out / "predictions.png")
    print_table(table, args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--tasks", type=lambda text: None if text == "all" else int(text), default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/main_table"), help="folder for the table and pictures")
    parser.add_argument("--runs", type=Path, help="folder of the runs' folders (default: --out)")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="runs side by side (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="for every run, behind --")
    args = parser.parse_args(argv)
    args.tasks = "null" if args.tasks is None else args.tasks
    args.runs = args.runs or args.out
    return args


def default_jobs() -> int:
    """On a CPU one run a core: an inner step gains little from a second thread. On a GPU one run."""
    import torch

    return 1 if torch.cuda.is_available() else (os.cpu_count() or 1)


def composed(overrides: Sequence[str]):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Run `jobs` at a time, their output in console.log of their folders; after a failure none is begun."""
    jobs = max(1, min(jobs, len(runs)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # the trained rows take longest; begun first, they leave no core idle at the end
    longest_first = sorted(runs, key=lambda run: "algo=finetune" in run.overrides)

    def one(run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        bar = progress.add_task(f"{run.row}, seed {run.seed}", total=None)
        log = run.folder / "console.log"
        command = [sys.executable, "-m", "metaseg.run", *run.overrides, f"hydra.run.dir={run.folder.resolve()}"]
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise SystemExit(f"{run.row}, seed {run.seed} failed ({code}), {log} ends:\n{log.read_text()[-2000:]}")
        progress.update(bar, total=1, completed=1)
        progress.advance(total)

    with Progress(*columns) as progress:
        total = progress.add_task(f"{len(runs)} runs, {jobs} at a time", total=len(runs))
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(one, run) for run in longest_first]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def summarise(row: str, runs: Sequence[Run], everything: Sequence[Run]) -> dict:
    """A row's numbers: means over seeds; intervals over tasks, each task being the mean of its seeds."""
    results = [run.results() for run in runs]
    tasks = task_means([read_run(run.folder) for run in runs], "iou")
    low, high = bootstrap_ci95(list(tasks.values()))
    numbers = {
        "row": row,
        "iou": float(np.mean(list(tasks.values()))),
        "iou_low": low,
        "iou_high": high,
        "miou_class": float(np.mean([r["test"]["miou_class"] for r in results])),
        "fb_iou": float(np.mean([r["test"]["fb_iou"] for r in results])),
        "iou_before_adaptation": float(np.mean([r["test"]["iou_before_adaptation"] for r in results])),
        "update_lr": " ".join(f"{r['update']['lr']:g}" for r in results),
        "iou_by_seed": " ".join(f"{r['test']['iou']['mean']:.4f}" for r in results),
        "tasks": len(tasks),
        "seeds": " ".join(str(run.seed) for run in runs),
        "shots": results[0]["shots"],
        "meta_steps": results[0]["meta_steps"],
        "minutes": float(np.mean([r["wall_s"] for r in results]) / 60),
        "git_commit": results[0]["git_commit"],
    }
    baseline = [run for run in everything if run.row == BASELINE]
    if baseline and row != BASELINE:
        gain = compare([run.folder for run in baseline], [run.folder for run in runs]).iou
        numbers["gain"] = gain.mean
        numbers["gain_low"], numbers["gain_high"] = gain.ci95
    return numbers


def write_csv(table: Sequence[dict], path: Path) -> None:
    fields = list(max(table, key=len))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in table:
            writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})


def draw_bars(table: Sequence[dict], path: Path) -> None:
    """IoU with its interval, and a mark for the IoU before adaptation."""
    figure = Figure(figsize=(7, 0.5 * len(table) + 1.2), layout="constrained")
    ax = figure.subplots()
    places = np.arange(len(table))[::-1]
    ious = np.array([row["iou"] for row in table])
    intervals = np.array([[row["iou"] - row["iou_low"], row["iou_high"] - row["iou"]] for row in table]).T
    colours = ["#9aa5b1" if row["meta_steps"] == 0 else "#2f7fb8" for row in table]
    ax.barh(places, ious, xerr=intervals, color=colours, height=0.62, capsize=3, ecolor="#333333")
    befores = [row["iou_before_adaptation"] for row in table]
    ax.plot(befores, places, "k|", markersize=13, label="before adaptation")
    for place, row in zip(places, table, strict=True):
        ax.text(0.01, place, f"{row['iou']:.3f}", va="center", color="white", fontsize=9)
    ax.set(
        yticks=places, yticklabels=[row["row"] for row in table], xlim=(0, max(0.8, *(r["iou_high"] for r in table)))
    )
    first = table[0]
    ax.set_xlabel(f"IoU on {first['tasks']} test tasks, {first['shots']} shots, 95 % interval over tasks")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def draw_predictions(runs: Sequence[Run], overrides: Sequence[str], path: Path, columns: int = 6) -> None:
    """The first query image of the first tasks: support, query, each row's prediction, the truth."""
    config = composed(overrides)
    episodes = evaluation_episodes(config, create(config.dataset), "test", make_update(config["update"]))
    predictions = {run.row: np.load(run.folder / "panels" / "predictions.npy") for run in runs}
    columns = min(columns, *(len(masks) for masks in predictions.values()))
    if columns == 0:
        return
    lines = ["support", "", "query", *predictions, "truth"]
    figure = Figure(figsize=(1.25 * columns + 1.0, 1.25 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for j in range(columns):
        episode = episodes[j]
        support, support_masks = episode.support.numpy()
        query, truth = episode.query.numpy()
        pictures = [overlay(support[i], support_masks[i], TRUTH) for i in (0, 1 % len(support))]
        pictures += [query[0]]
        pictures += [overlay(query[0], masks[j][0], PREDICTION) for masks in predictions.values()]
        pictures += [overlay(query[0], truth[0], TRUTH)]
        axes[0, j].set_title(episode.task.replace("_", " ")[:18], fontsize=8)
        for ax, picture in zip(axes[:, j], pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
    for ax, name in zip(axes[:, 0], lines, strict=True):
        ax.set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=110)


def print_table(table: Sequence[dict], args: argparse.Namespace) -> None:
    shots, tasks = table[0]["shots"], table[0]["tasks"]
    title = f"IoU in %, {shots} shots, {tasks} tasks of unseen classes, the same episodes a row"
    headings = "θ", "update.lr", "IoU", "95 %", f"gain over {BASELINE}", "before", "min"
    view = Table(*headings, title=title, box=SIMPLE_HEAD)
    for row in table:
        gain = ""
        if "gain" in row:
            mean, low, high = (_percent(row[key], "+") for key in ("gain", "gain_low", "gain_high"))
            gain = f"{mean} [{low}, {high}]"
        view.add_row(
            row["row"],
            row["update_lr"],
            _percent(row["iou"]),
            f"[{_percent(row['iou_low'])}, {_percent(row['iou_high'])}]",
            gain,
            _percent(row["iou_before_adaptation"]),
            f"{row['minutes']:.1f}",
        )
    console = Console()
    console.print(view)
    for name, what in {
        f"{args.out}/main_table.csv and .png": "the table",
        f"{args.out}/predictions.png": "predictions of each row",
        f"{args.runs}/*/wandb": "W&B runs, offline unless you are logged in; `wandb sync DIR` uploads one",
    }.items():
        console.print(f"{name}: {what}", soft_wrap=True, highlight=False)


def _percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}"


if __name__ == "__main__":
    main()
