"""The algorithms, all on the same test episodes: a table, with a picture of the rows and of predictions.

    python experiments/main_table.py --rows imagenet reptile fomaml_star --tasks 40 --seeds 0 --out runs/demo
    python experiments/main_table.py --data fss1000 --tasks all -- dataset.root=PATH

Each row and seed is one `python -m metaseg.run` in a folder of its own under --runs; one that has finished with the
same configuration is not repeated. Words behind `--` go to every run: `-- dataset.image_size=96 evaluate.queries=5`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from runs import Run, composed, draw_bars, execute, parse, parser, print_table, tabulate, write_about, write_csv

from metaseg.config import make_update
from metaseg.data.episodes import EvaluationEpisodes
from metaseg.job import create, evaluation_episodes
from metaseg.pictures import PREDICTION, TRUTH, overlay

ROWS = {
    "emoji": {
        "random": ["algo=finetune", "model.weights=null"],
        "imagenet": ["algo=finetune"],
        "joint": ["algo=joint"],
        "reptile": ["algo=reptile"],
        "fomaml": ["algo=fomaml"],
        "fomaml_star": ["algo=fomaml_star"],
    },
    "fss1000": {
        "random": ["experiment=paper", "algo=finetune", "model.weights=null"],
        "imagenet": ["experiment=paper", "algo=finetune"],
        **{row: [f"experiment=paper_{row}"] for row in ("joint", "reptile", "fomaml", "fomaml_star")},
    },
}
BASELINE = "imagenet"
# each row adapts with the one that is best for it on validation tasks
LRS = {"emoji": "[0.02,0.05,0.1]", "fss1000": "[0.0005,0.002,0.008]"}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "main_table", tasks="all", seeds=[0])
    made.add_argument("--rows", nargs="+", choices=ROWS["emoji"], default=list(ROWS["emoji"]))
    args = parse(made, argv)
    rows = ROWS[args.data]
    common = [f"evaluate.test_tasks={args.tasks}", f"evaluate.lrs={LRS[args.data]}", *args.overrides]
    runs = [
        Run(row, seed, args.runs / f"{row}-s{seed}", [*rows[row], f"seed={seed}", *common])
        for row in args.rows
        for seed in args.seeds
    ]
    first = composed(runs[0].overrides)
    source = create(first.dataset)  # drawn or read once, before the runs need it side by side
    # the trained rows take longest; begun first, they leave no core idle at the end
    execute(sorted(runs, key=lambda run: "algo=finetune" in run.overrides), args.jobs)
    table = tabulate(runs, BASELINE)
    write_csv(table, args.out / "main_table.csv")
    write_about(args, runs, args.out / "main_table.json")
    draw_bars(table, args.out / "main_table.png")
    episodes = evaluation_episodes(first, source, "test", make_update(first["update"]))
    draw_predictions([run for run in runs if run.seed == args.seeds[0]], episodes, args.out / "predictions.png")
    print_table(
        table,
        BASELINE,
        [
            (f"{args.out}/main_table.csv, .png and .json", "the table, and where it comes from"),
            (f"{args.out}/predictions.png", "predictions of each row"),
            (f"{args.runs}/*/wandb", "W&B runs, offline unless you are logged in; `wandb sync DIR` uploads one"),
        ],
    )


def draw_predictions(runs: Sequence[Run], episodes: EvaluationEpisodes, path: Path, columns: int = 6) -> None:
    """The first query image of the first tasks: support, query, each row's prediction, the truth."""
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


if __name__ == "__main__":
    main()
