"""Multiruns: each job leaves how it ended, one that fails does not stop the others, and at the end there is a table."""

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from metaseg.atomic import write_json
from metaseg.config import config_sha256, initialisations, plain
from metaseg.errors import RESUMABLE, ConfigError, Stopped, UserError
from metaseg.ranks import check_launchable, leads
from metaseg.texts import is_number, read_json, say

OUTCOME = "outcome.json"

Outcome = dict[str, Any]
"""Of a run's folder: `state` (finished or failed), `headline` (its metric, or null), `config_sha256`, `error`."""


def read_outcome(folder: Path) -> Outcome | None:
    """How the run in a folder ended; None if it has not, was killed, or the file is unreadable."""
    try:
        found: Outcome = read_json(folder / OUTCOME)
        headline, error = found["headline"], found["error"]
        _ = found["state"], found["config_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    sound = (headline is None or is_number(headline)) and isinstance(error, str | None)
    return found if sound else None


Run = Callable[[DictConfig, Path], float]
"""Does what a configuration says, leaves the results in a folder and returns its headline metric."""


def finished(config: DictConfig, folder: Path) -> float | None:
    """The headline metric of the run in a folder; None unless it has finished with this very configuration.

    None, too, if an initialisation that it takes has been written since.
    """
    outcome = read_outcome(folder)
    if not outcome or (outcome["state"], outcome["config_sha256"]) != ("finished", config_sha256(config)):
        return None
    written = (folder / OUTCOME).stat().st_mtime
    if any(file.stat().st_mtime > written for file in initialisations(config)):
        return None
    return float(outcome["headline"])


def recorded(run: Run, config: DictConfig, folder: Path) -> float:
    """Do a run, and leave in its folder how it ended; one that has already finished is not run again on `skip_done`.

    Returns:
        What `run` returned, now or then.

    Raises:
        Exception: what `run` raised, after it is written down.
    """
    earlier = _done(config, folder)
    if earlier is not None:
        return earlier
    if leads(config):
        (folder / OUTCOME).unlink(missing_ok=True)
    try:
        check_launchable(config)
        headline = run(config, folder)
    except Exception as error:
        if leads(config):
            with suppress(OSError):  # the disk may be full; the error is worth more
                _write(folder, config, error=str(error) if isinstance(error, UserError) else traceback.format_exc())
        raise
    if leads(config):
        _write(folder, config, headline)
    return headline


def sweep_job(config: DictConfig, folder: Path) -> float:
    """A run as a job of a multirun, in a process of its own: however it ends, the others go on.

    Returns:
        The run's headline metric, now or then; NaN if the job failed or was killed, which is written down.

    Raises:
        Stopped: if the sweep was told to stop.
        ConfigError: if a multirun has no such jobs.
    """
    check_launchable(config)
    done = _done(config, folder)
    if done is not None:
        return done
    (folder / OUTCOME).unlink(missing_ok=True)
    hydra = HydraConfig.get()
    told = {
        "config": plain(config),
        "folder": str(folder),
        "logging": OmegaConf.to_container(hydra.job_logging, resolve=True),
    }
    # submitit divides no threads, unlike joblib and Ray; torch would take all of the machine's
    threads = hydra.launcher.get("cpus_per_task")
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ
    # not by multiprocessing, which joblib's and Ray's workers have bent to their own ways
    command = [sys.executable, "-c", f"import {__name__} as s; s.job()"]
    launcher = os.getppid()
    process = subprocess.Popen(command, stdin=PIPE, text=True, env=environment)
    with _passing_on(process) as received:
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin:
            json.dump(told, process.stdin)
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            if os.getppid() != launcher:  # the multirun has ended, and nobody would take the result
                process.terminate()
                process.wait()
                os._exit(RESUMABLE)  # nor begin another job
    if received:
        raise Stopped
    outcome = read_outcome(folder)
    if outcome is None:
        _write(folder, config, error=_how_it_died(process.returncode))
        sys.stderr.write(f"metaseg: {_how_it_died(process.returncode)}\nthe other jobs go on: {folder}\n")
    return math.nan if outcome is None or outcome["headline"] is None else float(outcome["headline"])


def job() -> None:
    """A job's own process: does what standard input says, and tells of an error."""
    if sys.platform == "linux":  # to be told to stop, too, if the process that waits for this one is killed
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGTERM, stop_run)
    from metaseg.run import run

    told = json.load(sys.stdin)
    configure_log(OmegaConf.create(told["logging"]))
    try:
        recorded(run, OmegaConf.create(told["config"]), Path(told["folder"]))
    except Exception as error:
        why = f"metaseg: {error}" if isinstance(error, UserError) else traceback.format_exc()
        sys.stderr.write(f"{why}\nthis job has failed, the others go on: {told['folder']}\n")


def stop_run(number: int, frame: FrameType | None) -> None:
    """Handles a signal outside of meta-training, in which `checkpoints.StopOnSignal` does: the run can begin again."""
    raise Stopped


def stop_multirun(number: int, frame: FrameType | None) -> None:
    """Handles a signal to Hydra's process: it ends at once, and what waits for the jobs tells them to stop."""
    how = f"stopped by {signal.Signals(number).name}, the jobs at work leave checkpoints"
    sys.stderr.write(f"metaseg: {how}; the same command with skip_done=true ckpt_path=last goes on\n")
    sys.stderr.flush()
    os._exit(RESUMABLE)  # launchers would kill their workers first


@contextmanager
def _passing_on(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Meanwhile what tells this process to stop tells the job's; yields the signals received.

    Not where a launcher has plans for them: submitit queues the job again, and Slurm tells all processes by itself.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches it by itself
            process.terminate()

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if here else {}
    unplanned = (signal.SIG_DFL, signal.default_int_handler, stop_multirun)
    taken = {number: handler for number, handler in before.items() if handler in unplanned}
    for number in taken:
        signal.signal(number, pass_on)
    try:
        yield received
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def _how_it_died(exit_code: int) -> str:
    if exit_code == RESUMABLE:
        return "this job was stopped; the same command with skip_done=true ckpt_path=last goes on with it"
    if exit_code >= 0:
        return f"this job's process ended with exit code {exit_code} and left no outcome"
    name = next((known.name for known in signal.Signals if known == -exit_code), f"signal {-exit_code}")
    why = "; the machine may be out of memory: fewer jobs side by side" if name == "SIGKILL" else ""
    return f"this job's process was killed by {name}{why}"


class SummaryAtTheEnd(Callback):
    """Hydra's callback: when all jobs have ended, a summary of the sweep; the exit code is 1 if any has failed.

    Of a study its test is enough: what one worker leaves undone the others do.
    """

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print and write the summary of the sweep's folder."""
        from metaseg.summary import failures, read_sweep, studies, summarise, tested  # now: launchers load this

        folder = Path(config.hydra.sweep.dir)
        try:
            summarise(folder)
        except Exception:  # of which Hydra would make a warning, and the exit code 0
            sys.exit(f"{traceback.format_exc()}metaseg: {folder} has no summary")
        failed, found = failures(folder), studies(read_sweep(folder))
        untested = [name for name, workers in found if not tested(workers)]
        if untested:
            sys.exit(
                f"metaseg: {len(untested)} studies of {len(found)} have not been tested, as no worker in {folder} left "
                f"results.json: {'; '.join(untested)}. The same command tests it, and searches on before if need be"
            )
        if failed and found:
            sys.stderr.write(f"metaseg: {len(failed)} workers have not finished; the others did without them\n")
        elif failed:
            sys.exit(
                f"metaseg: {len(failed)} jobs have not finished: {', '.join(path.name for path in failed)}. The same "
                f"command with skip_done=true hydra.sweep.dir={folder} runs these again, and no other"
            )


def _done(config: DictConfig, folder: Path) -> float | None:
    if not isinstance(config.skip_done, bool):  # Hydra takes `no` for a text, which would count as true
        raise ConfigError(f"skip_done={config.skip_done}: give true or false")
    headline = finished(config, folder) if config.skip_done else None
    if headline is not None:
        say(f"skip_done: {folder} has finished with this configuration")
    return headline


def _write(folder: Path, config: DictConfig, headline: float | None = None, error: str | None = None) -> None:
    outcome: Outcome = {
        "state": "finished" if error is None else "failed",
        "headline": headline,
        "config_sha256": config_sha256(config),
        "error": error,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / OUTCOME, outcome)
