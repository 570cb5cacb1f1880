"""The search for the update procedure: its space, its honest score, its resuming, and what it leaves."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from test_run import results
from trees import write_splits, write_tree

from metaseg import uho
from metaseg.config import check, check_overrides, config_dir, expand_update, make_update
from metaseg.errors import ConfigError
from metaseg.evaluate import Example, Score
from metaseg.job import Job, build, fingerprint
from metaseg.run import run
from metaseg.update import Update

CLASSES = [f"class_{i}" for i in range(6)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = write_tree(tmp_path_factory.mktemp("tree"), CLASSES)
    splits = write_splits(root / "splits.json", [], CLASSES[:4], CLASSES[4:])
    return (
        *(
            "dataset=folder",
            f"dataset.root={root}",
            f"dataset.splits={splits}",
            "debug=fast",
            "model.rsd=[16]",
            "logger=csv",
        ),
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
    complete = record["history"]
    assert record["val_iou"] == max(trial["value"] for trial in complete) >= record["default_val_iou"]
    (default,) = (trial for trial in record["history"] if trial.get("default"))
    assert default["params"]["lr"] == 0.05
    assert record["default_val_iou"] == default["iou_by_steps"]["2"]
    for trial in complete:
        by_steps = {int(steps): iou for steps, iou in trial["iou_by_steps"].items()}
        assert by_steps.keys() == {1, 2}  # of uho.steps, and update.steps is one of them
        assert trial["value"] == max(by_steps.values()) == by_steps[trial["steps"]]
        assert trial["oracle_iou"] >= trial["value"]

    chosen = expand_update([f"update={tmp_path / 'a' / 'update.yaml'}"])
    omega = make_update(composed(*chosen)["update"])
    best = max(complete, key=lambda trial: trial["value"])
    assert omega.steps == best["steps"]
    assert {name: getattr(omega, name) for name in best["params"]} == best["params"]
    found = results(tmp_path / "a")
    assert (found["test"]["tasks"], found["test"]["steps"]) == (2, omega.steps)
    assert found["val"] is None  # ω was chosen on these tasks
    assert found["uho"]["val_iou"] == record["val_iou"]
    assert "ω is the best of 4 trials on val tasks" in (tmp_path / "a" / "card.md").read_text()
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

    def killed(*arguments: Any) -> float | None:
        taken.append(arguments[2].params)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return take(*arguments)

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
    names = {study.study_name.partition("-tested-")[0] for study in journal.get_all_studies()}
    assert len(names) == 2


def test_a_search_is_tested_on_other_tasks_when_asked(words: tuple[str, ...], tmp_path: Path) -> None:
    folder, storage = tmp_path / "a", tmp_path / "study.journal"
    first = search((*words, "evaluate.test_tasks=1"), folder, storage, trials=2)
    again = search((*words, "evaluate.test_tasks=2"), folder, storage, trials=2)
    assert again["history"] == first["history"]
    assert (first["test"]["tasks"], again["test"]["tasks"]) == (1, 2)


def test_a_finished_search_leaves_the_whole_run_again(words: tuple[str, ...], tmp_path: Path) -> None:
    folder, storage = tmp_path / "a", tmp_path / "study.journal"
    search(words, folder, storage, trials=2)
    left = {name: (folder / name).read_bytes() for name in ("results.json", "per_task.csv", "update.yaml", "uho.json")}
    search(words, folder, storage, trials=2)
    assert {name: (folder / name).read_bytes() for name in left} == left


def test_a_kill_before_the_report_tests_again(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "study.journal"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(uho, "report", killed)
        with pytest.raises(KeyboardInterrupt):
            search(words, tmp_path / "a", storage, trials=2)
    record = search(words, tmp_path / "b", storage, trials=2)
    assert (record["trials"], results(tmp_path / "b")["test"]["tasks"]) == (2, 2)


def test_a_worker_that_does_not_test_keeps_no_earlier_results(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in uho.LEFT:
        (tmp_path / name).touch()
    monkeypatch.setattr(uho, "close", lambda *_: None)
    run(composed(*words, f"uho.storage={tmp_path}/study.journal", "uho.trials=1"), tmp_path)
    assert not any((tmp_path / name).exists() for name in uho.LEFT)


def foretell(monkeypatch: pytest.MonkeyPatch, trials: Iterator[list[float]]) -> None:
    """Have each trial's validation tasks score these IoUs."""
    real = uho.scoring

    def scoring(job: Job, split: Any, update: Update, rungs: Sequence[int] = ()) -> Any:
        if split == "test":
            return real(job, split, update, rungs)
        ious = next(trials) if rungs else [0.0] * 4  # without rungs it is only asked how many there are
        return [Example(None, None, flat(f"task_{i}", iou)) for i, iou in enumerate(ious)]  # type: ignore[arg-type]

    monkeypatch.setattr(uho, "LEAST_TASKS", 2)
    monkeypatch.setattr(uho, "scoring", scoring)


def test_a_trial_below_the_median_is_given_up_with_an_estimate(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, good, poor, late = [0.6, 0.6, 0.4, 0.4], [0.7] * 4, [0.4] * 4, [0.9, 0.9, 0.1, 0.1]
    foretell(monkeypatch, iter([default, good, poor, late]))
    record = search(words, tmp_path / "a", tmp_path / "study.journal", trials=4)
    assert [trial.get("given_up", False) for trial in record["history"]] == [False, False, True, False]
    # the default's 0.5 on all four, and 0.4 − 0.6 on the two that were seen
    assert [trial["value"] for trial in record["history"]] == pytest.approx([0.5, 0.7, 0.3, 0.5])
    assert (record["given_up"], record["val_iou"]) == (1, pytest.approx(0.7))


def test_the_sampler_learns_from_what_was_given_up(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foretell(monkeypatch, chain([[0.6] * 4, [0.7] * 4], repeat([0.1] * 4)))
    record = search(words, tmp_path / "a", tmp_path / "study.journal", trials=9)
    assert record["given_up"] >= 3
    asked = [json.dumps(trial["params"], sort_keys=True) for trial in record["history"]]
    assert len(set(asked)) == len(asked)


def flat(task: str, iou: float) -> Score:
    """A score of this IoU at all steps."""
    counts = np.array([[[1000 * iou, 1000, 1000, 1000]]] * 3)
    return Score(task, (0, 1, 2), counts, np.zeros(3), counts[-1], 0.0)


def test_the_oracle_is_each_tasks_own_step_and_draws_are_means() -> None:
    def score(task: str, *ious: float) -> Score:
        counts = np.array([[[1000 * iou, 1000, 1000, 1000]] for iou in ious])
        return Score(task, (0, 1, 2), counts, np.zeros(3), counts[-1], 0.0)

    scores = [score("a", 0, 0.2, 0.6), score("b", 0, 0.5, 0.1), score("a", 0, 0.6, 0.4), score("b", 0, 0.5, 0.1)]
    ious = uho._ious(scores, [1, 2])
    np.testing.assert_allclose(ious, [[0.4, 0.5], [0.5, 0.1]], atol=1e-9)  # (tasks, rungs)


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("evaluate.test_tasks=1", True),
        ("evaluate.panels=0", True),
        ("evaluate.validations=5", True),
        ("uho.trials=7", True),
        ("evaluate.val_tasks=3", False),
        ("evaluate.shots=3", False),
        ("update.dropout=0.1", False),
        ("uho.steps=[1]", False),
        ("uho.space.lr.low=1e-3", False),
        ("model.drop_path=0.0", False),
        ("engine=reference", False),
        ("seed=1", False),  # of the random weights here
    ],
)
def test_a_study_is_of_what_decides_its_numbers(words: tuple[str, ...], override: str, same: bool) -> None:
    one, other = (fingerprint(build(composed(*words, *more))) for more in ([], [override]))
    assert (one == other) == same


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
