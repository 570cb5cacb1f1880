"""README says how each promise is tried: the tests that it names are there."""

import ast
import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def rows() -> list[list[str]]:
    """The cells of the table under "What can go wrong"."""
    section = (
        (TOP / "README.md").read_text(encoding="utf-8").partition("## What can go wrong\n")[2].partition("\n## ")[0]
    )
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_every_row_says_what_happens_and_names_a_test() -> None:
    assert len(rows()) > 20
    for wrong, happens, tested in rows():
        assert wrong
        assert happens
        assert NAMED.search(tested), wrong


@pytest.mark.parametrize(("file", "name"), sorted({found for row in rows() for found in NAMED.findall(row[2])}))
def test_a_named_test_is_there(file: str, name: str) -> None:
    tree = ast.parse((TOP / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
