"""What is installed with metaseg: bounds, licences, the audit; and that the pages about it name what there is."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import licences

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WANTED = {"": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGES = ["SECURITY.md", "CONTRIBUTING.md"]
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make up an installed package: its name and version, then lines of its metadata."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def made_up(name: str, *metadata: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            "\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *metadata, ""])
        )

    return made_up


def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: str, extras: str = "") -> None:
    """A pyproject.toml for the script to read."""
    file = tmp_path / "pyproject.toml"
    file.write_text(f"[project]\ndependencies = [{needs}]\n[project.optional-dependencies]\n{extras}\n")
    monkeypatch.setattr(licences, "PYPROJECT", file)


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
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
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


# Licences


def test_markers_and_extras_decide_what_is_brought(install: Install) -> None:
    install("top", *("Requires-Dist: " + r for r in ("base", "old; python_version < '3'", "more; extra == 'x'")))
    install("base", "Requires-Dist: top[x]")  # a circle, that asks for an extra on its second way round
    install("more", "Requires-Dist: much-more (>=1)")
    install("much-more")
    install("unasked")
    brought = licences.closure(["Top", "unasked; sys_platform == 'none'"])
    assert sorted(brought) == ["base", "more", "much-more", "top"]


ISC = "Classifier: License :: OSI Approved :: ISC License (ISCL)"


@pytest.mark.parametrize(
    ("metadata", "declared"),
    [
        (["License-Expression: MIT", "License: GPL", ISC], "MIT"),
        (["License: BSD", ISC], "BSD"),
        (["License: UNKNOWN", ISC], "ISC License (ISCL)"),
        (["License: Copyright (c)", "        all of us", ISC], "ISC License (ISCL)"),
        (["License: MIT License", "        ", "        Copyright (c) all of us"], "MIT License"),
        ([ISC, "Classifier: License :: Other"], "ISC License (ISCL); Other"),
        (["Classifier: License :: OSI Approved"], "unknown"),
        ([], "unknown"),
    ],
)
def test_the_expression_counts_before_the_field_before_the_classifiers(
    install: Install, metadata: list[str], declared: str
) -> None:
    install("made-up", *metadata)
    assert licences.declared(distribution("made-up")) == declared


@pytest.mark.parametrize(
    "licence",
    [
        *("MIT", "MIT License", "Apache License, Version 2.0", "Apache License v2.0", "3-Clause BSD License"),
        *("BSD-3-Clause AND 0BSD AND Zlib AND CC0-1.0", "MPL-2.0", "MPL-2.0 AND (Apache-2.0 OR MIT)"),
        *("Mozilla Public License 2.0 (MPL 2.0)", "LGPL-2.1-or-later", "MIT License; BSD License"),
    ],
)
def test_permissive_licences_and_weak_copyleft_may_stay(licence: str) -> None:
    assert licences.accepted(licence)


@pytest.mark.parametrize(
    "licence",
    [
        *("AGPL-3.0-only", "GPL-2.0-or-later", "MIT AND GPL-3.0-only", "MIT OR GPL-3.0-only", "CC-BY-SA-4.0"),
        *("GNU Affero General Public License v3", "GNU General Public License (GPL)", "Proprietary", "BUSL-1.1"),
        *("MIT with Commons Clause", "Apache-2.0 WITH Commons-Clause", "LicenseRef-anything", "unknown", "()"),
    ],
)
def test_strong_copyleft_and_what_is_not_known_may_not(licence: str) -> None:
    assert not licences.accepted(licence)


def test_a_package_under_the_agpl_ends_the_script_with_1_and_its_name(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("good", "License-Expression: MIT", "Requires-Dist: bad")
    install("bad", "License-Expression: AGPL-3.0-only")
    project(tmp_path, monkeypatch, "'good'")
    with pytest.raises(SystemExit, match="LISTED") as ended:
        licences.main(["--out", str(tmp_path / "out")])
    assert not isinstance(ended.value.code, int)  # a message: Python prints it and exits with 1
    assert capsys.readouterr().out == "bad 1.0, for (always): AGPL-3.0-only\n"
    assert "| bad | 1.0 | AGPL-3.0-only | (always) | **refused** |" in (tmp_path / "out" / "licences.md").read_text()


def test_the_table_says_which_extras_need_a_package(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("base", "License-Expression: MIT")
    install("shared", "License: BSD", "Requires-Dist: base")
    project(tmp_path, monkeypatch, "'base'", "one = ['shared']\ntwo = ['shared']\nthree = ['absent']\ndev = ['absent']")
    licences.main(["--extras", "one,two", "--out", str(tmp_path / "out")])
    head, *table = (tmp_path / "out" / "licences.md").read_text().splitlines()[2:]
    assert head.startswith("`python experiments/licences.py --extras one,two --out ")
    assert re.search(r"commit \w+.*, \d{4}-\d\d-\d\d, .*: 2 packages", head)
    assert table[3:] == ["| base | 1.0 | MIT | (always) |  |", "| shared | 1.0 | BSD | one, two |  |"]


def test_an_extra_that_is_not_installed_is_said_with_the_cure(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("base", "License-Expression: MIT")
    project(tmp_path, monkeypatch, "'base'", "one = ['absent-package']")
    with pytest.raises(SystemExit, match=r"absent-package is not installed: pip install -e '\.\[one\]'"):
        licences.main([])


def test_an_extra_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        licences.main(["--extras", "demo,moon"])
    assert "moon" in capsys.readouterr().err


@pytest.mark.parametrize(("metadata", "may_stay"), [([], True), (["License-Expression: AGPL-3.0-only"], False)])
def test_a_listed_package_may_stay_only_while_it_declares_the_same(
    install: Install, monkeypatch: pytest.MonkeyPatch, metadata: list[str], may_stay: bool
) -> None:
    monkeypatch.setattr(licences, "LISTED", {("made-*", "unknown"): ("MIT", "says its author")})
    install("made-up", *metadata)
    assert licences.judged("made-up", distribution("made-up"), ["demo"]).may_stay is may_stay


def test_the_committed_table_has_every_requirement_and_refuses_none() -> None:
    table = (ROOT / "experiments" / "licences" / "licences.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\| (\S+) \| ", table, re.MULTILINE))
    wanted = [want for extra, wants in WANTED.items() if extra != "dev" for want in wants]
    assert {canonicalize_name(Requirement(want).name) for want in wanted} <= names
    assert "refused" not in table


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


# Pages


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short_and_names_only_what_there_is(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    targets = set(re.findall(r"`make ([a-z-]+)", text))
    assert targets <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    links = {link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)}
    paths = {word for word in re.findall(r"`([\w./-]+)`", text) if "/" in word}
    assert [path for path in links | paths if not (ROOT / path).exists()] == []


def test_contributing_says_how_each_check_is_run() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    checks = ("lint", "type", "test", "test-slow", "test-lowest", "licences", "audit")
    assert [check for check in checks if f"`make {check}`" not in text] == []
