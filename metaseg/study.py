"""A study: trials of a search, taken by workers that share nothing but its storage.

A worker is a process on any machine. It begins a trial only while fewer than the study's budget are complete or being
taken by the living, and waits for those at the end. A trial carries its worker and the time of its last sign of life;
a dead worker's is told as failed, and its place is free. So the death of a worker loses at most its trial.

Workers do not ask for the same point: Optuna's `GPSampler` (read in 5.0.0) takes RUNNING trials into its expected
improvement (qLogEI, over what they may yet yield) as soon as their parameters are known, and random trials are drawn
by their own number. Only two that ask while the other's Gaussian process is being fitted may get points alike.
"""

import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from pytorch_lightning.loggers import Logger
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from metaseg.config import SEARCHES, initialisations, plain
from metaseg.errors import ConfigError
from metaseg.seeding import derive_seed
from metaseg.texts import say

STALE_S = 600.0  # a worker elsewhere without a sign of life for so long is dead; clocks have to agree far better
BEAT_S = 5.0  # between two signs of life, at least
CLOSING_BEAT_S = 60.0  # likewise while the best is tested
UNREADABLE = "a URL that is none"  # shown in its stead: a password may be in it
POLL_S = 1.0  # between two looks at what the other workers do


class Sampler(optuna.samplers.GPSampler):
    """A Gaussian process with expected improvement, all of whose draws come from (`key`, the trial's number).

    So neither workers that begin together draw one point, nor does a search that goes on draw what it has drawn.

    Args:
        key: what the seed is derived from.
        random: trials before the Gaussian process chooses.
    """

    def __init__(self, key: Sequence[int | str], random: int) -> None:
        self._key, self._random = key, random
        self._begin(0)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed."""
        self._begin(trial.number)
        super().before_trial(study, trial)

    def _begin(self, number: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(
                seed=derive_seed(*self._key, number) % 2**32,
                n_startup_trials=self._random,
                deterministic_objective=True,
            )


def open_storage(place: str, key: str) -> BaseStorage:
    """A journal file, or with `://` in it the URL of a database, such as sqlite:///runs/search.db; made if need be.

    Args:
        place: where.
        key: of the configuration, for the message.

    Raises:
        ConfigError: if there is no such database, no driver of it, or its texts are too short; or a journal is broken.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    said = f"{key}={masked(place)}"
    if "://" not in place:
        try:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            lock = JournalFileSymlinkLock(place)
            journal = JournalFileBackend(place, lock)
            lines = _lines(Path(place), lock)
        except OSError as error:
            raise ConfigError(f"{said} cannot be written ({error.strerror}): give another file, {key}=PATH") from error
        if lines and not lines[0].startswith(b"{"):
            raise ConfigError(f"{said} holds something else than studies: give another file, {key}=PATH")
        broken = _broken_line(lines)
        if broken:
            raise ConfigError(
                f"{said}: line {broken} is broken, as a full disk or a power cut leaves it: with no worker running, "
                f"remove it (sed -i {broken}d {place}), or begin another study with {key}=PATH"
            )
        return JournalStorage(journal)
    if masked(place) == UNREADABLE:
        raise ConfigError(f"{key}: give a database's URL, scheme://user@host:port/name, with any other @ in it as %40")
    if place.startswith(("mysql", "mariadb")):
        raise ConfigError(
            f"{said}: its texts end at 64 KB, which a test's results exceed: use a PostgreSQL or SQLite database, "
            "or a journal file"
        )
    # SQLite waits only five seconds for other writers by itself
    wait = {"connect_args": {"timeout": 60}} if place.startswith("sqlite") else {}
    for last in (False, False, False, True):
        try:
            return RDBStorage(place, engine_kwargs=wait)
        except ImportError as error:
            raise ConfigError(f"{said}: {error}") from error
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if last:
                raise ConfigError(f"{said}: give the URL of a database that is there ({error})") from error
            time.sleep(POLL_S)  # of workers that make the tables at the same time one succeeds
    raise AssertionError


def masked(place: str) -> str:
    """Where a study lies, for people and files: a database's URL without its password."""
    if "://" not in place or place.startswith("sqlite://"):
        return place
    try:
        url = make_url(place).difference_update_query(["password"])
    except (ArgumentError, ValueError):
        return UNREADABLE
    parts = (url.host or "", url.database or "")
    return UNREADABLE if "@" in "".join(parts) else url.render_as_string(hide_password=True)


def to_log(config: DictConfig) -> dict[str, Any]:
    """The configuration in plain containers, without the password of a database."""
    container = plain(config)
    for mode in SEARCHES:
        container[mode]["storage"] = masked(container[mode]["storage"] or "") or None
    return container


def clear(folder: Path, names: Sequence[str], config: DictConfig) -> None:
    """Remove what a smaller study has left in a run's folder, but no initialisation that this run begins from."""
    kept = {path.resolve() for path in initialisations(config)}
    for path in (folder / name for name in names):
        if path.resolve() not in kept:
            path.unlink(missing_ok=True)


def open_study(storage: BaseStorage, name: str, key: Sequence[int | str], random: int) -> Study:
    """The study of a name, new or as others left it or work on it.

    Args:
        storage: other studies may lie in it.
        name: what the trials' values depend on.
        key: what all its draws come from.
        random: trials before the Gaussian process chooses, and any is given up.
    """
    return optuna.create_study(
        storage=storage,
        sampler=Sampler(key, random),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=random),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )


def finished(study: Study) -> list[FrozenTrial]:
    """Trials that have a value, be it an estimate or that of a lost one."""
    return _in(study, TrialState.COMPLETE)


def best_trials(study: Study) -> list[FrozenTrial]:
    """Trials that were not given up or lost, the one of the highest value first; of equals the earlier."""
    whole = [trial for trial in finished(study) if not trial.user_attrs.get("given_up")]
    return sorted(whole, key=lambda trial: -value_of(trial))


def default_trial(study: Study) -> FrozenTrial | None:
    """The trial of the configuration as it stands, waiting or taken."""
    return next((trial for trial in _claimed(study) if trial.user_attrs.get("default")), None)


def value_of(trial: FrozenTrial) -> float:
    """Of a complete trial."""
    assert trial.value is not None
    return trial.value


def work(
    study: Study,
    trials: int,
    space: Mapping[str, BaseDistribution],
    default: Mapping[str, Any],
    take: Callable[[Trial], None],
    loggers: Sequence[Logger],
    name: str,
) -> None:
    """Take trials until `trials` are complete, here or elsewhere.

    Args:
        study: to work on.
        trials: how many it shall have.
        space: of the trials' parameters.
        default: the point of it to begin with, once.
        take: finds a trial's value and tells it to the study.
        loggers: of the best value so far.
        name: of the search, for them.
    """
    while (trial := claim(study, trials, default)) is not None:
        try:
            suggest(trial, space)
            take(trial)
        except UpdateFinishedTrialError:  # by another worker, to which this one gave no sign of life for `STALE_S`
            say(f"trial {trial.number} was taken for dead, and is lost")
            continue
        except BaseException:
            with suppress(UpdateFinishedTrialError):
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        whole = best_trials(study)
        values = [value_of(one) for one in whole if one.number == trial.number]
        for logger in loggers if values else ():
            metrics = {f"{name}/iou": values[0], f"{name}/best_iou": value_of(whole[0])}
            logger.log_metrics(metrics, step=trial.number)


def claim(study: Study, trials: int, default: Mapping[str, Any] | None = None, wait: bool = True) -> Trial | None:
    """A trial that is this process's to take; None when `trials` are complete.

    Args:
        study: to work on.
        trials: how many it shall have.
        default: a point to begin with, once.
        wait: while all are taken, but not complete; otherwise None is returned then, too.
    """
    told = False
    while len(finished(study)) < trials:
        bury_dead(study)
        taken = _claimed(study)
        if default is not None and len(taken) < trials and default_trial(study) is None:
            study.enqueue_trial(dict(default), user_attrs={"default": True})
        if len(taken) < trials or _in(study, TrialState.WAITING):
            trial = study.ask()
            trial.set_user_attr("worker", _this_process())
            # others may have asked at the same time, and enqueued the default: the earlier ones have it
            if trial.number in [one.number for one in _claimed(study)[:trials]]:
                return trial
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        if not wait:
            return None
        if not told:
            say("all trials are taken; waiting for those that other workers have not finished")
            told = True
        time.sleep(POLL_S)
    return None


def suggest(trial: Trial, space: Mapping[str, BaseDistribution]) -> None:
    """Have the sampler choose the trial's parameters."""
    for name, of in space.items():
        if isinstance(of, FloatDistribution):
            trial.suggest_float(name, of.low, of.high, log=of.log)
        elif isinstance(of, IntDistribution):
            trial.suggest_int(name, of.low, of.high, log=of.log)
        else:
            assert isinstance(of, CategoricalDistribution)
            trial.suggest_categorical(name, of.choices)


class Beat:
    """Writes a trial's sign of life when called, but not more often than every `BEAT_S`."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.last = trial, -BEAT_S

    def __call__(self) -> None:
        """Raises UpdateFinishedTrialError if others have given the trial's worker up."""
        if time.monotonic() - self.last >= BEAT_S:
            self.last = time.monotonic()
            self.trial.set_user_attr("beat", time.time())


def bury_dead(study: Study) -> None:
    """Tell the trials of dead workers as failed: their places are free, and the sampler awaits no value of theirs."""
    for trial in _in(study, TrialState.RUNNING):
        if not _lives(trial):
            with suppress(UpdateFinishedTrialError):  # another worker was quicker
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def hopeless(study: Study, trial: Trial, value: float, step: int) -> bool:
    """Report what a trial has reached; whether it is below the median of what earlier ones had at that step.

    The default never is, nor is any before its value is known: estimates are made from it.
    """
    trial.report(value, step)
    default = default_trial(study)
    known = (
        default is not None
        and default.state == TrialState.COMPLETE
        and not default.user_attrs.get("given_up")
        and step in default.intermediate_values
    )
    return known and not trial.user_attrs.get("default") and trial.should_prune()


def give_up(study: Study, trial: Trial, value: float, step: int) -> None:
    """Tell an estimate of a trial's value: the default's, and how the two differ at `step`.

    Told as pruned, the Gaussian process would learn nothing from it, and ask for the same point for ever. A trial that
    was given up is never the best.
    """
    default = default_trial(study)
    assert default is not None  # or it were not `hopeless`
    trial.set_user_attr("given_up", True)
    study.tell(trial, value_of(default) + value - default.intermediate_values[step], skip_if_finished=True)


def lose(study: Study, trial: Trial) -> None:
    """Tell a trial that has come to nothing as the lowest IoU there is, for the sampler to stay away from there."""
    trial.set_user_attr("given_up", True)
    study.tell(trial, 0.0, skip_if_finished=True)


def close(
    storage: BaseStorage, study: Study, key: str, late: bool, test: Callable[[], dict[str, Any]]
) -> dict[str, Any] | None:
    """Test the best of a complete study, by one of its workers.

    Who does is elected as trials are: the only trial of a study of its own is the closing, and a dead worker's is free
    for the next one that comes.

    Args:
        storage: of both.
        study: complete.
        key: what it is tested on.
        late: whether this worker is of those that leave an earlier closing alone.
        test: tests it; returns what to keep in the storage, as plain containers.

    Returns:
        What `test` returned, now or in an earlier run; None if it is another worker's affair.
    """
    name = f"{study.study_name}-tested-{len(finished(study))}-{key}"
    closing = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    trial = claim(closing, 1, wait=False)
    if trial is None:
        return None if late or not finished(closing) else dict(closing.user_attrs)
    try:
        with _beating(trial):
            record = test()
        for part, value in record.items():
            closing.set_user_attr(part, value)
        closing.tell(trial, 0.0, skip_if_finished=True)  # last: killed before, it has not been tested
    except BaseException:
        closing.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise
    return record


@contextmanager
def _beating(trial: Trial) -> Iterator[None]:
    """Meanwhile a thread writes the trial's sign of life."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(CLOSING_BEAT_S):
            with suppress(Exception):  # the next may succeed; what is being done is worth more
                trial.set_user_attr("beat", time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def history(study: Study) -> list[dict[str, Any]]:
    """All complete trials: value, params, and what they say of themselves."""
    own = ("worker", "beat")
    return [
        {"value": trial.value, "params": trial.params}
        | {key: value for key, value in trial.user_attrs.items() if key not in own}
        for trial in finished(study)
    ]


def draw_course(ax: Axes, study: Study) -> None:
    """Draw the trials' values and the best so far by their numbers."""
    whole = sorted(best_trials(study), key=lambda trial: trial.number)
    numbers, values = [trial.number for trial in whole], [value_of(trial) for trial in whole]
    given_up = [(trial.number, value_of(trial)) for trial in finished(study) if trial.number not in numbers]
    ax.plot(numbers, values, "o", color="#9aa5b1", markersize=4, label="trial")
    if given_up:
        ax.plot(*zip(*given_up, strict=True), "x", color="#9aa5b1", markersize=4, label="given up (estimate) or lost")
    ax.step(numbers, np.maximum.accumulate(values), where="post", color="#2f7fb8", label="best so far")
    ax.set(xlabel="trial", ylabel="IoU on validation tasks")
    ax.legend(frameon=False)


def _lines(journal: Path, lock: JournalFileSymlinkLock) -> list[bytes]:
    lock.acquire()  # or a line that is being written looks torn
    try:
        return journal.read_bytes().splitlines(keepends=True)
    finally:
        lock.release()


def _broken_line(lines: Sequence[bytes]) -> int | None:
    """The number of the first line that is not whole, from 1; Optuna would append to a torn last one."""
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return number
        if not line.endswith(b"\n"):
            return number
    return None


def _in(study: Study, *states: TrialState) -> list[FrozenTrial]:
    return sorted(study.get_trials(deepcopy=False, states=states), key=lambda trial: trial.number)


def _claimed(study: Study) -> list[FrozenTrial]:
    """Trials that count against the budget, by number; of the default the first alone, as several may enqueue it."""
    trials = _in(study, TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
    defaults = [trial.number for trial in trials if trial.user_attrs.get("default")]
    return [trial for trial in trials if trial.number not in defaults[1:]]


def _lives(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial does: exactly if it is of this machine, else by its last sign of life."""
    worker = trial.user_attrs.get("worker")
    if worker and sys.platform == "linux" and worker["machine"] == _machine():
        return bool(_began(worker["pid"]) == worker["began"])
    assert trial.datetime_start is not None  # it is running
    beat: float = trial.user_attrs.get("beat", trial.datetime_start.timestamp())
    return time.time() - beat < STALE_S


def _this_process() -> dict[str, Any]:
    return {"machine": _machine(), "pid": os.getpid(), "began": _began(os.getpid())}


def _machine() -> str:
    """Where a process number means one process.

    Containers may share the machine's name but not its numbers, and machines the name but not their boot.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's ticks (numbers are used again); None if it is no more, or not on Linux."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else numbers[18]
