"""Runs on one page: `python -m metaseg.dashboard runs multirun/night` writes report.html, which needs no network.

With `--project ENTITY/PROJECT` the same sections become a workspace and a report in W&B, of the runs there. What both
show is `SECTIONS`: each has W&B panels of the metrics that runs log, and what the page has in their place.
"""

import argparse
import html
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from metaseg.errors import ConfigError, UserError, printable
from metaseg.page import Found, Html, adaptation, algorithms, find, learning, listing, searches, worst_tasks
from metaseg.tracking import META_STEP

TITLE = "metaseg"


class Panel(NamedTuple):
    """What one W&B panel shows.

    Attributes:
        title: of it.
        kind: line: a metric over `x`; bar: its last value; table, media: what was logged by this name.
        metric: its name, as runs log it; of a line it may have `.*` in it.
        x: a line's axis.
        by_algo: whether a line or bar is of an algorithm's runs together, their mean and range, or each run's own.
    """

    title: str
    kind: Literal["line", "bar", "table", "media"]
    metric: str
    x: str = META_STEP
    by_algo: bool = True


class Section(NamedTuple):
    """A part of the dashboard.

    Attributes:
        title: of it.
        text: what it shows.
        panels: in W&B.
        html: what the page has in their place.
    """

    title: str
    text: str
    panels: tuple[Panel, ...]
    html: Callable[[Found], Html]


SECTIONS = (
    Section(
        "Algorithms",
        "IoU on test tasks, which neither θ nor ω has seen. Runs that differ in nothing but the seed stand together.",
        (
            Panel("IoU on test tasks", "bar", "test/iou"),
            Panel("before adaptation", "bar", "test/iou_before_adaptation"),
            Panel("gap within task: support's IoU − query's", "bar", "test/gap_within_task"),
            Panel("class-accumulated mIoU", "bar", "test/miou_class"),
        ),
        algorithms,
    ),
    Section(
        "Searches",
        "On validation tasks: for the best update procedure ω*, θ fixed (mode=uho), the best IoU so far by trial and "
        "IoU by learning rate and steps; over training (mode=search), IoU by what was searched.",
        (
            Panel("best IoU so far", "line", "uho/best_iou", "trial", by_algo=False),
            Panel("IoU of each trial", "line", "uho/iou", "trial", by_algo=False),
            Panel("IoU by learning rate and steps", "media", "uho"),
            Panel("training: best IoU so far", "line", "search/best_iou", "trial", by_algo=False),
            Panel("training: IoU of each trial", "line", "search/iou", "trial", by_algo=False),
            Panel("training: IoU by what was searched", "media", "search"),
        ),
        searches,
    ),
    Section(
        "Learning curves",
        "IoU on validation tasks on the way through meta-training, and the loss of the last inner steps; many-shot "
        "curves of several initialisations (mode=curves).",
        (
            Panel("IoU on validation tasks", "line", "val/iou"),
            Panel("training loss", "line", "train/loss"),
            Panel("norm of the meta-gradient", "line", "train/meta_gradient_norm"),
            Panel("IoU by shots", "line", "curves/.*/iou", "shots", by_algo=False),
            Panel("many-shot curves", "media", "curves"),
        ),
        learning,
    ),
    Section(
        "Adaptation curves",
        "IoU and loss on the query images of test tasks, by inner step (evaluate.rungs are the steps on the way).",
        (
            Panel("IoU", "line", "adaptation/test/iou", "inner_step"),
            Panel("loss", "line", "adaptation/test/loss", "inner_step"),
        ),
        adaptation,
    ),
    Section(
        "Worst tasks",
        "The tasks of the lowest IoU, and pictures of what was predicted (evaluate.panels=N draws N tasks).",
        (
            Panel("test episodes", "table", "test/per_task"),
            Panel("predictions", "media", "test/panels"),
        ),
        worst_tasks,
    ),
)


def write_page(folders: Sequence[Path], out: Path) -> Found:
    """Write all runs below the folders as one HTML file, pictures included; returns what was found.

    Raises:
        DataError: if there is no run.
    """
    found = find(folders)
    parts = [(section.title, section.text, section.html(found)) for section in SECTIONS]
    parts.append(("Runs", "Two runs of one configuration and one commit agree.", listing(found, out.parent)))
    body = "\n".join(
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{content or '<p>None.</p>'}</section>"
        for title, text, content in parts
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    of = html.escape(", ".join(map(str, folders)))
    page = _PAGE.format(title=f"{TITLE}: {of}", body=body)
    out.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of folders that are no UTF-8
    return found


def workspace(entity: str, project: str) -> Any:
    """The sections as a W&B workspace, not saved yet; making it needs no network."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=s.title, panels=[_panel(p) for p in s.panels], is_open=True) for s in SECTIONS]
    return ws.Workspace(entity=entity, project=project, name=TITLE, sections=sections)


def wandb_report(entity: str, project: str) -> Any:
    """The sections as a W&B report, not saved yet; making it needs no network."""
    from wandb_workspaces.reports import v2 as wr

    blocks = [wr.TableOfContents()]
    for section in SECTIONS:
        # the run set names no project: it is the report's own, and none is asked for by network
        grid = wr.PanelGrid(runsets=[wr.Runset(name="runs")], panels=[_panel(panel) for panel in section.panels])
        blocks += [wr.H2(section.title), wr.P(section.text), grid]
    return wr.Report(entity=entity, project=project, title=TITLE, blocks=blocks, width="fluid")


def upload(target: str) -> list[str]:
    """Build workspace and report in a W&B project ENTITY/PROJECT; returns their addresses.

    Raises:
        UserError: if it is no such name, the extra `dashboard` is not installed, or W&B cannot be used.
    """
    import wandb

    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        raise ConfigError(f"--project {target}: give ENTITY/PROJECT, as in https://wandb.ai/ENTITY/PROJECT")
    try:
        made = workspace(entity, project), wandb_report(entity, project)
    except ImportError as error:
        raise UserError('--project needs wandb-workspaces: pip install "metaseg-lightning[dashboard]"') from error
    try:
        logged_in = wandb.login(prompt=False)
    except Exception as error:  # there is a key, but the server refuses it or is out of reach
        raise UserError(f"W&B's login failed ({error}): `wandb login --relogin`, or leave --project out") from error
    if not logged_in:
        raise UserError("--project needs W&B's server: `wandb login` first, or leave it out for report.html alone")
    try:
        return [str(part.save().url) for part in made]
    except Exception as error:  # whatever the server says
        raise UserError(
            f"W&B has refused {target} ({error}): is there such a project, and may you write there?"
        ) from error


def _panel(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2 as wr

    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.metric)
    if panel.kind == "media":
        return wr.MediaBrowser(title=panel.title, media_keys=[panel.metric])
    grouped = {"groupby": wr.Config("algo.name"), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    how = grouped if panel.by_algo else {}
    if panel.kind == "bar":
        return wr.BarPlot(title=panel.title, metrics=[panel.metric], **how)
    y = {"metric_regex": panel.metric} if ".*" in panel.metric else {"y": [panel.metric]}
    return wr.LinePlot(title=panel.title, x=panel.x, **y, **how)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser("python -m metaseg.dashboard", description="Show runs on one page.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of runs or sweeps; all below are read")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; default: %(default)s")
    parser.add_argument("--project", metavar="ENTITY/PROJECT", help="build a workspace and a report in W&B")
    args = parser.parse_args(argv)
    if not args.folders and not args.project:
        parser.error("give folders of runs, or --project")
    try:
        if args.folders:
            found = write_page(args.folders, args.out)
            print(f"{args.out}: {len(found.runs) + len(found.curves)} runs")
            for folder, why in found.broken.items():
                print(printable(f"{folder}: {why}"))
        for address in upload(args.project) if args.project else ():
            print(address)
    except (UserError, OSError) as error:
        sys.exit(f"metaseg: {error}")


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.4rem }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 0; border-top: 1px solid #ddd; padding-top: 1rem }}
p {{ margin: 0.3rem 0 0.8rem; color: #555 }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 13px; margin-bottom: 1rem }}
th, td {{ text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid #eee; vertical-align: top }}
td:nth-child(n + 2):not(:last-child) {{ white-space: nowrap }}
img {{ max-width: 100%; display: block; margin: 0.5rem 0 }}
figure {{ display: inline-block; width: 47%; margin: 0 2% 0 0; vertical-align: top }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


if __name__ == "__main__":
    main()
