"""Inner loops whose numbers stop being finite: said in words, and in meta-training counted and dropped."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from metaseg import ranks
from metaseg.errors import DivergedError
from metaseg.update import Update

FIRST_EPISODES = 20  # of a run, from which on the share of dropped ones says something


def first_bad(losses: Sequence[float]) -> int | None:
    """How many inner steps there were before the first loss that is not finite; None if all are."""
    return next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)


def divergence(update: Update, losses: Sequence[float]) -> str:
    """In words, behind which inner step, of which learning rate, an adaptation is not `Adapter.finite` any more.

    Args:
        update: ω.
        losses: of all its mini-batches, at least one, each before its step.
    """
    steps, bad = len(losses), first_bad(losses)
    what = "the numbers are not finite" if bad is None else f"the loss is {losses[bad]}"
    taken = steps if bad is None else bad
    when = f"after inner step {taken}" if taken else "before inner step 1"
    return f"{what} {when} of {steps}, at lr {update.lr_at(max(0, taken - 1)):g}"


class DroppedEpisodes:
    """Counts the training episodes that diverged, and ends the run when they are too many.

    Args:
        most: share of the episodes so far, in [0, 1], that may have been dropped, asked from `FIRST_EPISODES` on and at
            the end.
        meta_batch: episodes of a meta-step, of all ranks together.
        meta_steps: of the run.

    Attributes:
        count: of all ranks together.
        last: meta-step, task, inner step and learning rate of the last one; "" if there is none.
    """

    def __init__(self, most: float, meta_batch: int, meta_steps: int) -> None:
        self.most, self.meta_batch, self.meta_steps = most, meta_batch, meta_steps
        self.count, self.last = 0, ""

    def note(self, meta_step: int, new: int, here: Sequence[str]) -> None:
        """Count those of a meta-step, and warn at the first, second, fourth, eighth and so on.

        Args:
            meta_step: its number, from 1.
            new: how many all ranks drop, at least one.
            here: of each that this rank drops, its task and `divergence`.
        """
        before = self.count
        self.count += new
        self.last = f"meta-step {meta_step}, {ranks.gathered(here)[-1]}"
        if self.count.bit_length() > before.bit_length() and ranks.rank() == 0:
            said = f"{self.count} training episodes diverged and were dropped; the last: {self.last}"
            warnings.warn(said, stacklevel=2)

    def check(self, meta_step: int) -> None:
        """Ask whether the run may go on after a meta-step.

        Raises:
            DivergedError: if not.
        """
        episodes = meta_step * self.meta_batch
        telling = episodes >= FIRST_EPISODES or meta_step == self.meta_steps
        if telling and self.count / episodes > self.most:
            raise DivergedError(
                f"{self.count} of {episodes} training episodes diverged and were dropped, more than the share "
                f"max_dropped={self.most:g}; the last: {self.last}. Lower algo.inner.lr (algo.outer.lr, if "
                "it is before inner step 1), or raise max_dropped"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"count": self.count, "last": self.last}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what a checkpoint kept."""
        self.count, self.last = state["count"], state["last"]
