"""Flat storage: a network's parameters as views of one vector, so that whole-network operations are one each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaseg.update import batchnorm_parameters


def ordered_parameters(net: nn.Module) -> list[nn.Parameter]:
    """All parameters in the order of vectors: batch norms' first, which have no L2, then the others."""
    norms = batchnorm_parameters(net)
    known = {id(p) for p in norms}
    return norms + [p for p in net.parameters() if id(p) not in known]


def running_statistics(net: nn.Module) -> list[Tensor]:
    """Running means and variances of all batch norms."""
    return [
        buffer
        for module in net.modules()
        if isinstance(module, nn.BatchNorm2d)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]


def flat(net: nn.Module) -> Tensor:
    """The parameters as one vector (n,), of which they are views from now on; four-dimensional ones channels_last.

    Moving the network to another device or dtype ends that; call again then.
    """
    return _join(ordered_parameters(net))


def flat_statistics(net: nn.Module) -> Tensor:
    """The running statistics as one vector, of which they are views from now on."""
    return _join(running_statistics(net))


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all elements as one vector (n,), each tensor's in `in_memory_order`."""
    return torch.cat([in_memory_order(t.detach()) for t in tensors]) if tensors else torch.zeros(0)


def in_memory_order(t: Tensor) -> Tensor:
    """The elements as a vector: of four dimensions in the order of channels_last, else row by row."""
    return (t.permute(0, 2, 3, 1) if t.ndim == 4 else t).reshape(-1)


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a vector in the shapes of `like`, as `gather` would join them."""
    parts = torch.split(vector, [t.numel() for t in like]) if like else ()
    return [_shaped(part, t) for part, t in zip(parts, like, strict=True)]


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    if like.ndim != 4:
        return part.view(like.shape)
    n, c, h, w = like.shape
    return part.view(n, h, w, c).permute(0, 3, 1, 2)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(0)
    joined = _joined(tensors)
    if joined is None:
        joined = gather(tensors)
        for tensor, view in zip(tensors, split(joined, tensors), strict=True):
            tensor.data = view
    return joined


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """The vector that the tensors are views of, if they are."""
    first, address = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != address or in_memory_order(tensor.detach()).data_ptr() != address:
            return None
        address += tensor.nbytes
    size, offset = sum(t.numel() for t in tensors), first.storage_offset()
    storage = first.untyped_storage()
    if (offset + size) * first.element_size() > storage.nbytes():
        return None
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, offset, (size,), (1,))
