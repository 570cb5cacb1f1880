"""Meta-learned initialisations for image segmentation: `metaseg.load(path).adapt(images, masks).predict(image)`."""

import os
from typing import TYPE_CHECKING, Any

# albumentations asks the network for its newest version at import; nothing here uses the network unasked.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from metaseg import _torchvision as _torchvision

if TYPE_CHECKING:
    from metaseg.practice import Adapted, Initialisation, load

__all__ = ["Adapted", "Initialisation", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # only when they are asked for: they bring along torch, timm and Hydra
    if name in __all__:
        from metaseg import practice

        return getattr(practice, name)
    raise AttributeError(f"module 'metaseg' has no attribute {name!r}")
