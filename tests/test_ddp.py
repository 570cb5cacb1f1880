"""Runs of two processes on the CPU: the same as one process's, one set of files, stopped by a signal to either."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from trees import write_data

from metaseg import ranks
from metaseg.adapt import Adapter
from metaseg.algos import Reptile
from metaseg.config import check, config_dir
from metaseg.data.episodes import MetaBatches
from metaseg.episode import Episode
from metaseg.errors import RESUMABLE, ConfigError
from metaseg.job import build
from metaseg.ranks import check_launchable
from metaseg.run import run
from metaseg.sweep import read_outcome

STEPS = 4
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run with a checkpoint at each meta-step, a validation of one episode, and a test of two."""
    data = write_data(tmp_path_factory.mktemp("data"))
    quick = [
        "debug=fast",
        "model.rsd=[16]",
        "algo.inner.steps=1",
        "model.weights=null",
        "logger=csv",
        "workers=0",
        "evaluate.validations=1",
    ]
    return [
        *data,
        *quick,
        "evaluate.train_tasks=0",
        "evaluate.val_tasks=1",
        "checkpoint_every=1",
        f"trainer.max_steps={STEPS}",
    ]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(composed(*words, "trainer=cpu"), folder)
    return folder


def composed(*words: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(words))


def everything(folder: Path) -> tuple[dict[str, object], dict[str, bytes]]:
    """The numbers of results.json, and θ with the batch norms' statistics, bit for bit."""
    results = json.loads((folder / "results.json").read_text())
    del results["wall_s"], results["git_commit"]
    return results, {name: t.numpy().tobytes() for name, t in load_file(folder / "init.safetensors").items()}


def files(folder: Path) -> set[str]:
    """What the run itself wrote; Hydra has its log and configuration there, too."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith(".log") and name != "outcome.json"}


@pytest.mark.slow
def test_two_ranks_of_a_meta_batch_of_two_are_one_process_bit_for_bit(
    words: list[str], alone: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
    done = subprocess.run(
        [*torchrun, "metaseg.run", *words, *DDP, f"hydra.run.dir={tmp_path}", "hydra.output_subdir=null"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert everything(tmp_path) == everything(alone)
    assert files(tmp_path) == files(alone)
    outcome = read_outcome(tmp_path)
    assert outcome
    assert outcome["headline"] == everything(alone)[0]["test"]["iou"]["mean"]
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (torch.load(part / "checkpoints" / name, weights_only=True) for part in (alone, tmp_path))
        assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])


@pytest.mark.slow
def test_uneven_shares_differ_by_the_order_of_the_sum_alone(words: list[str], tmp_path: Path) -> None:
    # a single meta-step, since a random network at 32 pixels soon makes much of a different last bit
    uneven = [*words, "mode=fit", "algo.meta_batch=3", "trainer.max_steps=1"]
    config = composed(*uneven, "trainer=cpu")
    begin = build(config).net.state_dict()
    (tmp_path / "one").mkdir()
    run(config, tmp_path / "one")
    command = [sys.executable, "-m", "metaseg.run", *uneven, *DDP, f"hydra.run.dir={tmp_path}/two"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "init.safetensors") for name in ("one", "two"))
    moved = max(float((one[name] - begin[name]).abs().max()) for name in one)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert moved > 0.1
    assert apart < 1e-6 * moved


class OnlyRank0(Reptile):
    """Whose inner loops come to nothing on the other rank."""

    def meta_gradient(self, theta: nn.Module, episode: Episode, adapt: Adapter) -> Tensor:
        return super().meta_gradient(theta, episode, adapt) * (math.nan if ranks.rank() else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("most", [0.4, 0.5])
def test_what_one_rank_drops_both_know(most: float, words: list[str], tmp_path: Path) -> None:
    bad = [f"algo.method._target_={__name__}.OnlyRank0", f"max_dropped={most}", f"hydra.run.dir={tmp_path}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "metaseg.run", *words, *DDP, *bad],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stderr.count("1 training episodes diverged and were dropped; the last: meta-step 1, task") == 1
    if most < 0.5:
        assert done.returncode == 1, done.stderr
        assert f"{STEPS} of {2 * STEPS} training episodes diverged and were dropped, more than" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def after_a_signal_to_rank_1(number: signal.Signals, words: list[str], folder: Path) -> tuple[int, str]:
    """The exit code and stderr of a run of two ranks, the second of which is sent a signal at the first checkpoint."""
    command = [sys.executable, "-m", "metaseg.run", *words, *DDP, f"hydra.run.dir={folder}", "ckpt_path=last"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
    (other,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(other), number)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


@pytest.mark.slow
def test_the_death_of_one_rank_ends_the_other_with_a_cure(words: list[str], alone: Path, tmp_path: Path) -> None:
    code, stderr = after_a_signal_to_rank_1(signal.SIGKILL, words, tmp_path)
    assert code == 1, stderr
    assert "another process of this run has ended" in stderr
    assert "Traceback" not in stderr
    run(composed(*words, "trainer=cpu", "ckpt_path=last"), tmp_path)
    assert everything(tmp_path) == everything(alone)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_one_process_goes_on(words: list[str], alone: Path, tmp_path: Path) -> None:
    code, stderr = after_a_signal_to_rank_1(signal.SIGTERM, words, tmp_path)
    assert code == RESUMABLE, stderr
    reached = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < reached < STEPS
    assert stderr.count(f"stopped by SIGTERM at meta-step {reached}; the same command with ckpt_path=last") == 1
    assert read_outcome(tmp_path) is None
    run(composed(*words, "trainer=cpu", "ckpt_path=last"), tmp_path)
    assert everything(tmp_path) == everything(alone)


def test_ranks_share_out_each_meta_batch() -> None:
    first, second = (list(MetaBatches(lambda: 1, 3, meta_batch=5, places=range(rank, 5, 2))) for rank in (0, 1))
    assert first == [5, 7, 9, 10, 12, 14]
    assert second == [6, 8, 11, 13]
    assert len(MetaBatches(lambda: 1, 3, meta_batch=5, places=range(1, 5, 2))) == 6  # a resumed epoch's are counted


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["trainer.devices=2"], "give trainer.devices=1, or trainer=ddp for more"),
        (["+trainer.strategy=fsdp"], "trainer.strategy=fsdp: choose trainer=ddp"),
        (["trainer=ddp", "algo=finetune"], "mode=fit_test of algo=finetune is not: use trainer=auto"),
        (["trainer=ddp", "mode=search"], "mode=search of algo=reptile is not: use trainer=auto"),
        (["trainer=ddp", "trainer.accelerator=cpu"], "trainer.devices=auto: on the CPU give the number"),
    ],
)
def test_what_ranks_cannot_do_is_refused(overrides: list[str], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        check(composed(*overrides))


def test_more_ranks_than_episodes_are_refused_before_they_start(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 processes share .* algo.meta_batch=2 .* give algo.meta_batch=3 or more"):
        run(composed(*words, *DDP, "trainer.devices=3"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "environment", "cure"),
    [
        (["hydra.mode=MULTIRUN"], {}, "begin the whole multirun again: start its runs one by one without -m"),
        ([], {"TORCHELASTIC_RUN_ID": "x"}, "name one for all, as hydra.run.dir=runs/big"),
        (["trainer.num_nodes=2"], {}, "start those of several by torchrun or srun"),
        (["hydra.run.dir=runs/big", "trainer.num_nodes=2"], {"TORCHELASTIC_RUN_ID": "x"}, None),
        ([], {}, None),
    ],
)
def test_how_ranks_cannot_be_started_is_refused(
    overrides: list[str], environment: dict[str, str], cure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config", overrides=["trainer=ddp", "hydra.mode=RUN", *overrides], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: config.hydra)
    if cure is None:
        check_launchable(config)
        return
    with pytest.raises(ConfigError, match=cure):
        check_launchable(config)
