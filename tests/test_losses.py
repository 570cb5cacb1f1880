"""The training loss against hand-computed cases."""

import math

import pytest
import torch

from metaseg.losses import SegmentationLoss, segmentation_loss, soft_iou


def logits_of(probability: torch.Tensor) -> torch.Tensor:
    """Logits (n, 2, h, w) whose softmax gives the object these probabilities (n, h, w)."""
    return torch.stack([torch.zeros_like(probability), (probability / (1 - probability)).log()], dim=1) + 3.0


def test_a_coin_for_each_pixel() -> None:
    """IoU = 1 / (2 + 2 − 1) = 1/3, so dice = 1/2; and each pixel costs ln 2."""
    masks = torch.tensor([[[1, 1], [0, 0]]], dtype=torch.uint8)
    loss = segmentation_loss(torch.zeros(1, 2, 2, 2), masks)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(2) + math.log(2), abs=1e-5)


def test_cross_entropy_and_dice_add_up() -> None:
    """Each pixel is right with 0.8: ∩ = 0.8, ∪ = (0.8 + 3·0.2) + 1 − 0.8 = 1.6, so IoU = 1/2 and dice = 2/3."""
    masks = torch.tensor([[[1, 0], [0, 0]]])
    probability = torch.tensor([[[0.8, 0.2], [0.2, 0.2]]])
    assert soft_iou(probability, masks).tolist() == pytest.approx([0.5], abs=1e-6)
    loss = segmentation_loss(logits_of(probability), masks)
    assert loss.item() == pytest.approx(-math.log(0.8) - math.log(2 / 3), abs=1e-5)


def test_cross_entropy_is_a_mean_over_all_pixels() -> None:
    """Two images with p = 0.5 and 0.9 on pixels that are all object, so that IoU is p as well."""
    probability = torch.stack([torch.full((2, 2), 0.5), torch.full((2, 2), 0.9)])
    loss = segmentation_loss(logits_of(probability), torch.ones(2, 2, 2, dtype=torch.uint8))
    cross_entropy = -(math.log(0.5) + math.log(0.9)) / 2
    assert loss.item() == pytest.approx(cross_entropy - math.log(2 * 0.7 / 1.7), abs=1e-5)


def test_iou_is_averaged_over_the_batch_before_it_becomes_dice() -> None:
    """IoUs 1/3 and 1/2, mean 5/12, dice 10/17; not dice by dice (7/12 or ½·ln 1/3)."""
    masks = torch.tensor([[[1, 1], [0, 0]], [[1, 1], [1, 1]]])
    loss = segmentation_loss(torch.zeros(2, 2, 2, 2), masks).item()
    assert loss == pytest.approx(math.log(2) - math.log(10 / 17), abs=1e-5)
    assert loss != pytest.approx(math.log(2) - math.log(7 / 12), abs=1e-3)
    assert loss != pytest.approx(math.log(2) - 0.5 * math.log(1 / 3), abs=1e-3)


def test_a_perfect_prediction_costs_nothing() -> None:
    masks = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]])
    sure = (2.0 * masks - 1) * 40
    assert segmentation_loss(torch.stack([-sure, sure], dim=1), masks).item() == pytest.approx(0, abs=1e-6)


def test_channel_1_is_the_object() -> None:
    masks = torch.ones(1, 2, 2, dtype=torch.uint8)
    object_, background = torch.tensor([-5.0, 5.0]), torch.tensor([5.0, -5.0])
    right, wrong = (segmentation_loss(x.view(1, 2, 1, 1).expand(1, 2, 2, 2), masks) for x in (object_, background))
    assert right < 0.001
    assert wrong > 10


def test_an_empty_mask_beside_an_object() -> None:
    """IoUs 0 and 1/2 (all object, p = ½), mean 1/4, dice 2/5."""
    masks = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]).to(torch.uint8)
    loss = segmentation_loss(torch.zeros(2, 2, 2, 2), masks)
    assert loss.item() == pytest.approx(math.log(2) - math.log(0.4), abs=1e-5)


def test_an_empty_mask_alone_is_finite() -> None:
    """∩ = 0 and ∪ = 4·½ leave IoU = 1e-7 / (2 + 1e-7)."""
    loss = segmentation_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8))
    iou = 1e-7 / (2 + 1e-7)
    assert loss.item() == pytest.approx(math.log(2) - math.log(2 * iou / (1 + iou)), rel=1e-5)


@pytest.mark.parametrize("object_pixels", [0, 1, 16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_the_gradient_is_finite(object_pixels: int, scale: float) -> None:
    masks = (torch.arange(16) < object_pixels).view(1, 4, 4).to(torch.uint8)
    logits = scale * torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_(True)
    loss = segmentation_loss(logits, masks)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_gradient_is_that_of_the_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    masks = torch.randint(2, (2, 3, 3), generator=generator)
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, masks), (logits,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_masks_of_any_integer_dtype(dtype: torch.dtype) -> None:
    masks = torch.tensor([[[1, 1], [0, 0]]], dtype=dtype)
    assert segmentation_loss(torch.zeros(1, 2, 2, 2), masks).item() == pytest.approx(2 * math.log(2), abs=1e-5)


# Options


def test_label_smoothing_is_in_the_cross_entropy_alone() -> None:
    """Each pixel is right with 0.8, dice is 2/3; of the target, ε/2 = 0.1 goes to the other class."""
    masks = torch.tensor([[[1, 0], [0, 0]]])
    logits = logits_of(torch.tensor([[[0.8, 0.2], [0.2, 0.2]]]))
    loss = SegmentationLoss(label_smoothing=0.2)(logits, masks)
    cross_entropy = -(0.9 * math.log(0.8) + 0.1 * math.log(0.2))
    assert loss.item() == pytest.approx(cross_entropy - math.log(2 / 3), abs=1e-5)


def test_darc1_is_the_largest_mean_absolute_output() -> None:
    """|outputs| of channel 0: 1 + 2 + 3 + 0 over two images, mean 3/2; of channel 1: 0 + 0 + 4 + 1, mean 5/4."""
    logits = torch.tensor([[[[1.0, -2.0]], [[0.0, 0.0]]], [[[3.0, 0.0]], [[-4.0, 1.0]]]])
    masks = torch.tensor([[[1, 0]], [[0, 1]]])
    added = SegmentationLoss(darc1=0.1)(logits, masks) - segmentation_loss(logits, masks)
    assert added.item() == pytest.approx(0.1 * 1.5, abs=1e-6)
    added = SegmentationLoss(darc1=0.1)(logits[1:], masks[1:]) - segmentation_loss(logits[1:], masks[1:])
    assert added.item() == pytest.approx(0.1 * 2.5, abs=1e-6)


def test_darc1_pulls_on_one_channel_alone() -> None:
    """By λ / (pixels of the batch) times the sign."""
    logits = torch.tensor([[[[1.0, -2.0]], [[0.5, 0.5]]]], requires_grad=True)
    masks = torch.tensor([[[1, 0]]])
    (with_darc1,) = torch.autograd.grad(SegmentationLoss(darc1=0.1)(logits, masks), logits)
    (plain,) = torch.autograd.grad(segmentation_loss(logits, masks), logits)
    expected = torch.tensor([[[[0.05, -0.05]], [[0.0, 0.0]]]])
    torch.testing.assert_close(with_darc1 - plain, expected)


def test_the_plain_loss_has_no_option_on() -> None:
    assert segmentation_loss == SegmentationLoss(label_smoothing=0.0, darc1=0.0)


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("label_smoothing", 1.0, "0 or more, below 1"),
        ("label_smoothing", -0.1, "0 or more, below 1"),
        ("darc1", -1.0, "0 or more"),
        ("darc1", float("nan"), "0 or more"),
    ],
)
def test_impossible_options_are_refused_with_a_cure(name: str, value: float, cure: str) -> None:
    with pytest.raises(ValueError, match=rf"^update\.loss\.{name}={value}: give {cure}$"):
        SegmentationLoss(**{name: value})
