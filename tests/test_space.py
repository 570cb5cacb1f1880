"""The space of update procedures: what can be searched, and that every value of it is an ω."""

from typing import Any

import pytest
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from test_uho import composed
from test_update import update

from metaseg.config import make_update
from metaseg.errors import ConfigError
from metaseg.space import distributions, point


def test_the_configured_space_holds_the_default() -> None:
    config = composed("mode=uho", "algo=finetune")
    omega = make_update(config["update"])
    space = distributions(config.uho.space, omega)
    assert space["lr"] == FloatDistribution(5e-5, 0.5, log=True)
    assert space["batchnorm"] == CategoricalDistribution(["running", "support"])
    assert point(space, omega)["lr"] == 0.05


def test_a_field_is_whole_if_omegas_is() -> None:
    space = {"batch_size": {"low": 2, "high": 9}, "augment": {"low": 0, "high": 1}}
    assert distributions(OmegaConf.create(space), update()) == {
        "batch_size": IntDistribution(2, 9),
        "augment": FloatDistribution(0.0, 1.0),
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "uho.space={} holds nothing: give ranges"),
        ({"steps": {"low": 1, "high": 9}}, "steps come from uho.steps"),
        ({"lr": {"low": 1.0}}, "low and high"),
        ({"lr": {"low": 2.0, "high": 1.0}}, "low below high"),
        ({"lr": {"low": "a", "high": 1.0}}, "give numbers"),
        ({"lr": {"lo": 1}}, "low and high"),
        ({"lr": 0.1}, "give choices, or low and high"),
        ({"lr": {"low": 0.01, "high": 0.5, "step": 0.01}}, "give choices, or low and high"),
        ({"batch_size": {"choices": [4, 8], "low": 2, "high": 9}}, "not both"),
        ({"adapts": {"choices": []}}, "give choices"),
        ({"batchnorm": {"choices": ["support", "runing"]}}, "reaches runing, but update.batchnorm=runing: give one of"),
        ({"dropout": {"low": 0.0, "high": 1.5}}, "reaches 1.5, but update.dropout=1.5"),
        ({"lr": {"low": 0.5, "high": 1.0}}, "widen it"),
        ({"adapts": {"choices": ["head"]}}, "~uho.space.adapts"),
    ],
)
def test_a_space_that_is_none_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distributions(OmegaConf.create(space), update())
