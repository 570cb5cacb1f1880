"""The main table's script, on a small tree."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from trees import write_splits, write_tree

SCRIPT = Path(__file__).parents[1] / "experiments" / "main_table.py"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    names = [f"class_{i}" for i in range(6)]
    root = write_tree(tmp_path / "tree", names)
    splits = write_splits(tmp_path / "splits.json", names[:2], names[2:4], names[4:])
    rows = ["--rows", "imagenet", "reptile", "--tasks", "2", "--seeds", "0", "--jobs", "2", "--out", f"{tmp_path}/out"]
    data = ["dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}", "dataset.image_size=32"]
    return [*rows, "--", "debug=fast", "model.weights=null", "logger=csv", *data]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_row_an_algorithm_and_no_run_twice(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(words, monkeypatch)
    out = tmp_path / "out"
    with (out / "main_table.csv").open() as file:
        table = {row["row"]: row for row in csv.DictReader(file)}
    assert list(table) == ["imagenet", "reptile"]
    difference = float(table["reptile"]["iou"]) - float(table["imagenet"]["iou"])
    assert float(table["reptile"]["gain"]) == pytest.approx(difference, abs=2e-4)
    assert table["reptile"]["tasks"] == "2"
    for name in ("main_table.png", "predictions.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 100

    results = {row: out / f"{row}-s0" / "results.json" for row in table}
    before = {row: path.stat().st_mtime_ns for row, path in results.items()}
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("run again"))
    run(words, monkeypatch)
    assert {row: path.stat().st_mtime_ns for row, path in results.items()} == before
    with pytest.raises(pytest.fail.Exception, match="run again"):
        run([*words, "update.steps=3"], monkeypatch)  # another configuration is another run


def test_a_failing_run_shows_its_end(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"seed 0 failed \(1\)[\s\S]*trainer.max_steps=0"):
        run([*words, "trainer.max_steps=0"], monkeypatch)
