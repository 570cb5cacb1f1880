"""How fast meta-training and evaluation are, beside the loops that one would write instead.

    python experiments/speed.py --device cpu --sizes 96 224 --json experiments/speed/cpu.json

Each contender lives in a process of its own, so that memory and start-up are its own and the fast engine's settings
reach nobody else. They take turns, a block each, `--repeats` times; medians count. Data are synthetic, weights random.
Writes the JSON, and beside it a Markdown table and a plot.
`--quick` is a dry run: of some minutes at these sizes, of one at `--sizes 32`.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
NAMES = {
    "fast": "metaseg, engine=auto",
    "reference": "metaseg, engine=reference",
    "plain": "plain PyTorch loop",
    "learn2learn": "learn2learn MAML, first order",
    "higher": "higher, first order",
}
MODELS = {"efficientlab_6_3": ("tf_efficientnet_b0", 0.2), "efficientlab_lite0": ("tf_efficientnet_lite0", 0.2)}
KINDS = {  # parts of the operations' and kernels' names, in small letters; the first kind that fits
    "convolution": ("conv", "gemm", "xmma", "fprop", "dgrad", "wgrad", "cutlass", "nchwtonhwc", "nhwctonchw"),
    "batch norm": ("batch_norm", "bn_", "batchnorm"),
    "activation": ("silu", "hardtanh", "sigmoid"),
    "resize": ("upsample",),
    "random": ("bernoulli", "random_"),
    "copy, fill": ("copy", "catarray", "cat", "fill", "constant_pad", "empty", "resize_"),
    "optimizer": ("sgd", "multi_tensor"),
    "arithmetic": ("::mul", "::add", "::sub", "::div", "::sum", "::mean", "elementwise", "reduce"),
}
BATCH, META_BATCH, STEPS, SHOTS, QUERIES = 8, 5, 5, 10, 5
INNER_LR = 0.005


class Synthetic:
    """Tasks of noise with a brighter disc as the object; a `TaskSource` without files."""

    name = "synthetic"

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def names(self, split: str) -> list[str]:
        """Sixteen tasks a split."""
        return [f"{split}-{i}" for i in range(16)]

    def count(self, task: str) -> int:
        """Enough for one episode."""
        return SHOTS + QUERIES

    def load(self, task: str, which: list[int]) -> tuple[Any, Any]:
        """Images (n, h, w, 3) and masks (n, h, w), uint8."""
        import numpy as np

        rng = np.random.default_rng([len(task), *which])
        size, n = self.image_size, len(which)
        y, x = np.mgrid[:size, :size]
        centres = rng.uniform(size / 4, 3 * size / 4, (n, 2, 1, 1))
        masks = (((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2) < (size / 4) ** 2).astype(np.uint8)
        images = rng.integers(0, 128, (n, size, size, 3), dtype=np.uint8) + 127 * masks[..., None]
        return images.astype(np.uint8), masks


class Contender:
    """Meta-trains with Reptile (FOMAML where the peer has no Reptile) and evaluates; one of `NAMES`."""

    def __init__(self, name: str, args: argparse.Namespace, size: int) -> None:
        import torch
        from torch.optim import SGD

        import metaseg  # noqa: F401
        from metaseg.algos import Reptile
        from metaseg.data.episodes import EvaluationEpisodes, TrainingEpisodes
        from metaseg.models import EfficientLab
        from metaseg.update import Update

        self.name, self.device = name, torch.device(args.device)
        self.torch = torch
        self.workers = 1 if args.device == "cpu" else max(1, (os.cpu_count() or 2) - 1)
        torch.manual_seed(0)
        backbone, drop_path = MODELS[args.model]
        self.net = EfficientLab(backbone, (16, 4), drop_path).to(self.device)
        self.update = Update(partial(SGD), lr=INNER_LR, steps=STEPS, batch_size=BATCH)
        self.algo, source = Reptile(SHOTS), Synthetic(size)
        self.training = TrainingEpisodes(partial(self.algo.episode, source, self.update, 0), 10**9)
        self.meta_batch = [self.training[i] for i in range(META_BATCH)]
        omega = replace(self.update, steps=args.test_steps)
        # on a GPU the lanes' set-up and captures, a few seconds, must not pass for the work of a few tasks
        draws = args.draws if name == "fast" else 1
        names = source.names("test")[: args.tasks]
        self.test = EvaluationEpisodes(source, "test", names, omega, shots=5, queries=QUERIES, draws=draws, seed=0)
        self.omega = omega
        if name in ("fast", "reference"):
            from metaseg import engine

            self.engine = {"fast": engine.auto, "reference": engine.reference}[name]
            self.lanes = self.engine(self.net, self.update)
            self.meta_step = self._ours
        else:
            self._make_plain()
            self.meta_step = {"plain": self._plain, "learn2learn": self._learn2learn, "higher": self._higher}[name]

    def train(self, meta_steps: int) -> float:
        """Seconds a meta-step, episodes at hand."""
        return self._timed(lambda: [self._finished(self.meta_batch) for _ in range(meta_steps)]) / meta_steps

    def loading(self, meta_steps: int) -> dict[str, float]:
        """Seconds a meta-step with a loader's worker, and how many of them were spent waiting for it."""
        from metaseg.data.episodes import From, episode_loader

        sampler = From(lambda: 0, (meta_steps + 1) * META_BATCH)
        loader = iter(episode_loader(self.training, self.workers, batch_size=META_BATCH, sampler=sampler))
        self.meta_step(next(loader))
        self._wait()
        waited = 0.0
        started = time.perf_counter()
        for _ in range(meta_steps):
            asked = time.perf_counter()
            meta_batch = next(loader)
            waited += time.perf_counter() - asked
            self._finished(meta_batch)
        self._wait()
        whole = time.perf_counter() - started
        return {"seconds": whole / meta_steps, "waiting": waited / meta_steps}

    def evaluate(self) -> float:
        """Seconds a test task: adaptation and prediction."""
        if self.name in ("fast", "reference"):
            from metaseg.evaluate import Scoring

            processes = None if self.name == "fast" else 1
            scoring = Scoring(self.net, self.test, self.omega, self.engine, processes=processes, workers=self.workers)
            return self._timed(lambda: list(scoring)) / len(self.test)
        some = range(min(len(self.test), 10))
        return self._timed(lambda: [self._plain_task(self.test[i]) for i in some]) / len(some)

    def memory(self) -> float:
        """Peak memory so far, in MB: of the process, or of the GPU."""
        if self.device.type == "cuda":
            return self.torch.cuda.max_memory_reserved() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def ceilings(self) -> dict[str, float]:
        """What the device can do at best: a large float32 (CUDA: bfloat16) matrix product, and a large copy."""
        torch, on_gpu = self.torch, self.device.type == "cuda"
        n = 8192 if on_gpu else 2048
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16 if on_gpu else torch.float32)
        x = torch.randn(2**26, device=self.device)
        y = torch.empty_like(x)
        product = median(self._timed(lambda: a @ a) for _ in range(7))
        copied = median(self._timed(lambda: y.copy_(x)) for _ in range(7))
        return {"matmul_gflops": 2 * n**3 / product / 1e9, "copy_gbs": 2 * 4 * x.numel() / copied / 1e9}

    def profile(self) -> dict[str, float]:
        """Where a meta-step's time goes: shares of the work that torch's profiler sees, by kind of operation."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
        with profile(activities=activities) as seen:
            self.meta_step(self.meta_batch)
            self._wait()
        times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in seen.key_averages()}
        shares = dict.fromkeys((*KINDS, "other"), 0.0)
        for name, spent in times.items():
            kind = next((k for k, parts in KINDS.items() if any(part in name.casefold() for part in parts)), "other")
            shares[kind] += spent / sum(times.values())
        return shares

    def floating_point_operations(self) -> float:
        """Of an inner step, as the plain network's formulas are written: forward once, backward twice."""
        from torch.utils.flop_counter import FlopCounterMode

        from metaseg.models import use_shortcuts

        net = copy.deepcopy(self.net)
        use_shortcuts(net, False)
        with FlopCounterMode(display=False) as counter, self.torch.no_grad():
            net(self.meta_batch[0].batches[0].images.to(self.device))
        return 3.0 * counter.get_total_flops()

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def _finished(self, meta_batch: list[Any]) -> None:
        """A meta-step, and waiting for a GPU to have done it, as training does when it logs the loss."""
        self.meta_step(meta_batch)
        self._wait()

    def _ours(self, meta_batch: list[Any]) -> None:
        from metaseg.engine.flat import flat

        there = [episode.to(self.device) for episode in meta_batch]
        gradients = self.lanes.map(lambda adapt, episode: self.algo.meta_gradient(self.net, episode, adapt), there)
        with self.torch.no_grad():
            flat(self.net).sub_(self.torch.stack(gradients).mean(0), alpha=0.1)

    # What one would write with PyTorch alone: whole modules, their own layout, eager steps.

    def _make_plain(self) -> None:
        from torch import nn

        from metaseg.models import use_shortcuts

        use_shortcuts(self.net, False)
        self.net.dropout = nn.Dropout(0.5)
        for module in self.net.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = True  # timm's default
        self.net.train()

    def _on_device(self, batch: Any) -> tuple[Any, Any]:
        return batch.images.to(self.device).contiguous().float(), batch.masks.to(self.device)

    def _adapt(self, batches: tuple[Any, ...]) -> Any:
        from metaseg.engine.flat import ordered_parameters
        from metaseg.losses import segmentation_loss
        from metaseg.update import batchnorm_parameters

        phi = copy.deepcopy(self.net)
        norms = batchnorm_parameters(phi)
        optimizer = self.update.make_optimizer(ordered_parameters(phi)[len(norms) :], norms)
        for batch in batches:
            images, masks = self._on_device(batch)
            optimizer.zero_grad()
            segmentation_loss(phi(images), masks).backward()
            optimizer.step()
        return phi

    def _plain(self, meta_batch: list[Any]) -> None:
        torch = self.torch
        change = [torch.zeros_like(p) for p in self.net.parameters()]
        for episode in meta_batch:
            phi = self._adapt(episode.batches)
            with torch.no_grad():
                for total, ours, theirs in zip(change, self.net.parameters(), phi.parameters(), strict=True):
                    total += (theirs - ours) / len(meta_batch)
        with torch.no_grad():
            for p, step in zip(self.net.parameters(), change, strict=True):
                p += 0.1 * step

    def _plain_task(self, episode: Any) -> None:
        phi = self._adapt(episode.batches)
        with self.torch.no_grad():
            phi(self._on_device(episode.support)[0])
            phi.eval()(self._on_device(episode.query)[0]).argmax(1).cpu()

    def _learn2learn(self, meta_batch: list[Any]) -> None:
        import learn2learn

        from metaseg.losses import segmentation_loss

        maml = learn2learn.algorithms.MAML(self.net, lr=INNER_LR, first_order=True)
        for episode in meta_batch:
            learner = maml.clone()
            for batch in episode.batches[:-1]:
                images, masks = self._on_device(batch)
                learner.adapt(segmentation_loss(learner(images), masks))
            images, masks = self._on_device(episode.batches[-1])
            segmentation_loss(learner(images), masks).backward()
        self._outer()

    def _higher(self, meta_batch: list[Any]) -> None:
        import higher

        from metaseg.losses import segmentation_loss

        optimizer = self.torch.optim.SGD(self.net.parameters(), lr=INNER_LR, weight_decay=5e-4)
        for episode in meta_batch:
            with higher.innerloop_ctx(self.net, optimizer, track_higher_grads=False) as (phi, inner):
                for batch in episode.batches[:-1]:
                    images, masks = self._on_device(batch)
                    inner.step(segmentation_loss(phi(images), masks))
                images, masks = self._on_device(episode.batches[-1])
                gradients = self.torch.autograd.grad(segmentation_loss(phi(images), masks), list(phi.parameters()))
            for p, g in zip(self.net.parameters(), gradients, strict=True):
                p.grad = g if p.grad is None else p.grad + g
        self._outer()

    def _outer(self) -> None:
        with self.torch.no_grad():
            for p in self.net.parameters():
                p -= 0.1 * INNER_LR * p.grad / META_BATCH
                p.grad = None


def serve(name: str, args: argparse.Namespace, size: int, asked: float, connection: Connection) -> None:
    """A contender's process: answers (method, arguments) until it is told None."""
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers: as users have it
    contender = Contender(name, args, size)
    contender.train(1)
    connection.send(time.time() - asked)  # start-up: the process, imports, and the first meta-step
    while (request := connection.recv()) is not None:
        method, arguments = request
        connection.send(getattr(contender, method)(*arguments))


def measure(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """All contenders at one image size, in turn."""
    context = multiprocessing.get_context("spawn")
    servers, results = {}, {}
    for name in NAMES:
        if name in ("learn2learn", "higher") and importlib.util.find_spec(name) is None:
            results[name] = {"missing": f"{name} is not installed"}
            continue
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, args, size, time.time(), theirs))
        process.start()
        theirs.close()
        servers[name] = (process, ours)
        try:
            results[name] = {"start_up_s": ours.recv(), "train_s": [], "evaluate_s": []}
        except EOFError:
            results[name] = {"missing": f"{name} failed at its first meta-step"}
            del servers[name]

    def ask(name: str, method: str, *arguments: Any) -> Any:
        servers[name][1].send((method, arguments))
        return servers[name][1].recv()

    for turn in range(args.repeats):
        for name in servers:
            results[name]["train_s"].append(ask(name, "train", args.meta_steps))
            print(f"{size}² turn {turn + 1}/{args.repeats} {name}: {results[name]['train_s'][-1]:.3f} s a meta-step")
    for name in servers:
        results[name]["memory_mb"] = ask(name, "memory")
    for _ in range(args.evaluations):
        for name in ("fast", "reference", "plain"):
            results[name]["evaluate_s"].append(ask(name, "evaluate"))
    images = BATCH * STEPS * META_BATCH
    for name in servers:
        result = results[name]
        result["images_per_s"] = images / median(result["train_s"])
        if result["evaluate_s"]:
            result["tasks_per_s"] = 1 / median(result["evaluate_s"])
    loading = ask("fast", "loading", args.meta_steps)
    ceilings, operations = ask("plain", "ceilings"), ask("plain", "floating_point_operations")
    for name in ("plain", "fast"):
        results[name]["profile"] = ask(name, "profile")
    step = median(results["fast"]["train_s"]) / (STEPS * META_BATCH)
    for process, connection in servers.values():
        connection.send(None)
        process.join()
    return {
        "contenders": results,
        "ratio": median(results["plain"]["train_s"]) / median(results["fast"]["train_s"]),
        "evaluation_ratio": _ratio(results, "evaluate_s"),
        "memory_ratio": results["fast"]["memory_mb"] / results["reference"]["memory_mb"],
        "loading": {**loading, "waiting_share": loading["waiting"] / loading["seconds"]},
        "ceilings": {
            **ceilings,
            "gflop_per_step": operations / 1e9,
            "share_of_matmul": operations / 1e9 / step / ceilings["matmul_gflops"],
        },
    }


def _ratio(results: dict[str, Any], key: str) -> float:
    return median(results["plain"][key]) / median(results["fast"][key])


def table(done: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        f"`{done['command']}`, commit {done['commit']}, {done['machine']}, {done['model']}, seed 0.",
        "",
        "| size | loop | images/s | × plain | tasks/s | peak MB | start-up s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size, result in done["sizes"].items():
        plain = result["contenders"]["plain"]["images_per_s"]
        for name, row in result["contenders"].items():
            if "missing" in row:
                lines.append(f"| {size}² | {NAMES[name]} | {row['missing']} | | | | |")
                continue
            tasks = f"{row['tasks_per_s']:.3g}" if "tasks_per_s" in row else ""
            lines.append(
                f"| {size}² | {NAMES[name]} | {row['images_per_s']:.1f} | {row['images_per_s'] / plain:.2f} "
                f"| {tasks} | {row['memory_mb']:.0f} | {row['start_up_s']:.1f} |"
            )
    for size, result in done["sizes"].items():
        c = result["ceilings"]
        lines += [
            "",
            f"{size}²: the fast engine waits for data {100 * result['loading']['waiting_share']:.1f} % of the time; its"
            f" peak memory is {result['memory_ratio']:.2f} × the reference's; an inner step is "
            f"{c['gflop_per_step']:.1f} GFLOP as written, {100 * c['share_of_matmul']:.0f} % of the rate of a large "
            f"matrix product ({c['matmul_gflops']:.0f} GFLOP/s; copies run at {c['copy_gbs']:.0f} GB/s).",
        ]
    lines += [
        "",
        "A meta-step by torch's profiler, % of its time (and ms an inner step):",
        "",
        f"| size | loop | {' | '.join((*KINDS, 'other'))} |",
        f"| --- | --- |{' --- |' * (len(KINDS) + 1)}",
    ]
    for size, result in done["sizes"].items():
        for name in ("plain", "fast"):
            row = result["contenders"][name]
            step = 1000 * median(row["train_s"]) / (STEPS * META_BATCH)
            cells = [f"{100 * share:.1f} ({step * share:.1f})" for share in row["profile"].values()]
            lines.append(f"| {size}² | {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(done: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sizes = done["sizes"]
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 2.6), layout="constrained", squeeze=False)
    for axis, (size, result) in zip(axes[0], sizes.items(), strict=True):
        rows = {NAMES[n]: r["images_per_s"] for n, r in result["contenders"].items() if "images_per_s" in r}
        bars = axis.barh(list(rows), list(rows.values()), color=["#d1495b", *["#8d99ae"] * (len(rows) - 1)])
        axis.bar_label(bars, fmt="%.1f", padding=2)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(title=f"{size}², {done['device']}", xlabel="images/s of meta-training")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--model", choices=MODELS, default="efficientlab_6_3")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run?")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.meta_steps = 10 if on_gpu else 1
    args.test_steps, args.tasks, args.draws, args.evaluations = (59, 16, 15, 1) if on_gpu else (4, 4, 1, 2)
    if args.quick:
        args.repeats, args.evaluations, args.tasks, args.draws = 2, 1, 2, 1
    from runs import machine  # not above: the contenders' processes shall not import what they are measured with

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    sizes = {str(size): measure(args, size) for size in args.sizes}
    done = {
        "command": shlex.join(["python", "experiments/speed.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "machine": machine(args.device),
        "device": args.device,
        "model": args.model,
        "quick": args.quick,
        "ratio": {size: result["ratio"] for size, result in sizes.items()},
        "sizes": sizes,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(done, indent=1))
    args.json.with_suffix(".md").write_text(table(done))
    plot(done, args.json.with_suffix(".png"))
    print(table(done))


if __name__ == "__main__":
    main()
