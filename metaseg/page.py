"""The parts of a dashboard's page, of what runs left in their folders: tables and pictures as HTML."""

import base64
import csv
import glob
import html
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaseg.compare import FinishedRun, compare, read_run
from metaseg.errors import ComparisonError, DataError, UserError
from metaseg.panels import file_name
from metaseg.summary import Job, Row, draw, grouped, last_line, natural, read_job
from metaseg.sweep import read_outcome
from metaseg.texts import is_number, no_math, read_csv, read_file, read_json, read_yaml

WORST = 10  # tasks that are listed
SHOWN = 4  # of these with pictures, at most
MOST_PICTURE = 2**23  # bytes of one
TOLD = ("trainer.max_steps",)
UNTOLD = (  # overrides that change no number, of these and below them, but for `TOLD`; a storage's URL has a password
    *("logger", "workers", "worker", "skip_done", "checkpoint_every", "trainer", "hydra"),
    *("search.workers", "uho.workers", "search.storage", "uho.storage"),
    *("evaluate.processes", "evaluate.panels", "evaluate.rungs"),
)


class Html(str):
    """Text that is HTML already; any other is escaped."""


@dataclass(frozen=True)
class Found:
    """What lies below some folders.

    Attributes:
        rows: finished runs on tasks: those that differ in nothing but the seed are one row.
        curves: folders of many-shot curves (mode=curves).
        broken: folders of runs that have no result, or none that can be read, and why.
    """

    rows: list[tuple[Row, list[FinishedRun]]]
    curves: list[Path]
    broken: dict[Path, str]

    @property
    def runs(self) -> list[tuple[str, FinishedRun]]:
        """All finished runs on tasks, each with its row's name."""
        return [(row.name, run) for row, runs in self.rows for run in runs]


def find(folders: Sequence[Path]) -> Found:
    """Read all runs below the folders. One that is unfinished or broken is named, and does not stop the others.

    Raises:
        DataError: if a folder is none, or there is no run below any.
    """
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder: give those of runs or sweeps, such as runs or multirun/DATE/TIME")
    paths = {path.parent for folder in folders for path in folder.rglob("results.json")}
    paths |= {path.parents[1] for folder in folders for path in folder.rglob(".hydra/overrides.yaml")}
    if not paths:
        raise DataError(f"no runs below {', '.join(map(str, folders))}: give folders that metaseg.run has left")
    runs: dict[Path, FinishedRun] = {}
    jobs: list[Job] = []
    curves: list[Path] = []
    broken: dict[Path, str] = {}
    for path in sorted(paths, key=natural):
        try:
            if not (path / "results.json").is_file():
                if not _worked(path):
                    broken[path] = _why(path)
            elif (path / "summary.csv").is_file() and _results(path).get("mode") == "curves":
                _listed(_results(path), "")
                curves.append(path)
            else:
                runs[path] = _read(path)
                jobs.append(_job(runs[path]))
        except Exception as error:  # of files of any kind
            broken[path] = str(error) if isinstance(error, UserError) else repr(error)
    return Found([(row, [runs[job.folder] for job in of]) for row, of in _short(grouped(jobs))], curves, broken)


def algorithms(found: Found) -> Html:
    """Each row's mean over seeds with its interval, and its paired gain over an untrained θ, if there is one."""
    if not found.rows:
        return Html("")
    baselines = [runs for _, runs in found.rows if all(map(_is_baseline, runs))]
    lines = []
    for row, runs in found.rows:
        first = runs[0]
        part = first.results[first.split]
        tested = f"{first.results['dataset']}, {part['tasks']} {first.split} tasks, {first.results['shots']} shots"
        spread = "" if row.half_width is None else f"± {100 * row.half_width:.1f}"
        over_tasks = "–".join(f"{100 * bound:.1f}" for bound in part["iou"]["ci95"]) if len(runs) == 1 else ""
        numbers = (f"{100 * (row.mean or 0):.1f}", spread, over_tasks, _gain(baselines, runs))
        lines.append([row.name, tested, row.seeds, *numbers])
    head = ["", "tested on", "seeds", "IoU %", "95 % over seeds", "95 % over tasks", "gain, paired"]
    file = BytesIO()
    draw([row for row, _ in found.rows], file)
    how = "<p>Gains are over the first baseline that met the same episodes, task by task.</p>"
    return Html(table(head, lines) + (how if baselines else "") + picture(file.getvalue(), "IoU by row"))


def searches(found: Found) -> Html:
    """Each search for ω, or over training: its numbers, the best values, and its picture."""
    parts: list[Html] = []
    for name, run in found.runs:
        mode = run.results.get("mode")
        file = run.folder / f"{mode}.json"
        if mode not in ("uho", "search") or not file.is_file():
            continue
        try:
            record = read_json(file)
            best = max((t for t in record["history"] if not t.get("given_up")), key=lambda trial: trial["value"])
            values = {**best["params"], **({"steps": best["steps"]} if "steps" in best else {})}
            ious = (record["default_val_iou"], record["val_iou"], record["test"]["iou"]["mean"])
            head = ["", "trials", "val IoU %, as given", "val IoU %, best", "test IoU %, best", "best values"]
            words = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
            parts.append(table(head, [[name, record["trials"], *(f"{100 * iou:.1f}" for iou in ious), words]]))
        except Exception as error:  # likewise
            parts.append(Html(f"<p>{html.escape(f'{file} is not what a search writes: {error!r}')}</p>"))
        parts.append(_file(file.with_suffix(".png"), f"search of {name}"))
    return Html("".join(parts))


def learning(found: Found) -> Html:
    """IoU on validation tasks and training loss by meta-step, a line a run; and the many-shot curves."""
    figure, axes = _axes("IoU on validation tasks", "loss of the last inner steps", "meta-step")
    for (name, run), colour in _coloured(found):
        rows = [row for path in sorted(run.folder.glob("csv*/metrics.csv"), key=natural) for row in _metrics(path)]
        for ax, metric in zip(axes, ("val/iou", "train/loss"), strict=True):
            points = _points(rows, metric)
            if run.results.get("mode") in ("fit", "fit_test") and points:
                ax.plot(*zip(*sorted(points.items()), strict=True), ".-", color=colour, label=no_math(name))
    parts = [_drawn(figure, "learning curves")]
    for folder in found.curves:
        title = Html(f"<p>From one image to hundreds, {html.escape(str(folder))}</p>")
        parts += [title, _file(folder / "curves.png", "curves")]
    return Html("".join(parts))


def adaptation(found: Found) -> Html:
    """IoU and loss on query images by inner step, a line a run."""
    figure, axes = _axes("IoU on query images", "loss on query images", "inner step")
    for (name, run), colour in _coloured(found):
        course = run.results[run.split].get("course")  # runs of before there was it have none
        for ax, key in zip(axes, ("iou", "loss"), strict=True) if course else ():
            shown = [at[key] if is_number(at[key]) else math.nan for at in course]  # a loss may be out of sight
            ax.plot([at["step"] for at in course], shown, ".-", color=colour, label=no_math(name))
    return _drawn(figure, "adaptation curves")


def worst_tasks(found: Found) -> Html:
    """The tasks of the lowest IoU, mean over all rows, and pictures of some as far as a run has drawn them."""
    by_row = {row.name: _task_means(runs) for row, runs in found.rows}
    met = {task for means in by_row.values() for task in means}
    mean = {task: float(np.mean([means[task] for means in by_row.values() if task in means])) for task in met}
    worst = sorted(met, key=lambda task: (mean[task], task))[:WORST]
    if not worst:
        return Html("")
    lines = [
        [task, data, *(f"{100 * by_row[n][data, task]:.0f}" if (data, task) in by_row[n] else "" for n in by_row)]
        for data, task in worst
    ]
    shown = [_panel(found, *task) for task in worst]
    pictures = [part for part in shown if part][:SHOWN]
    return Html(table(["task", "data", *by_row], lines) + "".join(pictures))


def listing(found: Found, beside: Path) -> Html:
    """All runs, with links to their folders as seen from the folder `beside`, and those that have no result."""
    head = ["folder", "mode", "algo", "seed", "meta-steps", "data", "IoU %", "configuration", "commit", "minutes"]
    lines = []
    for _, run in found.runs:
        iou = f"{100 * run.results[run.split]['iou']['mean']:.1f}"
        lines.append([_link(run.folder, beside), *_listed(run.results, iou)])
    lines += [[_link(folder, beside), *_listed(_results(folder), "")] for folder in found.curves]
    without = [[_link(folder, beside), why] for folder, why in found.broken.items()]
    return Html(table(head, lines) + (table(["folder without a result", "why"], without) if without else ""))


def table(head: Sequence[object], lines: Iterable[Sequence[object]]) -> Html:
    """A table; cells that are not `Html` are escaped."""
    rows = [f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in line)}</tr>" for line in lines]
    heads = "".join(f"<th>{_cell(value)}</th>" for value in head)
    return Html(f"<div><table><tr>{heads}</tr>{''.join(rows)}</table></div>")


def picture(png: bytes, alt: str) -> Html:
    """A picture inside the page; nothing of what is no PNG, for a link in a run's folder may lead to any file."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        return Html("")
    data = base64.b64encode(png).decode()
    return Html(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')


def _read(folder: Path) -> FinishedRun:
    """A run that has all the page asks for.

    Raises:
        ComparisonError: if it has not.
    """
    run = read_run(folder)
    try:
        part = run.results[run.split]
        _ = part["tasks"], (run.results.get("episodes") or {}).get("seed")
        low, high = part["iou"]["ci95"]
        course = part.get("course") or ()
        numbers = [part["iou"]["mean"], low, high, *(at[key] for at in course for key in ("step", "iou"))]
        if not all(map(is_number, numbers)) or not all(isinstance(at["loss"], int | float | None) for at in course):
            raise ValueError("an IoU, or its course, is no number")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ComparisonError(f"{folder}/results.json is not what a run writes ({error!r}): run it again") from error
    _listed(run.results, "")
    return run


def _worked(folder: Path) -> bool:
    """Whether it is of a search's worker, of which another tested the best."""
    outcome = read_outcome(folder)
    return outcome is not None and outcome["state"] == "finished"


def _why(folder: Path) -> str:
    """Why there is no result."""
    outcome = read_outcome(folder)
    return last_line(outcome["error"] if outcome else None)


def _results(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "results.json")
    return found if isinstance(found, dict) else {}


def _job(run: FinishedRun) -> Job:
    """What distinguishes the run, as a sweep's summary has it: algorithm, mode and the overrides that it was given."""
    results = run.results
    mode = str(results.get("mode", ""))
    values = {"algo": str(results["algo"]), "mode": mode}
    if (run.folder / ".hydra").is_dir():
        given = read_job(run.folder).values
    else:  # begun from Python: nothing less tells one configuration from another, but every seed is a row
        given = {"configuration": str(results.get("config_sha256", ""))[:12]}
    values |= {key: value for key, value in given.items() if key not in values and _tells(key)}
    if "fit" in mode:  # where it was resumed from
        values.pop("ckpt_path", None)
    if "ckpt_path" in values:
        values["ckpt_path"] = _whole(values["ckpt_path"], run.folder)
    values["seed"] = str(results.get("seed", ""))
    return Job(run.folder, values, float(results[run.split]["iou"]["mean"]), None)


def _tells(key: str) -> bool:
    """Whether an override belongs into a row's name; a group's choice may be of a package, as in trainer@x."""
    return key in TOLD or not any(key == no or key.startswith((f"{no}.", f"{no}/", f"{no}@")) for no in UNTOLD)


def _whole(path: str, folder: Path) -> str:
    """A path as the run in `folder` was given it, from the root."""
    begun_in = ""
    with suppress(FileNotFoundError, LookupError, TypeError):
        begun_in = str(read_yaml(folder / ".hydra" / "hydra.yaml")["hydra"]["runtime"]["cwd"])
    return os.path.normpath(Path(begun_in, Path(path).expanduser()))


def _short(rows: Sequence[tuple[Row, list[Job]]]) -> list[tuple[Row, list[Job]]]:
    """The rows, of each `ckpt_path` as many last parts, two or more, as tell it from the others."""
    whole = {row.values["ckpt_path"] for row, _ in rows if row.values.get("ckpt_path")}
    tries = ({path: str(Path(*Path(path).parts[-parts:])) for path in whole} for parts in count(2))
    short = next(names for names in tries if len({*names.values()}) == len(whole)) | {"": ""}
    return [
        (row._replace(values={k: short[v] if k == "ckpt_path" else v for k, v in row.values.items()}), jobs)
        for row, jobs in rows
    ]


def _is_baseline(run: FinishedRun) -> bool:
    """Whether it tests a θ that was not meta-trained, by an ω that was not searched for."""
    return not run.results.get("trained_on") and run.results.get("mode") in ("fit_test", "test")


def _gain(baselines: Sequence[Sequence[FinishedRun]], runs: Sequence[FinishedRun]) -> str:
    """Over the first of the baselines that met the same episodes."""
    for baseline in baselines:
        try:
            iou = compare([run.folder for run in baseline], [run.folder for run in runs]).iou
        except ComparisonError:
            continue
        low, high = iou.ci95
        gain = f"{100 * iou.mean:+.1f}\u00a0[{100 * low:+.1f},\u00a0{100 * high:+.1f}]"  # in one line
        return "baseline" if baseline is runs else gain
    return "other episodes" if baselines else ""


def _task_means(runs: Sequence[FinishedRun]) -> dict[tuple[str, str], float]:
    """IoU by (data set, task), mean over those of the runs that met it."""
    values: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for task, iou in run.task_means("iou").items():
            values.setdefault((str(run.results["dataset"]), task), []).append(iou)
    return {task: float(np.mean(ious)) for task, ious in values.items()}


def _panel(found: Found, data: str, task: str) -> Html | None:
    """The first picture of a task that any of the runs has drawn."""
    for name, run in found.runs:
        if run.results["dataset"] == data:
            for path in sorted(run.folder.glob(f"panels/*-{glob.escape(file_name(task))}.png")):
                shown = _file(path, task)
                if shown and path.stem.partition("-")[2] == file_name(task):
                    return Html(f"<figure><p>{html.escape(f'{task}, {name}')}</p>{shown}</figure>")
    return None


def _axes(left: str, right: str, below: str) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, label in zip(axes, (left, right), strict=True):
        ax.set(xlabel=below, ylabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _coloured(found: Found) -> list[tuple[tuple[str, FinishedRun], str]]:
    """All runs, those of a row in one colour."""
    colours = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(name for name, _ in found.runs))}
    return [((name, run), colours[name]) for name, run in found.runs]


def _drawn(figure: Figure, alt: str) -> Html:
    """The figure as a picture, with a legend; nothing of one that shows nothing."""
    lines = {str(line.get_label()): line for ax in figure.axes for line in ax.lines}  # a row's seeds are named once
    if not lines:
        return Html("")
    figure.set_figheight(figure.get_figheight() + 0.18 * len(lines))
    figure.legend(lines.values(), lines.keys(), loc="outside lower left", frameon=False, fontsize=8)
    file = BytesIO()
    figure.savefig(file, dpi=110)
    return picture(file.getvalue(), alt)


def _file(path: Path, alt: str) -> Html:
    with suppress(OSError, ValueError):
        return picture(read_file(path, MOST_PICTURE), alt)
    return Html("")


def _metrics(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    with suppress(OSError, ValueError, csv.Error):  # up to what is no CSV
        rows.extend(read_csv(path, ("step", "val/iou", "val/iou_low", "train/loss"), errors="replace"))
    return rows


def _points(rows: Iterable[dict[str, str]], metric: str) -> dict[int, float]:
    """A metric by meta-step, nan where it is not finite; a line that a killed run has torn is left out."""
    points = {}
    for row in rows:
        # after training the tested θ is validated once more, with an interval: no point of the curve
        if row.get(metric) and not row.get("val/iou_low"):
            with suppress(ValueError, KeyError):
                step, value = int(row["step"]), float(row[metric])
                if is_number(step):
                    points[step] = value if is_number(value) else math.nan
    return points


def _link(folder: Path, beside: Path) -> Html:
    href = quote(os.fsencode(Path(os.path.relpath(folder.resolve(), beside.resolve())).as_posix()))
    return Html(f'<a href="{html.escape(href)}">{html.escape(str(folder))}</a>')


def _listed(results: dict[str, Any], iou: str) -> list[str]:
    """A run's line in the list, but its folder.

    Raises:
        ComparisonError: if the results are not what a run writes.
    """
    try:
        commit = results.get("git_commit") or ""
        dirty = "-dirty" if commit.endswith("-dirty") else ""
        minutes = f"{results['wall_s'] / 60:.1f}" if "wall_s" in results else ""
        algo = results.get("algo") or ", ".join(results.get("inits", {}))
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ComparisonError(f"its results.json is not what a run writes ({error!r}): run it again") from error
    first, *others = (results.get(key, "") for key in ("mode", "seed", "meta_steps", "dataset"))
    of = (str(results.get("config_sha256", ""))[:12], commit.removesuffix("-dirty")[:12] + dirty, minutes)
    return [*map(str, (first, algo, *others, iou)), *of]


def _cell(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))
