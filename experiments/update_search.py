"""UHO, before and after: the default ω, the best of the main table's learning rates, and the ω* that mode=uho finds.

    python experiments/update_search.py --rows reptile --seeds 0
    python experiments/update_search.py --data fss1000 --tasks all --rows fomaml_star -- dataset.root=PATH

θ is fixed: an initialisation that main_table.py left (--main-table, --rows). ω* is searched on validation tasks; all
three are tested on the same episodes of the test tasks.
"""

import shutil
from collections.abc import Sequence

from runs import (
    Run,
    add_inits,
    draw_bars,
    execute,
    initialisation,
    parse,
    parser,
    print_table,
    recommended,
    tabulate,
    write_about,
    write_csv,
)

from metaseg.compare import compare, write_plot

BASELINE = "default ω"
# fewer trials and steps than the defaults, for an afternoon's budget on two cores
SEARCH = {
    "emoji": [
        *("uho.trials=30", "uho.random=8", "uho.steps=[5,10,20,30,45,60]", "uho.space.lr.low=5e-3"),
        "evaluate.val_tasks=16",
    ],
    "fss1000": ["experiment=paper_uho"],
}
PROTOCOL = {"emoji": ["evaluate.val_tasks=16"], "fss1000": ["experiment=paper"]}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "update_search", tasks="60", seeds=[0])
    add_inits(made, ["reptile"])
    args = parse(made, argv)
    if len(args.rows) > 1:
        made.error("--rows: one initialisation at a time; its seeds are the rows' seeds")
    runs = []
    for seed in args.seeds:
        init = initialisation(args, args.rows[0], seed)
        chosen = recommended(init)
        default = [word for word in chosen if not word.startswith("update.lr=")]
        common = [f"seed={seed}", f"evaluate.test_tasks={args.tasks}", "evaluate.train_tasks=0", *args.overrides]
        folder = args.runs / f"{args.rows[0]}-s{seed}"
        journal = f"uho.storage={folder / 'search' / 'uho.journal'}"
        searched = [word for word in default if word != "mode=test"]
        words = {
            BASELINE: [*PROTOCOL[args.data], *default],
            "best lr of three": [*PROTOCOL[args.data], *chosen],
            "ω* (UHO)": [*SEARCH[args.data], "mode=uho", *searched, journal],
        }
        names = dict(zip(words, ("default", "best_lr", "search"), strict=True))
        runs += [Run(row, seed, folder / names[row], [*words[row], *common]) for row in words]
    execute(sorted(runs, key=lambda run: run.folder.name != "search"), args.jobs)
    runs.sort(key=lambda run: list(names).index(run.row))
    table = tabulate(runs, BASELINE)
    write_csv(table, args.out / "update_search.csv")
    write_about(args, runs, args.out / "update_search.json")
    draw_bars(table, args.out / "update_search.png")
    for seed in args.seeds:
        for name in ("uho.png", "update.yaml"):
            left = args.runs / f"{args.rows[0]}-s{seed}" / "search" / name
            shutil.copy(left, args.out / f"{left.stem}-s{seed}{left.suffix}")
    before, after = ([run.folder for run in runs if run.row == row] for row in (BASELINE, "ω* (UHO)"))
    write_plot(compare(before, after), args.out / "gain.png")
    print_table(
        table,
        BASELINE,
        [
            (f"{args.out}/update_search.csv, .png and .json", "the table, and where it comes from"),
            (f"{args.out}/uho-s*.png, update-s*.yaml", "the searches, and their ω* (update=PATH)"),
            (f"{args.out}/gain.png", "what each test task gains"),
        ],
    )


if __name__ == "__main__":
    main()
