"""Initialisations as W&B artifacts: which run made θ, and which runs tested it or went on from it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import wandb
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from metaseg.config import initialisations
from metaseg.data.source import SPLITS
from metaseg.initialisation import read_about
from metaseg.texts import read_json, say
from metaseg.tracking import to_wandb


def init_artifact(path: Path) -> wandb.Artifact:
    """The artifact of an `init.safetensors`: `init-ALGO-DATASET`, of type model.

    The file is its only content, so that a copy of the file is the same artifact. What is known of it is its metadata,
    with the IoUs of results.json beside it; card.md beside it is its description.

    Raises:
        WeightsError: if the file is unreadable.
    """
    about = asdict(read_about(path))
    seen = about.pop("seen") or {}  # hundreds of names
    metadata = {**about, "classes_seen": {split: len(names) for split, names in seen.items()}, **_ious(path)}
    card = path.with_name("card.md")
    artifact = wandb.Artifact(
        f"init-{about['algo']}-{about['dataset']}",
        type="model",
        description=card.read_text(encoding="utf-8") if card.is_file() else None,
        metadata=metadata,
    )
    artifact.add_file(str(path), name="init.safetensors", policy="immutable", skip_cache=True)
    return artifact


def log_init(loggers: Sequence[Logger], path: Path) -> None:
    """Say to W&B that the run made this `init.safetensors`."""
    to_wandb(loggers, lambda run: run.log_artifact(init_artifact(path)))


def use_inits(loggers: Sequence[Logger], config: DictConfig) -> None:
    """Say to W&B which `init.safetensors` the run takes θ from; online only, since offline runs cannot say it."""
    for path in initialisations(config):
        if path.suffix == ".safetensors":  # a checkpoint is no artifact
            to_wandb(loggers, partial(_use, path))


def _use(path: Path, run: "wandb.Run") -> None:
    if run.offline or run.disabled:
        return
    try:
        run.use_artifact(init_artifact(path))
    except Exception as error:  # of the network or the server's; W&B can do without
        say(f"W&B: {path} is not noted as this run's input ({error})")


def _ious(path: Path) -> dict[str, float]:
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none beside a file that was copied
        results = read_json(path.with_name("results.json"))
        return {f"{split}_iou": results[split]["iou"]["mean"] for split in SPLITS if results[split]}
    return {}
