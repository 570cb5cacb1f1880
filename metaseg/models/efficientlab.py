"""EfficientLab: an EfficientNet to stride 16 and residual skip decoders (Hendryx et al. 2019, arXiv 1912.06290)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaseg.errors import ConfigError, WeightsError
from metaseg.models.backbone import Backbone, imagenet_weights, read_weights

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


def convolve_with_constant(conv: nn.Conv2d, x: Tensor, constant: Tensor) -> Tensor:
    """A 3×3 convolution, zero-padded by 1, of x with `constant` tiled behind it as further channels.

    The same numbers as conv(cat(x, tiled)), but a tiled constant gives one result in the inside and eight at the
    borders, so these nine are computed and spread out. Saves a quarter of the stride-4 decoder's arithmetic.

    Args:
        conv: of channels + c input channels.
        x: shape (n, channels, h, w).
        constant: shape (n, c, 1, 1).
    """
    for_x, for_constant = torch.split(conv.weight, [x.shape[1], constant.shape[1]], dim=1)
    y = F.conv2d(x, for_x, conv.bias, padding=1)
    tile = constant.expand(-1, -1, min(y.shape[2], 3), min(y.shape[3], 3))
    nine = F.conv2d(tile, for_constant, padding=1)
    return y + _widen(_widen(nine, 3, y.shape[3]), 2, y.shape[2])


def _widen(x: Tensor, dim: int, size: int) -> Tensor:
    """Repeat the middle one of three along `dim` until it has `size`; up to three stay as they are."""
    if size <= 3:
        return x
    first, middle, last = torch.split(x, 1, dim)
    shape = list(x.shape)
    shape[dim] = size - 2
    return torch.cat([first, middle.expand(shape), last], dim)


class ResidualSkipDecoder(nn.Module):
    """RSD: merges deep features into a shallower skip connection and adds them back as a residual.

    Args:
        deep: channels of the deep features.
        skip: channels of the skip connection.
        channels: channels of the result, and of each branch.

    Attributes:
        shortcuts: whether to compute the same function with fewer operations than its formula has.
    """

    def __init__(self, deep: int, skip: int, channels: int) -> None:
        super().__init__()
        self.shortcuts = True
        both = deep + skip
        self.match = unit(deep, channels, 1) if deep != channels else nn.Identity()
        self.point = unit(both, channels, 1)
        self.dilated = unit(both, channels, 3, dilation=2)
        self.fuse = unit(2 * channels + both, channels, 3)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Merge (n, deep, h, w) into (n, skip, H, W); returns (n, channels, H, W)."""
        up = upsample(deep, skip.shape[2:])
        x = torch.cat([up, skip], dim=1)
        mean = x.mean(dim=(2, 3), keepdim=True)  # first, so that autograd adds its tiled gradient to x's last
        point, dilated = self.point(x), self.dilated(x)
        residual: Tensor = self.match(up)
        conv, activation, norm = self.fuse
        if self.shortcuts:
            assert isinstance(conv, nn.Conv2d)
            y = convolve_with_constant(conv, torch.cat([point, dilated], dim=1), mean)
            for part in (up, skip, point, dilated):
                _want_dense_gradient(part)
        else:
            y = conv(torch.cat([point, dilated, mean.expand_as(x)], dim=1))
        merged: Tensor = residual + norm(activation(y))
        return merged


def _want_dense_gradient(x: Tensor) -> None:
    """Have x's gradient copied out of the concatenation's: batch norm's backward pass is slow on a slice."""
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))  # type: ignore[no-untyped-call]


def use_shortcuts(net: nn.Module, wanted: bool) -> None:
    """Have all decoders of a network compute with shortcuts, or as the formula is written."""
    for module in net.modules():
        if isinstance(module, ResidualSkipDecoder):
            module.shortcuts = wanted


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


class EfficientLab(nn.Module):
    """Binary segmentation network: backbone, residual skip decoders from deep to shallow, 1×1 head.

    Args:
        backbone: a timm EfficientNet.
        rsd: strides of the decoders, from deep to shallow: (16, 4) is EfficientLab-6-3, (4,) EfficientLab-3.
        drop_path: drop-connect rate of the backbone's last block.
        weights: None (random), "imagenet" (backbone only), or a file: the backbone's weights under timm's names, or
            the whole network's (an `init.safetensors`).

    Raises:
        ConfigError: if a stride does not exist; WeightsError if the weights are missing or don't fit.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b0",
        rsd: Sequence[Literal[2, 4, 8, 16]] = (16, 4),
        drop_path: float = 0.2,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(backbone, drop_path)
        widths = self.backbone.channels
        if not rsd or list(rsd) != sorted(set(rsd), reverse=True) or not set(rsd) <= set(widths):
            raise ConfigError(
                f"model.rsd={list(rsd)}: give distinct strides from deep to shallow, out of {sorted(widths)}"
            )
        self.strides = tuple(rsd)
        channels = deep = widths[16]
        self.decoders = nn.ModuleList()
        for stride in self.strides:
            self.decoders.append(ResidualSkipDecoder(deep, widths[stride], channels))
            deep = channels
        self.dropout = Dropout(0.0)  # its rate is part of the update procedure
        self.head = nn.Conv2d(channels, 2, 1)
        nn.init.normal_(self.head.weight, std=1.0)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = BATCH_NORM_MOMENTUM
        self.register_buffer("mean", 255 * torch.tensor(self.backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(self.backbone.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self._load(backbone, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Map RGB images (n, 3, height, width), 0 … 255, uint8 or float, to logits (n, 2, height, width).

        Channel 0 is background, channel 1 the object. Height and width are multiples of 16 in training; others work.
        """
        features = self.backbone((images.to(self.mean.dtype) - self.mean) / self.std)
        x = features[16]
        for decoder, stride in zip(self.decoders, self.strides, strict=True):
            x = decoder(x, features[stride])
        logits = self.head(self.dropout(x)).to(self.mean.dtype)  # also where autocast computed it in less
        return upsample(logits, images.shape[2:])

    def _load(self, name: str, weights: str | None) -> None:
        if weights is None:
            return
        if weights == "imagenet":
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
        WeightsError: if it belongs to a network of another shape.
    """
    own = net.state_dict()
    wrong = [
        key
        for key in own.keys() | state.keys()
        if key not in own or key not in state or own[key].shape != state[key].shape
    ]
    if wrong:
        raise WeightsError(
            f"{origin} holds another network: {len(wrong)} tensors differ, first {sorted(wrong)[0]}. "
            "Choose the model=… that it was trained with."
        )
    net.load_state_dict(state)
