"""The training loss: cross-entropy − ln(dice) (arXiv 1912.06290, section 3). L2 is the optimizers' weight decay."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-7


def soft_iou(probability: Tensor, masks: Tensor) -> Tensor:
    """IoU of object probabilities (n, h, w) in [0, 1] with masks (n, h, w) in {0, 1}; shape (n,), differentiable."""
    intersection = (probability * masks).sum(dim=(1, 2))
    union = (probability + masks).sum(dim=(1, 2)) - intersection
    return (intersection + EPS) / (union + EPS)


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy − ln(2·IoU / (1 + IoU)).

    The soft IoU of the object channel is averaged over the batch before it becomes a dice coefficient (*orig*).

    Args:
        logits: shape (n, 2, h, w), channel 1 the object.
        masks: shape (n, h, w), {0, 1}, any integer dtype.

    Returns:
        A scalar, ≥ 0.
    """
    cross_entropy = F.cross_entropy(logits, masks.long())
    iou = soft_iou(logits.softmax(dim=1)[:, 1], masks.to(logits.dtype)).mean()
    return cross_entropy - torch.log(2 * iou / (1 + iou))
