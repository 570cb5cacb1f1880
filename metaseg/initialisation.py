"""Initialisations as files: θ with what is known about it, in safetensors; and θ out of a Lightning checkpoint."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from metaseg.errors import ConfigError, WeightsError
from metaseg.models.network import load_network

_NO_SHAPE = ("weights", "drop_path")  # what may differ between networks that one file of weights fits
_UNSAID = {"residual": True}  # what a network's configuration from before there was the choice means


@dataclass(frozen=True)
class About:
    """Where an initialisation comes from.

    Attributes:
        model: the network's configuration: `hydra.utils.instantiate` of it, weights left null, gives the `nn.Module`.
        algo: the algorithm's name.
        dataset: the data set's name.
        splits_sha256: the data set's `splits_sha256`.
        seed: of the meta-training.
        meta_steps: taken.
        update: the update procedure to adapt with, as configured.
    """

    model: dict[str, Any]
    algo: str
    dataset: str
    splits_sha256: str
    seed: int
    meta_steps: int
    update: dict[str, Any]


def save_initialisation(net: nn.Module, about: About, path: Path) -> None:
    """Write θ, parameters and buffers, with `about` in the file's metadata (JSON strings)."""
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in net.state_dict().items()
    }
    save_file(state, path, metadata={key: json.dumps(value) for key, value in asdict(about).items()})


def load_initialisation(net: nn.Module, path: Path, model: dict[str, Any]) -> About:
    """Load θ from an `init.safetensors` or a `.ckpt` of a run into a network of the configuration `model`.

    Nothing in the file is executed.

    Raises:
        WeightsError: if the file is unreadable or holds another network.
    """
    state, about = _read(path)
    theirs, ours = ({**_UNSAID, **m, **dict.fromkeys(_NO_SHAPE)} for m in (about.model, model))
    if theirs != ours:
        differ = [
            f"model.{key}={theirs.get(key)}" for key in sorted(theirs.keys() | ours) if theirs.get(key) != ours.get(key)
        ]
        raise WeightsError(f"{path} holds another network than model=… gives; it was trained with {' '.join(differ)}")
    load_network(net, state, path)
    return about


def read_about(path: Path) -> About:
    """What is known of the θ in an `init.safetensors` or a `.ckpt` of a run.

    Raises:
        WeightsError: if the file is unreadable.
    """
    return _read(path)[1]


def check_resumable(path: Path, about: About) -> None:
    """Refuse to resume a checkpoint of another run: one cannot go on with other data, seeds or algorithms.

    Raises:
        ConfigError: naming what differs.
    """
    names = ("algo", "dataset", "splits_sha256", "seed", "model")
    theirs, ours = (
        {name: getattr(a, name) for name in names} | {"model": {**_UNSAID, **a.model}}
        for a in (_read_checkpoint(path)[1], about)
    )
    differ = [f"{name}={theirs[name]}" for name in names if theirs[name] != ours[name]]
    if differ:
        raise ConfigError(
            f"ckpt_path={path} is of a run with {', '.join(differ)}: resume with the same, or give "
            "model.weights=PATH of its init.safetensors to begin a new run from its weights"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], About]:
    return (_read_safetensors if path.suffix == ".safetensors" else _read_checkpoint)(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], About]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, About(  # noqa: SIM118  # no mapping
                **{key: json.loads(value) for key, value in metadata.items()}
            )
    except Exception as error:
        raise WeightsError(f"{path} is no initialisation that metaseg wrote: {error}") from error


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], About]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        about = About(**{**checkpoint["hyper_parameters"]["about"], "meta_steps": checkpoint["global_step"]})
        state = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
    except Exception as error:
        raise WeightsError(f"{path} is no checkpoint that metaseg wrote: {error}") from error
    return state, about
