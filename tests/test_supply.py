"""What is installed with metaseg."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = {"": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()


# Bounds


@pytest.mark.parametrize("extra", WANTED)
def test_each_requirement_has_a_lower_bound_to_test(extra: str) -> None:
    bounds = {want: [part.operator for part in Requirement(want).specifier] for want in WANTED[extra]}
    assert [want for want, operators in bounds.items() if ">=" not in operators] == []


def test_the_package_imports_nothing_that_it_does_not_require() -> None:
    required = {canonicalize_name(Requirement(want).name) for wants in WANTED.values() for want in wants}
    givers = packages_distributions()
    imported = set()
    for file in (ROOT / "metaseg").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"metaseg"}
    assert {"torch", "yaml", "sqlalchemy"} <= foreign
    installed = {name: {canonicalize_name(giver) for giver in givers[name]} for name in foreign if name in givers}
    assert [name for name, those in installed.items() if not those & required] == []


def test_the_lowest_versions_are_tested_on_the_lowest_python() -> None:
    assert PROJECT["requires-python"] == ">=" + re.search(r"uv venv .*--python (\S+)", MAKEFILE)[1]
