"""EfficientLab: an EfficientNet to stride 16 and residual skip decoders (Hendryx et al. 2019, arXiv 1912.06290)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaseg.errors import ConfigError
from metaseg.models.backbone import Backbone
from metaseg.models.network import SegmentationNetwork, unit, upsample


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
        residual: whether to add the upsampled deep features to the result; False is an ablation.

    Attributes:
        shortcuts: whether to compute the same function with fewer operations than its formula has.
    """

    def __init__(self, deep: int, skip: int, channels: int, residual: bool = True) -> None:
        super().__init__()
        self.shortcuts, self.residual = True, residual
        both = deep + skip
        self.match = unit(deep, channels, 1) if residual and deep != channels else nn.Identity()
        self.point = unit(both, channels, 1)
        self.dilated = unit(both, channels, 3, dilation=2)
        self.fuse = unit(2 * channels + both, channels, 3)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Merge (n, deep, h, w) into (n, skip, H, W); returns (n, channels, H, W)."""
        up = upsample(deep, skip.shape[2:])
        x = torch.cat([up, skip], dim=1)
        mean = x.mean(dim=(2, 3), keepdim=True)  # first, so that autograd adds its tiled gradient to x's last
        point, dilated = self.point(x), self.dilated(x)
        conv, activation, norm = self.fuse
        if self.shortcuts:
            assert isinstance(conv, nn.Conv2d)
            y = convolve_with_constant(conv, torch.cat([point, dilated], dim=1), mean)
            for part in (up, skip, point, dilated):
                _want_dense_gradient(part)
        else:
            y = conv(torch.cat([point, dilated, mean.expand_as(x)], dim=1))
        merged: Tensor = norm(activation(y))
        if self.residual:
            merged = self.match(up) + merged
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


class EfficientLab(SegmentationNetwork):
    """Binary segmentation network: backbone, residual skip decoders from deep to shallow, 1×1 head.

    Args:
        backbone: a timm EfficientNet.
        rsd: strides of the decoders, from deep to shallow: (16, 4) is EfficientLab-6-3, (4,) EfficientLab-3.
        drop_path: drop-connect rate of the backbone's last block.
        weights: see `SegmentationNetwork`.
        residual: whether the decoders have their residual connection; False is the paper's ablation.

    Raises:
        ConfigError: if a stride does not exist; WeightsError if the weights are missing or don't fit.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b0",
        rsd: Sequence[Literal[2, 4, 8, 16]] = (16, 4),
        drop_path: float = 0.2,
        weights: str | None = None,
        residual: bool = True,
    ) -> None:
        if not isinstance(residual, bool):  # Hydra takes `no` for a text, which would count as true
            raise ConfigError(f"model.residual={residual}: give true or false")
        body = Backbone(backbone, drop_path)
        widths = body.channels
        if not rsd or list(rsd) != sorted(set(rsd), reverse=True) or not set(rsd) <= set(widths):
            raise ConfigError(
                f"model.rsd={list(rsd)}: give distinct strides from deep to shallow, out of {sorted(widths)}"
            )
        channels = deep = widths[16]
        decoders = nn.ModuleList()
        for stride in rsd:
            decoders.append(ResidualSkipDecoder(deep, widths[stride], channels, residual))
            deep = channels
        super().__init__(body, decoders, channels, weights)
        self.strides = tuple(rsd)

    def decode(self, features: dict[int, Tensor]) -> Tensor:
        """From stride 16 through one decoder after the other; the result has the last one's stride."""
        x = features[16]
        for decoder, stride in zip(self.decoders, self.strides, strict=True):
            x = decoder(x, features[stride])
        return x
