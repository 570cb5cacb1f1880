"""Meta-learned initialisations for image segmentation."""

import os

# albumentations asks the network for its newest version at import; nothing here uses the network unasked.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from metaseg import _torchvision as _torchvision

__version__ = "0.1.0"
