"""Initialisations as files: θ with what is known about it, in safetensors; and θ out of a Lightning checkpoint."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import timm
import torch
from fsspec.utils import get_protocol
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from metaseg.atomic import written_whole
from metaseg.data.faults import first
from metaseg.data.source import SPLITS, Split, TaskSource, task_ids
from metaseg.errors import ConfigError, UserError, WeightsError
from metaseg.models.network import check_network, load_network
from metaseg.models.weights import read_torch
from metaseg.seeding import torch_seed
from metaseg.texts import is_plain
from metaseg.trust import NETWORKS, check_trusted

MOST_PIXELS = 2**12  # of an image's side, at most, in a file
# pixels of all mini-batches of an adaptation, which lie in memory together: 9 GB, twice that while they are drawn, and
# three times with early stopping, whose search has as many of its own; the paper draws 2·10⁸, in 500 steps at 224²
MOST_DRAWN = 2**31
_NO_SHAPE = ("weights", "drop_path")  # what may differ between networks that one file of weights fits
BEST = "best.ckpt"  # the one checkpoint that Lightning keeps of a run
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
    theirs, ours = ({**_UNSAID, **m, **_without_shape(m)} for m in (about.model, model))
    if theirs != ours:
        differ = [
            f"model.{key}={theirs.get(key)}" for key in sorted(theirs.keys() | ours) if theirs.get(key) != ours.get(key)
        ]
        raise WeightsError(f"{path} holds another network than model=… gives; it was trained with {' '.join(differ)}")
    load_network(net, state, path)
    return about


def _without_shape(model: Mapping[str, Any]) -> dict[str, None]:
    """Nothing in place of what may differ, if it is a value: what Hydra would make something of may not."""
    return {name: None for name in _NO_SHAPE if not isinstance(model.get(name), dict | list)}


def read_about(path: Path) -> About:
    """What is known of the θ in an `init.safetensors` or a `.ckpt` of a run.

    Raises:
        WeightsError: if the file is unreadable.
    """
    return _read(path)[1]


def read_network(path: Path) -> tuple[nn.Module, About]:
    """The network of an `init.safetensors` or a `.ckpt` of a run, in eval mode, and what is known of it.

    The file may come from anywhere, so it chooses among metaseg's networks. Nothing is downloaded, and no network is
    made that is larger than the file's weights.

    Raises:
        WeightsError: if the file is unreadable, names anything that is not metaseg's or torch's, or does not fit.
    """
    state, about = _read(path)
    check_trusted({"model": about.model, "update": about.update}, path)
    try:
        model = {**about.model, "weights": None}
        target = model.pop("_target_")
        if not timm.is_model(model["backbone"]):  # a hub's address, say
            raise WeightsError(f"{path} names {model['backbone']!r} as its backbone, which timm does not have")
        with torch_seed(0):  # of weights that are replaced: nobody's random state shall move
            with torch.device("meta"):  # without memory
                check_network(NETWORKS[target](**model), state, path)
            net = NETWORKS[target](**model)
    except UserError:
        raise
    except Exception as error:  # JSON of any shape
        raise WeightsError(f"{path} does not describe a network of metaseg's: {error!r}") from error
    load_network(net, state, path)
    return net.eval(), about


def check_resumable(path: Path, about: About, training: Mapping[str, Any]) -> None:
    """Refuse to resume a checkpoint of another run: it would end as neither of the two does.

    Args:
        path: of the checkpoint.
        about: of the run.
        training: what decides its meta-training, by dotted key (`config.training_values`).

    Raises:
        ConfigError: naming what differs.
        WeightsError: if it is unreadable; if it has an optimizer go on with what no run leaves; or if it names files
            that no run has kept as its best: Lightning removes what a checkpoint names there as soon as there is a
            better one, be it anywhere.
    """
    with _reading(path, "checkpoint"):
        checkpoint = read_torch(path)
        saved = _about_of(checkpoint)
        trained = checkpoint["hyper_parameters"].get("training", training)
        if not all(isinstance(key, str) and is_plain(value) for key, value in trained.items()):
            raise ValueError("what it says of its training is not what a run writes")
        for name in _files_of(checkpoint):
            if name and (get_protocol(name) != "file" or Path(name).name != BEST or ".." in Path(name).parts):
                raise ValueError(f"it names {name!r} as a checkpoint of its run")
        for part in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
            _check_state(part, checkpoint.get(part), path.stat().st_size)
    names = ("algo", "dataset", "splits_sha256", "seed", "model")
    theirs, ours = (
        {name: getattr(a, name) for name in names} | {"model": {**_UNSAID, **a.model}} for a in (saved, about)
    )
    theirs |= trained
    ours |= training
    differ = [f"{name}={theirs.get(name)}" for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if differ:
        raise ConfigError(
            f"ckpt_path={path} is of a run with {', '.join(differ)}: resume with the same, or give "
            "model.weights=PATH of its init.safetensors to begin a new run from its weights"
        )


def _check_state(part: str, state: Any, room: int) -> None:
    """Refuse a part of a checkpoint that would grow: an optimizer casts and copies each tensor and list that it finds.

    Args:
        part: its name; the tensors of `optimizer_states` are finite.
        state: it.
        room: bytes that its tensors may have together.

    Raises:
        ValueError: if it holds other tensors and values than a run leaves, or the same list twice, or in itself.
    """
    seen: set[int] = set()
    rest = [state]
    while rest:
        node = rest.pop()
        if isinstance(node, dict | list | tuple):
            if node and id(node) in seen:
                raise ValueError(f"it has the same values twice in {part}")
            seen.add(id(node))
            rest += node.values() if isinstance(node, dict) else node
        elif isinstance(node, Tensor):
            plain = not node.is_nested and node.layout == torch.strided and not node.is_meta
            if not plain or not (node.dtype == torch.float32 or node.numel() == 1):
                raise ValueError(f"it has a tensor in {part} that is {node.dtype}, {node.layout}")
            room -= node.nbytes
            if room < 0:
                raise ValueError(f"its tensors in {part} are larger than the file")
            if part == "optimizer_states" and not bool(torch.isfinite(node).all()):
                raise ValueError(f"it has numbers in {part} that are none (NaN) or infinite")
        elif not is_plain(node):
            raise ValueError(f"it has {node!r:.40} in {part}")


def _files_of(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """The checkpoints that Lightning's callbacks have noted in one."""
    for noted in checkpoint.get("callbacks", {}).values():
        for key, value in noted.items():
            if key.endswith("_path"):
                yield value
        yield from noted.get("best_k_models", ())


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
    with _reading(path, "initialisation"), safe_open(path, framework="pt") as file:
        about = _about({key: json.loads(value) for key, value in (file.metadata() or {}).items()})
        return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118  # no mapping


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], About]:
    with _reading(path, "checkpoint"):
        checkpoint = read_torch(path)
        state = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("its state_dict does not hold tensors alone")
        return state, _about_of(checkpoint)


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong inside is the file's fault; what it is that metaseg would have written says `what`."""
    try:
        yield
    except Exception as error:  # safetensors, zip and pickle each have errors of their own
        raise WeightsError(
            f"{path} is no {what} that metaseg wrote: {error}; give the init.safetensors of a run, or a .ckpt of its "
            "checkpoints folder"
        ) from error


def _about_of(checkpoint: Mapping[str, Any]) -> About:
    return _about({**checkpoint["hyper_parameters"]["about"], "meta_steps": checkpoint["global_step"]})


def _about(values: Mapping[str, Any]) -> About:
    """What a file says of itself, once it is sure that each value is of its kind.

    Raises:
        TypeError, ValueError: if it is not.
    """
    about = About(**values)
    check_about(about)
    return about


def check_about(about: About) -> None:
    """Refuse what no file may say of itself.

    Raises:
        ValueError: naming the first field.
    """
    sides = about.image_size is None or (_is_whole(about.image_size) and about.image_size <= MOST_PIXELS)
    seen = {} if about.seen is None else about.seen
    sound = {
        **{name: isinstance(getattr(about, name), dict) for name in ("model", "update")},
        **{name: isinstance(getattr(about, name), str) for name in ("algo", "dataset", "splits_sha256")},
        "seed": _is_whole(about.seed, least=None),
        "meta_steps": _is_whole(about.meta_steps),
        "image_size": sides,
        "shots": about.shots is None or _is_whole(about.shots),
        "tile": isinstance(about.tile, bool),
    }
    sound = {name: holds and is_plain(getattr(about, name)) for name, holds in sound.items()}
    sound["seen"] = isinstance(seen, dict) and all(_are_texts([key, *names]) for key, names in seen.items())
    wrong = [name for name, holds in sound.items() if not holds]
    if wrong:
        raise ValueError(f"its {wrong[0]} is not what a run writes")
    steps, batch_size = (about.update.get(name) for name in ("steps", "batch_size"))
    images = (steps if _is_whole(steps) else 1) * (batch_size if _is_whole(batch_size) else 1)
    side = about.image_size or 64  # the least that there is, where it is not said
    if images * side**2 > MOST_DRAWN:
        raise ValueError(
            f"its update asks for {images} images of {side}², more than memory has: lower its steps or batch_size, or "
            "the image size"
        )


def _is_whole(value: Any, least: int | None = 0) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
