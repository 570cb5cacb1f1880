r"""Beyond the paper: EMA of θ, and learned per-layer inner learning rates (LSLR) in first-order form.

    python experiments/beyond.py run --seeds 0 1 --record runs/beyond.json    # goes on where it was stopped
    python experiments/beyond.py table --record runs/beyond.json --out experiments/beyond
    python experiments/beyond.py check                                        # seconds: is LSLR's gradient right?

Neither helped on the embedded data (README.md beside this), so that neither is part of the package: this file is what
was tried. LSLR (Antoniou et al. 2019, arXiv 1810.09502; Li et al. 2017, arXiv 1707.09835): φ_{t+1} = φ_t − lr·α_l·g_t
for layer l (a parameter tensor), the same α in all steps. With G the tail's gradient at φ_{K−1}, first order:
dL_tail/d log α_l = −⟨G, θ − φ_{K−1}⟩_l. Adam steps log α along the meta-batch's mean; G is what FOMAML* has anyway.
"""

import metaseg  # noqa: F401, I001, RUF100  # before Lightning, for torchvision's sake
import argparse
import itertools
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from runs import composed, machine, write_csv
from torch import Tensor, nn

from metaseg.adapt import Adapter, Lanes
from metaseg.algos import FomamlStar
from metaseg.data.episodes import TrainingEpisodes, episode_loader
from metaseg.engine import Fast
from metaseg.engine.flat import flat, flat_statistics, ordered_parameters
from metaseg.engine.memory import keep_freed_memory
from metaseg.episode import Batch, Episode
from metaseg.evaluate import Score, evaluate
from metaseg.job import Job, build, create, scoring
from metaseg.metrics import bootstrap_ci95
from metaseg.module import MetaModule, linear
from metaseg.report import git_commit
from metaseg.update import Update

LRS = (0.05, 0.1)  # of ω at test, of which each variant has its best
RUNGS = (5, 15)  # inner steps at which an adaptation of 30 is scored on its way
DECAYS = (0.9,)
COMMON = ["mode=fit", "evaluate.train_tasks=0", "evaluate.val_tasks=24", "evaluate.processes=1", "workers=0"]


class Rates:
    """α: one factor on the inner learning rate for each parameter tensor, as logarithms, with its own Adam."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        known = {id(p): name for name, p in net.named_parameters()}
        self.names = [known[id(p)] for p in ordered_parameters(net)]
        self.sizes = torch.tensor([p.numel() for p in ordered_parameters(net)])
        self.log = torch.zeros(len(self.sizes))
        self.optimizer = torch.optim.Adam([self.log], lr=lr) if lr else None
        self.hyper_gradients: list[Tensor] = []  # of the meta-step's episodes so far

    def per_parameter(self) -> Tensor:
        """The factor of each parameter, in the order of the flat vector."""
        return torch.repeat_interleave(self.log.exp(), self.sizes)

    def per_tensor(self, vector: Tensor) -> Tensor:
        """Sums over each tensor."""
        return torch.stack([part.sum() for part in vector.split(self.sizes.tolist())])

    def step(self) -> None:
        """Adam's, along the mean of the episodes' hyper-gradients; none if its learning rate is 0."""
        if self.optimizer:
            self.log.grad = torch.stack(self.hyper_gradients).mean(dim=0)
            self.optimizer.step()
        self.hyper_gradients.clear()


class Scaled(Fast):
    """`Fast`, with each tensor's move scaled by its α: for SGD and Adam that is a learning rate of its own."""

    def __init__(self, net: nn.Module, update: Update, rates: Rates) -> None:
        self.rates = rates
        super().__init__(net, update)

    def _step(self, batch: Batch, lr: float, seed: int, everything: bool) -> Tensor:
        before = self._vector.clone()
        loss = super()._step(batch, lr, seed, everything)
        if not everything:  # FOMAML's last step is no step, but the gradient
            self._vector.copy_(torch.lerp(before, self._vector, self.rates.per_parameter()))
        return loss


class LearnsRates(FomamlStar):
    """FOMAML* that also notes the hyper-gradient of log α."""

    rates: Rates

    def meta_gradient(self, theta: nn.Module, episode: Episode, adapt: Adapter) -> Tensor:
        """FOMAML*'s."""
        adapt.start(theta, episode.seed)
        for batch in episode.batches[:-1]:
            adapt.step(batch)
        before = adapt.vector().clone()
        adapt.step(episode.batches[-1], everything=True)
        g = before - adapt.vector()
        self.rates.hyper_gradients.append(-self.rates.per_tensor(g * (flat(theta) - before)) / adapt.update.lr)
        return g


class Ema(pl.Callback):
    """θ's exponential moving averages over meta-steps, from zero and bias-corrected; running statistics likewise."""

    def __init__(self, decays: Sequence[float]) -> None:
        self.sums: dict[float, tuple[Tensor | float, Tensor | float]] = dict.fromkeys(decays, (0.0, 0.0))
        self.taken = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: MetaModule, *_: object) -> None:
        """Take in θ as it is after a meta-step."""
        now = flat(module.net), flat_statistics(module.net)
        for d, old in self.sums.items():
            self.sums[d] = tuple(d * s + (1 - d) * x.clone() for s, x in zip(old, now, strict=True))
        self.taken += 1

    def averages(self) -> dict[float, tuple[Tensor, Tensor]]:
        """By decay: parameters and running statistics."""
        return {d: tuple(s / (1 - d**self.taken) for s in sums) for d, sums in self.sums.items()}


class RatesStep(pl.Callback):
    """α's step behind θ's; its learning rate falls linearly, as ε does."""

    def __init__(self, rates: Rates, lr: float, steps: int) -> None:
        self.rates, self.lr, self.course = rates, lr, linear(1.0, 0.0, steps)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: MetaModule, outputs: object, batch: object, i: int
    ) -> None:
        """Step α."""
        if self.rates.optimizer:
            self.rates.optimizer.param_groups[0]["lr"] = self.lr * self.course(i)
        self.rates.step()


def job_of(algo: str, seed: int, overrides: Sequence[str] = ()) -> Job:
    return build(composed([f"algo={algo}", f"seed={seed}", *COMMON, *overrides]))


def engine_of(rates: Rates | None) -> Callable[[nn.Module, Update], Lanes]:
    def engine(net: nn.Module, update: Update) -> Lanes:
        keep_freed_memory()
        return Lanes([Scaled(net, update, rates) if rates else Fast(net, update)])

    return engine


def train(job: Job, rates_lr: float | None) -> dict[str, object]:
    """Meta-train without validations; returns θ and its averages as (vector, statistics), and α."""
    config, steps = job.config, job.config.trainer.max_steps
    rates = None
    if rates_lr is not None:
        rates = Rates(job.net, rates_lr)
        job.algo.__class__, job.algo.rates = LearnsRates, rates
    ema = Ema(DECAYS)
    callbacks = [ema] + ([RatesStep(rates, rates_lr, steps)] if rates else [])
    module = MetaModule(
        job.net,
        job.algo,
        inner=job.inner,
        engine=engine_of(rates),
        outer=create(config.algo.outer),
        final_lr=config.algo.final_lr,
        meta_steps=steps,
        about={},
    )
    episodes = TrainingEpisodes(
        partial(job.algo.episode, job.source, job.inner, config.seed), steps * config.algo.meta_batch
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(accelerator="cpu", max_steps=steps, callbacks=callbacks, **quiet)
        trainer.fit(module, episode_loader(episodes, 0, batch_size=config.algo.meta_batch))
    thetas = {"theta": (flat(job.net).clone(), flat_statistics(job.net).clone())}
    thetas |= {f"ema{d}": average for d, average in ema.averages().items()}
    return {"thetas": thetas, "log_alpha": rates and rates.log}


def put(net: nn.Module, theta: tuple[Tensor, Tensor]) -> None:
    flat(net).copy_(theta[0])
    flat_statistics(net).copy_(theta[1])


def measure(job: Job, log_alpha: Tensor | None, lr: float, title: str) -> dict[str, object]:
    """Scores of `job.net` on the validation tasks, task by task."""
    rates = None
    if log_alpha is not None:
        rates = Rates(job.net, 0.0)
        rates.log = log_alpha
    update = replace(job.update, lr=lr)
    scores: list[Score] = evaluate(
        scoring(replace(job, engine=engine_of(rates)), "val", update, RUNGS), title=title
    ).scores
    return {
        "tasks": [s.task for s in scores],
        "steps": list(scores[0].steps),
        "iou": [s.ious.round(5).tolist() for s in scores],
        "loss": [round(s.loss, 5) for s in scores],
    }


TRAININGS = {"reptile": ("reptile", None), "fomaml_star": ("fomaml_star", None), "lslr": ("fomaml_star", 0.1)}
VARIANTS = {  # the training of θ, which of its θ, the training of α; and what it is compared with
    "reptile": ("reptile", "theta", None, ""),
    "reptile, EMA": ("reptile", "ema0.9", None, "reptile"),
    "fomaml_star": ("fomaml_star", "theta", None, ""),
    "fomaml_star, EMA": ("fomaml_star", "ema0.9", None, "fomaml_star"),
    "fomaml_star, LSLR": ("lslr", "theta", "lslr", "fomaml_star"),
}


def run(path: Path, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Train what is not there yet beside `path`, and score each variant that `path` lacks."""
    record = json.loads(path.read_text()) if path.exists() else {}
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)

    def trained(name: str, seed: int) -> dict[str, object]:
        file = folder / f"{name}-s{seed}.pt"
        if not file.exists():
            torch.save(train(job_of(TRAININGS[name][0], seed, overrides), TRAININGS[name][1]), file)
        return torch.load(file, weights_only=True)

    for seed, (variant, (of, which, alpha_of, _)) in itertools.product(seeds, VARIANTS.items()):
        missing = [lr for lr in LRS if f"{variant}|{seed}|{lr}" not in record]
        if not missing:
            continue
        job = job_of(TRAININGS[of][0], seed, overrides)
        put(job.net, trained(of, seed)["thetas"][which])
        log_alpha = trained(alpha_of, seed)["log_alpha"] if alpha_of else None
        for lr in missing:
            record[f"{variant}|{seed}|{lr}"] = measure(job, log_alpha, lr, f"{variant}, seed {seed}, lr {lr}")
            path.write_text(json.dumps(record))


def table(path: Path, out: Path, command: str) -> None:
    """Write beyond.csv and beyond.json: each variant at its best learning rate, and its gain, paired by task."""
    record = json.loads(path.read_text())
    seeds = sorted({int(key.split("|")[1]) for key in record})

    def ious(variant: str, seed: int) -> tuple[float, np.ndarray]:
        """The best learning rate, and the tasks' IoUs at the end with it."""
        by_lr = {lr: np.array(record[f"{variant}|{seed}|{lr}"]["iou"])[:, -1] for lr in LRS}
        return max(by_lr.items(), key=lambda one: one[1].mean())

    rows = []
    for variant, (*_, baseline) in VARIANTS.items():
        found = [ious(variant, seed) for seed in seeds]
        row = {
            "row": variant,
            "iou": float(np.mean([x for _, x in found])),
            "gain": "",
            "gain_low": "",
            "gain_high": "",
        }
        if baseline:
            gains = np.mean([x - ious(baseline, seed)[1] for (_, x), seed in zip(found, seeds, strict=True)], axis=0)
            row["gain"], (row["gain_low"], row["gain_high"]) = float(gains.mean()), bootstrap_ci95(gains)
        row |= {"update_lr": " ".join(str(lr) for lr, _ in found), "iou_by_seed": ""}
        row["iou_by_seed"] = " ".join(f"{x.mean():.4f}" for _, x in found)
        rows.append(row | {"tasks": len(found[0][1]), "seeds": " ".join(map(str, seeds))})
    out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out / "beyond.csv")
    about = {"command": command, "seeds": seeds, "commit": git_commit(), "machine": machine()}
    (out / "beyond.json").write_text(json.dumps(about, indent=2) + "\n")
    for row in rows:
        print(row)


def check() -> None:
    """α = 1, held still, is FOMAML* bit for bit; the hyper-gradient of one inner step is the derivative."""
    tiny = [
        "trainer.max_steps=2",
        "algo.meta_steps=2",
        "algo.meta_batch=2",
        "algo.inner.steps=2",
        "dataset.classes=8",
        "evaluate.val_tasks=2",
    ]
    a, b = (train(job_of("fomaml_star", 0, tiny), lr)["thetas"]["theta"][0] for lr in (None, 0.0))
    print("α = 1 bit for bit:", torch.equal(a, b))

    job = job_of("fomaml_star", 0, [*tiny, "update.weight_decay=0"])
    job.net.double()
    rates = Rates(job.net, 0.0)
    rates.log = rates.log.double()
    job.algo.__class__, job.algo.rates = LearnsRates, rates
    adapt = Scaled(job.net, job.inner, rates)
    episode = job.algo.episode(job.source, job.inner, 0, 0)
    job.algo.meta_gradient(job.net, episode, adapt)
    (analytic,) = rates.hyper_gradients

    def tail_loss(i: int, delta: float) -> float:
        rates.log[i] += delta
        job.algo.meta_gradient(job.net, episode, adapt)
        rates.log[i] -= delta
        return float(adapt.losses[-1])

    for i in (0, 50, 100, len(analytic) - 20, len(analytic) - 2, int(analytic.abs().argmax())):
        numeric = (tail_loss(i, 1e-4) - tail_loss(i, -1e-4)) / 2e-4
        print(f"{rates.names[i]}: dL/d log α = {analytic[i]:.6e}, numerically {numeric:.6e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "check"])
    parser.add_argument("--record", type=Path, default=Path("runs/beyond.json"), help="what run writes and table reads")
    parser.add_argument("--out", type=Path, default=Path("runs/beyond"), help="for the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("overrides", nargs="*", help="for every training, behind --")
    args = parser.parse_args()
    if args.what == "run":
        run(args.record, args.seeds, args.overrides)
    elif args.what == "table":
        table(args.record, args.out, shlex.join(["python", *sys.argv]))
    else:
        check()


if __name__ == "__main__":
    main()
