"""The space of update procedures that is searched: Optuna's distributions of ω's fields, out of the configuration."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from metaseg.config import plain
from metaseg.errors import ConfigError
from metaseg.update import Update

SEARCHABLE = ("lr", "batch_size", "weight_decay", "dropout", "augment", "batchnorm", "adapts")


def distributions(space: DictConfig, update: Update) -> dict[str, BaseDistribution]:
    """Optuna's distributions of a configured space.

    Args:
        space: by field of ω, either `choices`, or `low` and `high`, and `log` if its logarithm is uniform.
        update: ω as configured, of which each end and each choice must make another.

    Raises:
        ConfigError: if a name cannot be searched, a range is none, or ω refuses one of its values or lies outside.
    """
    made: dict[str, BaseDistribution] = {}
    for name, entry in plain(space).items():
        if name not in SEARCHABLE:
            raise ConfigError(f"uho.space.{name}: choose from {', '.join(SEARCHABLE)}; steps come from uho.steps")
        made[name] = _distribution(name, entry)
    for name, distribution in made.items():
        for value in _ends(distribution):
            try:
                replace(update, **{name: value})
            except ConfigError as error:
                raise ConfigError(f"uho.space.{name} reaches {value}, but {error}") from None
        value = getattr(update, name)
        if not _holds(distribution, value):
            raise ConfigError(
                f"uho.space.{name} does not hold update.{name}={value}: widen it, change that, or leave it out of the "
                f"search with ~uho.space.{name}"
            )
    return made


def point(space: Mapping[str, BaseDistribution], update: Update) -> dict[str, Any]:
    """The configured ω as a point of the space."""
    return {name: getattr(update, name) for name in space}


def _distribution(name: str, entry: Any) -> BaseDistribution:
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys == {"choices"} and isinstance(entry["choices"], list) and entry["choices"]:
        return CategoricalDistribution(entry["choices"])
    if keys not in ({"low", "high"}, {"low", "high", "log"}):
        raise ConfigError(
            f"uho.space.{name}={entry}: give choices, or low and high (and log: true), not both; to take a key away: "
            f"~uho.space.{name}.choices"
        )
    try:
        # numbers such as 1 are whole in YAML, whatever the field is
        return IntDistribution(**entry) if name == "batch_size" else FloatDistribution(**entry)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"uho.space.{name}={entry}: give numbers, low below high ({error})") from error


def _ends(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    ends = _ends(distribution)
    if isinstance(distribution, CategoricalDistribution):
        return value in ends
    low, high = ends
    return bool(low <= value <= high)
