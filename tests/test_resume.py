"""Real processes, stopped and killed while they meta-train: the same command goes on, to the same end bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from trees import write_data

from metaseg.checkpoints import RESUMABLE, AtomicCheckpointIO
from metaseg.config import config_dir, config_sha256
from metaseg.errors import ConfigError
from metaseg.run import resumed, run

STEPS = 24


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of `STEPS` meta-steps with a checkpoint at each and two validations."""
    data = write_data(tmp_path_factory.mktemp("data"))
    quick = ["debug=fast", "model.weights=null", "logger=csv", "trainer=cpu", "workers=0", "evaluate.validations=2"]
    return [*data, *quick, "checkpoint_every=1", f"trainer.max_steps={STEPS}"]


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "metaseg.run", *words, f"hydra.run.dir={folder}", "ckpt_path=last"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.is_file() else 0


def interrupt(words: list[str], folder: Path, number: signal.Signals, draw: random.Random) -> tuple[int, str, int]:
    """Start the run, send it a signal at a random moment of its meta-training; (exit code, stderr, meta-steps done)."""
    last = folder / "checkpoints" / "last.ckpt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    process = start(words, folder)
    while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
        time.sleep(0.01)
    time.sleep(0.2 * draw.random())
    process.send_signal(number)
    _, stderr = process.communicate()
    return process.returncode, stderr, step_of(last)


def test_stopped_and_killed_it_ends_where_the_uninterrupted_run_does(words: list[str], tmp_path: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config", overrides=words)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    run(config, whole)
    draw = random.Random(time.time_ns())

    code, stderr, reached = interrupt(words, broken, signal.SIGTERM, draw)
    assert code == RESUMABLE, stderr
    assert f"stopped by SIGTERM at meta-step {reached}; the same command with ckpt_path=last goes on" in stderr
    for _ in range(2):
        code, stderr, later = interrupt(words, broken, signal.SIGKILL, draw)
        assert code == -signal.SIGKILL, stderr
        assert reached <= later <= STEPS
        reached = later
    process = start(words, broken)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr

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
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
