"""A sweep as one table: `python -m metaseg.summary multirun/DIR`.

Jobs that differ in nothing but the seed are one row: the mean over seeds of each job's headline metric (IoU on the test
tasks; see `metaseg.run.run`), with Student's 95 % interval over seeds. Seeds share their episodes, so this interval is
of meta-training's own chance; what other tasks would give is in each job's results.json. Workers on one study are no
table: all but one of them end with an IoU on validation tasks, so of each study it is said where its test lies.
"""

import argparse
import csv
import re
import sys
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from matplotlib.figure import Figure
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import t as student

from metaseg.errors import DataError, UserError, printable
from metaseg.sweep import read_outcome
from metaseg.texts import MOST_LETTERS, no_math, read_yaml, say

SEED = "seed"
WORKER = "worker"
UNREADABLE = (OSError, ValueError, RecursionError, HydraException, OmegaConfBaseException)  # of what Hydra has written


class Job(NamedTuple):
    """One job of a sweep.

    Attributes:
        folder: of it.
        values: of its overrides, by key; as they are meant, not as Hydra has them escaped.
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
        by_seed: headline metrics by seed, of those that have finished; several of a seed that was run again elsewhere.
        missing: seeds of those that have not.
    """

    values: dict[str, str]
    by_seed: dict[str, list[float]]
    missing: list[str]

    @property
    def seeds(self) -> str:
        """Those that have finished; 0×2 was run twice."""
        return " ".join(f"{seed}×{len(of)}" if len(of) > 1 else seed for seed, of in self.by_seed.items())

    @property
    def means(self) -> list[float]:
        """Of each seed; runs of one seed are no sample of its chance, so they count once."""
        return [float(np.mean(of)) for of in self.by_seed.values()]

    @property
    def mean(self) -> float | None:
        """Over seeds; None if none has finished."""
        return float(np.mean(self.means)) if self.by_seed else None

    @property
    def half_width(self) -> float | None:
        """Of Student's 95 % interval of `mean` over seeds; None of fewer than two."""
        n = len(self.by_seed)
        return float(student.ppf(0.975, n - 1) * np.std(self.means, ddof=1) / np.sqrt(n)) if n > 1 else None

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


def grouped(jobs: Sequence[Job], together: str = SEED) -> list[tuple[Row, list[Job]]]:
    """The rows, each with its jobs: those that differ in nothing but `together`."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.values))
    varied = [key for key in keys if key != together and len({job.values.get(key, "") for job in jobs}) > 1]
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.values.get(key, "") for key in varied), []).append(job)
    return [(_row(dict(zip(varied, values, strict=True)), group), group) for values, group in groups.items()]


def failures(folder: Path) -> list[Path]:
    """Folders of the jobs that have not finished."""
    return [job.folder for job in read_sweep(folder) if job.headline is None]


def studies(jobs: Sequence[Job]) -> list[tuple[str, list[Job]]]:
    """The studies that the jobs are workers on, by what distinguishes them; none if they are no workers."""
    if all(job.values.get(WORKER, "null") == "null" for job in jobs):
        return []
    return [(row.name, workers) for row, workers in grouped(jobs, WORKER)]


def tested(workers: Sequence[Job]) -> list[Path]:
    """Folders of a study's workers that have the test of its best.

    A metric is no such sign: while one worker tests, which may fail, the others end with an IoU on validation tasks.
    """
    return [job.folder for job in workers if (job.folder / "results.json").is_file()]


def summarise(folder: Path) -> list[Row]:
    """Print a sweep's table, and write it into its folder as summary.csv, summary.tex and summary.png.

    Of workers it is printed where each study's test lies, and there is no table.

    Raises:
        DataError: if there are no jobs.
    """
    jobs = read_sweep(folder)
    table = [] if studies(jobs) else rows(jobs)
    console = Console()
    if table:
        write_csv(table, folder / "summary.csv")
        (folder / "summary.tex").write_text(latex(table), encoding="utf-8")
        draw(table, folder / "summary.png")
        print_table(table, len(jobs), console)
    for name, workers in studies(jobs):
        where = ", ".join(map(str, tested(workers))) or "not yet; the same command goes on with it, and tests it"
        say(f"study of {len(workers)} workers, {name}; tested: {where}")
    print_unfinished(jobs, folder, console)
    if table:
        say(f"summary.csv, summary.tex, summary.png: {folder}")
    return table


def write_csv(table: Sequence[Row], path: Path) -> None:
    """Write a line a row; numbers in [0, 1]."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*table[0].values, "iou", "half_width", "seeds", "iou_by_seed", "missing_seeds"])
        for row in table:
            numbers = ["" if value is None else f"{value:.4f}" for value in (row.mean, row.half_width)]
            by_seed = " ".join(f"{value:.4f}" for value in row.means)
            writer.writerow([*row.values.values(), *numbers, row.seeds, by_seed, " ".join(row.missing)])


def latex(table: Sequence[Row]) -> str:
    """The table for a paper; it needs the package booktabs."""
    keys = list(table[0].values)
    lines = [[*map(_escaped, keys), "IoU (\\%)", "seeds"]]
    best = max((row.mean for row in table if row.mean is not None), default=None)
    for row in table:
        number = "--" if row.mean is None else f"{100 * row.mean:.1f}"
        number = f"\\mathbf{{{number}}}" if row.mean is not None and row.mean == best else number
        spread = "" if row.half_width is None else f" \\pm {100 * row.half_width:.1f}"
        lines.append([*map(_escaped, row.values.values()), f"${number}{spread}$", str(len(row.by_seed))])
    # {}: what comes before would take a [ or * for its own
    head, *body = (f"{'{}' if cells[0][:1] in '[*' else ''}{' & '.join(cells)} \\\\" for cells in lines)
    begin = f"\\begin{{tabular}}{{{'l' * len(keys)}rr}}"
    return "\n".join([begin, "\\toprule", head, "\\midrule", *body, "\\bottomrule", "\\end{tabular}", ""])


def draw(table: Sequence[Row], path: Path | BytesIO) -> None:
    """Each row's mean with its interval, and its seeds as dots."""
    names = [no_math(textwrap.fill(row.name[:MOST_LETTERS], 44)) for row in table]
    lines = sum(max(name.count("\n"), 1) for name in names)
    figure = Figure(figsize=(7, 0.45 * lines + 1.1), layout="constrained")
    ax = figure.subplots()
    for place, row in zip(range(len(table))[::-1], table, strict=True):
        ax.plot(row.means, [place] * len(row.means), "o", color="#9aa5b1", markersize=4)
        if row.mean is not None:
            ax.errorbar(row.mean, place, xerr=row.half_width, fmt="|", color="#2f7fb8", markersize=14, capsize=3)
    ax.set(yticks=range(len(table))[::-1], yticklabels=names, xlabel="IoU, mean over seeds")
    ax.margins(y=0.5 / len(table) + 0.05)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def print_table(table: Sequence[Row], jobs: int, console: Console) -> None:
    """Print the rows."""
    view = Table(*(table[0].values or ["jobs"]), "IoU %", "± 95 %", "seeds", "missing", title=f"{jobs} jobs")
    for row in table:
        numbers = ["" if value is None else f"{100 * value:.1f}" for value in (row.mean, row.half_width)]
        cells = [*(row.values.values() or ["all"]), *numbers, row.seeds, " ".join(row.missing)]
        view.add_row(*map(escape, cells))
    console.print(view)


def print_unfinished(jobs: Sequence[Job], folder: Path, console: Console) -> None:
    """Print what has not finished, and what may be of another sweep in the same folder."""
    for job in jobs:
        if job.headline is None:
            told = printable(f"{job.folder.name}: {last_line(job.error)}")
            console.print(told, markup=False, soft_wrap=True)
    begun = folder / "multirun.yaml"  # Hydra writes it before any job
    times = {job.folder.name: _overrides(job.folder).stat().st_mtime for job in jobs if begun.is_file()}
    older = [name for name, time in times.items() if time < begun.stat().st_mtime]
    if older:
        told = f"{', '.join(older)}: older than {begun}. If they are of an earlier sweep, remove them"
        console.print(printable(told), markup=False, soft_wrap=True)


def last_line(error: str | None) -> str:
    """Of what a run says of its end."""
    return next(reversed((error or "").strip().splitlines()), "killed, or still running")


def read_job(folder: Path) -> Job:
    """The job in a folder that Hydra made.

    Raises:
        DataError: if its overrides cannot be read.
    """
    try:
        words = read_yaml(_overrides(folder))
        overrides = OverridesParser.create().parse_overrides([str(word) for word in words or ()])
    except UNREADABLE as error:
        raise DataError(
            f"{_overrides(folder)} is not what Hydra writes: run it again, or remove it ({error})"
        ) from error
    values = {o.get_key_element().lstrip("+~"): "removed" if o.is_delete() else _plain(o.value()) for o in overrides}
    outcome = read_outcome(folder) or {"headline": None, "error": None}
    return Job(folder, values, outcome["headline"], outcome["error"])


def _overrides(folder: Path) -> Path:
    return folder / ".hydra" / "overrides.yaml"


def _plain(value: object) -> str:
    """An override's value as one would read it, without a URL's user and password."""
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_plain(of)}' for key, of in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    told = printable(re.sub("://[^@]*@", "://", str(value)))
    return told or "''"  # nothing at all stands for what was not given


def _row(values: dict[str, str], jobs: Sequence[Job]) -> Row:
    by_seed: dict[str, list[float]] = {}
    missing = []
    for job in jobs:
        seed = job.values.get(SEED, "0")
        if job.headline is None:
            missing.append(seed)
        else:
            by_seed.setdefault(seed, []).append(job.headline)
    return Row(values, by_seed, missing)


def natural(path: Path) -> tuple[Any, ...]:
    """Job 10 comes after job 9."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parts)


def _escaped(text: str) -> str:
    named = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum"}
    escapes = {char: f"\\{char}" for char in "_%&#${}"} | {char: f"\\{name}{{}}" for char, name in named.items()}
    return "".join(escapes.get(char, char) for char in text)


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
