"""Let torchvision import beside a CPU build of torch that it was not compiled for.

PyPI's torchvision is built for CUDA. Next to a CPU torch its extension does not load, the operators that it
registers are missing, and `import torchvision` (so timm, torchmetrics and Lightning too) fails with "operator
torchvision::nms does not exist". metaseg uses none of these operators: declaring the two that torchvision looks up
is enough. Where the extension loads, this module does nothing.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _declare_missing_operators() -> "torch.library.Library | None":
    """Declare `nms` and `qnms` if torchvision's extension can't load; the caller must keep the result alive."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for extension in sorted(Path(spec.origin).parent.glob("_C*.*")):
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
        return library
    return None


_library = _declare_missing_operators()
