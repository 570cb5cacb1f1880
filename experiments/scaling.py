r"""What a meta-step costs, against meta-batch, image size, tasks and ranks: measured here, modelled beyond.

    python experiments/scaling.py --out experiments/scaling --fill docs/scaling.md

Reptile on the embedded data, in processes of `metaseg.run`, a thread a rank; then the embedded data's shards, with
indices of up to a million tasks that repeat their images. Writes scaling.json, .md (the tables) and .png; --fill puts
the tables between their marks in a page. Words behind -- go to every run.

The model: t(step) = M / R · t_episode + t_outer + t_reduce, with meta-batch M and ranks R. t_episode and t_outer are
fitted to the measured meta-batches; t_reduce is a ring's, 2 (R − 1) messages of bytes / R each, at the bandwidths and
latencies of LINKS.
"""

import argparse
import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from runs import Row, composed, machine
from scipy.optimize import nnls

from metaseg.config import config_dir, inner_config, make_update
from metaseg.data.shards import IMAGE, IMAGES, META, TASKS, ShardSource, task_type, write_index, write_shards
from metaseg.data.source import TaskSource, splits_sha256, task_ids
from metaseg.engine.flat import gather, ordered_parameters, running_statistics
from metaseg.job import create
from metaseg.report import git_commit

ALGORITHM = "algo=reptile"
# of a run that is to be measured: as little as may be beside its meta-steps
BARE = [
    *("mode=fit", ALGORITHM, "model.weights=null", "logger=csv", "workers=0", "trainer.accelerator=cpu"),
    *("evaluate.train_tasks=0", "evaluate.val_tasks=1", "evaluate.validations=1", "update.steps=1"),
]
SETTLING = 2  # first meta-steps, which do not count
LINKS = {  # assumptions, not measurements: bytes/s and seconds a message
    "1 Gbit/s Ethernet": (0.11e9, 100e-6),
    "10 Gbit/s Ethernet": (1.1e9, 50e-6),
    "100 Gbit/s InfiniBand": (11e9, 5e-6),
}
FASTER = 50  # times that a rank of the second kind is as fast as the measured one: an assumption, too
LATENCY = 0.05  # seconds to the first byte of object storage: likewise
RANKS = (1, 2, 8, 32, 128)


def meta_steps(args: argparse.Namespace, size: int, meta_batch: int, ranks: int = 1, threads: int = 1) -> Row:
    """Seconds a meta-step, by the run's own log."""
    folder = args.runs / f"{size}px-{meta_batch}episodes-{ranks}ranks-{threads}threads"
    words = [*BARE, f"algo.meta_batch={meta_batch}", f"dataset.image_size={size}", *args.few]
    words += [f"trainer.max_steps={SETTLING + args.steps}", *args.overrides]
    words += ["trainer=ddp", f"trainer.devices={ranks}"] if ranks > 1 else ["trainer=cpu"]
    shutil.rmtree(folder, ignore_errors=True)
    execute(words, folder, threads)
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        seconds = [float(row["train/seconds"]) for row in csv.DictReader(file) if row.get("train/seconds")]
    counted = seconds[SETTLING:]
    row = {"size": size, "meta_batch": meta_batch, "ranks": ranks, "threads": threads}
    return {**row, "seconds": median(counted), "least": min(counted), "most": max(counted)}


def execute(words: Sequence[str], folder: Path, threads: int) -> None:
    """A run in a process of its own."""
    command = [sys.executable, "-m", "metaseg.run", *words, f"hydra.run.dir={folder.resolve()}"]
    print(shlex.join(["python", *command[1:]]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise SystemExit(f"it failed ({done.returncode}):\n{done.stderr[-2000:]}")


def checkpoint(path: Path) -> dict[str, float]:
    """Bytes and seconds of a checkpoint of a run."""
    content = torch.load(path, weights_only=True)
    copy = path.with_suffix(".copy")
    return {"bytes": path.stat().st_size, "seconds": timed(lambda: torch.save(content, copy), 5)}


def reduced_bytes(words: Sequence[str]) -> int:
    """What the ranks average in a meta-step: the meta-gradient and the running statistics, in float32."""
    net = instantiate(composed(["model.weights=null", *words]).model)
    return 4 * sum(gather(tensors).numel() for tensors in (ordered_parameters(net), running_statistics(net)))


def many_tasks(args: argparse.Namespace) -> list[Row]:
    """What opening a data set and drawing an episode cost: the source itself, and its shards with longer indices."""
    config = composed([ALGORITHM, f"dataset.image_size={args.sizes[0]}", *args.overrides])
    source: TaskSource = create(config.dataset)
    algo, update = create(config.algo.method), make_update(inner_config(config))
    base = args.runs / "shards"
    shutil.rmtree(base, ignore_errors=True)  # of other data, it may be
    write_shards(source, base, 64 * 2**20)
    stored = np.load(base / IMAGES)
    bytes_per_image = float((stored["image"].astype(int) + stored["mask"]).mean())
    rows = []
    for tasks in (None, *args.tasks):
        folder = base if tasks is None else repeated(base, tasks, args.runs / f"index-{tasks}")
        opened = source if tasks is None else ShardSource(folder)
        seen = task_ids(opened, "train")

        def draw(index: int, opened: TaskSource = opened) -> object:
            return algo.episode(opened, update, 0, index)

        draw(0)
        started = time.perf_counter()
        for index in range(args.episodes):
            draw(index)
        drawn = (time.perf_counter() - started) / args.episodes
        names = opened.names("train")
        some = [names[int(i)] for i in np.random.default_rng(0).integers(len(names), size=args.episodes)]
        started = time.perf_counter()
        for task in some:
            opened.load(task, range(algo.shots))
        loaded = (time.perf_counter() - started) / args.episodes
        index_bytes = sum((folder / name).stat().st_size for name in (TASKS, IMAGES, META))
        images = len(np.load(folder / IMAGES, mmap_mode="r"))
        rows.append(
            {
                "tasks": "the source itself" if tasks is None else tasks,
                "index_bytes": None if tasks is None else index_bytes,
                "open_s": None if tasks is None else timed(lambda folder=folder: ShardSource(folder), 3),
                "splits_sha256_s": timed(lambda opened=opened: splits_sha256(opened), 3),
                "seen_bytes": len(json.dumps(seen)),
                "seen_s": timed(lambda seen=seen: torch.save(seen, args.runs / "seen.pt"), 3),
                "load_s": loaded,
                "episode_s": drawn,
                "episode_bytes": algo.shots * bytes_per_image,
                "images_bytes": None if tasks is None else images * bytes_per_image,
            }
        )
        print(rows[-1], flush=True)
    return rows


def repeated(base: Path, tasks: int, folder: Path) -> Path:
    """An index of `tasks` tasks in which those of `base` come again and again, each under new names."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in base.glob("*.tar"):
        link = folder / shard.name
        link.unlink(missing_ok=True)
        link.symlink_to(shard.resolve())
    stored, images = np.load(base / TASKS), np.load(base / IMAGES)
    chosen = stored[np.arange(tasks) % len(stored)]
    counts = chosen["count"].astype(np.int64)
    first = np.cumsum(counts) - counts
    rows = np.zeros(tasks, task_type(12))
    rows["name"] = np.char.add(b"task-", np.char.zfill(np.arange(tasks).astype("S7"), 7))
    rows["first"], rows["count"], rows["shard"] = first, counts, chosen["shard"]
    which = np.repeat(chosen["first"].astype(np.int64) - first, counts) + np.arange(counts.sum())
    held_out = max(tasks // 10, 1)
    splits = {"train": tasks - 2 * held_out, "val": held_out, "test": held_out}
    shards = json.loads((base / META).read_text())["shards"]
    write_index(folder, ShardSource(base), splits, rows, images[which].astype(IMAGE), shards)
    return folder


def timed(work: Callable[[], object], times: int) -> float:
    """Median seconds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


def fit(steps: Sequence[Row]) -> dict[str, Any]:
    """t_outer and, by image size, t_episode: least squares over the meta-batches of one rank and one thread."""
    alone = [row for row in steps if row["ranks"] == row["threads"] == 1]
    first = [row for row in alone if row["size"] == alone[0]["size"]]
    (slope, outer), _ = nnls(np.array([[row["meta_batch"], 1] for row in first]), [row["seconds"] for row in first])
    by_size = {row["size"]: (row["seconds"] - outer) / row["meta_batch"] for row in alone}
    return {"t_outer": float(outer), "t_episode": {**by_size, alone[0]["size"]: float(slope)}}


def reduce_seconds(size: int, ranks: int, link: str) -> float:
    """A ring all-reduce of `size` bytes: 2 (R − 1) messages of a rank's share of them."""
    bandwidth, latency = LINKS[link]
    return 2 * (ranks - 1) * (size / ranks / bandwidth + latency)


def model(episode: float, outer: float, size: int, meta_batch: int, ranks: int, link: str) -> float:
    """Seconds a meta-step."""
    return math.ceil(meta_batch / ranks) * episode + outer + reduce_seconds(size, ranks, link)


def tables(done: dict[str, Any]) -> dict[str, str]:
    """Markdown, by the name of the mark in docs/scaling.md."""
    fitted, size = done["model"], done["reduced_bytes"]
    t_outer, smallest = fitted["t_outer"], done["steps"][0]["size"]
    episodes = {int(key): value for key, value in fitted["t_episode"].items()}
    where = f"`{done['command']}`, commit {str(done['commit'])[:7]}, {done['machine']}."
    steps = [
        [
            f"{row['size']}²",
            row["meta_batch"],
            row["ranks"],
            row["threads"],
            f"{row['seconds']:.2f} ({row['least']:.2f} … {row['most']:.2f})",
            f"{1000 * row['seconds'] / row['meta_batch']:.0f}",
            f"{1000 * episodes[row['size']] / row['ranks'] + 1000 * t_outer / row['meta_batch']:.0f}"
            if row["threads"] == 1
            else "",
        ]
        for row in done["steps"]
    ]
    heads = [
        "image",
        "meta-batch",
        "ranks",
        "threads each",
        "s a meta-step",
        "ms an episode",
        "by the model, no network",
    ]
    told = [
        f"t_outer = {1000 * t_outer:.0f} ms; t_episode = "
        + ", ".join(f"{1000 * value:.0f} ms at {key}²" for key, value in sorted(episodes.items()))
        + f". The ranks average {size / 1e6:.2f} MB a meta-step; `last.ckpt` has "
        f"{done['checkpoint']['bytes'] / 1e6:.1f} MB and takes {1000 * done['checkpoint']['seconds']:.0f} ms to write, "
        "into the page cache."
    ]
    links = []
    for link in LINKS:
        for ranks in RANKS[1:]:
            row: list[object] = [link, ranks]
            for faster in (1, FASTER):
                episode, outer = episodes[smallest] / faster, t_outer / faster
                seconds = model(episode, outer, size, ranks, ranks, link)
                row += [f"{1000 * seconds:.1f}", f"{100 * (episode + outer) / seconds:.0f} %"]
            links.append(row)
    beyond = [
        "link",
        "ranks = meta-batch",
        "ms a meta-step",
        "efficiency",
        f"ms, ranks {FASTER} × as fast",
        "efficiency",
    ]
    many = [
        [
            row["tasks"] if isinstance(row["tasks"], str) else f"{row['tasks']:,}",
            f"{row['index_bytes'] / 1e6:.1f}" if row["index_bytes"] is not None else "",
            f"{row['images_bytes'] / 1e9:.2f}" if row["images_bytes"] is not None else "",
            f"{row['open_s']:.2f}" if row["open_s"] is not None else "",
            f"{row['splits_sha256_s']:.2f}",
            f"{row['seen_bytes'] / 1e6:.2f}, {row['seen_s']:.2f}",
            f"{1000 * row['load_s']:.2f}",
            f"{1000 * row['episode_s']:.2f}",
        ]
        for row in done["tasks"]
    ]
    columns = ["tasks", "index, MB", "images, GB", "open, s", "hash of splits, s", "`seen`, MB and s a checkpoint"]
    columns += ["load, ms an episode", "draw with its mini-batches, ms"]
    need = []
    for faster in (1, FASTER):
        last = done["tasks"][-1]
        rate = 1 / (episodes[smallest] / faster)
        near, far = (rate * (last["episode_s"] + latency) for latency in (0, LATENCY))
        need.append(
            [
                "as measured" if faster == 1 else f"{FASTER} × as fast",
                f"{rate:.1f}",
                f"{rate * last['episode_bytes'] / 1e6:.2f}",
                f"{near:.2f}",
                f"{far:.2f}",
            ]
        )
    loading = [
        "a rank",
        "episodes/s",
        "MB/s",
        "loader workers, local files",
        f"{1000 * LATENCY:.0f} ms from the storage",
    ]
    return {
        "meta-step": "\n".join([where, "", *grid(heads, steps), "", *told]),
        "ranks": "\n".join(grid(beyond, links)),
        "tasks": "\n".join([where, "", *grid(columns, many)]),
        "loading": "\n".join(grid(loading, need)),
    }


def grid(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (heads, ["---"] * len(heads), *rows)]


def fill(page: Path, written: dict[str, str]) -> None:
    """Put each table between `<!-- measured: NAME -->` and `<!-- end -->`."""
    text = page.read_text()
    for name, table in written.items():
        mark = rf"(<!-- measured: {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, found = re.subn(mark, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"{page} has no <!-- measured: {name} --> … <!-- end -->")
    page.write_text(text)


def draw(done: dict[str, Any], path: Path) -> None:
    """The measured meta-steps with the model's lines, and the modelled speed-up by ranks."""
    fitted, steps = done["model"], done["steps"]
    episodes = {int(key): value for key, value in fitted["t_episode"].items()}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for size, episode in sorted(episodes.items()):
        rows = [row for row in steps if row["size"] == size and row["ranks"] == row["threads"] == 1]
        most = np.array([0, max(row["meta_batch"] for row in steps)])
        (line,) = left.plot(most, fitted["t_outer"] + episode * most, "-", linewidth=1)
        places = [row["meta_batch"] for row in rows], [row["seconds"] for row in rows]
        left.plot(*places, "o", color=line.get_color(), label=f"{size}²")
    for row in steps:
        if row["ranks"] > 1:
            left.plot(row["meta_batch"], row["seconds"], "k^", label=f"{row['size']}², {row['ranks']} ranks")
    left.set(xlabel="meta-batch", ylabel="s a meta-step", title="measured (lines: fitted)", xlim=0, ylim=0)
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    left.legend(handles.values(), handles.keys(), frameon=False, fontsize=8)
    smallest = steps[0]["size"]
    for link in LINKS:
        for faster, style in ((1, "-"), (FASTER, "--")):
            episode, outer = episodes[smallest] / faster, fitted["t_outer"] / faster
            times = [model(episode, outer, done["reduced_bytes"], ranks, ranks, link) for ranks in RANKS]
            gain = [ranks * (episode + outer) / seconds for ranks, seconds in zip(RANKS, times, strict=True)]
            right.plot(RANKS, gain, style, label=link + (f", ranks {FASTER} × as fast" if faster > 1 else ""))
    right.plot(RANKS, RANKS, ":", color="grey")
    right.set(
        xscale="log", yscale="log", xlabel="ranks = meta-batch", ylabel="episodes/s, × one rank", title="modelled"
    )
    right.legend(frameon=False, fontsize=7, loc="upper left")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder for the tables and the picture")
    made.add_argument("--runs", type=Path, default=Path("runs/scaling"), help="folder for what is measured, 0.5 GB")
    made.add_argument("--fill", type=Path, help="page with marks for the tables")
    made.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="the first for all meta-batches")
    made.add_argument("--meta-batches", type=int, nargs="+", default=[1, 2, 5, 10], help="other sizes: the middle one")
    made.add_argument("--ranks", type=int, nargs="*", default=[2], help="the largest meta-batch with so many")
    made.add_argument("--steps", type=int, default=6, help="meta-steps that count, in each run")
    made.add_argument("--tasks", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    made.add_argument("--episodes", type=int, default=200, help="to draw for a time of loading")
    made.add_argument("overrides", nargs="*", help="for every run, behind --")
    args = made.parse_args(argv)
    # the number of classes is nothing to a meta-step, and some are drawn in no time
    args.few = ["dataset.classes=20"] if "classes" in composed(args.overrides).dataset else []
    for folder in (args.out, args.runs):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    size, most = args.sizes[0], max(args.meta_batches)
    steps = [meta_steps(args, size, meta_batch) for meta_batch in args.meta_batches]
    steps += [meta_steps(args, other, args.meta_batches[len(args.meta_batches) // 2]) for other in args.sizes[1:]]
    steps += [meta_steps(args, size, most, threads=max(args.ranks, default=1))] if args.ranks else []
    if (config_dir() / "trainer" / "ddp.yaml").is_file():
        steps += [meta_steps(args, size, most, ranks=ranks) for ranks in args.ranks]
    done = {
        "command": shlex.join(["python", *sys.argv]) if argv is None else shlex.join(argv),
        "commit": git_commit(),
        "machine": machine(),
        "steps": steps,
        "model": fit(steps),
        "links": LINKS,
        "reduced_bytes": reduced_bytes(args.overrides),
        "checkpoint": checkpoint(next(args.runs.glob(f"{size}px-*/checkpoints/last.ckpt"))),
        "tasks": many_tasks(args),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    (args.out / "scaling.json").write_text(json.dumps(done, indent=1) + "\n")
    written = tables(done)
    (args.out / "scaling.md").write_text("\n\n".join(f"## {name}\n\n{table}" for name, table in written.items()) + "\n")
    draw(done, args.out / "scaling.png")
    if args.fill:
        fill(args.fill, written)
    print((args.out / "scaling.md").read_text())


if __name__ == "__main__":
    main()
