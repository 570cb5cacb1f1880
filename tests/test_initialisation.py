"""Files of initialisations and checkpoints, also from before a network's configuration had all its present fields."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metaseg.errors import ConfigError, WeightsError
from metaseg.initialisation import About, check_resumable, load_initialisation, save_initialisation
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
    check_resumable(saved, replace(ABOUT, model={**OLD, "residual": True}))
    with pytest.raises(ConfigError, match="is of a run with model=.*'residual': True"):
        check_resumable(saved, replace(ABOUT, model={**OLD, "residual": False}))
