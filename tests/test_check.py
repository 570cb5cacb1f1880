"""`python -m metaseg.check`."""

import subprocess
import sys
from pathlib import Path

from trees import write_splits, write_tree


def check(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "metaseg.check", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_sound_and_a_broken_data_set_are_reported(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    root = write_tree(tmp_path / "tree", names)
    splits = write_splits(tmp_path / "splits.json", ["a"], ["b"], ["c"])
    overrides = ["dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}"]
    done = check(tmp_path, *overrides)
    assert done.returncode == 0
    assert "folder at 224²" in done.stdout
    assert "train: 1 of 1 classes, 10 images" in done.stdout
    (root / "a" / "3.png").unlink()
    done = check(tmp_path, *overrides)
    assert done.returncode == 1
    assert "3.jpg" in done.stderr
    done = check(tmp_path, *overrides, "dataset.min_images=9")
    assert done.returncode == 0
    assert "1 × image without a mask" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "splits.json"}  # looking leaves nothing behind
