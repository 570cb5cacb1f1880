"""The network's and the regularisers' parts, each left out or exchanged: meta-trained, and tested on the same episodes.

    python experiments/ablations.py --rows 6-3 3 no-residual
    python experiments/ablations.py --data fss1000 --tasks all -- dataset.root=PATH

On the embedded data with Reptile, on FSS-1000 with FOMAML*, the paper's. A row's settings hold in meta-training and at
test; the learning rate of ω is the preset's for all of them.
"""

from collections.abc import Sequence

from runs import Run, composed, draw_bars, execute, parse, parser, print_table, tabulate, write_about, write_csv

from metaseg.job import create

BASELINE = "6-3"
LITE0 = "model.backbone=tf_efficientnet_lite0"
ALGORITHM = {"emoji": ["algo=reptile", "evaluate.train_tasks=0"], "fss1000": ["experiment=paper_fomaml_star"]}
DECODERS = {
    "emoji": {  # the same backbone as the preset's; at 64 pixels stride 16 has 4 × 4 places, so dilations are small
        "aspp": ["model=deeplab_aspp", LITE0, "model.rates=[1,2,3]"],
        "v3plus": ["model=deeplab_v3plus", LITE0, "model.rates=[1,2,3]"],
    },
    "fss1000": {"aspp": ["model=deeplab_aspp"], "v3plus": ["model=deeplab_v3plus"]},
}
ROWS: dict[str, list[str]] = {
    BASELINE: [],
    "3": ["model.rsd=[4]"],
    "6": ["model.rsd=[16]"],
    "no-residual": ["model.residual=false"],
    "aspp": [],
    "v3plus": [],
    "no-dropout": ["update.dropout=0"],
    "no-augmentation": ["update.augment=0"],
    "no-l2": ["update.weight_decay=0"],
    "l1": ["update.weight_decay=0", "update.l1=1e-5"],
    "darc1": ["update.loss.darc1=0.01"],
    "label-smoothing": ["update.loss.label_smoothing=0.1"],
}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "ablations")
    made.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parse(made, argv)
    common = [*ALGORITHM[args.data], f"evaluate.test_tasks={args.tasks}"]
    words = rows(args.data)
    runs = [
        Run(row, seed, args.runs / f"{row}-s{seed}", [*common, *words[row], f"seed={seed}", *args.overrides])
        for row in args.rows
        for seed in args.seeds
    ]
    create(composed(runs[0].overrides).dataset)  # drawn or read once, before the runs need it side by side
    execute(runs, args.jobs)
    table = [{**row, "parameters": parameters(runs, row["row"])} for row in tabulate(runs, BASELINE)]
    write_csv(table, args.out / "ablations.csv")
    write_about(args, runs, args.out / "ablations.json")
    draw_bars(table, args.out / "ablations.png")
    print_table(table, BASELINE, [(f"{args.out}/ablations.csv, .png and .json", "the table, and where it comes from")])


def rows(data: str) -> dict[str, list[str]]:
    """The overrides of each row."""
    return ROWS | DECODERS[data]


def parameters(runs: Sequence[Run], row: str) -> int:
    """Of the row's network."""
    model = composed(next(run for run in runs if run.row == row).overrides).model
    return sum(p.numel() for p in create(model, weights=None).parameters())


if __name__ == "__main__":
    main()
