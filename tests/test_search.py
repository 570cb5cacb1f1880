"""mode=search: its space, its trials, what it leaves, its workers, and how a command line becomes them."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import pytorch_lightning as pl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import Trial
from PIL import Image
from safetensors.torch import load_file
from test_config import composed
from test_run import results
from trees import write_data

from metaseg import search as module
from metaseg.config import check, config_sha256, expand_workers
from metaseg.errors import RESUMABLE, ConfigError, Stopped
from metaseg.initialisation import read_about
from metaseg.job import build, fingerprint
from metaseg.run import run
from metaseg.space import training_distributions, with_values
from metaseg.study import finished, open_storage, open_study

LEFT = ("search.json", "results.json", "per_task.csv", "best.txt", "init.safetensors", "card.md")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    quick = [
        "debug=fast",
        "model.rsd=[16]",
        "algo.inner.steps=1",
        "model.weights=null",
        "logger=csv",
        "trainer=cpu",
        "workers=0",
        "evaluate.processes=1",
    ]
    few = ["evaluate.train_tasks=0", "evaluate.validations=2", "evaluate.panels=0", "search.random=1"]
    return ["mode=search", *write_data(tmp_path_factory.mktemp("data")), *quick, *few]


@pytest.fixture(scope="module")
def configured(words: list[str]) -> str:
    """The study's name."""
    return fingerprint(build(composed(*words)))


def start(words: Sequence[str], folder: Path, storage: str, trials: int) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    return run(composed(*words, f"search.storage={storage}", f"search.trials={trials}"), folder)


def study_of(words: Sequence[str], storage: str) -> Study:
    return open_study(open_storage(storage, ""), fingerprint(build(composed(*words))), (0,), 1)


def test_a_search_leaves_the_best_theta_and_a_second_one_returns_at_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = module.hopeless, tmp_path / "a"
    storage = f"sqlite:///{tmp_path}/study.db"

    def second_is_hopeless(study: Study, trial: Trial, value: float, step: int) -> bool:
        real(study, trial, value, step)
        return trial.number == 1

    monkeypatch.setattr(module, "hopeless", second_is_hopeless)
    headline = start(words, folder, storage, 3)

    record, found = json.loads((folder / "search.json").read_text()), results(folder)
    default, given_up, last = record["history"]
    assert default["params"] == {"algo.outer.lr": 1.0, "algo.inner.lr": 0.05, "update.lr": 0.05}
    assert (given_up["given_up"], record["given_up"]) == (True, 1)
    best = max((default, last), key=lambda trial: trial["value"])
    assert (record["val_iou"], record["values"]) == (best["value"], best["params"])
    assert record["default_val_iou"] == default["value"]
    assert headline == found["test"]["iou"]["mean"] == record["test"]["iou"]["mean"]
    assert found["val"]["iou"]["mean"] == pytest.approx(best["value"])  # the same θ, ω and tasks once more
    alone = composed(*words, "mode=fit_test", *(folder / "best.txt").read_text().split())
    told = {"trials": 3, "val_iou": best["value"], "config_sha256": config_sha256(alone)}
    assert (found["mode"], found["search"]) == ("search", told)
    command = composed(*words, f"search.storage={storage}", "search.trials=3")
    assert found["config_sha256"] == config_sha256(command)
    assert found["update"]["lr"] == best["params"]["update.lr"]

    # of θ, the best trial's; of the others no checkpoints, but the curves; the one given up has one validation of two
    about = read_about(folder / "init.safetensors")
    assert (about.algo, about.meta_steps > 0, set(about.seen or {})) == ("reptile", True, {"train", "val"})
    places = [next(folder.glob(f"study-*/trial-{number}")) for number in range(3)]
    kept = Path(best["checkpoint"])
    assert kept == (places[record["history"].index(best)] / "checkpoints" / "best.ckpt").resolve()
    assert not (places[1] / "checkpoints").exists()
    validated = [
        sum(bool(line.split(",")[column]) for line in lines[1:])
        for place in places
        if (lines := (place / "csv" / "metrics.csv").read_text().splitlines())
        for column in [lines[0].split(",").index("val/iou")]
    ]
    assert validated == [2, 1, 2]
    with Image.open(folder / "search.png") as picture:
        assert picture.width > 1000
    overrides = (folder / "best.txt").read_text().split()
    again = composed(*words, *overrides)
    assert {key: OmegaConf.select(again, key) for key in best["params"]} == best["params"]

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    for name in ("take_trial", "test"):
        monkeypatch.setattr(module, name, fail)
    assert start(words, tmp_path / "b", storage, 3) == headline
    for name in LEFT[:4]:
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes(), name
    first, second = (load_file(part / "init.safetensors") for part in (folder, tmp_path / "b"))
    assert all((first[key] == second[key]).all() for key in first)
    assert (tmp_path / "b" / "card.md").is_file()

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(module, "close", lambda *_: None)
        assert start(words, tmp_path / "b", storage, 3) == best["value"]
    assert not any((tmp_path / "b" / name).exists() for name in LEFT)  # of the worker that tests alone

    kept.unlink()
    with pytest.raises(ConfigError, match=r"best.ckpt of the best trial is gone: put it back"):
        start(words, tmp_path / "b", storage, 3)


@pytest.mark.slow
def test_a_killed_worker_costs_its_trial_and_the_search_ends_with_all_others(words: list[str], tmp_path: Path) -> None:
    storage = str(tmp_path / "study.journal")
    fork = multiprocessing.get_context("fork")

    def worker(number: int) -> None:
        if number == 0:
            module.fit = lambda *_: ((tmp_path / "hangs").touch(), time.sleep(600))  # type: ignore[assignment]
        start([*words, f"worker={number}", "search.workers=2"], tmp_path / str(number), storage, 2)

    workers = [fork.Process(target=worker, args=(number,)) for number in (0, 1)]
    workers[0].start()
    while not (tmp_path / "hangs").exists():
        time.sleep(0.01)
    workers[1].start()  # and meets a trial that is being taken
    place = tmp_path / "1"
    while not list(place.glob("study-*/trial-1/csv/metrics.csv")):
        time.sleep(0.01)
    assert workers[0].pid
    os.kill(workers[0].pid, signal.SIGKILL)
    for one in workers:
        one.join()
    assert [one.exitcode for one in workers] == [-signal.SIGKILL, 0]
    record = json.loads((place / "search.json").read_text())
    assert record["trials"] == 2
    assert [trial.number for trial in finished(study_of(words, storage))] == [1, 2]
    assert {name for name in LEFT if (place / name).exists()} == set(LEFT)
    assert not any((tmp_path / "0" / name).exists() for name in LEFT)


def test_a_stopped_worker_ends_with_75_and_the_same_command_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = str(tmp_path / "study.journal")

    with monkeypatch.context() as killed:
        killed.setattr(module.Course, "on_train_batch_end", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped) as ended:
            start(words, tmp_path / "a", storage, 2)
    assert ended.value.code == RESUMABLE
    said = capsys.readouterr().err
    assert "the same command goes on" in said
    assert "ckpt_path=last" not in said
    assert [trial.state.name for trial in study_of(words, storage).trials] == ["FAIL"]
    monkeypatch.setattr(module, "take_trial", lambda job, study, trial, folder: study.tell(trial, trial.number / 10))
    assert not list((tmp_path / "a").glob("study-*/*"))
    with pytest.raises(ConfigError, match="of the best trial is gone"):  # such trials have no checkpoint
        start(words, tmp_path / "a", storage, 2)
    done = finished(study_of(words, storage))
    assert [trial.user_attrs.get("default", False) for trial in done] == [True, False]


def test_a_validation_is_reported_as_the_best_so_far(tmp_path: Path) -> None:
    study = open_study(open_storage(str(tmp_path / "study.journal"), ""), "name", (0,), 1)
    course = module.Course(study, study.ask())

    class Trainer:
        global_step, max_steps, should_stop = 1, 3, False
        callback_metrics: dict[str, float]

    trainer = Trainer()
    for iou in (0.2, 0.5, 0.4):
        trainer.callback_metrics = {"val/iou": iou}
        course.on_validation_end(trainer)  # type: ignore[arg-type]
    assert course.trial.storage.get_trial(course.trial._trial_id).intermediate_values == {1: 0.2, 2: 0.5, 3: 0.5}
    assert (course.best, course.given_up, trainer.should_stop) == (0.5, None, False)
    assert isinstance(course, pl.Callback)


# The space


TRAINED = ("reptile", "fomaml", "fomaml_star", "joint")


@pytest.mark.parametrize("preset", [f"{group}{algo}" for group in ("algo=", "experiment=paper_") for algo in TRAINED])
def test_the_default_space_holds_what_is_configured(preset: str) -> None:
    config = composed("mode=search", preset, "dataset=emoji")
    check(config)
    space = training_distributions(config)
    assert list(space) == ["algo.outer.lr", "algo.inner.lr", "update.lr"]
    assert all(isinstance(of, FloatDistribution) and of.log for of in space.values())


def test_a_space_is_what_it_says() -> None:
    steps, adapts = "+search.space.algo.inner.steps={low:2,high:8}", "+search.space.update.adapts={choices:[all,head]}"
    config = composed("mode=search", "~search.space.algo.outer", "~search.space.algo.inner", steps, adapts)
    assert training_distributions(config) == {
        "update.lr": FloatDistribution(5e-4, 0.5, log=True),
        "algo.inner.steps": IntDistribution(2, 8),
        "update.adapts": CategoricalDistribution(["all", "head"]),
    }
    fraction = composed("mode=search", "algo.outer.lr=1", "search.space.algo.outer.lr={low:1,high:10,log:true}")
    assert training_distributions(fraction)["algo.outer.lr"] == FloatDistribution(1.0, 10.0, log=True)
    made = with_values(config, {"algo.inner.steps": 7, "update.adapts": "head"})
    assert (made.algo.inner.steps, made["update"].adapts, made.trainer.max_steps) == (7, "head", 60)
    assert config.algo.inner.steps == 5  # the trial's is a copy


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+search.space.algo.outer.lrr={low:1,high:2}"],
            "no such value in algo, update, model; did you mean algo.out",
        ),
        (["+search.space.evaluate.shots={low:1,high:2}"], "search.space.evaluate.shots: there is no such value"),
        (["+search.space.algo.inner.schedule={low:1,high:2}"], "algo.inner.schedule: there is no such value"),
        (["+search.space.update.adapts={low:1,high:2}"], "update.adapts=all is no number, so give choices"),
        (["+search.space.update.adapts=head"], "is no number, so give choices"),
        (["search.space.update.lr.low=1"], "low below high"),
        (["search.space.update.lr.high=null"], "give numbers"),
        (["search.space.update.lr.low=0.1"], "does not hold update.lr=0.05: widen it"),
        (
            ["+search.space.update.steps={low:0,high:50}"],
            "search.space.update.steps reaches 0, but update.steps=0: give",
        ),
        (["+search.space.update.adapts={choices:[all,hed]}"], "reaches hed, but update.adapts=hed"),
        (["search.space=null"], "search.space=None holds nothing: give ranges"),
        (["~search.space.algo", "~search.space.update"], "search.space={} holds nothing: give ranges"),
    ],
)
def test_impossible_spaces_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training_distributions(composed("mode=search", *overrides))


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["algo=finetune"], "nothing to search: use algo=reptile"),
        ([f"ckpt_path={__file__}"], "meta-trains anew, so leave it null"),
        (["evaluate.lrs=[0.1]"], "mode=search compares trials at their one update.lr"),
        (["search.workers=0"], "search.workers=0: give 1 or more"),
        (["search.workers=2"], "search.workers=2 belongs on the command line"),
        (["mode=uho", "algo=finetune", "uho.workers=2"], "uho.workers=2 belongs on the command line"),
        (["mode=fit", "worker=0"], "only mode=uho and mode=search have workers"),
        (["worker=-1"], "worker=-1: give 0 or more, or null for a run alone"),
        (["search.trials=1.5"], "search.trials=1.5: give a whole number"),
    ],
)
def test_impossible_searches_are_refused(overrides: list[str], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        check(composed("mode=search", *overrides))


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("evaluate.test_tasks=1", True),
        ("search.trials=7", True),
        ("search.workers=2", True),
        ("search.storage=x", True),
        ("workers=1", True),
        ("seed=1", False),
        ("evaluate.validations=1", False),
        ("trainer.max_steps=3", False),
        ("algo.meta_batch=1", False),
        ("search.space.update.lr.high=0.4", False),
    ],
)
def test_a_study_is_of_what_decides_its_numbers(words: list[str], configured: str, override: str, same: bool) -> None:
    assert (fingerprint(build(composed(*words, "worker=0", override))) == configured) == same


def test_a_worker_is_the_same_configuration_to_skip_done() -> None:
    assert config_sha256(composed("mode=search", "worker=0")) == config_sha256(composed("mode=search", "worker=1"))


# The command line


def test_workers_become_a_multirun() -> None:
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]
    assert expand_workers(["mode=uho", "uho.workers=3"]) == ["-m", "mode=uho", "uho.workers=3", "worker=0,1,2", *joblib]
    slurm = ["-m", "mode=search", "search.workers=2", "seed=0,1", "hydra/launcher=submitit_slurm"]
    assert expand_workers(slurm) == [*slurm, "worker=0,1"]
    one = ["mode=search", "search.workers=4", "hydra.launcher.n_jobs=2"]
    assert expand_workers(one) == ["-m", *one, "worker=0,1,2,3", "hydra/launcher=joblib"]
    OverridesParser.create().parse_overrides(expand_workers(one)[1:])
    both = ["mode=search", "uho.workers=9", "search.workers=2"]
    assert expand_workers(both)[4] == "worker=0,1"
    with pytest.raises(ConfigError, match=r"2 workers are a multirun.*give hydra.sweep.dir=here"):
        expand_workers([*both, "hydra.run.dir=here"])


@pytest.mark.parametrize(
    "words",
    [
        ["mode=uho", "uho.workers=1"],
        ["mode=uho", "search.workers=2"],
        ["uho.workers=abc"],
        ["-m", "worker=0,1", "search.workers=2"],
        ["algo=reptile"],
    ],
)
def test_other_command_lines_stay_as_they_are(words: list[str]) -> None:
    assert expand_workers(words) == words
