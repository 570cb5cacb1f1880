"""Five labelled images and twenty others, by each way a person has: how long, how good, and what it looks like.

    python experiments/five_images.py
    python experiments/five_images.py --init RUN/init.safetensors --tasks 12 --out experiments/five_images

The same images go through `evaluate` and, as files, through `python -m metaseg.adapt`: the command must reach the IoU
that evaluate reports. They draw other mini-batches, so single tasks differ, and the mean over tasks tells; each has
a seed of its own, for one seed's draws may be lucky or not, and all tasks would share that. Drawn
(shell.png, python.png, onnx.png) is the task that is nearest to the median by evaluate's IoU.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image
from runs import Row, machine, parse, parser, percent, write_csv

import metaseg
from metaseg import ship
from metaseg.adapt.output import MODEL, RECORD
from metaseg.config import make_update
from metaseg.data.emoji import EmojiSource
from metaseg.data.episodes import EvaluationEpisodes
from metaseg.data.source import UInt8
from metaseg.engine import auto
from metaseg.episode import Episode
from metaseg.evaluate import Scoring, evaluate
from metaseg.export import export
from metaseg.metrics import bootstrap_ci95, iou
from metaseg.pictures import PREDICTION, TRUTH, overlay
from metaseg.report import git_commit

SHOTS, QUERIES = 5, 20
CLASSES = 60  # of each split that are drawn, for their first images are enough


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "five_images", tasks="12", seeds=None)
    made.add_argument("--init", type=Path, help="default: the shipped one")
    args = parse(made, argv)
    if args.data != "emoji" or args.overrides:
        made.error("this one has a form for the embedded data alone, and no overrides")
    started = time.perf_counter()
    init = args.init or ship.shipped()
    episodes = episodes_for(init, int(args.tasks))
    scores = evaluate(Scoring(metaseg.load(init).net, episodes, episodes.update, auto), title="evaluate").scores
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(len(episodes))]
        table = [
            {"task": score.task, "evaluate": score.iou, **by_shell(init, episode, place, seed)}
            for seed, (score, episode, place) in enumerate(zip(scores, episodes, places, strict=True))
        ]
        middle = median([row["evaluate"] for row in table])
        write_csv(table, args.out / "five_images.csv")
        draw(episodes[middle], places[middle], args.out)
    differences = np.array([row["shell"] - row["evaluate"] for row in table])
    about = {
        "command": args.command,
        "init": init.name if args.init is None else str(init),
        "algo": metaseg.load(init).about.algo,
        "tasks": len(table),
        "iou_evaluate": float(np.mean([row["evaluate"] for row in table])),
        "iou_shell": float(np.mean([row["shell"] for row in table])),
        "shell_minus_evaluate_ci95": list(bootstrap_ci95(differences)),
        "seconds_most": max(row["seconds"] for row in table),
        "drawn": table[middle]["task"],
        "commit": git_commit(),
        "machine": machine(),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    (args.out / "five_images.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    low, high = (percent(bound, "+") for bound in bootstrap_ci95(differences))
    print(
        f"IoU over {len(table)} tasks: evaluate {percent(about['iou_evaluate'])}, shell {percent(about['iou_shell'])}"
    )
    print(f"paired difference {percent(differences.mean(), '+')} [{low}, {high}]")
    print(f"at most {about['seconds_most']:.0f} s a task")
    print(f"{args.out}: five_images.csv and .json, shell.png, python.png, onnx.png")


def episodes_for(init: Path, tasks: int) -> EvaluationEpisodes:
    """Fixed episodes of test classes, with the ω that the initialisation recommends."""
    known = metaseg.load(init)
    source = EmojiSource(known.image_size, images_per_class=SHOTS + QUERIES, classes=CLASSES)
    update = make_update(OmegaConf.create(known.omega(None, SHOTS)))
    names = source.names("test")[:tasks]
    return EvaluationEpisodes(source, "test", names, update, shots=SHOTS, queries=QUERIES, draws=1, seed=0)


def by_shell(init: Path, episode: Episode, place: Path, seed: int) -> Row:
    """The IoU that `python -m metaseg.adapt` reaches on an episode's images as files, and the seconds that it took."""
    (labelled, labels), (photos, truth) = episode.support.numpy(), episode.query.numpy()
    for name in ("labelled", "photos"):
        (place / name).mkdir(parents=True)
    for i, (image, mask) in enumerate(zip(labelled, labels, strict=True)):
        Image.fromarray(image).save(place / "labelled" / f"{i:02}.png")
        Image.fromarray(mask * np.uint8(255)).save(place / "labelled" / f"{i:02}_mask.png")
    for i, image in enumerate(photos):
        Image.fromarray(image).save(place / "photos" / f"{i:02}.png")
    words = [f"init={init}", f"support={place}/labelled", f"query={place}/photos", f"out={place}/masks", f"seed={seed}"]
    started = time.perf_counter()
    adapt_in_shell(words)
    seconds = time.perf_counter() - started
    predicted = np.stack([read_mask(path) for path in sorted((place / "masks" / "masks").iterdir())])
    return {"shell": mean_iou(predicted, truth), "seconds": round(seconds, 1)}


def adapt_in_shell(words: Sequence[str]) -> None:
    """The command itself, with its start."""
    subprocess.run([sys.executable, "-m", "metaseg.adapt", *words], check=True, capture_output=True)


def draw(episode: Episode, place: Path, out: Path) -> None:
    """What the three ways gave for one task: from the files of the shell, from Python, and from ONNX Runtime."""
    labelled, labels = episode.support.numpy()
    photos, truth = episode.query.numpy()
    masks = [read_mask(path) for path in sorted((place / "masks" / "masks").iterdir())]
    steps = json.loads((place / "masks" / RECORD).read_text())["steps"]
    columns = 10
    found = [overlay(i, m, PREDICTION) for i, m in zip(photos, masks, strict=True)]
    shown: list[tuple[str, Sequence[UInt8]]] = [
        (f"{SHOTS} labelled", [overlay(i, m, TRUTH) for i, m in zip(labelled, labels, strict=True)]),
        *((f"{len(found)} found" if i == 0 else "", found[i : i + columns]) for i in range(0, len(found), columns)),
    ]
    reached = f"IoU {mean_iou(np.stack(masks), truth):.2f} on {len(found)} others"
    title = f"{episode.task}: {steps} inner steps on {SHOTS} images, then {reached}"
    sheet(shown, columns, title).savefig(out / "shell.png", dpi=100)

    init = metaseg.load(place / "masks" / MODEL)
    some = photos[:8]
    soft = np.stack([init.predict(image, soft=True) for image in some])
    rows: list[tuple[str, Sequence[UInt8]]] = [
        ("image", list(some)),
        ("predict(image,\nsoft=True)", list(heat(soft))),
        ("predict(image)", [overlay(i, init.predict(i), PREDICTION) for i in some]),
    ]
    sheet(rows, len(some), f"metaseg.load(…).adapt(images, masks).predict(image): {episode.task}").savefig(
        out / "python.png", dpi=100
    )

    file = place / "model.onnx"
    export(init.net, init.image_size, file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (probability,) = session.run(None, {"images": np.ascontiguousarray(some.transpose(0, 3, 1, 2))})
    difference = float(np.abs(probability - soft).max())
    rows = [("image", list(some)), ("ONNX Runtime", list(heat(probability))), ("PyTorch", list(heat(soft)))]
    size = f"{file.stat().st_size / 1e6:.1f} MB"
    sheet(rows, len(some), f"model.onnx, {size}: largest difference of a probability {difference:.0e}").savefig(
        out / "onnx.png", dpi=100
    )


def sheet(rows: Sequence[tuple[str, Sequence[UInt8]]], columns: int, title: str) -> Figure:
    """Rows of images, each with its name."""
    figure = Figure(figsize=(columns + 1.0, 1.04 * len(rows) + 0.4), layout="constrained")
    for line, (name, images) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for j, ax in enumerate(line):
            ax.set(xticks=[], yticks=[])
            ax.set_frame_on(False)
            if j < len(images):
                ax.imshow(images[j], interpolation="nearest")
        line[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=10)
    return figure


def heat(probabilities: np.ndarray) -> UInt8:
    """Probabilities as grey pictures (n, h, w, 3)."""
    grey = np.rint(probabilities * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def read_mask(path: Path) -> UInt8:
    """A written mask, {0, 1}."""
    return (np.asarray(Image.open(path)) > 0).astype(np.uint8)


def mean_iou(predicted: UInt8, truth: UInt8) -> float:
    """Mean of per-image object IoU; shapes (n, h, w)."""
    axes = (1, 2)
    return float(iou((predicted & truth).sum(axes), (predicted | truth).sum(axes)).mean())


def median(values: Sequence[float]) -> int:
    """Which of the values is nearest to their median."""
    return int(np.abs(np.array(values) - np.median(values)).argmin())


if __name__ == "__main__":
    main()
