"""Loaders of training and validation episodes for the Lightning trainer."""

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from metaseg import ranks
from metaseg.data.episodes import MetaBatches, episode_loader
from metaseg.episode import Episode


class EpisodeData(pl.LightningDataModule):
    """Feeds meta-batches of training episodes, and what the validation episodes scored.

    Args:
        training: as many episodes as meta-steps × meta-batch.
        validation: adapts to fixed episodes of held-out tasks as it is iterated over (`evaluate.Scoring`).
        meta_batch: episodes a meta-step, ≥ 1.
        workers: loader processes; 0 loads in the main process.
    """

    def __init__(self, training: Dataset[Episode], validation: Iterable[Any], *, meta_batch: int, workers: int) -> None:
        super().__init__()
        self.training, self.validation = training, validation
        self.meta_batch, self.workers = meta_batch, workers

    def train_dataloader(self) -> DataLoader[list[Episode]]:
        """One pass over this rank's episodes of each meta-batch of the run, from the trainer's current meta-step on."""
        own = ranks.share(self.meta_batch)
        meta_steps = len(self.training) // self.meta_batch  # type: ignore[arg-type]
        sampler = MetaBatches(self._meta_step, meta_steps, self.meta_batch, own)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return episode_loader(self.training, self.workers, batch_size=len(own), sampler=sampler, pin_memory=on_gpu)

    def val_dataloader(self) -> Iterable[Any]:
        """The validation."""
        return self.validation

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a meta-batch; a score stays where it is."""
        return [episode.to(device) for episode in batch] if isinstance(batch, list) else batch

    def _meta_step(self) -> int:
        return self.trainer.global_step if self.trainer else 0
