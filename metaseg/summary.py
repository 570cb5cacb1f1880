"""A sweep as one table: `python -m metaseg.summary multirun/DIR`.

Jobs that differ in nothing but the seed are one row: the mean over seeds of each job's headline metric (IoU on the test
tasks; see `metaseg.run.run`), with Student's 95 % interval over seeds. Seeds share their episodes, so this interval is
of meta-training's own chance; what other tasks would give is in each job's results.json.
"""

import argparse
import csv
import sys
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from metaseg.errors import DataError, UserError
from metaseg.sweep import read_outcome

SEED = "seed"
WORKER = "worker"


class Job(NamedTuple):
    """One job of a sweep.

    Attributes:
        folder: of it.
        values: of its overrides, by key.
        headline: its metric in [0, 1]; None if it has not finished.
        error: why not, if it says so.
    """

    folder: Path
    values: dict[str, str]
    headline: float | None
    error: str | None


class Row(NamedTuple):
    """Jobs that differ in nothing but the seed.

    Attributes:
        values: of the keys that the sweep varies, but the seed.
        by_seed: headline metrics by seed, of those that have finished.
        missing: seeds of those that have not.
    """

    values: dict[str, str]
    by_seed: dict[str, float]
    missing: list[str]

    @property
    def mean(self) -> float | None:
        """Over seeds; None if none has finished."""
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else None

    @property
    def half_width(self) -> float | None:
        """Of Student's 95 % interval of `mean` over seeds; None of fewer than two."""
        values, n = list(self.by_seed.values()), len(self.by_seed)
        return float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None

    @property
    def name(self) -> str:
        """Of what distinguishes it; overrides that its jobs were not given are left out."""
        return " ".join(f"{key}={value}" for key, value in self.values.items() if value) or "all"


def read_sweep(folder: Path) -> list[Job]:
    """The jobs below a sweep's folder, in the order of their numbers.

    Raises:
        DataError: if there is none.
    """
    found = [path.parents[1] for path in folder.rglob(".hydra/overrides.yaml")]
    if not found:
        raise DataError(f"{folder} holds no jobs of a multirun: give the folder of one, such as multirun/DATE/TIME")
    return [read_job(path) for path in sorted(found, key=natural)]


def rows(jobs: Sequence[Job]) -> list[Row]:
    """The jobs by what the sweep varies, seeds together; in the order of the first of each."""
    return [row for row, _ in grouped(jobs)]


def grouped(jobs: Sequence[Job]) -> list[tuple[Row, list[Job]]]:
    """The rows, each with its jobs."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.values))
    varied = [key for key in keys if key != SEED and len({job.values.get(key, "") for job in jobs}) > 1]
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.values.get(key, "") for key in varied), []).append(job)
    return [(_row(dict(zip(varied, values, strict=True)), group), group) for values, group in groups.items()]


def failures(folder: Path) -> list[Path]:
    """Folders of the jobs that have not finished."""
    return [job.folder for job in read_sweep(folder) if job.headline is None]


def incomplete_studies(folder: Path) -> int | None:
    """Of how many studies no worker has finished; None if the jobs are no workers."""
    studies: dict[frozenset[tuple[str, str]], list[float]] = {}
    for job in (jobs := read_sweep(folder)):
        done = studies.setdefault(frozenset(job.values.items() - {(WORKER, job.values.get(WORKER, ""))}), [])
        done += [] if job.headline is None else [job.headline]
    return sum(not done for done in studies.values()) if any(WORKER in job.values for job in jobs) else None


def summarise(folder: Path) -> list[Row]:
    """Print a sweep's table, and write it into its folder as summary.csv, summary.tex and summary.png.

    Raises:
        DataError: if there are no jobs.
    """
    jobs = read_sweep(folder)
    table = rows(jobs)
    write_csv(table, folder / "summary.csv")
    (folder / "summary.tex").write_text(latex(table), encoding="utf-8")
    draw(table, folder / "summary.png")
    print_table(table, jobs, folder)
    return table


def write_csv(table: Sequence[Row], path: Path) -> None:
    """Write a line a row; numbers in [0, 1]."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*table[0].values, "iou", "half_width", "seeds", "iou_by_seed", "missing_seeds"])
        for row in table:
            numbers = ["" if value is None else f"{value:.4f}" for value in (row.mean, row.half_width)]
            by_seed = " ".join(f"{value:.4f}" for value in row.by_seed.values())
            writer.writerow([*row.values.values(), *numbers, " ".join(row.by_seed), by_seed, " ".join(row.missing)])


def latex(table: Sequence[Row]) -> str:
    """The table for a paper; it needs the package booktabs."""
    keys = list(table[0].values)
    lines = [" & ".join([*map(_escaped, keys), "IoU (\\%)", "seeds"]) + " \\\\"]
    best = max((row.mean for row in table if row.mean is not None), default=None)
    body = []
    for row in table:
        number = "--" if row.mean is None else f"{100 * row.mean:.1f}"
        number = f"\\mathbf{{{number}}}" if row.mean is not None and row.mean == best else number
        spread = "" if row.half_width is None else f" \\pm {100 * row.half_width:.1f}"
        cells = [*(_escaped(value) for value in row.values.values()), f"${number}{spread}$", str(len(row.by_seed))]
        body.append(" & ".join(cells) + " \\\\")
    head = [f"\\begin{{tabular}}{{{'l' * len(keys)}rr}}", "\\toprule", *lines, "\\midrule"]
    return "\n".join([*head, *body, "\\bottomrule", "\\end{tabular}", ""])


def draw(table: Sequence[Row], path: Path | BytesIO) -> None:
    """Each row's mean with its interval, and its seeds as dots."""
    names = [textwrap.fill(row.name, 44) for row in table]
    lines = sum(max(name.count("\n"), 1) for name in names)
    figure = Figure(figsize=(7, 0.45 * lines + 1.1), layout="constrained")
    ax = figure.subplots()
    for place, row in zip(range(len(table))[::-1], table, strict=True):
        ax.plot(list(row.by_seed.values()), [place] * len(row.by_seed), "o", color="#9aa5b1", markersize=4)
        if row.mean is not None:
            ax.errorbar(row.mean, place, xerr=row.half_width, fmt="|", color="#2f7fb8", markersize=14, capsize=3)
    ax.set(yticks=range(len(table))[::-1], yticklabels=names, xlabel="IoU, mean over seeds")
    ax.margins(y=0.5 / len(table) + 0.05)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def print_table(table: Sequence[Row], jobs: Sequence[Job], folder: Path) -> None:
    """Print the rows, and what has not finished."""
    view = Table(*(table[0].values or ["jobs"]), "IoU %", "± 95 %", "seeds", "missing", title=f"{len(jobs)} jobs")
    for row in table:
        numbers = ["" if value is None else f"{100 * value:.1f}" for value in (row.mean, row.half_width)]
        view.add_row(*(row.values.values() or ["all"]), *numbers, " ".join(row.by_seed), " ".join(row.missing))
    console = Console()
    console.print(view)
    for job in jobs:
        if job.headline is None:
            why = (job.error or "killed, or still running").strip().splitlines()[-1]
            console.print(f"{job.folder.name}: {why}", markup=False, soft_wrap=True)
    console.print(f"summary.csv, summary.tex, summary.png: {folder}", soft_wrap=True)


def read_job(folder: Path) -> Job:
    """The job in a folder that Hydra made."""
    words = [str(word) for word in OmegaConf.load(folder / ".hydra" / "overrides.yaml")]
    overrides = OverridesParser.create().parse_overrides(words)
    values = {o.get_key_element(): "" if o.is_delete() else o.get_value_element_as_str() for o in overrides}
    outcome = read_outcome(folder) or {"headline": None, "error": None}
    return Job(folder, values, outcome["headline"], outcome["error"])


def _row(values: dict[str, str], jobs: Sequence[Job]) -> Row:
    seeds = [(job.values.get(SEED, "0"), job.headline) for job in jobs]
    done = {seed: headline for seed, headline in seeds if headline is not None}
    return Row(values, done, [seed for seed, headline in seeds if headline is None])


def natural(path: Path) -> tuple[Any, ...]:
    """Job 10 comes after job 9."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.parts)


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in "_%&#${}" else char for char in text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser("python -m metaseg.summary", description="Print a multirun's table, and write it.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="of the multirun, such as multirun/DATE/TIME")
    try:
        summarise(parser.parse_args(argv).folder)
    except UserError as error:
        sys.exit(f"metaseg: {error}")


if __name__ == "__main__":
    main()
