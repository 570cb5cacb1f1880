"""UHO, before and after: the default ω, and the ω* that mode=uho finds, for initialisations that stay as they are.

    python experiments/update_search.py --inits joint-s0 reptile-s1
    python experiments/update_search.py --data fss1000 --tasks all --inits fomaml_star-s0 -- dataset.root=PATH

The initialisations are main_table.py's (--main-table): a row and a seed. ω* is searched on validation tasks; both are
tested on the same episodes of the test tasks.
"""

import argparse
import shutil
from collections.abc import Sequence

from runs import (
    Run,
    add_main_table,
    draw_bars,
    execute,
    initialisation_of,
    parse,
    parser,
    print_table,
    recommended,
    tabulate,
    write_about,
    write_csv,
)

from metaseg.compare import compare, write_plot

# fewer trials and steps than the defaults, for an afternoon's budget on two cores
SEARCH = {
    "emoji": [
        *("uho.trials=24", "uho.random=8", "uho.steps=[5,10,20,30,45,60]", "uho.space.lr.low=5e-3"),
        "evaluate.val_tasks=16",
    ],
    "fss1000": ["experiment=paper_uho"],
}
DEFAULT: dict[str, list[str]] = {"emoji": ["evaluate.val_tasks=16"], "fss1000": ["experiment=paper"]}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "update_search", tasks="60", seeds=None)
    add_main_table(made)
    made.add_argument("--inits", nargs="+", required=True, metavar="ROW-sSEED")
    args = parse(made, argv)
    pairs = {init: before_and_after(args, init) for init in args.inits}
    runs = [run for pair in pairs.values() for run in pair]
    execute(sorted(runs, key=lambda run: run.folder.name != "search"), args.jobs)
    table = [row for before, after in pairs.values() for row in tabulate([before, after], before.row)]
    write_csv(table, args.out / "update_search.csv")
    write_about(args, runs, args.out / "update_search.json")
    draw_bars(table, args.out / "update_search.png")
    for init, (before, after) in pairs.items():
        shutil.copy(after.folder / "uho.png", args.out / f"{init}-search.png")
        shutil.copy(after.folder / "update.yaml", args.out / f"{init}-update.yaml")
        write_plot(compare([before.folder], [after.folder]), args.out / f"{init}-gain.png")
    print_table(
        table,
        "the default",
        [
            (f"{args.out}/update_search.csv, .png and .json", "the table, and where it comes from"),
            (f"{args.out}/*-search.png, *-update.yaml", "the searches, and their ω* (update=PATH)"),
            (f"{args.out}/*-gain.png", "what each test task gains"),
        ],
    )


def before_and_after(args: argparse.Namespace, init: str) -> tuple[Run, Run]:
    """The test of the default ω, and the search that ends with that of ω*."""
    folder = args.runs / init
    test, *theta, _ = recommended(initialisation_of(args, init))
    common = [*theta, f"evaluate.test_tasks={args.tasks}", "evaluate.train_tasks=0", *args.overrides]
    search = [*SEARCH[args.data], "mode=uho", f"uho.storage={folder / 'search' / 'uho.journal'}", *common]
    return (
        Run(f"{init}, default ω", 0, folder / "default", [*DEFAULT[args.data], test, *common]),
        Run(f"{init}, ω* (UHO)", 0, folder / "search", search),
    )


if __name__ == "__main__":
    main()
