"""Files of initialisations and checkpoints, also from before a network's configuration had all its present fields."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from metaseg.data.source import Split, task_ids
from metaseg.errors import ConfigError, WeightsError
from metaseg.initialisation import (
    About,
    check_held_out,
    check_resumable,
    load_initialisation,
    read_about,
    read_network,
    save_initialisation,
)
from metaseg.models import EfficientLab

OLD: dict[str, Any] = {  # as configured before `residual` came
    "_target_": "metaseg.models.EfficientLab",
    "backbone": "tf_efficientnet_lite0",
    "rsd": [16],
    "drop_path": 0.2,
    "weights": "imagenet",
}
ABOUT = About(OLD, "reptile", "emoji", "0" * 64, seed=0, meta_steps=3, update={})


@pytest.fixture
def net() -> EfficientLab:
    torch.manual_seed(0)
    return EfficientLab("tf_efficientnet_lite0", rsd=(16,))


@pytest.fixture(params=["init.safetensors", "last.ckpt"])
def saved(request: pytest.FixtureRequest, net: EfficientLab, tmp_path: Path) -> Path:
    path: Path = tmp_path / request.param
    if path.suffix == ".ckpt":
        state = {f"net.{key}": value for key, value in net.state_dict().items()}
        torch.save({"state_dict": state, "hyper_parameters": {"about": asdict(ABOUT)}, "global_step": 3}, path)
    else:
        save_initialisation(net, ABOUT, path)
    return path


def test_an_older_file_is_of_decoders_with_residual(net: EfficientLab, saved: Path) -> None:
    other = EfficientLab("tf_efficientnet_lite0", rsd=(16,))
    assert load_initialisation(other, saved, {**OLD, "residual": True, "weights": None}) == ABOUT
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in other.state_dict().items())
    with pytest.raises(WeightsError, match="it was trained with model.residual=True$"):
        load_initialisation(other, saved, {**OLD, "residual": False})


def test_an_older_checkpoint_resumes_with_residual(saved: Path) -> None:
    if saved.suffix != ".ckpt":
        pytest.skip("only checkpoints resume")
    check_resumable(saved, replace(ABOUT, model={**OLD, "residual": True}), {})
    with pytest.raises(ConfigError, match="is of a run with model=.*'residual': True"):
        check_resumable(saved, replace(ABOUT, model={**OLD, "residual": False}), {})


# Networks out of files that may come from anywhere


def written(net: EfficientLab, folder: Path, **model: Any) -> Path:
    path = folder / "init.safetensors"
    save_initialisation(net, replace(ABOUT, model={**OLD, **model}), path)
    return path


def test_a_file_gives_its_network(net: EfficientLab, tmp_path: Path) -> None:
    """Without weights that it may have begun from: the path is not opened."""
    before = torch.get_rng_state()
    found, about = read_network(written(net, tmp_path, weights="/no/such/file"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.training
    assert about.algo == "reptile"
    images = torch.arange(3 * 32 * 32).view(1, 3, 32, 32) % 256
    assert torch.equal(found(images), net.eval()(images))


def test_a_file_without_a_network(net: EfficientLab, tmp_path: Path) -> None:
    path = tmp_path / "init.safetensors"
    save_initialisation(net, replace(ABOUT, model={}), path)
    with pytest.raises(WeightsError, match="does not describe a network of metaseg's: KeyError"):
        read_network(path)


# What θ has seen


class Source:
    """Names and no images: all that is asked for."""

    def __init__(self, family: str, train: str = "", val: str = "", test: str = "") -> None:
        self.name = self.family = family
        self._names = {"train": train.split(), "val": val.split(), "test": test.split()}

    def names(self, split: Split) -> list[str]:
        return self._names[split]


def seen(train: str, val: str, family: str = "fss1000") -> About:
    source: Any = Source(family, train, val)
    return replace(ABOUT, seen={split: task_ids(source, split) for split in ("train", "val")})


def refused(about: About | None, source: Any, split: Split) -> str:
    try:
        check_held_out(about or ABOUT, source, [split], "ckpt_path=a.ckpt")
    except ConfigError as error:
        return str(error)
    return ""


def test_no_task_that_made_theta_is_scored() -> None:
    """val may be what the checkpoint was chosen on, since it is there to choose; test may be neither."""
    about = seen(train="airliner ant", val="television bee")
    assert not refused(about, Source("fss1000", "airliner", "television", "bus cat"), "test")
    assert not refused(about, Source("fss1000", "airliner", "television", "bus cat"), "val")
    assert not refused(about, Source("fss1000", "airliner", "television", "bus cat"), "train")
    assert "on 2 classes of the test split of fss1000: airliner, television. Give a θ that was trained without" in (
        refused(about, Source("fss1000", test="airliner bus television"), "test")
    )
    assert "1 classes of the val split of fss1000: ant." in refused(about, Source("fss1000", val="ant bee"), "val")


def test_a_long_list_of_met_classes_is_cut() -> None:
    names = " ".join(f"c{i}" for i in range(8))
    assert "8 classes of the test split of fss1000: c0, c1, c2, c3, c4 and 3 more." in (
        refused(seen(names, ""), Source("fss1000", test=names), "test")
    )


def test_names_are_compared_within_a_family() -> None:
    assert not refused(seen(train="bus", val=""), Source("folder", test="bus"), "test")
    assert refused(seen(train="bus", val="", family="folder"), Source("folder", test="bus"), "test")


def test_an_older_file_is_read_and_nothing_is_known_of_it(net: EfficientLab, tmp_path: Path) -> None:
    path = tmp_path / "init.safetensors"
    save_initialisation(net, seen("bus", ""), path)
    assert read_about(path).seen == {"train": ["fss1000/bus"], "val": []}
    with safe_open(path, framework="pt") as file:
        older = {key: value for key, value in file.metadata().items() if key != "seen"}
    save_file(load_file(path), path, metadata=older)
    assert read_about(path).seen is None
    assert not refused(read_about(path), Source("fss1000", test="bus"), "test")
