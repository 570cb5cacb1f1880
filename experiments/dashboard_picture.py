"""The picture of a report.html in the README: tiny runs, a few minutes on one core. Their numbers mean nothing.

    python experiments/dashboard_picture.py

It needs a Chromium, and the embedded data (pip install "metaseg-lightning[demo]").
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from metaseg.dashboard import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
WIDTH, TALLEST = 1100, 9000  # pixels
MARGIN = 12
TINY = [
    *("trainer=cpu", "logger=csv", "update.steps=10", "evaluate.rungs=[1,2,5]", "evaluate.test_tasks=6"),
    *("evaluate.val_tasks=4", "evaluate.train_tasks=0", "evaluate.panels=6", "evaluate.validations=3"),
]


def take_runs(folder: Path) -> None:
    """Two algorithms and the baseline with two seeds each, a search, and curves; what is done stays."""
    theta = f"{folder}/sweep/0/init.safetensors"
    curves = ["mode=curves", "curves.k=[1,2,5]", "curves.queries=4", "curves.tasks=3", "curves.steps=[1,5]"]
    for name, words in {
        "sweep": ["-m", "algo=reptile,fomaml_star", "seed=0,1", "trainer.max_steps=9", "algo.meta_batch=2"],
        "baseline": ["-m", "algo=finetune", "seed=0,1"],
        "uho": ["mode=uho", "algo=reptile", f"ckpt_path={theta}", "uho.trials=6", "uho.random=4", "uho.steps=[2,5]"],
        "curves": [*curves, f"curves.inits={{reptile:{theta},imagenet:imagenet}}", "curves.baseline=imagenet"],
    }.items():
        key = "hydra.sweep.dir" if "-m" in words else "hydra.run.dir"
        command = [sys.executable, "-m", "metaseg.run", *words, *TINY, f"{key}={folder}/{name}", "skip_done=true"]
        subprocess.run(command, check=True)


def photograph(page: Path, out: Path) -> None:
    """Take a picture of the whole page, its two halves side by side."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "page.png")
        size = f"--window-size={WIDTH},{TALLEST}"
        subprocess.run([str(CHROMIUM), *FLAGS, size, f"--screenshot={shot}", page.resolve().as_uri()], check=True)
        image = Image.open(shot).convert("RGB")
    blank = (np.asarray(image) == 255).all(axis=(1, 2))
    end = len(blank) - int(blank[::-1].argmin()) + MARGIN
    gaps = [y for y in range(MARGIN, end) if blank[y - MARGIN : y + MARGIN].all()]
    cut = min(gaps, key=lambda y: abs(y - end / 2))  # nothing is cut through
    both = Image.new("RGB", (2 * WIDTH, max(cut, end - cut)), "white")
    both.paste(image.crop((0, 0, WIDTH, cut)), (0, 0))
    both.paste(image.crop((0, cut, WIDTH, end)), (WIDTH, 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    both.resize((both.width * 2 // 3, both.height * 2 // 3)).quantize(96, dither=Image.Dither.NONE).save(
        out, optimize=True
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/dashboard"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("experiments/dashboard/report.png"))
    args = parser.parse_args(argv)
    take_runs(args.runs)
    write_page([args.runs], args.runs / "report.html")
    photograph(args.runs / "report.html", args.out)


if __name__ == "__main__":
    main()
