"""Look a data set over: `python -m metaseg.check dataset=folder dataset.root=… dataset.splits=…`."""

import sys
import warnings

import hydra
from omegaconf import DictConfig
from rich.console import Console

from metaseg.config import ConfigError, check_overrides, config_dir
from metaseg.data.source import SPLITS, DataError, TaskSource, splits_sha256
from metaseg.run import create


def describe(source: TaskSource) -> str:
    """The data set's splits and, if it kept one, its own report of what it left out."""
    lines = [f"{source.name} at {source.image_size}², splits sha256 {splits_sha256(source)}"]
    report = getattr(source, "report", None)
    if report is not None:
        return "\n".join([*lines, report()])
    for split in SPLITS:
        names = source.names(split)
        lines.append(f"{split}: {len(names)} classes, {sum(source.count(name) for name in names)} images")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(config: DictConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says it in full
            console.print(describe(create(config.dataset)), markup=False)
    except DataError as error:
        console.print(str(error), markup=False)
        sys.exit(1)


def main() -> None:
    """Run from the command line; exit code 1 for a data set that cannot be used."""
    # a look leaves nothing behind
    sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]
    try:
        check_overrides(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"metaseg: {error}")
    _hydra_main()


if __name__ == "__main__":
    main()
