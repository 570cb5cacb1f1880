"""Texts that may come from anywhere: read as plain values, no object being made of them, and shown as they are."""

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from metaseg.errors import printable

MOST_READ = 50 * 2**20  # bytes of a file
MOST_JSON, MOST_YAML = 2**24, 2**17  # which become many times as much in memory; YAML takes seconds, too
LARGEST = 1e15  # of a number, up or down: Matplotlib fails where floats are far apart
MOST_LETTERS = 500  # of a text in a figure
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


def is_number(value: object) -> bool:
    """Whether it is a number that can be counted with and drawn: finite, and not of hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def read_file(path: Path, most: int = MOST_READ) -> bytes:
    """The content of a file. What is none, such as a pipe, which may never end, is not there.

    Raises:
        OSError, ValueError: if it cannot be read, or has more than `most` bytes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    if path.stat().st_size > most:
        raise ValueError(f"{path} has more than {most:,} bytes, as no file of its kind")
    return path.read_bytes()


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, in plain containers: no object of Python's is made, and no `${…}` resolved.

    Raises:
        OSError, ValueError: if it cannot be read; also for aliases, a few lines of which can become gigabytes.
    """
    text = read_file(path, MOST_YAML).decode("utf-8")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError(f"{path} has aliases (*name): write each value out")
        return OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{path} is no YAML file of plain values: {error}") from error


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """The content of a JSON file.

    Raises:
        OSError, ValueError: if it cannot be read, or has more than `most` bytes.
    """
    try:
        return json.loads(read_file(path, most).decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def read_csv(path: Path, names: Sequence[str], errors: str = "strict") -> Iterator[dict[str, str]]:
    """What a CSV file has in the columns of these names, line by line; of a line that ends before them, less.

    Only these are kept, since a long head with many short lines would otherwise become gigabytes.

    Raises:
        OSError, ValueError, csv.Error: if it cannot be read; the last of them at the line where it ends to be CSV.
    """
    lines = csv.reader(TextIOWrapper(BytesIO(read_file(path)), "utf-8", errors, newline=""))
    head = next(lines, [])
    places = {name: head.index(name) for name in names if name in head}
    for line in filter(None, lines):
        yield {name: line[place] for name, place in places.items() if place < len(line)}


def say(line: str, *, stderr: bool = False) -> None:
    """Print a line for people as it is: what stands in brackets is no markup of Rich's, and no line is broken."""
    Console(stderr=stderr).print(printable(line), markup=False, soft_wrap=True)


def no_math(text: str) -> str:
    """For Matplotlib, which would read what is between two $ as a formula, and fails on what no encoding has."""
    return "\n".join(map(printable, text[:MOST_LETTERS].split("\n"))).replace("$", "\\$")
