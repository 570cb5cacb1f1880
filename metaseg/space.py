"""The spaces that are searched, as Optuna's distributions: of ω's fields (mode=uho), of any values (mode=search)."""

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from metaseg.config import check, plain
from metaseg.errors import ConfigError
from metaseg.update import Update

SEARCHABLE = ("lr", "batch_size", "weight_decay", "dropout", "augment", "batchnorm", "adapts")
TRAINING = ("algo", "update", "model")  # groups whose values mode=search may choose: the others decide what is scored
ALONE = {"mode": "fit", "worker": None}  # what makes a meta-training of its own of a search's configuration
_FRACTIONS = {"final_lr"} | {field.name for field in fields(Update) if field.type is float}  # though written as 1
_KEYS = ("choices", "low", "high", "log")


def distributions(space: DictConfig, update: Update) -> dict[str, BaseDistribution]:
    """Optuna's distributions of a configured space.

    Args:
        space: by field of ω, either `choices`, or `low` and `high`, and `log` if its logarithm is uniform.
        update: ω as configured, of which each end and each choice must make another.

    Raises:
        ConfigError: if a name cannot be searched, a range is none, or ω refuses one of its values or lies outside.
    """
    if not OmegaConf.is_dict(space) or not space:
        raise ConfigError(f"uho.space={space} holds nothing: give ranges, as {{lr: {{low: 0.01, high: 1, log: true}}}}")
    made: dict[str, BaseDistribution] = {}
    for name, entry in plain(space).items():
        if name not in SEARCHABLE:
            raise ConfigError(f"uho.space.{name}: choose from {', '.join(SEARCHABLE)}; steps come from uho.steps")
        made[name] = _distribution(f"uho.space.{name}", entry, whole=name == "batch_size")
    for name, distribution in made.items():
        for value in ends(distribution):
            try:
                replace(update, **{name: value})
            except ConfigError as error:
                raise ConfigError(f"uho.space.{name} reaches {value}, but {error}") from None
        value = getattr(update, name)
        _check_holds(f"uho.space.{name}", distribution, f"update.{name}", value)
    return made


def point(space: Mapping[str, BaseDistribution], update: Update) -> dict[str, Any]:
    """The configured ω as a point of the space."""
    return {name: getattr(update, name) for name in space}


def check_trial(trial: FrozenTrial, space: Mapping[str, BaseDistribution], key: str) -> None:
    """Refuse a trial that no search of this space has taken: a storage may come from anywhere, its values choose code.

    Args:
        trial: whose values are to be used.
        space: that is searched.
        key: of the configuration, that names the storage; for the message.

    Raises:
        ConfigError: naming the first value that the space does not have.
    """
    for name in sorted(trial.params.keys() | space.keys()):
        value = trial.params.get(name)
        if name not in space or not _holds(space[name], value):
            raise ConfigError(
                f"trial {trial.number} of the study has {name}={value}, which is not of the space that is searched: "
                f"nothing of it is used; begin another study with {key}=PATH"
            )


def training_distributions(config: DictConfig) -> dict[str, BaseDistribution]:
    """Optuna's distributions of `search.space`, by dotted key of the configuration.

    Raises:
        ConfigError: if there is no such key, a range is none or of what is no number, the configuration with one of
            its ends cannot work, or it does not hold what is configured.
    """
    made: dict[str, BaseDistribution] = {}
    values = {key: value for group in TRAINING for key, value in _leaves(plain(config)[group], group)}
    space = config.search.space
    if not OmegaConf.is_dict(space) or not space:
        raise ConfigError(
            f"search.space={space} holds nothing: give ranges, as {{update: {{lr: {{low: 0.01, high: 1}}}}}}"
        )
    for key, entry in _leaves(plain(space), ""):
        name = f"search.space.{key}"
        if key not in values:
            near = " or ".join(difflib.get_close_matches(key, values, n=2, cutoff=0.0))
            raise ConfigError(f"{name}: there is no such value in {', '.join(TRAINING)}; did you mean {near}?")
        value = values[key]
        if "choices" not in entry and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{name}: {key}={value} is no number, so give choices, as {{choices: [{value}, …]}}")
        given = [entry.get(end) for end in ("low", "high")] if isinstance(entry, dict) else []
        fraction = key.rpartition(".")[2] in _FRACTIONS
        whole = not fraction and all(isinstance(number, int) for number in (value, *given))
        made[key] = _distribution(name, entry, whole)
        for end in ends(made[key]):
            try:
                check(with_values(config, {**ALONE, key: end}))
            except ConfigError as error:
                raise ConfigError(f"{name} reaches {end}, but {error}") from None
        _check_holds(name, made[key], key, value)
    return made


def with_values(config: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """The configuration with these values, by dotted key."""
    made = copy.deepcopy(config)
    for key, value in values.items():
        OmegaConf.update(made, key, value, merge=False)
    return made


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Values, or entries of a space, by dotted key."""
    if isinstance(node, dict) and not node.keys() & set(_KEYS):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _distribution(name: str, entry: Any, whole: bool) -> BaseDistribution:
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys == {"choices"} and isinstance(entry["choices"], list) and entry["choices"]:
        return CategoricalDistribution(entry["choices"])
    if keys not in ({"low", "high"}, {"low", "high", "log"}):
        raise ConfigError(
            f"{name}={entry}: give choices, or low and high (and log: true), not both; to take a key away: "
            f"~{name}.choices"
        )
    try:
        # numbers such as 1 are whole in YAML, whatever the field is
        return IntDistribution(**entry) if whole else FloatDistribution(**entry)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={entry}: give numbers, low below high ({error})") from error


def _check_holds(name: str, distribution: BaseDistribution, key: str, value: Any) -> None:
    if not _holds(distribution, value):
        raise ConfigError(
            f"{name} does not hold {key}={value}: widen it, change that, or leave it out of the search with ~{name}"
        )


def ends(distribution: BaseDistribution) -> list[Any]:
    """All choices of a distribution, or its lowest and its highest value."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    held = ends(distribution)
    if isinstance(distribution, CategoricalDistribution):
        return value in held
    low, high = held
    return isinstance(value, int | float) and bool(low <= value <= high)
