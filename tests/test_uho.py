"""The search for the update procedure: its space, its honest score, its resuming, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from PIL import Image
from test_run import results
from test_update import update
from trees import write_splits, write_tree

from metaseg import uho
from metaseg.config import check, check_overrides, config_dir, expand_update, make_update
from metaseg.errors import ConfigError
from metaseg.run import run

CLASSES = [f"class_{i}" for i in range(6)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = write_tree(tmp_path_factory.mktemp("tree"), CLASSES)
    splits = write_splits(root / "splits.json", [], CLASSES[:4], CLASSES[4:])
    return (
        *("dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}", "debug=fast", "logger=csv"),
        *("model.weights=null", "trainer=cpu", "algo=finetune", "mode=uho", "evaluate.val_tasks=4"),
        *("uho.steps=[1,2]", "uho.random=2", "evaluate.processes=1"),
    )


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def search(words: tuple[str, ...], folder: Path, storage: Path, trials: int) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    value = run(composed(*words, f"uho.storage={storage}", f"uho.trials={trials}"), folder)
    record = json.loads((folder / "uho.json").read_text())
    assert record["test"]["iou"]["mean"] == value
    return record


def test_a_search_leaves_omega_and_a_second_one_returns_at_once(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "study.journal"
    record = search(words, tmp_path / "a", storage, trials=4)
    assert record["trials"] == 4
    complete = [trial for trial in record["history"] if trial["state"] == "COMPLETE"]
    assert record["val_iou"] == max(trial["value"] for trial in complete) >= record["default_val_iou"]
    for trial in complete:
        by_steps = {int(steps): iou for steps, iou in trial["iou_by_steps"].items()}
        assert by_steps.keys() == {1, 2}
        assert trial["value"] == max(by_steps.values()) == by_steps[trial["steps"]]
        assert trial["oracle_iou"] >= trial["value"]

    chosen = expand_update([f"update={tmp_path / 'a' / 'update.yaml'}"])
    omega = make_update(composed(*chosen)["update"])
    best = max(complete, key=lambda trial: trial["value"])
    assert omega.steps == best["steps"]
    assert {name: getattr(omega, name) for name in best["params"]} == best["params"]
    found = results(tmp_path / "a")
    assert (found["test"]["tasks"], found["test"]["steps"]) == (2, omega.steps)
    assert found["val"]["iou"]["mean"] == pytest.approx(record["val_iou"])  # that one, not the ladder's last
    with Image.open(tmp_path / "a" / "uho.png") as picture:
        assert picture.width > 500

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(uho, "scoring", fail)
    assert search(words, tmp_path / "b", storage, trials=4) == record
    assert (tmp_path / "b" / "update.yaml").read_text() == (tmp_path / "a" / "update.yaml").read_text()


def test_an_interrupted_search_goes_on(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, take = tmp_path / "study.journal", uho.take_trial
    taken = []

    def killed(*arguments: Any) -> None:
        taken.append(arguments[2].params)
        if len(taken) == 3:
            raise KeyboardInterrupt
        take(*arguments)

    monkeypatch.setattr(uho, "take_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        search(words, tmp_path / "a", storage, trials=4)
    record = search(words, tmp_path / "b", storage, trials=4)
    assert record["trials"] == 4
    assert len(taken) == 5  # two, the killed one, and the two that were left
    assert [trial["params"] for trial in record["history"]] == [*taken[:2], *taken[3:]]
    more = search(words, tmp_path / "c", storage, trials=5)
    assert more["history"][:4] == record["history"]
    assert more["trials"] == 5


def test_another_setting_is_another_study(words: tuple[str, ...], tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    search(words, tmp_path / "a", storage, trials=2)
    search((*words, "update.weight_decay=0.1"), tmp_path / "b", storage, trials=2)
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    assert len(journal.get_all_studies()) == 2


# The space


def test_the_configured_space_holds_the_default() -> None:
    config = composed("mode=uho", "algo=finetune")
    check(config)
    space = uho.distributions(config.uho.space)
    assert space["lr"] == FloatDistribution(5e-4, 0.5, log=True)
    assert space["batchnorm"] == CategoricalDistribution(["running", "support"])
    assert uho.default_parameters(space, make_update(config["update"]))["lr"] == 0.05


def test_whole_numbers_stay_whole() -> None:
    assert uho.distributions(OmegaConf.create({"batch_size": {"low": 2, "high": 9}})) == {
        "batch_size": IntDistribution(2, 9)
    }


@pytest.mark.parametrize(
    "space",
    [{"steps": {"low": 1, "high": 9}}, {"lr": {"low": 1.0}}, {"lr": {"low": 2.0, "high": 1.0}}, {"lr": {"lo": 1}}],
)
def test_a_space_that_is_none_is_refused(space: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="uho.space"):
        uho.distributions(OmegaConf.create(space))


@pytest.mark.parametrize("space", [{"lr": {"low": 0.5, "high": 1.0}}, {"adapts": {"choices": ["head"]}}])
def test_a_default_outside_is_refused(space: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="widen it"):
        uho.default_parameters(uho.distributions(OmegaConf.create(space)), update())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo=reptile"], "mode=uho of algo=reptile needs ckpt_path"),
        (["update=sgd_cosine"], "use update.schedule._target_=metaseg.update.Constant"),
        (["update=sgd_early_stopping"], "leave update.stopping null"),
        (["evaluate.lrs=[0.1]"], "leave it null"),
        (["uho.steps=[10,5]"], "ascending"),
        (["uho.steps=[]"], "ascending"),
        (["uho.trials=0"], "uho.trials=0: give 1 or more"),
    ],
)
def test_impossible_searches_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(composed("mode=uho", "algo=finetune", *overrides))


# update=PATH


def test_an_update_file_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    wanted = OmegaConf.merge(composed("update=adam")["update"], {"lr": 0.003, "batchnorm": "running", "adapts": "head"})
    OmegaConf.save(wanted, path)
    words = expand_update(["algo=fomaml", f"update={path}", "update.dropout=0.1"])
    check_overrides(words)
    assert composed(*words)["update"] == OmegaConf.merge(wanted, {"dropout": 0.1})
    assert expand_update(["update=adam", "seed=1"]) == ["update=adam", "seed=1"]


def test_a_file_that_is_no_update_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        expand_update([f"update={tmp_path}/none.yaml"])
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match="no update procedure"):
        expand_update([f"update={tmp_path}/other.yaml"])
