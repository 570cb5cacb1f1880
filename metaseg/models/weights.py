"""Files of weights: read without running code from them, and checked before a network takes their tensors.

Such a file may come from anywhere. Torch and safetensors read numbers and names alone; what they leave to others is how
much memory a few bytes may become, and whether the tensors are of the kind that a network has.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from metaseg.errors import WeightsError

ZIP = b"PK\3\4"  # what a torch file begins with, if it is not of torch before 1.6


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from a torch file without executing code from it.

    Raises:
        WeightsError: if there is no such file or it is no state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"no weights at {path}; give a file, model.weights=imagenet or model.weights=null")
    try:
        state = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else read_torch(path)
    except Exception as error:  # pickle, zip and safetensors each have errors of their own
        raise WeightsError(
            f"{path} cannot be read as weights ({error}): fetch it again, or give another file of a state dict"
        ) from error
    named = isinstance(state, dict) and state and all(isinstance(key, str) for key in state)
    if not (named and all(isinstance(value, Tensor) for value in state.values())):
        raise WeightsError(f"{path} holds no plain state dict; save one with torch.save(net.state_dict(), PATH)")
    return state


def read_torch(path: Path) -> Any:
    """What a torch file holds, on the CPU: tensors, and what is plain in Python. Nothing of it is run.

    The tensors lie in the file, mapped into memory, so that none reaches behind its end: of a pickle that claims longer
    ones than it has, torch before 2.13 would give what lies in memory there.

    Raises:
        ValueError: if it asks for code, or is not stored as torch does it; of a damaged one torch raises other errors.
    """
    stored = _check_records(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
    except pickle.UnpicklingError as error:  # torch's own message says how to have the code run all the same
        raise ValueError("it is damaged, or holds code beside tensors and names; nothing of it was run") from error


def _check_records(path: Path) -> bool:
    """Refuse records that are larger than the file: torch does not compress its own, but would inflate others'.

    Returns:
        Whether it has records: files of torch before 1.6 have none.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return False
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError("its records are compressed, which torch does not do, and may become anything")
    return True


def differing(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Names of the network's tensors that a state dict lacks, or has of another shape."""

    def same(given: Tensor | None, shape: torch.Size) -> bool:
        return given is not None and not given.is_nested and given.shape == shape  # a nested one has no shape

    return [key for key, value in own.items() if not same(state.get(key), value.shape)]


def check_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: str | Path) -> None:
    """Refuse tensors that are not of the network's kind: torch would cast them, or stop half-way.

    Args:
        own: the network's tensors.
        state: has them all, of their shapes.
        origin: what the message calls it.

    Raises:
        WeightsError: naming the first one.
    """
    for key, value in own.items():
        given = state[key]
        if given.dtype != value.dtype or given.layout != torch.strided or given.is_meta:
            kind = "without numbers (meta)" if given.is_meta else f"{given.dtype}, {given.layout}"
            raise WeightsError(
                f"{origin} holds {key} as {kind}, where the network has {value.dtype}, {value.layout}: convert it and "
                "save it again, or give another file"
            )
        if not bool(torch.isfinite(given).all()):
            raise WeightsError(
                f"{origin} holds numbers in {key} that are none (NaN) or infinite, as a training leaves them that has "
                "diverged: give an earlier checkpoint or another file"
            )
