"""What a look through the files of a data set finds, and how it is told: each fault with its place and its cure."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
Finding = TypeVar("Finding")

STRAY = "stray file"
MOST_TOLD = 10  # places of a kind of fault that are named; the rest is counted


class Cost(Enum):
    """What becomes of the thing at fault."""

    LEFT_OUT = auto()
    """It is not used."""
    DOUBT = auto()
    """It is used, but may not be what it seems."""
    NOTHING = auto()
    """It is ignored, and nobody will miss it: told in the report, but no reason for a warning."""


class Fault(NamedTuple):
    """Something in a data set that is not as it should be, and the way to mend it."""

    kind: str
    path: Path
    """Relative to the data set's root; in full where a data set has several."""
    cure: str
    detail: str = ""
    cost: Cost = Cost.LEFT_OUT


def stray(path: Path, cure: str = "nothing to do; it is ignored") -> Fault:
    """The fault of a file that has no business where it lies."""
    return Fault(STRAY, path, cure, cost=Cost.NOTHING)


def inspect_each(look: Callable[[Item], Finding], items: Sequence[Item]) -> list[Finding]:
    """What `look` finds in each item, in their order; threads serve, since Pillow decodes outside the GIL."""
    console = Console(stderr=True)
    quiet = not console.is_terminal
    # here and not in `look`: the filters are those of all threads
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, about what the findings tell
        findings = pool.map(look, items)
        return list(track(findings, "checking images", len(items), console=console, transient=True, disable=quiet))


def warn_of(faults: Iterable[Fault], where: str) -> None:
    """One warning, if there is anything to tell, at the line that called the data set's constructor."""
    lines = told(faults, where)
    if lines:
        warnings.warn("\n".join(lines), stacklevel=3)


def told(faults: Iterable[Fault], where: str) -> list[str]:
    """What a person has to hear, in lines: all that was left out of `where`, then all that is used in doubt."""
    faults = list(faults)
    left_out = fault_lines(fault for fault in faults if fault.cost is Cost.LEFT_OUT)
    doubts = fault_lines(fault for fault in faults if fault.cost is Cost.DOUBT)
    return [
        *([f"part of {where} is left out, the rest is used:", *left_out] if left_out else []),
        *([f"of {where} this is used, though in doubt:", *doubts] if doubts else []),
    ]


def fault_lines(faults: Iterable[Fault]) -> list[str]:
    """A line for each kind of fault: how many there are, the cure and the first places."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault)
    return [
        printable(
            f"{len(group)} × {kind} ({group[0].cure}): "
            + first([fault.path.as_posix() + (f" ({fault.detail})" if fault.detail else "") for fault in group])
        )
        for kind, group in kinds.items()
    ]


def printable(text: str) -> str:
    """The text with all that a terminal obeys, or no encoding has, as escapes: a file's name may hold anything."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def first(items: Sequence[str], most: int = MOST_TOLD) -> str:
    """The first items, and how many more there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
