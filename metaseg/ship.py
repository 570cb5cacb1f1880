"""The shipped initialisation: what people's own images start from when the commands are not told another.

    python -m metaseg.ship runs/demo/*        # `make demo` ends with it

keeps the best run's `init.safetensors`, with its card, where metaseg.load(), metaseg.adapt and metaseg.app look for it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaseg.atomic import written_whole
from metaseg.cache import cache_folder
from metaseg.card import write_card
from metaseg.errors import ConfigError, DataError, UserError, WeightsError
from metaseg.initialisation import read_about
from metaseg.texts import is_number, read_json
from metaseg.trust import check_trusted

NAME = "init.safetensors"


def shipped_path() -> Path:
    """Where the shipped initialisation lies, or would lie."""
    return cache_folder() / "shipped" / NAME


def shipped() -> Path:
    """The shipped initialisation.

    Raises:
        WeightsError: if there is none yet.
    """
    path = shipped_path()
    if not path.is_file():
        raise WeightsError(
            f"no initialisation is given, and {path} is not there: `make demo` builds it; or give a run's "
            "init.safetensors, or keep one for good: python -m metaseg.ship RUN"
        )
    return path


def ship(runs: Sequence[Path]) -> Path:
    """Keep the run's θ with the best IoU on validation tasks, and its card, as the shipped initialisation.

    Args:
        runs: folders of finished runs, of the same validation tasks; those that did not meta-train are passed over.

    Returns:
        The run's folder.

    Raises:
        DataError: if a folder holds no finished run.
        ConfigError: if no run was meta-trained and validated, or not all on the same episodes.
    """
    found = {run: results for run in runs if (results := _results(run))["meta_steps"] and results["val"]}
    if not found:
        raise ConfigError("none of these runs has meta-trained an initialisation and validated it: give others")
    episodes = {_validated_on(results) for results in found.values()}
    if len(episodes) > 1:
        raise ConfigError("these runs were validated on different episodes, so none is the best: give only one of them")
    best = max(found, key=lambda run: float(found[run]["val"]["iou"]["mean"]))
    about = read_about(best / NAME)  # a file that nobody could use shall not replace a sound one
    check_trusted({"model": about.model, "update": about.update}, best / NAME)
    target = shipped_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as partial:  # somebody may be reading it
        shutil.copyfile(best / NAME, partial)
    write_card(best / NAME, target.with_name("card.md"))
    return best


def _results(run: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = read_json(run / "results.json")
        if results["meta_steps"] and results["val"] and not is_number(results["val"]["iou"]["mean"]):
            raise TypeError("its IoU is no number")
        _ = results["val"] and _validated_on(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run} holds no finished run: give folders with results.json and {NAME}") from error
    return results


def _validated_on(results: dict[str, Any]) -> str:
    names = ("dataset", "splits_sha256", "episodes", "shots")
    return json.dumps([*(results[name] for name in names), results["val"]["tasks"]], sort_keys=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser("python -m metaseg.ship", description="Choose the initialisation to start from.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs; the best on validation")
    try:
        best = ship(parser.parse_args(argv).runs)
    except UserError as error:
        sys.exit(f"metaseg: {error}")
    print(f"{best / NAME} is what people's own images start from now: {shipped_path()}, with card.md beside it")


if __name__ == "__main__":
    main()
