"""Initialisations as files: θ with what is known about it, in safetensors; and θ out of a Lightning checkpoint."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from hydra.utils import get_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from metaseg import models
from metaseg.atomic import written_whole
from metaseg.data.faults import first
from metaseg.data.source import SPLITS, Split, TaskSource, task_ids
from metaseg.errors import ConfigError, UserError, WeightsError
from metaseg.models.network import load_network
from metaseg.seeding import torch_seed

NETWORKS: dict[str, type[nn.Module]] = {  # what a file may name as its network
    f"metaseg.models.{name}": found for name in models.__all__ if isinstance(found := getattr(models, name), type)
}
_NO_SHAPE = ("weights", "drop_path")  # what may differ between networks that one file of weights fits
_TRUSTED = ("metaseg.models.", "metaseg.update.", "metaseg.losses.", "torch.optim.")
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
        seen: the `task_ids` that θ learned from (train), and those on which its checkpoint was chosen (val); None if
            they are not known, as in files of before there was this field.
        image_size: height and width of the images that θ learned from; None if not known, likewise.
        shots: images of a task of its own that θ was adapted to since; None for an initialisation.
        tile: whether these were windows of larger images' own pixels.
    """

    model: dict[str, Any]
    algo: str
    dataset: str
    splits_sha256: str
    seed: int
    meta_steps: int
    update: dict[str, Any]
    seen: dict[str, list[str]] | None = None
    image_size: int | None = None
    shots: int | None = None
    tile: bool = False


def save_initialisation(net: nn.Module, about: About, path: Path) -> None:
    """Write θ, parameters and buffers, with `about` in the file's metadata (JSON strings)."""
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in net.state_dict().items()
    }
    metadata = {key: json.dumps(value) for key, value in asdict(about).items()}
    with written_whole(path) as partial:
        save_file(state, partial, metadata=metadata)


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


def read_network(path: Path) -> tuple[nn.Module, About]:
    """The network of an `init.safetensors` or a `.ckpt` of a run, in eval mode, and what is known of it.

    The file may come from anywhere, so it chooses among metaseg's networks: Hydra, which would run whatever `_target_`
    a configuration holds at any depth, is not asked. Nothing is downloaded.

    Raises:
        WeightsError: if the file is unreadable, names anything that is not metaseg's or torch's, or does not fit.
    """
    about = read_about(path)
    check_trusted(about, path)
    try:
        model = {**about.model, "weights": None}
        target = model.pop("_target_")
        if not timm.is_model(model["backbone"]):  # a hub's address, say
            raise WeightsError(f"{path} names {model['backbone']!r} as its backbone, which timm does not have")
        with torch_seed(0):  # of weights that are replaced: nobody's random state shall move
            net = NETWORKS[target](**model)
    except UserError:
        raise
    except Exception as error:  # JSON of any shape
        raise WeightsError(f"{path} does not describe a network of metaseg's: {error!r}") from error
    load_initialisation(net, path, about.model)
    return net.eval(), about


def check_trusted(about: About, path: Path) -> None:
    """Refuse a file whose configuration would have anything made but metaseg's and torch's parts of a network and ω.

    Hydra calls what a `_target_` names, and OmegaConf resolves `${…}`, while a file may come from anywhere.

    Raises:
        WeightsError: naming the first such thing.
    """
    for key, value in _values({"model": about.model, "update": about.update}):
        made = None
        if key == "_target_" and str(value).startswith(_TRUSTED):
            with suppress(Exception):  # whatever an import raises
                made = get_object(value)
        ours = isinstance(made, type) and f"{made.__module__}.".startswith(_TRUSTED)
        if (key == "_target_" and not ours) or "${" in str(value):
            raise WeightsError(
                f"{path} asks for {value}, which is neither metaseg's nor torch's, so nothing of it is run; to load a "
                "network of your own use metaseg.initialisation.load_initialisation"
            )


def _values(node: Any, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """All that is no container, with its key."""
    if isinstance(node, dict | list):
        for name, part in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _values(part, name)
    else:
        yield key, node


def check_resumable(path: Path, about: About, training: Mapping[str, Any]) -> None:
    """Refuse to resume a checkpoint of another run: it would end as neither of the two does.

    Args:
        path: of the checkpoint.
        about: of the run.
        training: what decides its meta-training, by dotted key (`config.training_values`).

    Raises:
        ConfigError: naming what differs.
    """
    names = ("algo", "dataset", "splits_sha256", "seed", "model")
    theirs, ours = (
        {name: getattr(a, name) for name in names} | {"model": {**_UNSAID, **a.model}}
        for a in (_read_checkpoint(path)[1], about)
    )
    theirs |= torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"].get("training", training)
    ours |= training
    differ = [f"{name}={theirs.get(name)}" for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if differ:
        raise ConfigError(
            f"ckpt_path={path} is of a run with {', '.join(differ)}: resume with the same, or give "
            "model.weights=PATH of its init.safetensors to begin a new run from its weights"
        )


def check_held_out(about: About, source: TaskSource, splits: Sequence[Split], theta: str) -> None:
    """Refuse to score θ on tasks that made it: an error on those says nothing of new ones.

    The rule is that of one data set's splits, across two: val has no task that θ learned from; test has none of these,
    and none on which its checkpoint was chosen. Tasks are the same if their names are, in one family of data
    (`TaskSource.family`). Of a θ that is not known to have seen anything, nothing is refused.

    Args:
        about: what is known of θ.
        source: the data set to score it on.
        splits: that are to be scored.
        theta: what the message calls θ, such as its file.

    Raises:
        ConfigError: naming some of the tasks, and the cure.
    """
    for split in splits:
        earlier = {task for seen in SPLITS[: SPLITS.index(split)] for task in (about.seen or {}).get(seen, ())}
        met = [task for task in task_ids(source, split) if task in earlier]
        if met:
            raise ConfigError(
                f"{theta} was meta-trained or validated on {len(met)} classes of the {split} split of {source.name}: "
                f"{first([task.partition('/')[2] for task in met], most=5)}. Give a θ that was trained without them "
                "(for dataset=fpk: with dataset=fss1000_fpk; otherwise: with these in dataset.exclude or out of "
                "dataset.splits), or score it on other classes"
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
