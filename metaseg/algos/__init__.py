"""Algorithms: an episode to a pseudo-gradient of θ. One file each."""

from metaseg.algos.base import Algorithm
from metaseg.algos.fomaml import Fomaml, FomamlStar
from metaseg.algos.joint import Joint
from metaseg.algos.reptile import Reptile

__all__ = ["Algorithm", "Fomaml", "FomamlStar", "Joint", "Reptile"]
