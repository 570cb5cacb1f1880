"""Which checkpoints a run keeps: `best.ckpt` on validation tasks, and `last.ckpt` to resume from."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`: the highest validation IoU so far; a resumed run knows what the run before it reached."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "best", monitor="val/iou", mode="max", enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score and its file; Lightning would forget them where the folder is another one."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class LastCheckpoint(Checkpoint):
    """`last.ckpt`: every `every` meta-steps and after each validation, better or not (Lightning's is only if better).

    To be given behind `BestCheckpoint`, so that it holds the best of the validation just done.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / "last.ckpt", every

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save if it is time."""
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save."""
        trainer.save_checkpoint(self.path, weights_only=False)
