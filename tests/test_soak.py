"""Thousands of meta-steps of a small network: memory, open files and threads of the process stay as they are."""

import os
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from test_adapt import Net
from test_run import job, results
from trees import write_data

STEPS, WARM = 4000, 1000  # caches of allocators and libraries are full by then
PAGE = os.sysconf("SC_PAGE_SIZE")


class SmallNet(Net):
    """`Net`, as a configuration makes networks."""

    def __init__(self, weights: str | None) -> None:
        super().__init__()


class Usage(Callback):
    """What the process holds at each thousandth meta-step: bytes of memory, open files, threads."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step % WARM == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held = (len(list(Path(f"/proc/self/{what}").iterdir())) for what in ("fd", "task"))
            self.seen.append((pages * PAGE, *held))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_thousands_of_meta_steps_hold_no_more_than_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loader process, checkpoints, validations in processes, CSV and W&B, as in use."""
    usage = Usage()
    monkeypatch.setattr("metaseg.fit.MetaProgressBar", lambda: usage)
    network = [
        "model._target_=test_soak.SmallNet",
        "~model.backbone",
        "~model.rsd",
        "~model.drop_path",
        "~model.residual",
    ]
    few = ["algo.meta_batch=1", "algo.inner.steps=1", "+algo.inner.batch_size=2", "evaluate.panels=0", "workers=1"]
    kept = ["checkpoint_every=50", f"trainer.max_steps={STEPS}", "evaluate.validations=8", "evaluate.processes=2"]
    job(tmp_path / "run", *write_data(tmp_path), *network, *few, *kept, "algo=reptile", "mode=fit")
    assert len(usage.seen) == STEPS // WARM
    (memory, files, threads), *later = usage.seen
    assert all(found[1:] == (files, threads) for found in later), usage.seen
    assert max(found[0] for found in later) < memory + 4 * 2**20, usage.seen
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == STEPS
    assert results(tmp_path / "run")["val"]["iou"]["mean"] > 0
