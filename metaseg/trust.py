"""What files that may come from anywhere can have metaseg do: read plain values, and make the parts of this list.

Hydra calls whatever a `_target_` names, at any depth, and OmegaConf resolves `${…}`. So nothing that an initialisation,
a checkpoint or a file of an update procedure describes is made before it has been through `check_trusted`.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from metaseg import models
from metaseg.errors import WeightsError

MOST_DEPTH = 16  # containers in each other in a configuration
MOST_LISTED = 1000  # values in one of them
OWN_NETWORK = "to load a network of your own use metaseg.initialisation.load_initialisation"
OWN_UPDATE = "with code of your own it belongs into conf/update/NAME.yaml, to be chosen by update=NAME"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

NETWORKS: dict[str, type[nn.Module]] = {
    f"metaseg.models.{name}": found for name in models.__all__ if isinstance(found := getattr(models, name), type)
}
OPTIMIZERS = frozenset(
    f"{module}.{name}"
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer
    for module in ("torch.optim", found.__module__)
)
PARTS: dict[str, Collection[str]] = {  # what a `_target_` may name, by its place
    "model": NETWORKS,
    "update": ("metaseg.update.Update",),
    "update.optimizer": OPTIMIZERS,
    "update.schedule": ("metaseg.update.Constant", "metaseg.update.Cosine", "metaseg.update.Step"),
    "update.stopping": ("metaseg.update.EarlyStopping",),
    "update.loss": ("metaseg.losses.SegmentationLoss",),
}
PARTIAL = "update.optimizer"  # the one part that is finished later


def check_trusted(configuration: Mapping[str, Any], path: Path, cure: str = OWN_NETWORK) -> None:
    """Refuse a file whose configuration would have anything made but metaseg's and torch's parts of a network and ω.

    Args:
        configuration: of the file: `model`, `update` or both, plain (see `is_plain`).
        path: of the file.
        cure: for code of one's own.

    Raises:
        WeightsError: naming the first such thing.
    """
    for group, node in configuration.items():
        for what in _untrusted(node, group):
            raise WeightsError(
                f"{path} asks for {what}, which is neither metaseg's nor torch's, so nothing of it is run; {cure}"
            )


def _untrusted(node: Any, place: str) -> Iterator[Any]:
    """What Hydra or OmegaConf would do something for, and is not on the list for its place."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                if not isinstance(value, str) or value not in PARTS.get(place, ()):
                    yield value
            elif key == "_partial_":
                if place != PARTIAL:
                    yield f"_partial_ in {place}"
            elif not key.isidentifier() or key.startswith("_"):  # a dot would lead deeper on a command line
                yield f"{key} in {place}"
            else:
                yield from _untrusted(value, f"{place}.{key}")
    elif isinstance(node, list):
        for part in node:
            yield from _untrusted(part, f"{place}[]")
    elif isinstance(node, str) and ("${" in node or node == "???"):
        yield node


def is_plain(node: Any, depth: int = MOST_DEPTH) -> bool:
    """Whether it is a configuration as JSON has it: no other types, not endless, finite numbers, one-line texts."""
    if isinstance(node, dict | list):
        keys, values = (node.keys(), node.values()) if isinstance(node, dict) else ((), node)
        texts = all(isinstance(key, str) and is_plain(key) for key in keys)
        return depth > 0 and len(node) <= MOST_LISTED and texts and all(is_plain(part, depth - 1) for part in values)
    if isinstance(node, str):
        return not _CONTROL.search(node)
    if isinstance(node, float):
        return math.isfinite(node)
    return node is None or (isinstance(node, int) and abs(node) < 2**63)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, in plain containers: no object of Python's is made, and no `${…}` resolved.

    Raises:
        OSError, ValueError: if it cannot be read; also for aliases, a few lines of which can become gigabytes.
    """
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(path.read_text(encoding="utf-8"))):
            raise ValueError(f"{path} has aliases (*name): write each value out")
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{path} is no YAML file of plain values: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
