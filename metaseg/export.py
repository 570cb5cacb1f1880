"""A network as one file for deployment: images of any size in, object probabilities of that size out.

    python -m metaseg.export RUN/init.safetensors model.onnx

The file's suffix says which: `.onnx` (ONNX, opset 18), `.pt2` (`torch.export`) or `.pt` (TorchScript). The graph is the
whole way from bytes to probabilities, so that nobody has to write the resizing and the normalisation a second time.
"""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from metaseg import __version__
from metaseg.card import write_card
from metaseg.errors import ConfigError, UserError
from metaseg.practice import load

OPSET = 18  # the first with antialiased resizing
ONNX_PACKAGES = {"onnx": "1.17", "onnxscript": "0.7.1"}  # onnxscript before: pixels up to 15 levels off at the borders
SHAPES = ({0: Dim("n"), 2: Dim("height"), 3: Dim("width")},)  # what may vary
INPUT, OUTPUT = "images", "probability"  # what the file calls them


class Deployed(nn.Module):
    """A network with what stands around it in use: resizing, softmax, resizing back.

    Args:
        net: maps images (n, 3, image_size, image_size), 0 … 255, to logits (n, 2, image_size, image_size); it
            normalises them itself, and its batch norm predicts by the statistics that it holds. Copied, to the CPU.
        image_size: height and width that it was trained with, at least 16.

    Raises:
        ConfigError: if the size cannot be.
    """

    def __init__(self, net: nn.Module, image_size: int) -> None:
        super().__init__()
        if image_size < 16:
            raise ConfigError(f"image_size={image_size}: give the one that the network was trained with, at least 16")
        self.net = copy.deepcopy(net).cpu()
        self.image_size = image_size
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map RGB images (n, 3, height, width), 0 … 255, uint8 or float, to the object's probability.

        Returns:
            Shape (n, height, width), float32, 0 … 1.
        """
        height, width = images.shape[2:]
        logits = self.net(resize(images.to(torch.float32), self.image_size, self.image_size))
        return resize(logits.softmax(dim=1)[:, 1:], height, width)[:, 0].clamp(0, 1)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resizing as Pillow does it, by which metaseg reads images: shrinking averages over the area.

    What remains is that Pillow rounds to whole levels after each of its two passes: of 0 … 255, at most 1 level and 0.2
    to 0.3 on average. (Without averaging, photographs shrunk to 64² differ by 11 on average, and by up to 185.)

    Args:
        images: shape (n, c, h, w), float32.
        height: of the result.
        width: of the result.

    Returns:
        Shape (n, c, height, width).
    """
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def export(net: nn.Module, image_size: int, path: str | Path) -> None:
    """Write a network as a graph for deployment; `path`'s suffix, .onnx, .pt2 or .pt, says in which format.

    All take images (n, 3, height, width), uint8, RGB, of any n, height and width, as `Deployed.forward` does, and hold
    `image_size`, `classes` and `metaseg_version` as metadata.

    Args:
        net: see `Deployed`.
        image_size: likewise.
        path: of the file, which is overwritten.

    Raises:
        ConfigError: if the suffix is none of these, or packages are missing.
    """
    formats = {".onnx": to_onnx, ".pt2": to_torch_export, ".pt": to_torchscript}
    path = Path(path)
    if path.suffix not in formats:
        raise ConfigError(f"{path}: give a file that ends in .onnx (ONNX), .pt2 (torch.export) or .pt (TorchScript)")
    path.parent.mkdir(parents=True, exist_ok=True)
    formats[path.suffix](net, image_size, path)


def to_onnx(net: nn.Module, image_size: int, path: Path) -> None:
    """Write ONNX with the input `images` and the output `probability`; see `export`."""
    missing = [f"{name}>={least}" for name, least in ONNX_PACKAGES.items() if not _installed(name, least)]
    if missing:
        raise ConfigError(f'ONNX needs {" and ".join(missing)}: pip install "metaseg-lightning[export]"')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.onnx.export(
            _program(net, image_size),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=SHAPES,  # once more, for their names
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(_metadata(image_size))
    program.save(path)


def to_torch_export(net: nn.Module, image_size: int, path: Path) -> None:
    """Write what `torch.export.load(path).module()` reads; metadata as the extra file metadata.json; see `export`."""
    metadata = {"metadata.json": json.dumps(_metadata(image_size))}
    torch.export.save(_program(net, image_size), path, extra_files=metadata)


def to_torchscript(net: nn.Module, image_size: int, path: Path) -> None:
    """Write what `torch.jit.load(path)` reads; metadata as the extra file metadata.json; see `export`.

    The file names the folders that the source code lay in.
    """
    with warnings.catch_warnings():
        # it is deprecated; and sizes that a trace takes for constants are so, once the images are resized
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(Deployed(net, image_size), _example(image_size))  # type: ignore[no-untyped-call]
        torch.jit.save(traced, path, _extra_files={"metadata.json": json.dumps(_metadata(image_size))})


def _installed(package: str, least: str) -> bool:
    try:
        return Version(version(package)) >= Version(least)
    except PackageNotFoundError:
        return False


def _program(net: nn.Module, image_size: int) -> ExportedProgram:
    program = torch.export.export(Deployed(net, image_size), (_example(image_size),), dynamic_shapes=SHAPES)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the folders of this machine are nobody's business
    return program


def _example(image_size: int) -> Tensor:
    """An input whose sizes are all distinct, and none of them 1, which an exporter might take for a constant."""
    return torch.zeros(2, 3, image_size + 5, image_size + 9, dtype=torch.uint8)


def _metadata(image_size: int) -> dict[str, str]:
    return {
        "image_size": str(image_size),
        "classes": json.dumps(["background", "object"]),
        "metaseg_version": __version__,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser("python -m metaseg.export", description="Write a network for deployment.")
    parser.add_argument("path", type=Path, metavar="PATH", help="init.safetensors or .ckpt of a run, or adapted since")
    parser.add_argument(
        "out", type=Path, metavar="FILE", help="what to write: .onnx, .pt2 (torch.export), .pt (TorchScript)"
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="if PATH does not say it")
    arguments = parser.parse_args(argv)
    path, out = arguments.path, arguments.out
    try:
        init = load(path, image_size=arguments.image_size, device="cpu")
        if init.about.tile:
            raise ConfigError(
                f"{path} predicts in tiles, which the graph would not: it sees an image as a whole. Use it with "
                f"python -m metaseg.adapt init={path} query=…, or adapt again without tile"
            )
        export(init.net, init.image_size, out)
        card = write_card(path, out.with_suffix(".card.md"))
    except UserError as error:
        sys.exit(f"metaseg: {error}")
    print(f"{out}, images of {init.image_size}² inside; its card: {card}")
    if init.about.shots is None:
        print("It is an initialisation: before it is adapted to a task, it is not meant to predict.")


if __name__ == "__main__":
    main()
