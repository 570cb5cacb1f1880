import os

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
