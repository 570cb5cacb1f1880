"""DeepLabv3 and DeepLabv3+ on EfficientLab's backbone and head: what the residual skip decoder is compared with.

Their ideas, in units of EfficientLab's and as wide as its decoders, so that a comparison is one of the decoders alone:
atrous spatial pyramid pooling (Chen et al. 2017, arXiv 1706.05587) and a decoder with one skip connection (Chen et al.
2018, arXiv 1802.02611).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metaseg.errors import ConfigError
from metaseg.models.backbone import Backbone
from metaseg.models.network import SegmentationNetwork, unit, upsample

SKIP_CHANNELS = 48  # that a skip connection is reduced to (arXiv 1802.02611, section 4.1)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (arXiv 1706.05587, section 3.3), with the image's mean as one of its branches.

    Args:
        deep: channels of the features.
        channels: channels of the result, and of each branch.
        rates: dilations of the 3×3 branches.
    """

    def __init__(self, deep: int, channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.point = unit(deep, channels, 1)
        self.dilated = nn.ModuleList(unit(deep, channels, 3, rate) for rate in rates)
        self.pooled = unit(deep, channels, 1)
        self.project = unit((2 + len(rates)) * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, deep, h, w) to (n, channels, h, w)."""
        # tiled before its unit and not behind it: a batch norm of one image needs more than one value a channel
        mean = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
        branches = [self.point(x), *(dilated(x) for dilated in self.dilated), self.pooled(mean)]
        projected: Tensor = self.project(torch.cat(branches, dim=1))
        return projected


class SkipDecoder(nn.Module):
    """DeepLabv3+'s decoder: deep features beside a reduced skip connection, merged by two 3×3 units.

    Args:
        deep: channels of the deep features.
        skip: channels of the skip connection.
        channels: channels of the result.
    """

    def __init__(self, deep: int, skip: int, channels: int) -> None:
        super().__init__()
        self.reduce = unit(skip, SKIP_CHANNELS, 1)
        self.merge = nn.Sequential(unit(deep + SKIP_CHANNELS, channels, 3), unit(channels, channels, 3))

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Merge (n, deep, h, w) into (n, skip, H, W); returns (n, channels, H, W)."""
        merged: Tensor = self.merge(torch.cat([upsample(deep, skip.shape[2:]), self.reduce(skip)], dim=1))
        return merged


class DeepLab(SegmentationNetwork):
    """Binary segmentation network: backbone, ASPP at stride 16, a skip decoder or none, 1×1 head.

    Args:
        backbone: a timm EfficientNet.
        skip: stride of the skip connection that a decoder merges, 4 in DeepLabv3+; None: no decoder, DeepLabv3.
        rates: dilations of the ASPP, 6, 12 and 18 at stride 16 in the paper. Where h or w is no larger than a rate,
            the outer taps of its 3×3 convolution see nothing but padding.
        drop_path: drop-connect rate of the backbone's last block.
        weights: see `SegmentationNetwork`.

    Raises:
        ConfigError: if the stride or a rate cannot be; WeightsError if the weights are missing or don't fit.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b0",
        skip: Literal[2, 4, 8] | None = 4,
        rates: Sequence[int] = (6, 12, 18),
        drop_path: float = 0.2,
        weights: str | None = None,
    ) -> None:
        body = Backbone(backbone, drop_path)
        widths = body.channels
        shallow = sorted(set(widths) - {16})
        if skip is not None and skip not in shallow:
            raise ConfigError(f"model.skip={skip}: give one of the strides {shallow}, or null for no skip connection")
        if not rates or min(rates) < 1:
            raise ConfigError(f"model.rates={list(rates)}: give dilations of 1 or more, as [6,12,18]")
        channels = widths[16]
        decoders = nn.ModuleList([ASPP(channels, channels, rates)])
        if skip is not None:
            decoders.append(SkipDecoder(channels, widths[skip], channels))
        super().__init__(body, decoders, channels, weights)
        self.skip = skip

    def decode(self, features: dict[int, Tensor]) -> Tensor:
        """From stride 16 through the ASPP, and through the skip decoder to its stride if there is one."""
        x: Tensor = self.decoders[0](features[16])
        return x if self.skip is None else self.decoders[1](x, features[self.skip])
