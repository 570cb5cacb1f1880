"""Episodes: what one adaptation learns from and is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaseg.data.source import UInt8


@dataclass(frozen=True)
class Batch:
    """Images with their masks, on one device.

    Attributes:
        images: RGB, shape (n, 3, height, width), uint8, 0 … 255; channels_last in memory.
        masks: shape (n, height, width), uint8: 1 on the object, 0 elsewhere.
    """

    images: Tensor
    masks: Tensor

    @classmethod
    def from_numpy(cls, images: UInt8, masks: UInt8) -> Batch:
        """Wrap images (n, height, width, 3) and masks (n, height, width) without copying them."""
        return cls(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks))

    def numpy(self) -> tuple[UInt8, UInt8]:
        """Images (n, height, width, 3) and masks (n, height, width)."""
        return self.images.permute(0, 2, 3, 1).cpu().numpy(), self.masks.cpu().numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice | Sequence[int]) -> Batch:
        """The images numbered `which`, as a batch."""
        return Batch(self.images[which], self.masks[which])

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        return Batch(self.images.to(device, non_blocking=True), self.masks.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies without waiting."""
        return Batch(self.images.pin_memory(), self.masks.pin_memory())


@dataclass(frozen=True)
class Episode:
    """One draw of a task.

    Attributes:
        task: the task's name.
        seed: of everything random that follows the draw (mini-batches, augmentation, dropout).
        support: the images to adapt on.
        query: the images to score on, none of them in `support`; may be empty in meta-training.
        batches: what the inner steps see, in their order: mini-batches of the support, shuffled and augmented.
        rehearsal: under early stopping, the episode on which the number of steps is chosen; its support and query
            are parts of the support here.
    """

    task: str
    seed: int
    support: Batch
    query: Batch
    batches: tuple[Batch, ...] = ()
    rehearsal: Episode | None = None

    def to(self, device: torch.device) -> Episode:
        """The episode on `device`."""
        return replace(
            self,
            support=self.support.to(device),
            query=self.query.to(device),
            batches=tuple(batch.to(device) for batch in self.batches),
            rehearsal=self.rehearsal and self.rehearsal.to(device),
        )

    def pin_memory(self) -> Episode:
        """The episode in page-locked memory; loaders call this by its name."""
        return replace(
            self,
            support=self.support.pin_memory(),
            query=self.query.pin_memory(),
            batches=tuple(batch.pin_memory() for batch in self.batches),
            rehearsal=self.rehearsal and self.rehearsal.pin_memory(),
        )
