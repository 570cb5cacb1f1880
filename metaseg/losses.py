"""The loss: cross-entropy − ln(dice) (arXiv 1912.06290, section 3), plain for scores, with options for inner steps.

L2 and L1 are the update procedure's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metaseg.errors import ConfigError

EPS = 1e-7


def soft_iou(probability: Tensor, masks: Tensor) -> Tensor:
    """IoU of object probabilities (n, h, w) in [0, 1] with masks (n, h, w) in {0, 1}; shape (n,), differentiable."""
    intersection = (probability * masks).sum(dim=(1, 2))
    union = (probability + masks).sum(dim=(1, 2)) - intersection
    return (intersection + EPS) / (union + EPS)


@dataclass(frozen=True)
class SegmentationLoss:
    """Cross-entropy − ln(2·IoU / (1 + IoU)), regularised.

    The soft IoU of the object channel is averaged over the batch before it becomes a dice coefficient (*orig*).

    Attributes:
        label_smoothing: share of each pixel's target that is spread evenly over both classes, in [0, 1); in the
            cross-entropy alone (*orig*).
        darc1: factor λ ≥ 0 of DARC1 (Kawaguchi, Kaelbling, Bengio 2017, arXiv 1710.05468), λ · max over output units
            of the mean |output|. Here the output units are the two channels of the logits, and every pixel of the
            batch counts as a sample.
    """

    label_smoothing: float = 0.0
    darc1: float = 0.0

    def __post_init__(self) -> None:
        """Refuse factors out of range."""
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"update.loss.label_smoothing={self.label_smoothing}: give 0 or more, below 1")
        if not 0 <= self.darc1 < math.inf:
            raise ConfigError(f"update.loss.darc1={self.darc1}: give 0 or more")

    def __call__(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: shape (n, 2, h, w), channel 1 the object.
            masks: shape (n, h, w), {0, 1}, any integer dtype.

        Returns:
            A scalar, ≥ 0.
        """
        cross_entropy = F.cross_entropy(logits, masks.long(), label_smoothing=self.label_smoothing)
        iou = soft_iou(logits.softmax(dim=1)[:, 1], masks.to(logits.dtype)).mean()
        loss = cross_entropy - torch.log(2 * iou / (1 + iou))
        if self.darc1:
            loss = loss + self.darc1 * logits.abs().mean(dim=(0, 2, 3)).amax()
        return loss


segmentation_loss = SegmentationLoss()  # the plain one, in which scores are reported
