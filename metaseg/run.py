"""The entry: compose → check → meta-train → test → report. `python -m metaseg.run algo=reptile`."""

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from metaseg import ranks
from metaseg.checkpoints import LAST
from metaseg.config import check_overrides, config_dir, expand_update, expand_workers, initialisations, trains
from metaseg.curves import curves
from metaseg.errors import ConfigError, MachineError, UserError
from metaseg.fit import train_and_test
from metaseg.job import Job, build
from metaseg.lineage import log_init, use_inits
from metaseg.ranks import leads
from metaseg.search import search
from metaseg.sweep import stop_multirun, stop_run
from metaseg.tracking import close_loggers, make_loggers
from metaseg.uho import uho


def run(config: DictConfig, folder: Path) -> float:
    """Do what a composed configuration says, and leave the results in `folder`.

    Returns:
        The headline metric: mean IoU on the test tasks; on the validation tasks for mode=fit. In [0, 1].

    Raises:
        UserError: saying what to change; before anything is written, if it could be known.
    """
    with _machine_faults(folder):
        return _run(resumed(config, folder), folder)


def _run(config: DictConfig, folder: Path) -> float:
    job = build(config)
    # of an earlier run here: what stands there shall be this one's
    leftovers = (folder / "results.json", folder / "card.md", *folder.glob("*.partial"))
    for path in leftovers if leads(config) else ():
        path.unlink(missing_ok=True)
    loggers = make_loggers(config, folder) if leads(config) else []
    exit_code = 1
    try:
        use_inits(loggers, config)
        headline = MODES[config.mode](job, loggers, folder)
        made = folder / "init.safetensors"
        # these two leave what they were given; and a search's worker may leave nothing, or what it began from
        if config.mode not in ("test", "curves") and made.is_file() and made not in initialisations(config):
            log_init(loggers, made)
        exit_code = 0
    finally:
        close_loggers(loggers, exit_code)
    return headline


def resumed(config: DictConfig, folder: Path) -> DictConfig:
    """The configuration, with `ckpt_path=last` as the folder's last checkpoint, or as null if there is none yet.

    Raises:
        ConfigError: if the run does not meta-train.
    """
    if config.ckpt_path != "last":
        return config
    if not trains(config):
        raise ConfigError(
            f"ckpt_path=last resumes meta-training, but mode={config.mode} of this algo has none: name a file"
        )
    last = folder / "checkpoints" / LAST
    return OmegaConf.merge(config, {"ckpt_path": str(last) if last.is_file() else None})  # type: ignore[return-value]


@contextmanager
def _machine_faults(folder: Path) -> Iterator[None]:
    """Raises MachineError in place of what torch or a library raises where the machine is to blame."""
    goes_on = "the same command goes on, a meta-training with ckpt_path=last"
    try:
        yield
    except UserError as error:
        if "in DataLoader worker process" in str(error):  # its message is the whole traceback there
            raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None
        raise
    except Exception as error:
        if "DataLoader worker (pid" in str(error):  # torch's RuntimeError: one that is gone
            raise MachineError(
                f"a process that loads or scores episodes has died ({str(error).strip()}): if for want of memory, take "
                f"fewer by workers=0 and evaluate.processes=1; {goes_on}"
            ) from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            less = "lower update.batch_size, algo.inner.batch_size, dataset.image_size or engine.lanes"
            raise MachineError(f"there is not enough memory ({str(error).strip()}): {less}; {goes_on}") from error
        if ranks.size() > 1 and any(what in str(error) for what in LOST):
            raise MachineError(f"another process of this run has ended, and says why above; {goes_on}") from error
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):  # also not as OSError
            raise MachineError(f"no room is left on the disk of {folder} ({error}): make some; {goes_on}") from error
        raise


# what torch.distributed says where another process does not answer any more
LOST = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "Connection refused", "remote process")

MODES: dict[str, Callable[[Job, Sequence[Logger], Path], float]] = {
    "fit_test": train_and_test,
    "fit": train_and_test,
    "test": train_and_test,
    "uho": uho,
    "search": search,
    "curves": curves,
}


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(config: DictConfig) -> float:
    # launchers pickle this function by value: it must not close over anything of this module
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from metaseg.sweep import recorded, sweep_job

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN:
        return sweep_job(config, folder)  # which begins a process: this one is spared the imports
    from metaseg.run import run

    return recorded(run, config, folder)


def launch(hydra_main: Callable[[], Any]) -> None:
    """Run a Hydra main; what the user can mend ends in its message, anything else in its whole traceback.

    SIGTERM, and of a multirun Ctrl-C, ends it with the exit code `errors.RESUMABLE`.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors come out of Hydra as they are
    # of a launcher's preset that has the plugin's own name, which is the name that people know
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    try:
        sys.argv[1:] = expand_workers(expand_update(sys.argv[1:]))
        check_overrides(sys.argv[1:])
        multirun = {"-m", "--multirun"} & set(sys.argv)
        for number in (signal.SIGTERM, signal.SIGINT) if multirun else (signal.SIGTERM,):
            signal.signal(number, stop_multirun if multirun else stop_run)
        hydra_main()
    except (UserError, HydraException, OmegaConfBaseException, MisconfigurationException) as error:
        sys.exit(f"metaseg: {error}")


def main() -> None:
    """Run from the command line."""
    launch(_hydra_main)


if __name__ == "__main__":
    main()
