"""Look a data set over: `python -m metaseg.check dataset=folder dataset.root=… dataset.splits=…`."""

import sys
import warnings

import hydra
from omegaconf import DictConfig
from rich.console import Console

from metaseg.config import config_dir
from metaseg.data.source import SPLITS, TaskSource, image_counts, splits_sha256
from metaseg.job import create
from metaseg.run import launch


def describe(source: TaskSource) -> str:
    """The data set's splits and, if it kept one, its own report of what it left out."""
    lines = [f"{source.name} at {source.image_size}², splits sha256 {splits_sha256(source)}"]
    report = getattr(source, "report", None)
    if report is not None:
        return "\n".join([*lines, report()])
    for split in SPLITS:
        counts = image_counts(source, split)
        lines.append(f"{split}: {len(counts)} classes, {counts.sum()} images")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(config: DictConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it in full
        report = describe(create(config.dataset))
    Console(soft_wrap=True, highlight=False, emoji=False, markup=False).print(report)


def main() -> None:
    """Run from the command line; the exit code is 1 for a data set that cannot be used."""
    # a look leaves nothing behind
    sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]
    launch(_hydra_main)


if __name__ == "__main__":
    main()
