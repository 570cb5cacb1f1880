"""Texts that may come from anywhere: read as plain values, no object being made of them, and shown as they are."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from metaseg.errors import printable

MOST_DEPTH = 16  # containers in each other in a configuration
MOST_LISTED = 1000  # values in one of them
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def is_plain(node: Any, depth: int = MOST_DEPTH) -> bool:
    """Whether it is a configuration as JSON has it: no other types, not endless, finite numbers, one-line texts."""
    if isinstance(node, dict | list):
        keys, values = (node.keys(), node.values()) if isinstance(node, dict) else ((), node)
        texts = all(isinstance(key, str) and is_plain(key) for key in keys)
        return depth > 0 and len(node) <= MOST_LISTED and texts and all(is_plain(part, depth - 1) for part in values)
    if isinstance(node, str):
        return not _CONTROL.search(node)
    if isinstance(node, float):
        return math.isfinite(node)
    return node is None or (isinstance(node, int) and abs(node) < 2**63)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, in plain containers: no object of Python's is made, and no `${…}` resolved.

    Raises:
        OSError, ValueError: if it cannot be read; also for aliases, a few lines of which can become gigabytes.
    """
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(path.read_text(encoding="utf-8"))):
            raise ValueError(f"{path} has aliases (*name): write each value out")
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{path} is no YAML file of plain values: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def say(line: str, *, stderr: bool = False) -> None:
    """Print a line for people as it is: what stands in brackets is no markup of Rich's, and no line is broken."""
    Console(stderr=stderr).print(printable(line), markup=False, soft_wrap=True)


def no_math(text: str) -> str:
    """For Matplotlib, which would read what is between two $ as a formula."""
    return text.replace("$", "\\$")
