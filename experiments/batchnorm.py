"""Batch-norm policies of ω: which statistics predict, for fixed initialisations on the same episodes.

    python experiments/batchnorm.py --rows imagenet reptile --seeds 0 1
    python experiments/batchnorm.py --data fss1000 --tasks all --rows fomaml_star -- dataset.root=PATH

The initialisations are main_table.py's (--main-table, --rows), each with the learning rate that was best for it under
`support`, the default. The inner steps do not depend on the policy, only the predictions do.
"""

from collections.abc import Sequence
from typing import get_args

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

from metaseg.update import BatchNormPolicy

PROTOCOL: dict[str, list[str]] = {"emoji": [], "fss1000": ["experiment=paper"]}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "batchnorm")
    add_inits(made, ["imagenet", "reptile"])
    args = parse(made, argv)
    tables, runs = [], []
    common = [f"evaluate.test_tasks={args.tasks}", "evaluate.train_tasks=0", *args.overrides]
    for row in args.rows:
        of_row = []
        for policy in get_args(BatchNormPolicy):
            for seed in args.seeds:
                chosen = recommended(initialisation(args, row, seed))
                words = [*PROTOCOL[args.data], *chosen, f"update.batchnorm={policy}", f"seed={seed}", *common]
                of_row.append(Run(f"{row}, {policy}", seed, args.runs / f"{row}-{policy}-s{seed}", words))
        runs.append(of_row)
    execute([run for of_row in runs for run in of_row], args.jobs)
    for row, of_row in zip(args.rows, runs, strict=True):
        tables += tabulate(of_row, f"{row}, running")
    write_csv(tables, args.out / "batchnorm.csv")
    write_about(args, [run for of_row in runs for run in of_row], args.out / "batchnorm.json")
    draw_bars(tables, args.out / "batchnorm.png")
    print_table(
        tables, "running", [(f"{args.out}/batchnorm.csv, .png and .json", "the table, and where it comes from")]
    )


if __name__ == "__main__":
    main()
