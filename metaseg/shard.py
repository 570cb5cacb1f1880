"""Write a data set as tar shards: `python -m metaseg.shard dataset=folder dataset.root=… dataset.splits=… out=OUT`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metaseg.check import describe
from metaseg.config import check_overrides, config_dir
from metaseg.data.shards import ShardSource, write_shards
from metaseg.errors import ConfigError, UserError
from metaseg.job import create


def run(words: Sequence[str]) -> None:
    """Do what the command line's words say.

    Raises:
        UserError: saying what to change; then there is no `out`.
    """
    check_overrides(words, "shard")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("shard", overrides=list(words))
    missing = [*sorted(OmegaConf.missing_keys(config)), *(["out"] if config.out is None else [])]
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give {missing[0]}=…; --help lists the keys")
    if not isinstance(config.shard_mb, int) or isinstance(config.shard_mb, bool) or config.shard_mb < 1:
        raise ConfigError(f"shard_mb={config.shard_mb}: give a whole number, 1 or more")
    out = Path(str(config.out)).expanduser()
    write_shards(create(config.dataset), out, config.shard_mb * 2**20)
    sys.stderr.write(f"{describe(ShardSource(out))}\ndataset=shards dataset.root={out} reads them\n")


def main() -> None:
    """Run from the command line; what the user can mend ends in its message alone, with exit code 1."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        sys.stdout.write((config_dir() / "shard.yaml").read_text(encoding="utf-8"))
        return
    try:
        run(words)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        sys.exit(f"metaseg: {error}")


if __name__ == "__main__":
    main()
