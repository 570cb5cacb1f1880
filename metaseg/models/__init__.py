"""Networks: images (n, 3, h, w) in 0 … 255 to logits (n, 2, h, w); they never see an episode."""

from metaseg.models.deeplab import DeepLab
from metaseg.models.efficientlab import EfficientLab, use_shortcuts

__all__ = ["DeepLab", "EfficientLab", "use_shortcuts"]
