"""One run in several processes: who leads, who takes which episodes, and what all must know. Alone, it is rank 0 of 1.

Lightning starts the ranks of `trainer=ddp`, or torchrun or srun do; they meet when meta-training begins.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import Tensor, distributed

from metaseg.errors import ConfigError

T = TypeVar("T")


def is_distributed(config: DictConfig) -> bool:
    """Whether the run is one of several processes, as `trainer=ddp` makes it."""
    return config.trainer.get("strategy") is not None


def check_launchable(config: DictConfig) -> None:
    """Refuse what Lightning's ranks can't be started in, or would end in several folders.

    Raises:
        ConfigError: with the cure.
    """
    if not is_distributed(config) or not HydraConfig.initialized():
        return
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        raise ConfigError(
            "trainer=ddp makes one run of several processes, each of which would begin the whole multirun again: start "
            "its runs one by one without -m, or give each of a sweep's jobs one device by trainer=auto"
        )
    by_others = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
    if by_others and not any(word.startswith("hydra.run.dir=") for word in hydra.overrides.hydra):
        raise ConfigError(
            "torchrun and srun start every process of trainer=ddp by itself, and the time in their folders' names may "
            "differ: name one for all, as hydra.run.dir=runs/big"
        )
    if config.trainer.get("num_nodes", 1) != 1 and not by_others:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes}: this command starts processes on its own machine only; "
            "start those of several by torchrun or srun"
        )


def leads(config: DictConfig) -> bool:
    """Whether this process writes and speaks for the run; known before the ranks have met."""
    if not is_distributed(config):
        return True
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    return int(rank_zero_only.rank) == 0  # type: ignore[attr-defined]


def size() -> int:
    """How many ranks have met."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return distributed.get_rank() if size() > 1 else 0


def share(number: int) -> range:
    """Of things numbered from 0, those that this rank takes: every `size()`-th."""
    return range(rank(), number, size())


def means(which: Sequence[bool], *values: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The mean over all ranks' tensors of one shape, for each of a few such sequences, by one all-reduce.

    Args:
        which: of a rank's tensors those that count; of all ranks' there may be none, and the means are zero then.
        values: sequences of as many tensors, at least one on each rank; of one device and dtype.

    Returns:
        For each the mean of those tensors that count, and how many they were; the same on every rank.
    """
    chosen = torch.tensor(which, device=values[0][0].device)
    sums = [torch.stack(list(tensors))[chosen].sum(dim=0) for tensors in values]
    count = sum(which)
    if size() > 1:
        joined = torch.cat([*(part.reshape(-1) for part in sums), sums[0].new_tensor([count])])
        distributed.all_reduce(joined)
        *totals, total = torch.split(joined, [*(part.numel() for part in sums), 1])
        sums, count = [part.view_as(like) for part, like in zip(totals, sums, strict=True)], int(total)
    return [part / max(count, 1) for part in sums], count


def gathered(own: Sequence[T]) -> list[T]:
    """All ranks' things, rank 0's first; the same on every rank."""
    if size() == 1:
        return list(own)
    found: list[Sequence[T]] = [()] * size()
    distributed.all_gather_object(found, own)
    return [one for part in found for one in part]


def in_turns(own: Iterable[T]) -> Iterator[T]:
    """What all ranks' iterables give: rank 0's first, rank 1's first, …, rank 0's second; the same on every rank.

    So the results of `share` come in the order of their numbers.
    """
    if size() == 1:
        yield from own
        return
    mine = iter(own)
    while True:
        found: list[T | None] = [None] * size()
        distributed.all_gather_object(found, next(mine, None))
        if found[0] is None:  # it has as many as any other
            return
        yield from (one for one in found if one is not None)
