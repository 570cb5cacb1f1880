import os
from pathlib import Path

# before any import of torch: two OpenMP threads collapse when another process computes
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import metaseg  # noqa: F401  # first, for torchvision's sake


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches in a temporary folder, and nothing of the user's W&B account."""
    os.environ["METASEG_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_MODE"] = "offline"
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def theta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small network's random initialisation, for reading only."""
    import torch
    from test_practice import ABOUT

    from metaseg.initialisation import save_initialisation
    from metaseg.models import EfficientLab

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("theta") / "init.safetensors"
    save_initialisation(EfficientLab("tf_efficientnet_lite0", rsd=(16,)), ABOUT, file)
    return file
