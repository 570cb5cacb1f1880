"""The inner learning rate × the number of inner steps: IoU on validation tasks, for fixed initialisations.

    python experiments/lr_grid.py --rows imagenet reptile --seeds 0
    python experiments/lr_grid.py --data fss1000 --rows fomaml_star -- dataset.root=PATH

The initialisations are main_table.py's (--main-table, --rows). An adaptation is scored on its way, so a column of the
grid costs one; test tasks are left alone. --tasks counts validation tasks here.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from runs import Row, add_inits, composed, initialisation, machine, parse, parser, recommended, write_csv

from metaseg.evaluate import evaluate
from metaseg.job import build, load, scoring
from metaseg.report import git_commit

LRS = {"emoji": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4), "fss1000": (1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)}
STEPS = {"emoji": (1, 2, 5, 10, 20, 30, 60), "fss1000": (1, 2, 5, 10, 20, 30, 59, 120)}
PROTOCOL: dict[str, list[str]] = {"emoji": [], "fss1000": ["experiment=paper"]}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "lr_grid", tasks="16", seeds=[0])
    add_inits(made, ["imagenet", "reptile"])
    args = parse(made, argv)
    started = time.perf_counter()
    inits = {(row, seed): initialisation(args, row, seed) for row in args.rows for seed in args.seeds}
    words = [*PROTOCOL[args.data], f"evaluate.val_tasks={args.tasks}", f"update.steps={max(STEPS[args.data])}"]
    grid: list[Row] = []
    for (row, seed), path in inits.items():
        for lr in LRS[args.data]:
            chosen = [*words, *recommended(path), f"update.lr={lr}", f"seed={seed}", *args.overrides]
            grid += column(row, seed, lr, chosen, STEPS[args.data])
    write_csv(grid, args.out / "lr_grid.csv")
    draw(grid, args.out / "lr_grid.png")
    about = {
        "command": args.command,
        "seeds": args.seeds,
        "commit": git_commit(),
        "machine": machine(),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    (args.out / "lr_grid.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{args.out}/lr_grid.csv, .png and .json")


def column(row: str, seed: int, lr: float, words: Sequence[str], steps: Sequence[int]) -> list[Row]:
    """The IoUs of one initialisation at one learning rate, by steps."""
    job = build(composed(words))
    load(job)
    evaluation = evaluate(scoring(job, "val", job.update, steps), title=f"{row}, seed {seed}, lr {lr:g}")
    tasks = len(evaluation.by_task)
    return [
        {
            "init": row,
            "seed": seed,
            "lr": f"{lr:g}",
            "steps": step,
            "iou": float(evaluation.per_task(lambda score, step=step: score.iou_at(step)).mean()),  # type: ignore[misc]
            "tasks": tasks,
        }
        for step in steps
    ]


def draw(grid: Sequence[Row], path: Path) -> None:
    """A map an initialisation, mean over seeds, one scale for all; its best place is marked."""
    names = list(dict.fromkeys(row["init"] for row in grid))
    lrs, steps = (list(dict.fromkeys(row[key] for row in grid)) for key in ("lr", "steps"))
    maps = {
        name: np.array(
            [
                [
                    np.mean([r["iou"] for r in grid if (r["init"], r["lr"], r["steps"]) == (name, lr, step)])
                    for lr in lrs
                ]
                for step in steps
            ]
        )
        for name in names
    }
    top = max(float(values.max()) for values in maps.values())
    figure = Figure(figsize=(4.2 * len(names) + 0.8, 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        shown = ax.imshow(values, origin="lower", aspect="auto", vmin=0, vmax=top, cmap="viridis")
        best = np.unravel_index(values.argmax(), values.shape)
        for i, j in np.ndindex(values.shape):
            weight = "bold" if (i, j) == best else "normal"
            colour = "white" if values[i, j] < 0.7 * top else "black"
            ax.text(
                j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=8, weight=weight
            )
        ax.set(xticks=range(len(lrs)), xticklabels=lrs, yticks=range(len(steps)), yticklabels=steps)
        ax.set(xlabel="inner learning rate", ylabel="inner steps", title=name)
    figure.colorbar(shown, ax=axes, label="IoU on validation tasks")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
