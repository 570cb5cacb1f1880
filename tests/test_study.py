"""Workers on one study: the budget, the dead and the living, and who tests; in journals and databases."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import Study
from optuna.trial import Trial, TrialState
from test_config import composed

from metaseg import study as module
from metaseg.errors import ConfigError
from metaseg.study import (
    STALE_S,
    Beat,
    best_trials,
    bury_dead,
    claim,
    clear,
    close,
    default_trial,
    finished,
    hopeless,
    masked,
    open_storage,
    open_study,
    suggest,
    to_log,
    work,
)

SPACE = {"x": FloatDistribution(0.0, 1.0)}
DEFAULT = {"x": 0.5}
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)


@pytest.fixture(params=["study.journal", "sqlite:///{}/study.db"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.param.format(tmp_path) if "{}" in request.param else str(tmp_path / request.param)


def opened(place: str) -> Study:
    return open_study(open_storage(place, "search.storage"), "name", (0, "test"), 3)


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def tell(study: Study, trial: Trial, value: float = 0.5) -> None:
    study.tell(trial, value, skip_if_finished=True)


def elsewhere(trial: Trial) -> None:
    """Have a trial taken by a worker of another machine."""
    trial.set_user_attr("worker", {"machine": "elsewhere", "pid": 1, "began": "1"})


def in_child(do: Callable[[], None]) -> None:
    """Do it in a process of its own, to its end."""
    child = FORK.Process(target=do)
    child.start()
    child.join()


# Several at once


def worker(place: str, folder: Path, trials: int, hangs: bool) -> None:
    study = opened(place)

    def take(trial: Trial) -> None:
        Beat(trial)()
        if hangs and trial.number > 0:
            (folder / "hangs").touch()
            time.sleep(600)
        time.sleep(0.05)
        tell(study, trial, 1 - (trial.params["x"] - 0.3) ** 2)

    def test() -> dict[str, Any]:
        (folder / f"tested-by-{os.getpid()}").touch()
        return {"best": best_trials(study)[0].number}

    work(study, trials, SPACE, DEFAULT, take, [], "test")
    close(study._storage, study, "tasks", True, test)


def test_a_killed_worker_costs_its_trial_and_nothing_else(place: str, tmp_path: Path) -> None:
    workers = [FORK.Process(target=worker, args=(place, tmp_path, 6, hangs)) for hangs in (True, False, False)]
    for one in workers:
        one.start()
    while not (tmp_path / "hangs").exists():
        time.sleep(0.01)
    assert workers[0].pid
    os.kill(workers[0].pid, signal.SIGKILL)  # and it is not waited for: until then the kernel keeps its number
    for one in workers[1:]:
        one.join()
    assert [one.exitcode for one in workers[1:]] == [0, 0]
    study = opened(place)
    complete = finished(study)
    assert len(complete) == 6
    assert TrialState.RUNNING not in [trial.state for trial in study.trials]
    assert len([trial for trial in study.trials if trial.user_attrs["worker"]["pid"] == workers[0].pid]) >= 1
    assert [trial.params for trial in complete if trial.user_attrs.get("default")] == [DEFAULT]
    assert len(list(tmp_path.glob("tested-by-*"))) == 1
    workers[0].join()


def test_two_that_ask_for_the_last_trial_do_not_both_get_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = opened(place), opened(place)
    ask = first.ask
    taken: list[Trial | None] = []

    def second_is_quicker() -> Trial:
        if not taken:
            taken.append(claim(second, 1, wait=False))
        return ask()

    monkeypatch.setattr(first, "ask", second_is_quicker)
    assert claim(first, 1, wait=False) is None
    assert taken[0] is not None
    assert taken[0].number == 0
    assert states(first) == ["RUNNING", "FAIL"]


def test_a_default_that_two_enqueue_is_taken_once(place: str) -> None:
    study = opened(place)
    for _ in range(2):
        study.enqueue_trial(DEFAULT, user_attrs={"default": True})
    for _ in range(3):
        trial = claim(study, 3, DEFAULT)
        assert trial
        suggest(trial, SPACE)
        tell(study, trial)
    assert claim(study, 3, DEFAULT) is None
    assert sorted(states(study)) == ["COMPLETE"] * 3 + ["FAIL"]
    assert [trial.params["x"] for trial in finished(study)].count(0.5) == 1


def test_the_default_of_a_dead_worker_is_taken_again(tmp_path: Path) -> None:
    place = str(tmp_path / "study.journal")
    in_child(lambda: claim(opened(place), 2, DEFAULT) and None)
    study = opened(place)
    trial = claim(study, 2, DEFAULT)
    assert trial
    suggest(trial, SPACE)
    assert (trial.params, trial.user_attrs["default"]) == (DEFAULT, True)
    assert states(study) == ["FAIL", "RUNNING"]


# The living and the dead


def test_a_living_workers_trial_is_left_to_it(place: str) -> None:
    mine = opened(place)
    trial = claim(mine, 1)
    assert trial

    def another_comes() -> None:
        assert claim(opened(place), 1, wait=False) is None
        bury_dead(opened(place))

    in_child(another_comes)
    assert states(mine) == ["RUNNING"]
    tell(mine, trial)
    assert states(mine) == ["COMPLETE"]


def test_on_another_machine_the_last_sign_of_life_counts(place: str) -> None:
    study = opened(place)
    trial = claim(study, 1)
    assert trial
    elsewhere(trial)
    bury_dead(study)
    assert states(study) == ["RUNNING"]  # it has just begun
    trial.set_user_attr("beat", time.time() - STALE_S + 60)
    bury_dead(study)
    assert states(study) == ["RUNNING"]
    trial.set_user_attr("beat", time.time() - STALE_S - 1)
    bury_dead(study)
    assert states(study) == ["FAIL"]


def test_machines_of_one_name_are_told_apart_by_their_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = opened(str(tmp_path / "study.journal"))
    trial = claim(study, 1)
    assert trial
    here, read = module._machine(), Path.read_text
    trial.set_user_attr("worker", {**trial.user_attrs["worker"], "began": "1"})  # dead, if it is of this machine

    def other_boot(path: Path, **how: Any) -> str:
        return "another\n" if path.name == "boot_id" else read(path, **how)

    with monkeypatch.context() as there:
        there.setattr(Path, "read_text", other_boot)
        assert module._machine() != here
        bury_dead(study)
        assert states(study) == ["RUNNING"]
    bury_dead(study)
    assert states(study) == ["FAIL"]


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    study = opened(str(tmp_path / "study.journal"))
    trial = claim(study, 1)
    assert trial
    trial.set_user_attr("worker", {**trial.user_attrs["worker"], "began": "1"})
    bury_dead(study)
    assert states(study) == ["FAIL"]


def test_who_was_taken_for_dead_goes_on_and_the_budget_holds(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    study, other = opened(place), opened(place)

    def take(trial: Trial) -> None:
        if trial.number == 1:
            other.tell(trial.number, state=TrialState.FAIL)
        Beat(trial)()
        tell(study, trial)

    work(study, 3, SPACE, DEFAULT, take, [], "test")
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert "trial 1 was taken for dead" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(75), ValueError])
def test_a_trial_that_fails_frees_its_place(tmp_path: Path, error: Any) -> None:
    study = opened(str(tmp_path / "study.journal"))

    def take(trial: Trial) -> None:
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        work(study, 3, SPACE, DEFAULT, take, [], "test")
    assert states(study) == ["FAIL"]


def test_a_sign_of_life_is_not_written_at_each_step(tmp_path: Path) -> None:
    study = opened(str(tmp_path / "study.journal"))
    trial = claim(study, 1)
    assert trial
    beat = Beat(trial)
    beat()
    first = trial.user_attrs["beat"]
    beat()
    assert opened(str(tmp_path / "study.journal")).trials[0].user_attrs["beat"] == first
    beat.last -= module.BEAT_S
    beat()
    assert trial.user_attrs["beat"] > first


# What is drawn, and what is given up


def test_a_draw_is_of_the_trials_number_alone(tmp_path: Path) -> None:
    def draws(place: Path, opens: int) -> list[float]:
        found = []
        for _ in range(6 // opens):
            study = opened(str(place))
            for _ in range(opens):
                trial = claim(study, 6, DEFAULT)
                assert trial
                suggest(trial, SPACE)
                tell(study, trial, 1 - (trial.params["x"] - 0.3) ** 2)
                found.append(trial.params["x"])
        return found

    at_once, in_pieces = draws(tmp_path / "a", 6), draws(tmp_path / "b", 2)
    assert at_once == in_pieces  # random ones and, from the fourth on, the Gaussian process's
    assert len(set(at_once)) == 6


def test_nothing_is_hopeless_before_the_default_is_known(tmp_path: Path) -> None:
    study = opened(str(tmp_path / "study.journal"))
    default = claim(study, 9, DEFAULT)
    others = [claim(study, 9, DEFAULT) for _ in range(4)]
    assert default
    for trial, value in zip(others[:3], (0.5, 0.6, 0.7), strict=True):
        assert trial
        assert not hopeless(study, trial, value, 1)
        tell(study, trial, value)
    poor = others[3]
    assert poor
    assert not hopeless(study, poor, 0.1, 1)  # three are complete, but not the default
    assert not hopeless(study, default, 0.1, 1)  # it never is
    tell(study, default, 0.1)
    later = claim(study, 9, DEFAULT)
    assert later
    assert hopeless(study, later, 0.2, 1)  # below the median of 0.1, 0.5, 0.6, 0.7
    first = default_trial(study)
    assert first is not None
    assert first.number == default.number


# Who tests


def test_the_best_is_tested_once_and_a_dead_tester_is_replaced(place: str) -> None:
    study = opened(place)
    tell(study, study.ask())
    storage = study._storage
    in_child(lambda: close(open_storage(place, ""), opened(place), "tasks", False, lambda: os._exit(1)) or None)
    with pytest.raises(KeyboardInterrupt):
        close(storage, study, "tasks", False, _interrupted)
    assert close(storage, study, "tasks", True, lambda: {"iou": 0.5}) == {"iou": 0.5}
    assert close(storage, study, "tasks", False, _interrupted) == {"iou": 0.5}
    assert close(storage, study, "tasks", True, _interrupted) is None  # another worker's affair
    assert close(storage, study, "other tasks", True, lambda: {"iou": 0.6}) == {"iou": 0.6}
    tell(study, study.ask(), 0.7)  # the search has gone on
    assert close(storage, study, "tasks", False, lambda: {"iou": 0.7}) == {"iou": 0.7}


def _interrupted() -> dict[str, Any]:
    raise KeyboardInterrupt


def test_who_tests_gives_signs_of_life(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSING_BEAT_S", 0.01)
    study = opened(place)
    tell(study, study.ask())

    def beat() -> float | None:
        closing = optuna.load_study(study_name="name-tested-1-tasks", storage=open_storage(place, ""))
        found: float | None = closing.trials[0].user_attrs.get("beat")
        return found

    def test() -> dict[str, Any]:
        while beat() is None:
            time.sleep(0.01)
        return {}

    close(study._storage, study, "tasks", False, test)
    last = beat()
    time.sleep(0.05)
    assert beat() == last  # and none afterwards


def test_while_one_tests_the_others_do_not(tmp_path: Path) -> None:
    study = opened(str(tmp_path / "study.journal"))
    tell(study, study.ask())
    seen: list[Any] = []

    def test() -> dict[str, Any]:
        seen.append(close(study._storage, study, "tasks", False, _interrupted))
        return {}

    close(study._storage, study, "tasks", False, test)
    assert seen == [None]


# Storage


@pytest.mark.parametrize("url", ["nonsense://x", "postgresql+nodriver://host/name"])
def test_a_database_that_cannot_be_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="uho.storage="):
        open_storage(url, "uho.storage")


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("runs/a.journal", "runs/a.journal"),
        ("sqlite:///runs/a@b.db", "sqlite:///runs/a@b.db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql+psycopg://me:secret%40@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://host/db?password=secret&sslmode=require", "postgresql://host/db?sslmode=require"),
        ("postgresql://me:a@secret@host/db", "a URL that is none"),
        ("postgresql://me:12/secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:secret@host:port/db", "a URL that is none"),
    ],
)
def test_a_password_is_not_shown(place: str, shown: str) -> None:
    assert masked(place) == shown
    if "secret" in place:
        with pytest.raises(ConfigError) as refused:
            open_storage(f"postgresql+nodriver://{place.partition('://')[2]}", "uho.storage")
        assert "secret" not in str(refused.value)
        logged = to_log(composed(f"search.storage={json.dumps(place)}"))
        assert (logged["search"]["storage"], logged["uho"]["storage"]) == (shown, None)


def test_a_database_of_short_texts_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"uho.storage=mysql://me:\*\*\*@host/db: its texts end at 64 KB.*use a Postgre"
    ):
        open_storage("mysql://me:secret@host/db", "uho.storage")


@pytest.mark.parametrize("after", ["", '{"op_code":4,"worker_id":"b"}\n'])
def test_a_torn_line_of_a_journal_is_refused_with_its_number(tmp_path: Path, after: str) -> None:
    path = tmp_path / "study.journal"
    study = opened(str(path))
    tell(study, study.ask())
    whole = path.read_text()
    path.write_text(f'{whole}{{"op_code":4,"work{after}')
    number = whole.count("\n") + 1
    with pytest.raises(ConfigError, match=rf"line {number} is broken.*sed -i {number}d .*search.storage=PATH"):
        opened(str(path))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: number - 1]))
    assert states(opened(str(path))) == ["COMPLETE"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("notes.txt", "holds something else than studies: give another file, uho.storage=PATH"),
        ("notes.txt/study.journal", "cannot be written .*: give another file, uho.storage=PATH"),
        ("folder", "cannot be written .*: give another file, uho.storage=PATH"),
    ],
)
def test_what_is_no_journal_stays_as_it_is(place: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine\n")
    with pytest.raises(ConfigError, match=said):
        open_storage(str(tmp_path / place), "uho.storage")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine\n"


def test_of_an_earlier_run_all_goes_but_the_initialisation_that_is_taken(tmp_path: Path) -> None:
    theta = tmp_path / "init.safetensors"
    for config, left in ((composed("mode=uho", f"ckpt_path={theta}"), [theta]), (composed("mode=search"), [])):
        for name in (theta.name, "search.json"):
            (tmp_path / name).touch()
        clear(tmp_path, (theta.name, "search.json", "best.txt"), config)
        assert list(tmp_path.iterdir()) == left


def test_studies_of_one_file_stay_apart(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "deep" / "study.journal"), "")
    one, other = (open_study(storage, name, (0,), 1) for name in "ab")
    tell(one, one.ask())
    assert (len(finished(one)), len(finished(other))) == (1, 0)
    assert isinstance(storage, optuna.storages.JournalStorage)
