"""Exported graphs against torch."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import metaseg.export
from metaseg import __version__
from metaseg.data.folder import read_image
from metaseg.errors import ConfigError
from metaseg.export import ONNX_PACKAGES, Deployed, _installed, export, main, resize
from metaseg.initialisation import About, save_initialisation
from metaseg.models import DeepLab, EfficientLab
from metaseg.seeding import generator

SIZE = 48
SIZES = [(1, SIZE, SIZE), (2, 40, 70), (3, 130, 97), (5, 33, 20), (1, 1, 3)]  # images, height, width
MODEL: dict[str, Any] = {
    "_target_": "metaseg.models.EfficientLab",
    "backbone": "tf_efficientnet_lite0",
    "rsd": [16, 4],
    "drop_path": 0.2,
    "weights": "imagenet",
}
ABOUT = About(
    MODEL, "reptile", "emoji", "0" * 64, seed=0, meta_steps=3, update={"batchnorm": "support"}, image_size=SIZE
)

Runner = Callable[[Tensor], Tensor]


def lived_in(net: nn.Module) -> nn.Module:
    """The network with batch-norm statistics that some images left, and with logits of a usual size."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    net.train()(photographs(4, SIZE, SIZE))
    with torch.no_grad():
        net.get_parameter("head.weight").div_(10)
    return net.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(EfficientLab("tf_efficientnet_lite0"))


def photographs(n: int, height: int, width: int) -> Tensor:
    """Images with coarse and fine structure, shape (n, 3, height, width), uint8."""
    draw = generator("photographs", n, height, width)
    coarse = torch.from_numpy(draw.integers(0, 200, (n, 3, 4, 4))).float()
    fine = torch.from_numpy(draw.integers(0, 56, (n, 3, height, width)))
    return (nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 199) + fine).to(torch.uint8)


def run_onnx(path: Path) -> Runner:
    ort = pytest.importorskip("onnxruntime", reason='needs the extra "export"')
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["probability"], {"images": images.numpy()})[0])


RUNNERS: dict[str, Callable[[Path], Runner]] = {
    ".onnx": run_onnx,
    ".pt2": lambda path: torch.export.load(path).module(),
    ".pt": torch.jit.load,
}
needs_onnx = pytest.mark.skipif(
    not all(_installed(*package) for package in ONNX_PACKAGES.items()), reason='needs the extra "export"'
)
FORMATS = [pytest.param(".onnx", marks=needs_onnx), ".pt2", ".pt"]


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("exported") / f"model{request.param}"
    export(net, SIZE, path)
    return path


# The graph


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (333, 517), (1000, 70), (40, 50)])
def test_images_are_resized_as_they_are_read(tmp_path: Path, height: int, width: int, size: int) -> None:
    """Within the rounding of Pillow's two passes."""
    image = photographs(1, height, width)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    read = read_image(tmp_path / "image.png", size).astype(np.float32)
    difference = np.abs(resize(image.float(), size, size)[0].permute(1, 2, 0).numpy() - read)
    assert difference.max() <= 1.001
    assert difference.mean() < 0.35


def test_at_the_networks_size_it_is_the_networks_softmax(net: nn.Module) -> None:
    images = photographs(2, SIZE, SIZE)
    found = Deployed(net, SIZE)(images)
    assert (found.shape, found.dtype) == ((2, SIZE, SIZE), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(found, net(images).softmax(dim=1)[:, 1], atol=1e-6, rtol=0)
    assert found.std() > 0.05  # or the tests below would compare nothing


def test_bytes_and_floats_are_the_same_image(net: nn.Module) -> None:
    images = photographs(2, 60, 80)
    assert torch.equal(Deployed(net, SIZE)(images), Deployed(net, SIZE)(images.double()))


def test_the_given_network_stays_as_it_is(net: nn.Module) -> None:
    Deployed(net.train(), SIZE)(photographs(1, 20, 30))
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    net.eval()


def test_a_size_that_cannot_be(net: nn.Module) -> None:
    with pytest.raises(ConfigError, match="image_size=0: give the one that the network was trained with"):
        Deployed(net, 0)


# The formats


@pytest.mark.parametrize("shape", SIZES)
def test_an_exported_graph_gives_torchs_numbers(net: nn.Module, exported: Path, shape: tuple[int, int, int]) -> None:
    images = photographs(*shape)
    expected = Deployed(net, SIZE)(images)
    found = RUNNERS[exported.suffix](exported)(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4 if exported.suffix == ".onnx" else 1e-6, rtol=0)


@pytest.mark.slow
@needs_onnx
def test_another_network_exports(tmp_path: Path) -> None:
    """A backbone with swish, squeeze-and-excitation and another normalisation; an ASPP and a skip decoder."""
    torch.manual_seed(0)
    net, images = lived_in(DeepLab("tf_efficientnet_b0")), photographs(3, 70, 50)
    export(net, SIZE, tmp_path / "model.onnx")
    found = run_onnx(tmp_path / "model.onnx")(images)
    torch.testing.assert_close(found, Deployed(net, SIZE)(images), atol=1e-4, rtol=0)


def test_the_file_says_what_it_is(exported: Path) -> None:
    if exported.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(exported)
        onnx.checker.check_model(model, full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        (images,), (probability,) = model.graph.input, model.graph.output
        dims = [
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (images, probability)
        ]
        assert (images.name, dims[0]) == ("images", ["n", 3, "height", "width"])
        assert (probability.name, dims[1]) == ("probability", ["n", "height", "width"])
        metadata = {entry.key: entry.value for entry in model.metadata_props}
    else:
        extra: dict[str, Any] = {"metadata.json": ""}
        if exported.suffix == ".pt2":
            torch.export.load(exported, extra_files=extra)
        else:
            torch.jit.load(exported, _extra_files=extra)
        metadata = json.loads(extra["metadata.json"])
    assert metadata.items() >= {"image_size": "48", "metaseg_version": __version__}.items()
    assert json.loads(metadata["classes"]) == ["background", "object"]


def test_the_file_does_not_name_this_machines_folders(exported: Path) -> None:
    if exported.suffix == ".pt":
        pytest.skip("TorchScript keeps the places of its source code, as to_torchscript says")
    contents = [exported.read_bytes()]
    if zipfile.is_zipfile(exported):
        with zipfile.ZipFile(exported) as file:
            contents = [file.read(name) for name in file.namelist()]
    source = str(Path(metaseg.export.__file__).parent).encode()
    assert not any(source in content for content in contents)


def test_another_suffix_is_refused(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.tflite: give a file that ends in .onnx \(ONNX\), .pt2"):
        export(net, SIZE, tmp_path / "model.tflite")


@pytest.mark.parametrize("least", [None, "1000"])
def test_a_missing_package_is_named_with_its_extra(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: str | None
) -> None:
    packages = {"torch": "2", "no-such-package": "1"} if least is None else {"torch": least}
    monkeypatch.setattr("metaseg.export.ONNX_PACKAGES", packages)
    named = "no-such-package>=1" if least is None else "torch>=1000"
    with pytest.raises(ConfigError, match=f'ONNX needs {named}: pip install "metaseg-lightning\\[export\\]"'):
        export(net, SIZE, tmp_path / "model.onnx")


# Files of initialisations


def write(net: nn.Module, folder: Path, about: About = ABOUT, **model: Any) -> Path:
    path = folder / "init.safetensors"
    save_initialisation(net, replace(about, model={**about.model, **model}), path)
    return path


# The command line


@pytest.mark.parametrize("known", ["file", "option"])
def test_from_the_shell(net: nn.Module, tmp_path: Path, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    about = ABOUT if known == "file" else replace(ABOUT, image_size=None)
    path, out = write(net, tmp_path, about), tmp_path / "out" / "model.pt"
    main([str(path), str(out), *(["--image-size", str(SIZE)] if known == "option" else [])])
    assert f"{out}, images of 48² inside" in capsys.readouterr().out
    images = photographs(2, 60, 50)
    torch.testing.assert_close(torch.jit.load(out)(images), Deployed(net, SIZE)(images), atol=1e-5, rtol=0)
    assert "# reptile on emoji" in out.with_suffix(".card.md").read_text()


def test_the_shell_ends_in_a_message(net: nn.Module, tmp_path: Path) -> None:
    out = str(tmp_path / "model.pt")
    with pytest.raises(SystemExit, match="metaseg: .*init.safetensors does not say which image size"):
        main([str(write(net, tmp_path, replace(ABOUT, image_size=None, dataset="mine"))), out])
    with pytest.raises(SystemExit, match="metaseg: .*nowhere.safetensors: there is no such file"):
        main([str(tmp_path / "nowhere.safetensors"), out])
