"""What is installed with metaseg: bounds, the audit."""

import ast
import os
import re
import subprocess
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


# Audit


def audited(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """`make audit` with a stand-in of pip-audit."""
    tools = tmp_path / "tools"
    (tools / "bin").mkdir(parents=True)
    for name, body in {"uv": "", "pip-audit": script}.items():
        (tools / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / "bin" / name).chmod(0o755)
    (tools / ".done").touch()
    command = ["make", "audit", f"TOOLS={tools}"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "MAKEFLAGS": ""}, capture_output=True, text=True)


def test_an_audit_without_the_database_fails_and_says_so(tmp_path: Path) -> None:
    done = audited(tmp_path, "echo torch: not found on PyPI >&2; exit 1")
    assert done.returncode == 2  # make's, of every target that fails
    assert "Not audited" in done.stdout


def test_an_audit_that_finds_something_shows_it_and_fails(tmp_path: Path) -> None:
    done = audited(tmp_path, 'while [ "$1" != --output ]; do shift; done; echo torch 2.5 CVE-2025-32434 > "$2"; exit 1')
    assert done.returncode == 2
    assert "torch 2.5 CVE-2025-32434" in done.stdout
    assert "Not audited" not in done.stdout


def test_an_audit_that_finds_nothing_succeeds(tmp_path: Path) -> None:
    assert audited(tmp_path, "exit 0").returncode == 0
