"""Randomness as a pure function of what it is for: no global random state anywhere in metaseg."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """A seed in 0 … 2⁶³ − 1 for what `key` names, such as (run seed, "train", index); equal on every machine."""
    named = (f"str:{part}" if isinstance(part, str) else f"int:{int(part)}" for part in key)  # NumPy's integers too
    digest = hashlib.sha256("\0".join(named).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator seeded with `derive_seed(*key)`."""
    return np.random.default_rng(derive_seed(*key))


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Seed torch's generators (CPU and CUDA) inside the block and give them back as they were."""
    # the current device alone: forking all of a large machine's would cost more than a step
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield
