"""Reptile (Nichol, Achiam, Schulman 2018, arXiv 1803.02999)."""

from torch import Tensor, nn

from metaseg.adapt import Adapter
from metaseg.algos.base import Algorithm
from metaseg.engine.flat import flat
from metaseg.episode import Episode


class Reptile(Algorithm):
    """g = θ − φ_K: with SGD of learning rate ε, θ moves the share ε of the way to the adapted weights."""

    def meta_gradient(self, theta: nn.Module, episode: Episode, adapt: Adapter) -> Tensor:
        """θ − φ_K, all shots being support."""
        adapt(theta, episode)
        return flat(theta) - adapt.vector()
