"""Real processes, stopped and killed while they meta-train: the same command goes on, to the same end bit for bit."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from trees import write_data

from metaseg.checkpoints import CheckpointFiles
from metaseg.config import config_dir, config_sha256
from metaseg.errors import RESUMABLE, ConfigError
from metaseg.run import resumed, run


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run with two validations."""
    data = write_data(tmp_path_factory.mktemp("data"))
    quick = [
        "debug=fast",
        "model.rsd=[16]",
        "model.weights=null",
        "logger=csv",
        "trainer=cpu",
        "workers=0",
        "evaluate.validations=2",
        "algo.inner.steps=1",
    ]
    return [*data, *quick]


def start(config: DictConfig, folder: Path) -> BaseProcess:
    """The run in a process of its own; forked, for this one has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(config, folder))
    process.start()
    return process


def _run(config: DictConfig, folder: Path) -> None:
    errors = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(errors, stream)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # pytest's does not end there
    run(config, folder)


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.is_file() else 0


def interrupt(
    config: DictConfig, folder: Path, number: signal.Signals, wait_s: float, trained: bool = True
) -> tuple[int | None, int]:
    """Start the run, and send it a signal; (exit code, meta-steps done).

    Args:
        config: of the run.
        folder: of the run.
        number: of the signal.
        wait_s: how long after its start, or after its first new checkpoint.
        trained: which of the two.
    """
    last = folder / "checkpoints" / "last.ckpt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    process = start(config, folder)
    while trained and process.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
        time.sleep(0.005)
    process.join(wait_s)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, number)
    process.join()
    return process.exitcode, step_of(last)


@pytest.mark.parametrize(("kills", "steps", "every"), [(2, 10, 1), pytest.param(20, 120, 3, marks=pytest.mark.slow)])
def test_stopped_and_killed_it_ends_where_the_uninterrupted_run_does(
    kills: int, steps: int, every: int, words: list[str], tmp_path: Path
) -> None:
    """Stopped by SIGTERM at its first checkpoint, and then so many times by SIGKILL at random moments.

    By turns these are in the midst of meta-training, and anywhere from the start of a run to its end.
    """
    words = [*words, f"trainer.max_steps={steps}", f"checkpoint_every={every}"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config, resuming = (compose("config", overrides=[*words, *more]) for more in ([], ["ckpt_path=last"]))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    started = time.monotonic()
    run(config, whole)
    takes_s = time.monotonic() - started
    draw = random.Random(time.time_ns())

    code, reached = interrupt(resuming, broken, signal.SIGTERM, 0)
    stderr = (broken / "stderr").read_text()
    assert code == RESUMABLE, stderr
    assert f"stopped by SIGTERM at meta-step {reached}; the same command with ckpt_path=last goes on" in stderr
    for number in range(kills):
        trained = number % 2 == 0
        wait_s = draw.uniform(0, 0.1 if trained else 2 * takes_s / kills)
        code, later = interrupt(resuming, broken, signal.SIGKILL, wait_s, trained)
        assert code in (-signal.SIGKILL, 0), (broken / "stderr").read_text()  # 0: it was faster
        assert reached <= later <= steps
        reached = later
    process = start(resuming, broken)
    process.join()
    assert process.exitcode == 0, (broken / "stderr").read_text()

    for name in ("last.ckpt", "best.ckpt"):
        first, second = (torch.load(part / "checkpoints" / name, weights_only=True) for part in (whole, broken))
        assert first["global_step"] == second["global_step"]
        for key, value in first["state_dict"].items():
            assert torch.equal(value, second["state_dict"][key]), key
        assert str(first["optimizer_states"]) == str(second["optimizer_states"])
    ours, theirs = (json.loads((part / "results.json").read_text()) for part in (whole, broken))
    assert (ours["test"], ours["config_sha256"]) == (theirs["test"], theirs["config_sha256"])
    assert len(list(broken.glob("csv*"))) >= 2  # the curves from before are not lost
    assert not list(broken.glob("checkpoints/*.partial"))


def test_last_is_the_run_folders_own(tmp_path: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        trains, tests = (compose("config", overrides=["ckpt_path=last", mode]) for mode in ("mode=fit", "mode=test"))
        fresh = compose("config", overrides=["mode=fit"])
    assert resumed(trains, tmp_path).ckpt_path is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    found = resumed(trains, tmp_path)
    assert found.ckpt_path == str(tmp_path / "checkpoints" / "last.ckpt")
    assert config_sha256(found) == config_sha256(fresh) == config_sha256(trains)
    with pytest.raises(ConfigError, match="ckpt_path=last resumes meta-training, but mode=test"):
        resumed(tests, tmp_path)


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint({"step": 1}, path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        CheckpointFiles().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
