"""What the machine does to a run: processes killed, disks full, W&B gone; nothing is lost, and the command goes on."""

import csv
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import wandb
import wandb_files
from machine import small_disk
from pytorch_lightning import Callback, Trainer
from safetensors.torch import load_file
from test_run import job, results
from trees import write_data

from metaseg import evaluate
from metaseg.atomic import written_whole
from metaseg.errors import DataError, MachineError
from metaseg.tracking import UPLOAD_S, _wandb_mode, close_loggers, wandb_logger

STEPS = 4


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of `STEPS` meta-steps with a checkpoint at each."""
    data = write_data(tmp_path_factory.mktemp("data"))
    few = ["evaluate.train_tasks=0", "evaluate.val_tasks=1", "evaluate.test_tasks=1", "evaluate.panels=0"]
    return [*data, *few, "algo=reptile", "checkpoint_every=1", f"trainer.max_steps={STEPS}", "++algo.inner.steps=1"]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    job(folder, *words, "logger=csv")
    return folder


def same(ours: Path, theirs: Path) -> bool:
    """Whether two runs ended with the same θ and test, bit for bit."""
    first, second = (load_file(folder / "init.safetensors") for folder in (ours, theirs))
    equal = all(torch.equal(value, second[name]) for name, value in first.items())
    return equal and results(ours)["test"] == results(theirs)["test"]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], None]) -> None:
    """Have something happen after a meta-step."""

    class Happening(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == step:
                happens()

    monkeypatch.setattr("metaseg.fit.MetaProgressBar", Happening)


def children(name: str) -> list[int]:
    """Processes of this name that this one has begun."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


# Processes that are killed


def test_a_killed_loader_process_ends_the_run_with_a_cure_and_the_same_command_goes_on(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        (loader,) = multiprocessing.active_children()
        assert loader.pid is not None
        os.kill(loader.pid, signal.SIGKILL)
        time.sleep(0.2)

    words = [*words, "logger=csv", "workers=1"]
    with monkeypatch.context() as patch:
        at_step(patch, 2, kill)
        said = r"a process that loads or scores episodes has died .* by workers=0 .* with ckpt_path=last"
        with pytest.raises(MachineError, match=said):
            job(tmp_path, *words)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] in (1, 2)
    job(tmp_path, *words, "ckpt_path=last")
    assert same(tmp_path, whole)


def test_a_killed_scoring_process_ends_the_run_with_a_cure_and_the_same_command_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, score = os.getpid(), evaluate._adapt_and_score

    def die(*arguments: object) -> object:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*arguments)

    words = [*words, "logger=csv", "algo=finetune", "evaluate.test_tasks=2", "evaluate.processes=2"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_adapt_and_score", die)
        with pytest.raises(MachineError, match="a process that loads or scores episodes has died"):
            job(tmp_path / "run", *words)
    assert (tmp_path / "run" / "init.safetensors").is_file()
    assert not (tmp_path / "run" / "results.json").exists()
    for folder in ("run", "other"):
        job(tmp_path / folder, *words)
    assert same(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize(("error", "what"), [(ValueError, ".*a bug of ours"), (DataError, "a bug of ours$")])
def test_an_error_in_a_scoring_process_stays_what_it_is(
    error: type[Exception], what: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("a bug of ours")

    monkeypatch.setattr(evaluate, "_adapt_and_score", fail)
    with pytest.raises(error, match=f"(?s)^{what}") as raised:
        job(tmp_path, *words, "logger=csv", "algo=finetune", "evaluate.test_tasks=2", "evaluate.processes=2")
    assert not isinstance(raised.value, MachineError)


def test_too_little_memory_ends_the_run_with_a_cure(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> torch.Tensor:
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("metaseg.fit.fit", ask)
    said = r"there is not enough memory \(.*memory.*\): lower update.batch_size, .* with ckpt_path=last"
    with pytest.raises(MachineError, match=said):
        job(tmp_path, *words, "logger=csv")


# W&B


def test_the_death_of_wandbs_service_does_not_end_the_run(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        (service,) = children("wandb-core")
        os.kill(service, signal.SIGKILL)
        time.sleep(0.2)

    with monkeypatch.context() as patch:
        at_step(patch, 2, kill)
        job(tmp_path / "run", *words)
    assert same(tmp_path / "run", whole)
    assert capfd.readouterr().err.count("this run goes on without it, its numbers are in csv/ and results.json") == 1
    with (tmp_path / "run" / "csv" / "metrics.csv").open(newline="") as file:
        assert sum(bool(row["train/loss"]) for row in csv.DictReader(file)) == STEPS
    # the next run of this process has W&B again
    value = job(tmp_path / "next", *words, "algo=finetune")
    (path,) = tmp_path.glob("next/wandb/offline-run-*/*.wandb")
    assert wandb_files.history(wandb_files.finished(path))["test/iou"] == [value]


def test_wandb_without_disk_does_not_end_the_run(
    words: list[str], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with small_disk(tmp_path / "run" / "wandb", 4):
        job(tmp_path / "run", *words)
        assert same(tmp_path / "run", whole)
        assert capfd.readouterr().err.count("this run goes on without it") == 1
    assert wandb.run is None


def test_wandb_that_does_not_start_does_not_end_the_run(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise wandb.errors.CommError("no service")

    monkeypatch.setattr("metaseg.tracking.wandb.init", refuse)
    job(tmp_path, *words)
    said = (
        "W&B has not started (CommError: no service): this run goes on without it, its numbers are in csv/ and results"
    )
    assert said in capfd.readouterr().err
    assert same(tmp_path, whole)
    assert (tmp_path / "csv" / "metrics.csv").is_file()


def test_an_upload_that_never_ends_does_not_hold_up_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = wandb_logger(str(tmp_path), [], [], project="metaseg")
    assert logger
    settings = logger.experiment.settings  # by which W&B raises a TimeoutError then
    assert (settings.finish_timeout, settings.finish_timeout_raises) == (UPLOAD_S, True)
    finish = wandb.Run.finish

    def too_late(run: wandb.Run, exit_code: int | None = None) -> None:
        finish(run, exit_code)
        raise TimeoutError("not all is uploaded")

    monkeypatch.setattr(wandb.Run, "finish", too_late)
    close_loggers([logger], 0)
    assert "W&B has failed (TimeoutError: not all is uploaded): this run goes on" in capsys.readouterr().err
    assert wandb.run is None


@pytest.mark.parametrize("said", ["cannot read [/root/.netrc]", "line\nbreaks"])
def test_whatever_wandb_says_is_shown_as_it_is(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("metaseg.tracking.wandb.login", refuse)
    assert _wandb_mode() == "offline"
    assert said.replace("\n", "\\n") in capsys.readouterr().out


# A disk that fills up


def test_a_full_disk_ends_the_run_with_a_cure_and_the_same_command_goes_on(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    """The disk holds one checkpoint of 5.7 MB, not the next."""
    words = [*words, "logger=csv"]
    disk = tmp_path / "disk"
    with small_disk(disk, 9 * 1024) as resize:
        with pytest.raises(MachineError, match=r"no room is left on the disk of .*: make some; .* with ckpt_path=last"):
            job(disk / "run", *words)
        last = disk / "run" / "checkpoints" / "last.ckpt"
        reached = torch.load(last, weights_only=True)["global_step"]
        assert 0 < reached < STEPS
        assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]  # nothing half written takes up room
        resize(64 * 1024)
        job(disk / "run", *words, "ckpt_path=last")
        assert same(disk / "run", whole)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with written_whole(path) as partial:
        partial.write_text("1")
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), written_whole(path) as partial:  # noqa: PT012  # all of it is what is tried
            partial.write_text("half of")
            raise error
    assert json.loads(path.read_text()) == 1
    assert list(tmp_path.iterdir()) == [path]
