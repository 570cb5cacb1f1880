"""`python -m metaseg.check`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import write_splits, write_tree

from metaseg.check import main

Check = Callable[..., str]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """The command in this process; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["check", *overrides])
        main()
        return capsys.readouterr().out

    return run


def test_a_sound_and_a_broken_data_set_are_reported(tmp_path: Path, check: Check) -> None:
    names = ["a", "b", "c"]
    root = write_tree(tmp_path / "tree", names)
    splits = write_splits(tmp_path / "splits.json", ["a"], ["b"], ["c"])
    overrides = ["dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}"]
    told = check(*overrides)
    assert "folder at 224²" in told
    assert "train: 1 of 1 classes, 10 images" in told
    (root / "a" / "3.png").unlink()
    command = [sys.executable, "-m", "metaseg.check", *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "3.jpg" in done.stderr
    assert "1 × image without a mask" in check(*overrides, "dataset.min_images=9")
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "splits.json"}  # looking leaves nothing behind


def test_names_of_every_kind_are_told_as_they_are(tmp_path: Path, check: Check) -> None:
    """Also those that a console might take for markup or an emoji's name."""
    root = write_tree(tmp_path / ":ant: [red]", ["a", "b", "c"])
    splits = write_splits(tmp_path / "splits.json", ["a"], ["b"], ["c"])
    (root / "a" / ":bee: [blue].png").touch()
    told = check("dataset=folder", f"dataset.root='{root}'", f"dataset.splits={splits}")
    assert str(root) in told.splitlines()
    assert "a/:bee: [blue].png" in told
