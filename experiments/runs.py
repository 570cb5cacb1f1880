"""What the experiments share: runs of `metaseg.run`, a few at a time and none twice, and tables of what they gave."""

import argparse
import csv
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from metaseg.compare import compare, read_run, task_means
from metaseg.config import config_dir
from metaseg.initialisation import read_about
from metaseg.metrics import bootstrap_ci95
from metaseg.sweep import finished

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One row of a table with one seed.

    Attributes:
        row: its name.
        seed: of the meta-training.
        folder: for what the run leaves.
        overrides: of the configuration.
    """

    row: str
    seed: int
    folder: Path
    overrides: list[str]

    def done(self) -> bool:
        """Whether it has finished with this very configuration, of the initialisations that are there now."""
        return finished(composed(self.overrides), self.folder) is not None

    def results(self) -> dict[str, Any]:
        """Of results.json."""
        found: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return found


def parser(
    description: str, name: str, *, tasks: str = "40", seeds: Sequence[int] | None = (0, 1)
) -> argparse.ArgumentParser:
    """The words that all experiments understand, with an experiment's own defaults; without seeds no --seeds."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", choices=["emoji", "fss1000"], default="emoji", help="fss1000: the paper's setting")
    made.add_argument("--tasks", default=tasks, help="test tasks, or all (default: %(default)s)")
    if seeds:
        made.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    made.add_argument("--out", type=Path, default=Path("runs") / name, help="folder for the table and pictures")
    made.add_argument("--runs", type=Path, help="folder of the runs' folders (default: --out)")
    made.add_argument("--jobs", type=int, default=default_jobs(), help="runs side by side (default: %(default)s)")
    made.add_argument("overrides", nargs="*", help="for every run, behind --")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The words of a command line, with what follows from them; makes the folders."""
    args = made.parse_args(argv)
    args.tasks = "null" if args.tasks == "all" else args.tasks
    args.runs = args.runs or args.out
    args.command = shlex.join(["python", *sys.argv]) if argv is None else shlex.join(argv)
    for folder in (args.runs, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    return args


def add_inits(made: argparse.ArgumentParser, rows: Sequence[str]) -> None:
    """Words for an experiment that takes initialisations of these rows and of --seeds from the main table's runs."""
    add_main_table(made)
    made.add_argument("--rows", nargs="+", default=list(rows), help="of the main table (default: %(default)s)")


def add_main_table(made: argparse.ArgumentParser) -> None:
    """The word that says where these runs are."""
    made.add_argument("--main-table", type=Path, default=Path("runs/main_table"), help="main_table.py's --runs")


def initialisation(args: argparse.Namespace, row: str, seed: int) -> Path:
    """The file that main_table.py left."""
    return initialisation_of(args, f"{row}-s{seed}")


def initialisation_of(args: argparse.Namespace, run: str) -> Path:
    """Likewise, by the name of its run."""
    path: Path = args.main_table / run / "init.safetensors"
    if not path.is_file():
        raise SystemExit(f"there is no {path}: run experiments/main_table.py first, or say --main-table and which runs")
    return path


def recommended(path: Path) -> list[str]:
    """Overrides to test an initialisation with the learning rate that was best for it, which is the last of them."""
    about = read_about(path)
    return ["mode=test", f"algo={about.algo}", f"ckpt_path={path}", f"update.lr={about.update['lr']}"]


def default_jobs() -> int:
    """On a CPU one run a core: an inner step gains little from a second thread. On a GPU one run."""
    import torch

    return 1 if torch.cuda.is_available() else (os.cpu_count() or 1)


def composed(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Run what is not done, `jobs` at a time, output in console.log of the folders; after a failure none is begun."""
    runs = [run for run in runs if not run.done()]
    jobs = max(1, min(jobs, len(runs)))
    # threads that share a core with another process wait for each other: divided among the runs, unless said otherwise
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())

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
            futures = [pool.submit(one, run) for run in runs]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def tabulate(runs: Sequence[Run], baseline: str) -> list[Row]:
    """A row of numbers for each row's runs, in their order, with the gain over `baseline` if that is among them."""
    rows = {run.row: [other for other in runs if other.row == run.row] for run in runs}
    return [summarise(of_row, rows.get(baseline, []) if row != baseline else []) for row, of_row in rows.items()]


def summarise(runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
    """A row's numbers: means over seeds; intervals over tasks, each task being the mean of its seeds."""
    results = [run.results() for run in runs]
    tasks = task_means([read_run(run.folder) for run in runs], "iou")
    low, high = bootstrap_ci95(list(tasks.values()))
    numbers: Row = {
        "row": runs[0].row,
        "iou": float(np.mean(list(tasks.values()))),
        "iou_low": low,
        "iou_high": high,
        "gain": None,
        "gain_low": None,
        "gain_high": None,
        "miou_class": float(np.mean([r["test"]["miou_class"] for r in results])),
        "fb_iou": float(np.mean([r["test"]["fb_iou"] for r in results])),
        "iou_before_adaptation": float(np.mean([r["test"]["iou_before_adaptation"] for r in results])),
        "val_iou": float(np.mean([r["val"]["iou"]["mean"] if r["val"] else r["uho"]["val_iou"] for r in results])),
        "update_lr": " ".join(f"{r['update']['lr']:.3g}" for r in results),
        "steps": " ".join(str(r["update"]["steps"]) for r in results),
        "iou_by_seed": " ".join(f"{r['test']['iou']['mean']:.4f}" for r in results),
        "tasks": len(tasks),
        "seeds": " ".join(str(run.seed) for run in runs),
        "shots": results[0]["shots"],
        "meta_steps": results[0]["meta_steps"],
        "minutes": float(np.mean([r["wall_s"] for r in results]) / 60),
    }
    if baseline:
        gain = compare([run.folder for run in baseline], [run.folder for run in runs]).iou
        numbers["gain"], (numbers["gain_low"], numbers["gain_high"]) = gain.mean, gain.ci95
    return numbers


def write_csv(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        for row in table:
            writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})


def write_about(args: argparse.Namespace, runs: Sequence[Run], path: Path) -> None:
    """Where the numbers come from, beside them, as JSON."""
    results = [run.results() for run in runs]
    about = {
        "command": args.command,
        "data": sorted({r["dataset"] for r in results}),
        "seeds": sorted({r["seed"] for r in results}),
        "commit": sorted({str(r["git_commit"]) for r in results}),
        "machine": machine(),
        "minutes_of_runs": round(sum(r["wall_s"] for r in results) / 60, 1),
        "runs_side_by_side": args.jobs,
    }
    path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def machine(device: str = "cpu") -> str:
    """The processor's or the GPU's name."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in known.splitlines() if "model name" in line), platform.machine())
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}"


def draw_bars(table: Sequence[Row], path: Path) -> None:
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


def print_table(table: Sequence[Row], baseline: str, files: Iterable[tuple[Path | str, str]]) -> None:
    """The rows, and what lies where."""
    shots, tasks = table[0]["shots"], table[0]["tasks"]
    title = f"IoU in %, {shots} shots, {tasks} tasks of unseen classes, the same episodes a row"
    headings = "", "update.lr", "steps", "IoU", "95 %", f"gain over {baseline}", "before", "min"
    view = Table(*headings, title=title, box=SIMPLE_HEAD)
    for row in table:
        gain = ""
        if row["gain"] is not None:
            mean, low, high = (percent(row[key], "+") for key in ("gain", "gain_low", "gain_high"))
            gain = f"{mean} [{low}, {high}]"
        view.add_row(
            row["row"],
            row["update_lr"],
            row["steps"],
            percent(row["iou"]),
            f"[{percent(row['iou_low'])}, {percent(row['iou_high'])}]",
            gain,
            percent(row["iou_before_adaptation"]),
            f"{row['minutes']:.1f}",
        )
    console = Console()
    console.print(view)
    for name, what in files:
        console.print(f"{name}: {what}", soft_wrap=True, highlight=False)


def percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}"
