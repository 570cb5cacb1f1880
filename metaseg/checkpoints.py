"""Which checkpoints a run keeps, `best.ckpt` on validation tasks and `last.ckpt` to resume from; how it is stopped."""

import copy
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metaseg.atomic import written_whole
from metaseg.errors import Stopped, WeightsError
from metaseg.models.weights import read_torch

LAST = "last.ckpt"


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints are files: written whole, read without running anything, and nothing but a file is removed.

    A process may be killed while it writes one; Lightning's own way goes through the folder for temporary files, and
    copies if that is on another disk. And a checkpoint may come from anywhere.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside `path`, then move there."""
        with written_whole(Path(path)) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """As `read_torch` does; the tensors are on the CPU, in memory of their own, whatever is asked for."""
        checkpoint: dict[str, Any] = copy.deepcopy(read_torch(Path(path)))
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file; Lightning's own would remove a folder, or what is behind a URL, that a checkpoint names."""
        Path(path).unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`: the highest validation IoU so far; a resumed run knows what the run before it reached."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "best", monitor="val/iou", mode="max", enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score and its file; Lightning would forget them where the folder is another one.

        Raises:
            WeightsError: if the two do not belong together.
        """
        sound = state_dict.keys() == self.state_dict().keys()
        try:
            kept, best = state_dict["best_k_models"], state_dict["best_model_score"]
            scores = [*kept.values(), *([] if best is None else [best])]
            sound = sound and all(isinstance(score, Tensor) and score.numel() == 1 for score in scores)
            sound = sound and (not kept or state_dict["kth_best_model_path"] in kept)
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise WeightsError(
                "the checkpoint to resume does not say of its best what a run does: give an earlier one, or "
                "model.weights=PATH of its init.safetensors to begin a new run from its weights"
            )
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class LastCheckpoint(Checkpoint):
    """`last.ckpt`: every `every` meta-steps and after each validation, better or not (Lightning's is only if better).

    To be given behind `BestCheckpoint`, so that it holds the best of the validation just done.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / LAST, every

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save if it is time, and before the meta-step that a validation follows: it may be stopped."""
        due = trainer.global_step % self.every == 0 or validation_follows(trainer, after=1)
        if due and not validation_follows(trainer):
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save."""
        trainer.save_checkpoint(self.path, weights_only=False)


def validation_follows(trainer: pl.Trainer, after: int = 0) -> bool:
    """Whether a validation follows this meta-step, or that `after` it; resumed from in between, Lightning skips it."""
    every = trainer.val_check_batch
    return isinstance(every, int) and (trainer.global_step + after) % every == 0


class StopOnSignal(pl.Callback):
    """On SIGTERM, SIGINT or SIGUSR2 finishes the meta-step, writes `last.ckpt`, ends the process with `RESUMABLE`.

    SIGUSR2 is what submitit has Slurm send before a job's time is over.

    A validation is not begun or finished: the last checkpoint is from before the meta-step that it follows. A second
    signal of the same kind does what it does elsewhere; within a second it is taken for the same, which a launcher
    passes on and the terminal or Slurm sends to all processes.

    Of several ranks one that receives a signal is enough: after each meta-step, and each scored episode, all agree.
    """

    SIGNALS = tuple(known for known in signal.Signals if known.name in ("SIGTERM", "SIGINT", "SIGUSR2"))

    def __init__(self, folder: Path) -> None:
        self.path = folder / LAST
        self.received: signal.Signals | None = None
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remember who had the signals, before Lightning takes SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in self.SIGNALS}

    def on_train_start(self, *_: Any) -> None:
        """Take them over; Lightning's own handling would save nothing, and have ranks wait for each other for ever."""
        for number in self._before:
            signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Between two meta-steps all state is consistent."""
        number = 0 if validation_follows(trainer) else self._agreed(trainer)
        if number:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._stop(trainer, number)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The last checkpoint has to do."""
        number = self._agreed(trainer)
        if number:
            self._stop(trainer, number)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Likewise."""
        self.on_validation_start(trainer)

    def on_fit_end(self, *_: Any) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, *_: Any) -> None:
        """Likewise."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number and time.monotonic() - self._when > 1:
            signal.signal(number, self._before[self.received])
            signal.raise_signal(number)
            return
        self.received, self._when = signal.Signals(number), time.monotonic()

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The number of the signal that this rank or another has received; 0 for none."""
        number = int(self.received or 0)
        if trainer.world_size == 1:
            return number
        mine = torch.tensor(number, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(mine, reduce_op="max"))

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        how = f"stopped by {signal.Signals(number).name} at meta-step {trainer.global_step}"
        if trainer.is_global_zero:
            sys.stderr.write(f"metaseg: {how}; the same command with ckpt_path=last goes on\n")
        raise Stopped(trainer.is_global_zero)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def check_state(
    path: Any, checkpoint: Mapping[str, Any], optimizer: Optimizer, schedule: LRScheduler, loops: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint that training cannot go on from: Lightning would end in the midst of restoring it.

    Args:
        path: of it, for the message.
        checkpoint: as Lightning keeps it.
        optimizer: like the run's, of a θ of its own, which takes a step here.
        schedule: of that optimizer.
        loops: the state of the trainer's, whose form the checkpoint's shall have.

    Raises:
        WeightsError: naming what is odd.
    """
    try:
        (of_optimizer,), (of_schedule,) = (copy.deepcopy(checkpoint[p]) for p in ("optimizer_states", "lr_schedulers"))
        optimizer.load_state_dict(of_optimizer)
        schedule.load_state_dict(of_schedule)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()
        odd = [
            key for key, value in checkpoint["loops"]["fit_loop"].items() if not _alike(value, loops.get(key, value))
        ]
        if odd:
            raise ValueError(f"{odd[0]} of its loops")
        if not isinstance(checkpoint.get("dropped_episodes", {"count": 0})["count"], int):
            raise ValueError("the count of its dropped episodes")
    except Exception as error:  # of whatever it holds
        raise WeightsError(
            f"{path} cannot be resumed: its optimizer, schedule or loops are not as a run leaves them ({error!r}). "
            "Give an earlier one, or model.weights=PATH of its init.safetensors to begin a new run from its weights"
        ) from error


def _alike(given: Any, own: Any) -> bool:
    """Whether it has the keys and kinds of our own state."""
    if isinstance(own, dict) and isinstance(given, dict):
        return given.keys() == own.keys() and all(_alike(given[key], value) for key, value in own.items())
    return type(given) is type(own)
