"""Paired comparison of runs on the same episodes: `python -m metaseg.compare RUN_A RUN_B`.

Tasks differ far more from each other than methods do. With both runs on the same episodes, that spread cancels in each
task's difference B − A, and an interval over tasks is one of what the two differ in.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from metaseg.errors import ComparisonError, printable
from metaseg.metrics import Floats, bootstrap_ci95, for_json
from metaseg.texts import is_number, no_math, read_csv, read_json

Measure = Literal["iou", "loss"]
MOST_EPISODES = 100_000  # for which an interval takes some seconds
_KINDS = {"algo": str, "batchnorm": str, "dataset": str, "splits_sha256": str, "shots": int}  # of results.json

# update=, since the file names the ω that suits its θ, the learning rate chosen for it or UHO's ω*
AGAIN = "without training anew: mode=test ckpt_path=RUN/init.safetensors update=RUN/init.safetensors"


@dataclass(frozen=True)
class FinishedRun:
    """What a run left in its folder.

    Attributes:
        folder: of the run.
        results: of results.json.
        scores: of per_task.csv: IoU in [0, 1] and loss of each (task, draw), in the file's order.
    """

    folder: Path
    results: dict[str, Any]
    scores: dict[tuple[str, int], dict[Measure, float]]

    @property
    def split(self) -> str:
        """Which split per_task.csv is of: test, or val for a run that left test tasks alone."""
        return "test" if self.results["test"] else "val"

    def task_means(self, measure: Measure) -> dict[str, float]:
        """Each task's mean over its draws."""
        draws: dict[str, list[float]] = {}
        for (task, _), score in self.scores.items():
            draws.setdefault(task, []).append(score[measure])
        return {task: float(np.mean(values)) for task, values in draws.items()}


@dataclass(frozen=True)
class Side:
    """One of the two things compared: runs of one algorithm, with one seed each.

    Attributes:
        algo: of all its runs.
        batchnorm: policy, or policies, that they predict by.
        folders: of the runs.
    """

    algo: str
    batchnorm: str
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Paired:
    """One measure on both sides, task by task.

    Attributes:
        a: shape (tasks,), each the mean over a task's draws and the side's runs.
        b: the same of the other side.
        higher_is_better: true of IoU, false of the loss.
    """

    a: Floats
    b: Floats
    higher_is_better: bool

    @property
    def differences(self) -> Floats:
        """B − A of each task, shape (tasks,)."""
        with np.errstate(invalid="ignore"):  # losses that diverged: inf − inf is nan, and shows as that
            return self.b - self.a

    @property
    def mean(self) -> float:
        """Mean of the differences."""
        return float(np.mean(self.differences))

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % bootstrap interval of `mean` over tasks."""
        with np.errstate(invalid="ignore"):  # likewise
            return bootstrap_ci95(self.differences)

    @property
    def better(self) -> float:
        """Share of tasks, in [0, 1], on which B is better than A; equal ones are not."""
        return float(np.mean(self.b > self.a if self.higher_is_better else self.b < self.a))

    def numbers(self) -> dict[str, object]:
        """The summaries for JSON; null where a loss was not finite."""
        return {
            "a": for_json(float(np.mean(self.a))),
            "b": for_json(float(np.mean(self.b))),
            "difference": {"mean": for_json(self.mean), "ci95": [for_json(bound) for bound in self.ci95]},
            "better": self.better,
        }


@dataclass(frozen=True)
class Comparison:
    """B against A on the same episodes. All differences are B − A.

    Attributes:
        a: the side compared with.
        b: the side whose gain or loss it is.
        split: val or test.
        shots: support images.
        tasks: their names, in the order of the arrays.
        iou: mean of per-image object IoU.
        loss: of the query set, without L2.
    """

    a: Side
    b: Side
    split: str
    shots: int
    tasks: tuple[str, ...]
    iou: Paired
    loss: Paired

    def numbers(self) -> dict[str, object]:
        """What `--json` writes: both sides, the summaries, and each task's values."""
        sides = {"a": self.a, "b": self.b}
        values = zip(self.tasks, self.iou.a, self.iou.b, self.loss.a, self.loss.b, strict=True)
        return {
            "difference": "b - a",
            **{
                name: {"algo": side.algo, "batchnorm": side.batchnorm, "runs": [str(path) for path in side.folders]}
                for name, side in sides.items()
            },
            "split": self.split,
            "shots": self.shots,
            "tasks": len(self.tasks),
            "iou": self.iou.numbers(),
            "loss": self.loss.numbers(),
            "per_task": [
                {
                    "task": task,
                    "iou": {"a": for_json(iou_a), "b": for_json(iou_b)},
                    "loss": {"a": for_json(loss_a), "b": for_json(loss_b)},
                }
                for task, iou_a, iou_b, loss_a, loss_b in values
            ],
        }


def compare(a: Sequence[Path], b: Sequence[Path]) -> Comparison:
    """Compare runs on the same episodes, task by task.

    Args:
        a: folders of one or more runs of one algorithm, such as several seeds; a task's value is their mean.
        b: the same of what is compared with them; as many or not.

    Raises:
        ComparisonError: if a folder holds no finished run, or the runs did not meet the same episodes.
    """
    runs_a, runs_b = ([read_run(folder) for folder in side] for side in (a, b))
    first = runs_a[0]
    for other in (*runs_a[1:], *runs_b):
        _check_same_episodes(first, other)

    def paired(measure: Measure, higher_is_better: bool) -> Paired:
        of_a, of_b = task_means(runs_a, measure), task_means(runs_b, measure)
        return Paired(np.array(list(of_a.values())), np.array([of_b[task] for task in of_a]), higher_is_better)

    return Comparison(
        a=_side(runs_a),
        b=_side(runs_b),
        split=first.split,
        shots=first.results["shots"],
        tasks=tuple(first.task_means("iou")),
        iou=paired("iou", higher_is_better=True),
        loss=paired("loss", higher_is_better=False),
    )


def read_run(folder: Path) -> FinishedRun:
    """What a run left in `folder`.

    Raises:
        ComparisonError: if it is not the folder of a finished run.
    """
    results, per_task = folder / "results.json", folder / "per_task.csv"
    missing = [path.name for path in (results, per_task) if not path.is_file()]
    if missing:
        raise ComparisonError(f"{folder} has no {' and no '.join(missing)}: name the folder of a run that has finished")
    try:
        found = read_json(results)
        scores: dict[tuple[str, int], dict[Measure, float]] = {
            (row["task"], int(row["draw"])): {"iou": float(row["iou"]), "loss": float(row["loss"])}
            for row in read_csv(per_task, ("task", "draw", "iou", "loss"))
        }
        run = FinishedRun(folder, found, scores)
        odd = [name for name, kind in _KINDS.items() if not isinstance(found[name], kind)]
        odd += ["episodes"] if not isinstance(found.get("episodes"), dict | None) else []  # older files have none
        if odd:
            raise TypeError(f"{odd[0]} is {found[odd[0]]!r:.40}")
        if not all(is_number(score["iou"]) for score in scores.values()):  # a loss may be infinite
            raise ValueError("an IoU is no number")
        _ = run.split
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ComparisonError(
            f"{folder}: results.json or per_task.csv is not what a run writes ({error!r}): run it again"
        ) from error
    if len(scores) > MOST_EPISODES:
        most = f"intervals are made of {MOST_EPISODES:,} at most: test on fewer by evaluate.test_tasks"
        raise ComparisonError(f"{per_task} has {len(scores):,} episodes, and {most}")
    if not scores:
        raise ComparisonError(f"{per_task} has no episode: run it again")
    return run


def task_means(runs: Sequence[FinishedRun], measure: Measure) -> dict[str, float]:
    """Each task's value: the mean over its draws, then over the runs, which have the same tasks."""
    by_run = [run.task_means(measure) for run in runs]
    return {task: float(np.mean([means[task] for means in by_run])) for task in by_run[0]}


def _check_same_episodes(one: FinishedRun, other: FinishedRun) -> None:
    """Refuse two runs that met other episodes; the first thing in which they differ is named, with what sets it."""
    ours, theirs = _episodes(one), _episodes(other)
    for name, (value, cure) in ours.items():
        if theirs[name][0] != value:
            raise ComparisonError(
                f"other {name}: {value} in {one.folder}, {theirs[name][0]} in {other.folder}. Paired means the same "
                f"episodes: run one of them again with {cure} as in the other ({AGAIN})"
            )
    differing = [f"{task}, draw {draw}" for task, draw in sorted(one.scores.keys() ^ other.scores.keys())]
    if differing:
        raise ComparisonError(
            f"other tasks: {len(differing)} of the episodes of {one.folder} and {other.folder} are in only one of them "
            f"({'; '.join(differing[:3])}{' …' if len(differing) > 3 else ''}). Run one of them again with "
            f"evaluate.{one.split}_tasks as in the other ({AGAIN})"
        )


def _episodes(run: FinishedRun) -> dict[str, tuple[object, str]]:
    """What decides a run's episodes, by name: its value, and the overrides that set it."""
    results, drawn = run.results, run.results.get("episodes")
    if drawn is None:
        raise ComparisonError(
            f"{run.folder}/results.json does not say which episodes it is of, as an older version wrote it: run it "
            f"again ({AGAIN})"
        )
    return {
        "data set": (results["dataset"], "dataset"),
        "splits": (f"sha256 {results['splits_sha256'][:12]}", "the data set's classes and splits"),
        "split": (run.split, "mode (fit scores validation tasks, the others test tasks)"),
        "shots": (results["shots"], "evaluate.shots"),
        "query images": (drawn.get("queries"), "evaluate.queries"),
        "draws": (drawn.get("draws"), "evaluate.draws"),
        "seed of the episodes": (drawn.get("seed"), "evaluate.seed"),
        "image size": (drawn.get("image_size"), "dataset.image_size"),
        "number of images": (drawn.get("images"), "the data set's images (emoji: dataset.images_per_class)"),
        "seed of the data set": (drawn.get("data_seed"), "dataset.seed"),
    }


def _side(runs: Sequence[FinishedRun]) -> Side:
    algos, batchnorms = (sorted({printable(run.results[key]) for run in runs}) for key in ("algo", "batchnorm"))
    if len(algos) > 1:
        raise ComparisonError(
            f"{', '.join(str(run.folder) for run in runs)} are of different algorithms ({', '.join(algos)}): a side is "
            "one algorithm's runs, such as several seeds; compare these algorithms with each other, side by side"
        )
    return Side(algos[0], ", ".join(batchnorms), tuple(run.folder for run in runs))


def write_json(comparison: Comparison, path: Path) -> None:
    """Write the numbers, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(comparison.numbers(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_plot(comparison: Comparison, path: Path, named: int = 4) -> None:
    """Draw each task's IoU, A against B, making the folder.

    Args:
        comparison: to draw.
        path: a PNG, or what else its suffix stands for.
        named: how many tasks are named: at most so many of those that gained most, and of those that lost most.

    Raises:
        ComparisonError: for a suffix that Matplotlib cannot write.
    """
    figure = Figure(figsize=(5.6, 5.8), layout="constrained")
    if path.suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise ComparisonError(f"{path}: a plot has a suffix such as .png")
    iou = comparison.iou
    differences = iou.differences
    order = np.argsort(differences)
    groups = [(order[::-1][:named], 1, "#2f7fb8"), (order[:named], -1, "#c8503c")]
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, zorder=0)
    ax.scatter(iou.a, iou.b, s=16, color="#9aa5b1")
    for tasks, sign, colour in groups:
        moved = tasks[sign * differences[tasks] > 0]
        height = math.inf
        for i in moved[np.argsort(-sign * iou.b[moved])]:  # from the outside inwards, no text on another
            x, y = float(iou.a[i]), float(iou.b[i])
            height = min(sign * y, height - 0.03)
            ax.scatter([x], [y], s=20, color=colour)
            rightwards = x < 0.3 if sign > 0 else x < 0.7  # away from the diagonal, unless the edge is near
            ax.annotate(
                f"{no_math(comparison.tasks[i])} {differences[i]:+.2f}",
                (x, sign * height),
                xytext=(6 if rightwards else -6, 0),
                textcoords="offset points",
                ha="left" if rightwards else "right",
                va="center",
                fontsize=8,
                color=colour,
            )
    low, high = iou.ci95
    ax.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        aspect="equal",
        xlabel=f"IoU of A: {_short(comparison.a)}",
        ylabel=f"IoU of B: {_short(comparison.b)}",
    )
    ax.set_title(
        f"{len(comparison.tasks)} {comparison.split} tasks, {comparison.shots} shots\n"
        f"B − A: {iou.mean:+.3f} [{low:+.3f}, {high:+.3f}], B better on {iou.better:.0%}",
        fontsize=10,
    )
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def print_table(comparison: Comparison) -> None:
    """Both sides by name, and a row a measure."""
    title = f"B − A on the same episodes: {len(comparison.tasks)} {comparison.split} tasks, {comparison.shots} shots"
    table = Table("", "A", "B", "B − A", "95 % over tasks", "tasks better in B", title=title, box=SIMPLE_HEAD)
    for name, paired in (("IoU", comparison.iou), ("loss", comparison.loss)):
        low, high = paired.ci95
        table.add_row(
            name,
            f"{paired.a.mean():.3f}",
            f"{paired.b.mean():.3f}",
            f"{paired.mean:+.3f}",
            f"{low:+.3f} … {high:+.3f}",
            f"{paired.better:.0%}",
        )
    console = Console(highlight=False)
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        folders = ", ".join(map(str, side.folders))
        console.print(f"{name}: {side.algo}, batch norm: {side.batchnorm}; {folders}", markup=False, soft_wrap=True)
    console.print(table)


def _short(side: Side) -> str:
    """Algorithm and first folder: two runs of one algorithm may differ in ω alone."""
    first, *others = side.folders
    return f"{side.algo}, {first.resolve().name}" + (f" and {len(others)} more" if others else "")


def _folders(word: str) -> list[Path]:
    """The runs that a word of the command line names; a multirun's folders may have commas in their own names."""
    return [Path(word)] if Path(word).is_dir() else [Path(part) for part in word.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m metaseg.compare",
        description="Compare two runs on the same episodes, task by task: the mean of B − A with its 95 % bootstrap "
        "interval over tasks, for IoU and for the loss.",
        epilog="A run is the folder that `python -m metaseg.run` left. Several, with commas between them, are seeds of "
        "one algorithm: each task's value is their mean. Runs on other episodes are refused.",
    )
    parser.add_argument("a", metavar="RUN_A", type=_folders, help="folder of a run, or RUN_A1,RUN_A2,…")
    parser.add_argument("b", metavar="RUN_B", type=_folders, help="likewise; a positive difference in IoU is B's gain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, with each task's")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw each task's IoU, A against B (PNG)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; the exit code is 1 for runs that cannot be compared."""
    args = _parser().parse_args(argv)
    try:
        comparison = compare(args.a, args.b)
        print_table(comparison)
        if args.json:
            write_json(comparison, args.json)
        if args.plot:
            write_plot(comparison, args.plot)
    except (ComparisonError, OSError) as error:
        sys.exit(f"metaseg: {error}")


if __name__ == "__main__":
    main()
