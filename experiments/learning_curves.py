r"""Many-shot learning curves: meta-learned, joint, ImageNet and random initialisations, from one image to hundreds.

    python experiments/learning_curves.py --rows reptile joint imagenet random --seeds 0
    python experiments/learning_curves.py --data fss1000 --rows fomaml_star joint imagenet -- \
      dataset.fss_root=PATH dataset.voc_root=PATH dataset.sbd_root=PATH

One run of mode=curves on initialisations that main_table.py left (--main-table, --rows, and one of --seeds), each with
the learning rate that was best for it. For FSS-1000 train them with
dataset=fss1000_fpk: the curves' five classes must be new to them.
"""

import csv
import shutil
from collections.abc import Sequence

from runs import Run, add_inits, execute, initialisation, parse, parser, write_about

# on the embedded data ω's steps and scores are fewer than the defaults, for an afternoon's budget on two cores
SETTINGS = {
    "emoji": [
        "dataset=emoji_many_shot",
        "update=sgd_early_stopping",
        "update.stopping.every=20",
        "update.stopping.patience=40",
        "curves.steps=[1,2,5,10,20,30,50,100,200]",
        "curves.k=[1,5,10,50,100,400]",
    ],
    "fss1000": ["experiment=paper_curves"],
}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "learning_curves", tasks="5", seeds=[0])
    add_inits(made, ["reptile", "joint", "imagenet", "random"])
    args = parse(made, argv)
    if len(args.seeds) > 1:
        made.error("--seeds: one; the curves compare initialisations, not seeds")
    if "imagenet" not in args.rows:
        made.error("--rows: imagenet among them; the others' gains are over it")
    (seed,) = args.seeds
    files = {row: initialisation(args, row, seed) for row in args.rows}
    inits = ",".join(f"{row}:{path}" for row, path in files.items())
    words = [
        *SETTINGS[args.data],
        "mode=curves",
        f"seed={seed}",
        f"curves.tasks={args.tasks}",
        f"curves.inits={{{inits}}}",
        "curves.baseline=imagenet",
    ]
    run = Run("curves", seed, args.runs / f"curves-s{seed}", [*words, *args.overrides])
    execute([run], jobs=1)
    for name in ("summary.csv", "curves.csv", "curves.png"):
        shutil.copy(run.folder / name, args.out / name)
    write_about(args, [run], args.out / "curves.json")
    with (args.out / "summary.csv").open() as file:
        for row in csv.DictReader(file):
            gain = ", ".join(f"{float(row[key]):+.3f}" for key in ("gain", "gain_low", "gain_high"))
            print(f"{row['init']:>12} k={row['k']:>3}: IoU {float(row['iou']):.3f}, gain over ImageNet and 95 % {gain}")
    print(f"{args.out}/summary.csv, curves.csv, curves.png: the curves; curves.json: where they come from")


if __name__ == "__main__":
    main()
