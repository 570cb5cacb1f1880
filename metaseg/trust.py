"""What files that may come from anywhere can have metaseg do: read plain values, and make the parts of this list.

Hydra calls whatever a `_target_` names, at any depth, and OmegaConf resolves `${…}`. So nothing that an initialisation,
a checkpoint or a file of an update procedure describes is made before it has been through `check_trusted`.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from metaseg import models
from metaseg.errors import WeightsError

OWN_NETWORK = "to load a network of your own use metaseg.initialisation.load_initialisation"
OWN_UPDATE = "with code of your own it belongs into conf/update/NAME.yaml, to be chosen by update=NAME"

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
        configuration: of the file: `model`, `update` or both, plain (see `texts.is_plain`).
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
