"""What all networks here share: a backbone below, a 1×1 head above, and what their decoders are made of."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaseg.errors import WeightsError
from metaseg.models.backbone import Backbone, imagenet_weights
from metaseg.models.weights import check_tensors, differing, read_weights

BATCH_NORM_MOMENTUM = 0.01  # the original's 0.99 in TensorFlow's terms
BATCH_NORM_EPS = 1e-3  # of the decoders; a backbone keeps the one that its weights were trained with


def unit(channels_in: int, channels_out: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution with bias (Glorot-uniform, zero bias) → swish → batch norm; keeps height and width."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=dilation * (kernel // 2), dilation=dilation)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # there is a bias
    return nn.Sequential(conv, nn.SiLU(), nn.BatchNorm2d(channels_out, eps=BATCH_NORM_EPS))


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of (n, c, h, w) to `size`, corners aligned."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=True)


class Dropout(nn.Dropout):
    """Dropout that drops the same elements in every memory layout, and is quick on the CPU.

    There torch draws a whole random number an element, one after another: at 224² that was 5 % of a step. This draws
    16 bits an element, so the rate is rounded to 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements of (n, c, h, w) at the rate p and scale the others by 1 / (1 − p), in training."""
        if not self.training or self.p == 0:
            return x
        n, c, h, w = x.shape  # dealt out as channels_last lies in memory, whichever way x does
        if x.device.type == "cpu":
            words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
            bits = words.view(torch.int16)[: x.numel()].view(n, h, w, c)
            keep = (bits >= round(self.p * 65536) - 32768).to(x.dtype)
        else:
            keep = torch.empty(n, h, w, c, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * keep.permute(0, 3, 1, 2).mul_(1 / (1 - self.p))


class SegmentationNetwork(nn.Module):
    """Binary segmentation network: backbone, decoders, dropout, 1×1 head, bilinear upsampling to the input's size.

    Args:
        backbone: features down to stride 16.
        decoders: what `decode` computes with; with the head, they are the part that `update.adapts=decoder` moves.
        channels: of the features that `decode` gives.
        weights: None (random), "imagenet" (backbone only), or a file: the backbone's weights under timm's names, or
            the whole network's (an `init.safetensors`).

    Raises:
        WeightsError: if the weights are missing or don't fit.
    """

    def __init__(self, backbone: Backbone, decoders: nn.ModuleList, channels: int, weights: str | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoders = decoders
        self.dropout = Dropout(0.0)  # its rate is part of the update procedure
        self.head = nn.Conv2d(channels, 2, 1)
        nn.init.normal_(self.head.weight, std=1.0)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = BATCH_NORM_MOMENTUM
        self.register_buffer("mean", 255 * torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self._load(weights)

    def forward(self, images: Tensor) -> Tensor:
        """Map RGB images (n, 3, height, width), 0 … 255, uint8 or float, to logits (n, 2, height, width).

        Channel 0 is background, channel 1 the object. Height and width are multiples of 16 in training; others work.
        """
        x = self.decode(self.backbone((images.to(self.mean.dtype) - self.mean) / self.std))
        logits = self.head(self.dropout(x)).to(self.mean.dtype)  # also where autocast computed it in less
        return upsample(logits, images.shape[2:])

    def decode(self, features: dict[int, Tensor]) -> Tensor:
        """Map the backbone's features by stride, 2 … 16, to those that the head sees, (n, channels, h, w)."""
        raise NotImplementedError  # no ABC: libraries that patch modules, such as higher, make subclasses of their own

    def _load(self, weights: str | None) -> None:
        if weights is None:
            return
        if weights == "imagenet":
            name = self.backbone.name
            self.backbone.load(imagenet_weights(name), f"the ImageNet weights of {name}")
            return
        state = read_weights(weights)
        if "head.weight" in state:
            load_network(self, state, weights)
        else:
            self.backbone.load(state, weights)


def load_network(net: nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Load a whole network's state dict.

    Raises:
        WeightsError: if it belongs to a network of another shape, or a tensor has another type or is not finite.
    """
    check_network(net, state, origin)
    check_tensors(net.state_dict(), state, origin)
    net.load_state_dict(state)


def check_network(net: nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Refuse a state dict that belongs to a network of another shape.

    Raises:
        WeightsError: naming the first tensor that differs.
    """
    own = net.state_dict()
    wrong = sorted([*differing(own, state), *(state.keys() - own.keys())])
    if wrong:
        raise WeightsError(
            f"{origin} holds another network: {len(wrong)} tensors differ, first {wrong[0]}. "
            "Choose the model=… that it was trained with."
        )
