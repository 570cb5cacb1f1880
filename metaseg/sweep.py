"""Multiruns: each job leaves how it ended, one that fails does not stop the others, and at the end there is a table."""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from metaseg.config import config_sha256
from metaseg.errors import UserError
from metaseg.ranks import check_launchable, leads

OUTCOME = "outcome.json"

OmegaConf.register_new_resolver("sweep_name", lambda: sweep_name(), replace=True)  # of conf/logger/wandb.yaml

Outcome = dict[str, Any]
"""Of a run's folder: `state` (finished or failed), `headline` (its metric, or null), `config_sha256`, `error`."""


def sweep_name() -> str | None:
    """The name that the jobs of this multirun share, of their folder's last two parts; None for a run alone."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return "/".join(Path(HydraConfig.get().sweep.dir).parts[-2:])


def read_outcome(folder: Path) -> Outcome | None:
    """How the run in a folder ended; None if it has not, was killed, or the file is unreadable."""
    try:
        found: Outcome = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        return found if {"state", "headline", "config_sha256", "error"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def recorded(run: Callable[[DictConfig, Path], float], config: DictConfig, folder: Path) -> float:
    """Do a run, and leave in its folder how it ended; one that has already finished is not run again on `skip_done`.

    Returns:
        What `run` returned, now or then.

    Raises:
        Exception: what `run` raised, after it is written down.
    """
    sha256 = config_sha256(config)
    earlier = read_outcome(folder)
    if config.skip_done and earlier and (earlier["state"], earlier["config_sha256"]) == ("finished", sha256):
        Console().print(f"skip_done: {folder} has finished with this configuration", soft_wrap=True)
        return float(earlier["headline"])
    if leads(config):
        (folder / OUTCOME).unlink(missing_ok=True)
    try:
        check_launchable(config)
        headline = run(config, folder)
    except Exception as error:
        told = str(error) if isinstance(error, UserError) else traceback.format_exc()
        if leads(config):
            _write(folder, {"state": "failed", "headline": None, "config_sha256": sha256, "error": told})
        raise
    if leads(config):
        _write(folder, {"state": "finished", "headline": headline, "config_sha256": sha256, "error": None})
    return headline


def sweep_job(run: Callable[[DictConfig, Path], float], config: DictConfig, folder: Path) -> float:
    """`recorded` as a job of a multirun: if it fails, the error is shown and NaN returned, and the others go on."""
    try:
        return recorded(run, config, folder)
    except Exception as error:
        told = f"metaseg: {error}" if isinstance(error, UserError) else traceback.format_exc()
        sys.stderr.write(f"{told}\nthis job has failed, the others go on: {folder}\n")
        return math.nan


class SummaryAtTheEnd(Callback):
    """Hydra's callback: when all jobs have ended, a summary of the sweep; the exit code is 1 if any has failed."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print and write the summary of the sweep's folder."""
        from metaseg.summary import failures, summarise  # with all its imports only now: launchers load this module

        folder = Path(config.hydra.sweep.dir)
        summarise(folder)
        failed = failures(folder)
        if failed:
            sys.exit(
                f"metaseg: {len(failed)} jobs have not finished: {', '.join(path.name for path in failed)}. The same "
                f"command with skip_done=true hydra.sweep.dir={folder} runs these again, and no other"
            )


def _write(folder: Path, outcome: Outcome) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{OUTCOME}.{os.getpid()}"
    partial.write_text(json.dumps(outcome, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / OUTCOME)
