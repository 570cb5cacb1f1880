"""Engines: how inner steps are computed. `reference` is the plain loop; `auto` gives its numbers sooner."""

from torch import nn

from metaseg.adapt import Lanes
from metaseg.engine.cuda import Graphs, Precision
from metaseg.engine.fast import Fast, check_optimizer
from metaseg.engine.flat import flat, flat_statistics
from metaseg.engine.memory import keep_freed_memory
from metaseg.engine.reference import Reference
from metaseg.update import Update

__all__ = ["Fast", "Graphs", "Reference", "auto", "check_optimizer", "reference"]


def reference(net: nn.Module, update: Update) -> Lanes:
    """The plain loop, kept as the truth."""
    return Lanes([Reference(net, update)])


def auto(net: nn.Module, update: Update, *, precision: Precision = "bf16", lanes: int = 5) -> Lanes:
    """The fast engine of the device that `net` is on.

    Args:
        net: a network of θ's architecture; copied.
        update: ω, with an optimizer out of `fast.OPTIMIZERS`.
        precision: on CUDA; see `cuda.Graphs`. The CPU computes in θ's own.
        lanes: adaptations side by side on CUDA, each with its own activations in memory.
    """
    device = next(net.parameters()).device
    if device.type == "cuda":
        flat(net), flat_statistics(net)  # now, before lanes on streams of their own read them
        return Lanes([Graphs(net, update, precision) for _ in range(lanes)])
    if device.type == "cpu":
        keep_freed_memory()
    return Lanes([Fast(net, update)])
