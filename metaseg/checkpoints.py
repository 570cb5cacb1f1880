"""Which checkpoints a run keeps: `best.ckpt` on validation tasks, and `last.ckpt` to resume from."""

from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`: the highest validation IoU so far; a resumed run knows what the run before it reached."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "best", monitor="val/iou", mode="max", save_last=True, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score and its file; Lightning would forget them where the folder is another one."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


def checkpoints(folder: Path, every: int) -> tuple[BestCheckpoint, ModelCheckpoint]:
    """The callbacks; `last.ckpt` is written at each validation and every `every` meta-steps."""
    last = ModelCheckpoint(folder, "last", every_n_train_steps=every, enable_version_counter=False)
    return BestCheckpoint(folder), last
