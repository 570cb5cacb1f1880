"""The same multirun of two algorithms and three seeds under every launcher: six numbers, which must agree.

    python experiments/launchers.py --out experiments/launchers

It needs the extras sweep, slurm and ray (pip install "metaseg-lightning[demo,sweep,slurm,ray]").
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runs import machine, write_csv

from metaseg.report import git_commit
from metaseg.summary import read_sweep

LAUNCHERS = ("basic", "joblib", "ray", "submitit_local")
WORDS = ["algo=reptile,fomaml_star", "seed=0,1,2", "logger=csv"]
SMALL = [  # enough for six different numbers
    *("trainer.max_steps=4", "algo.meta_batch=2", "update.steps=10", "evaluate.validations=1"),
    *("evaluate.train_tasks=0", "evaluate.val_tasks=2", "evaluate.test_tasks=4"),
]


def headlines(launcher: str, words: Sequence[str], folder: Path) -> dict[str, object]:
    """A row: the launcher, its jobs' test IoUs in their order, and how long all took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "metaseg.run", "-m", *words, f"hydra/launcher={launcher}"]
    subprocess.run([*command, f"hydra.sweep.dir={folder}"], check=True)
    ious = {f"iou_{job.folder.name}": f"{job.headline:.9f}" for job in read_sweep(folder)}
    return {"launcher": launcher, **ious, "seconds": round(time.perf_counter() - started)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/launchers"), help="folder for the table")
    parser.add_argument("--runs", type=Path, default=Path("runs/launchers"), help="folder of the sweeps")
    parser.add_argument("--launchers", nargs="+", default=LAUNCHERS)
    parser.add_argument("overrides", nargs="*", help="for every run, behind --")
    args = parser.parse_args(argv)
    words = [*WORDS, *SMALL, *args.overrides]
    table = [headlines(launcher, words, (args.runs / launcher).resolve()) for launcher in args.launchers]
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(table, args.out / "launchers.csv")
    command = shlex.join(["python", "-m", "metaseg.run", "-m", *words, "hydra/launcher=LAUNCHER"])
    (args.out / "about.md").write_text(f"`{command}`, commit {git_commit()}, {machine()}.\n")
    agree = len({tuple(value for key, value in row.items() if key.startswith("iou_")) for row in table}) == 1
    sys.exit(0 if agree else f"the launchers do not agree: {args.out / 'launchers.csv'}")


if __name__ == "__main__":
    main()
