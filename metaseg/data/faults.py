"""What a look through the files of a data set finds, and how it is told: each fault with its place and its cure."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image
from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
Finding = TypeVar("Finding")

STRAY = "stray file"  # the one kind that costs no image: in the report, but no reason for a warning

# What Pillow raises over damaged files; a SyntaxError, for one, is a PNG with a broken chunk.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class Fault(NamedTuple):
    """Something that was left out of a data set, and the way to mend it."""

    kind: str
    path: Path
    """Relative to the data set's root; in full where a data set has several."""
    cure: str
    detail: str = ""


def inspect_each(look: Callable[[Item], Finding], items: Sequence[Item]) -> list[Finding]:
    """What `look` finds in each item, in their order; threads serve, since Pillow decodes outside the GIL."""
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with ThreadPoolExecutor() as pool:
        findings = pool.map(look, items)
        return list(track(findings, "checking images", len(items), console=console, transient=True, disable=quiet))


def warn_of(faults: Iterable[Fault], where: str) -> None:
    """One warning about all that was left out of `where`, at the line that called the data set's constructor."""
    lines = fault_lines(fault for fault in faults if fault.kind != STRAY)
    if lines:
        warnings.warn("\n".join([f"part of {where} is left out, the rest is used:", *lines]), stacklevel=3)


def fault_lines(faults: Iterable[Fault]) -> list[str]:
    """A line for each kind of fault: how many there are, the cure and the first places."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault)
    return [
        f"{len(group)} × {kind} ({group[0].cure}): "
        + first([fault.path.as_posix() + (f" ({fault.detail})" if fault.detail else "") for fault in group])
        for kind, group in kinds.items()
    ]


def first(items: Sequence[str], most: int = 10) -> str:
    """The first items, and how many more there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
