"""Loaders of training and validation episodes for the Lightning trainer."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from metaseg.data.episodes import From, episode_loader
from metaseg.episode import Episode


class EpisodeData(pl.LightningDataModule):
    """Feeds meta-batches of training episodes, and validation episodes one at a time.

    Args:
        training: as many episodes as meta-steps × meta-batch.
        validation: fixed episodes of held-out tasks.
        meta_batch: episodes a meta-step, ≥ 1.
        workers: loader processes; 0 loads in the main process.
    """

    def __init__(
        self, training: Dataset[Episode], validation: Dataset[Episode], *, meta_batch: int, workers: int
    ) -> None:
        super().__init__()
        self.training, self.validation = training, validation
        self.meta_batch, self.workers = meta_batch, workers

    def train_dataloader(self) -> DataLoader[list[Episode]]:
        """One pass over all episodes of the run, from the trainer's current meta-step on."""
        sampler = From(lambda: self._meta_step() * self.meta_batch, len(self.training))  # type: ignore[arg-type]
        return episode_loader(self.training, self.workers, batch_size=self.meta_batch, sampler=sampler)

    def val_dataloader(self) -> DataLoader[list[Episode]]:
        """The validation episodes."""
        return episode_loader(self.validation, self.workers)

    def transfer_batch_to_device(
        self, batch: list[Episode], device: torch.device, dataloader_idx: int
    ) -> list[Episode]:
        """Move a meta-batch."""
        return [episode.to(device) for episode in batch]

    def _meta_step(self) -> int:
        return self.trainer.global_step if self.trainer else 0
