"""The experiments' scripts, on a small tree."""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_practice import ABOUT
from trees import write_data

from metaseg.adapt import __main__ as adapt_command
from metaseg.adapt.__main__ import read_words
from metaseg.config import config_sha256, inner_config, make_update
from metaseg.data.emoji import names_of
from metaseg.episode import Batch, Episode
from metaseg.initialisation import save_initialisation
from metaseg.models import EfficientLab
from metaseg.pictures import find_labelled
from metaseg.run import run as run_config
from metaseg.sweep import recorded

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import ablations
import batchnorm
import five_images
import launchers
import learning_curves
import lr_grid
import main_table
import runs
import scaling
import update_search

SCRIPTS = [main_table, ablations, update_search, learning_curves, batchnorm, lr_grid]
Words = list[str]
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """Behind `--`: a small tree, and seconds of work."""
    words = write_data(tmp_path_factory.mktemp("data"))
    return ["debug=fast", "model.weights=null", "logger=csv", *words]


def run_here(wanted: Sequence[runs.Run], jobs: int = 1) -> list[Words]:
    """Do the runs in this process; returns the overrides of those that were not done."""
    todo = [run for run in wanted if not run.done()]
    for run in todo:
        run.folder.mkdir(parents=True, exist_ok=True)
        recorded(run_config, runs.composed(run.overrides), run.folder)
    return [run.overrides for run in todo]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Words]:
    """The overrides of what is run, as it comes."""
    seen: list[Words] = []
    for script in SCRIPTS:
        monkeypatch.setattr(script, "execute", lambda wanted, jobs: seen.extend(run_here(wanted)), raising=False)
    return seen


@pytest.fixture(scope="module")
def table(data: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a main table's runs, from which the other experiments take their initialisations."""
    folder = tmp_path_factory.mktemp("table")
    for row in ("imagenet", "random", "reptile"):
        run_here([runs.Run(row, 0, folder / f"{row}-s0", [*main_table.ROWS["emoji"][row], *data])])
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_row_an_algorithm_and_no_run_twice(data: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    words = ["--rows", "imagenet", "reptile", "--tasks", "2", "--seeds", "0", "--jobs", "2", "--out", str(out), "--"]
    main_table.main([*words, *data])
    table = {row["row"]: row for row in read(out / "main_table.csv")}
    assert list(table) == ["imagenet", "reptile"]
    difference = float(table["reptile"]["iou"]) - float(table["imagenet"]["iou"])
    assert float(table["reptile"]["gain"]) == pytest.approx(difference, abs=2e-4)
    assert table["imagenet"]["gain"] == ""
    assert table["reptile"]["tasks"] == "2"
    for name in ("main_table.png", "predictions.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 100
    about = json.loads((out / "main_table.json").read_text())
    assert about["seeds"] == [0]
    assert about["minutes_of_runs"] >= 0
    assert about["commit"] == [json.loads((out / "reptile-s0" / "results.json").read_text())["git_commit"]]

    results = {row: out / f"{row}-s0" / "results.json" for row in table}
    before = {row: path.stat().st_mtime_ns for row, path in results.items()}
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("run again"))
    main_table.main([*words, *data])
    assert {row: path.stat().st_mtime_ns for row, path in results.items()} == before
    with pytest.raises(pytest.fail.Exception, match="run again"):
        main_table.main([*words, *data, "update.steps=3"])  # another configuration is another run


@pytest.mark.slow
def test_a_failing_run_shows_its_end(data: Words, tmp_path: Path) -> None:
    words = ["--rows", "reptile", "--tasks", "2", "--out", str(tmp_path), "--", *data, "trainer.max_steps=0"]
    with pytest.raises(SystemExit, match=r"seed 0 failed \(1\)[\s\S]*trainer.max_steps=0"):
        main_table.main(words)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_every_form_names_presets_that_there_are(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Path
) -> None:
    words: list[Words] = []
    monkeypatch.setattr(
        script, "execute", lambda runs, jobs: words.extend(run.overrides for run in runs), raising=False
    )
    monkeypatch.setattr(
        script, "column", lambda row, seed, lr, chosen, steps: words.append(chosen) or [], raising=False
    )
    monkeypatch.setattr(script, "create", lambda *_, **__: None, raising=False)
    theta = [f"--main-table={table}", "--rows", "imagenet", "--seeds", "0"]
    searched = [f"--main-table={table}", "--inits", "imagenet-s0"]
    options = {main_table: [], ablations: ["--seeds", "0"], update_search: searched}.get(script, theta)
    for form in ("emoji", "fss1000"):
        with pytest.raises((FileNotFoundError, IndexError)):  # what the runs would have left
            script.main([f"--data={form}", f"--out={tmp_path / form}", *options])
        assert words
        for overrides in words:
            config = runs.composed(overrides)
            on_fss = form == "fss1000"
            assert (config.dataset._target_.split(".")[2] in ("fss1000", "fpk")) == on_fss
            assert (config.dataset.image_size == 224) == on_fss
        words.clear()


@pytest.mark.slow
def test_an_ablation_changes_network_and_training(data: Words, in_process: list[Words], tmp_path: Path) -> None:
    rows = ["6-3", "aspp"]
    ablations.main(["--rows", *rows, "--tasks=2", "--seeds=0", "--jobs=1", f"--out={tmp_path}", "--", *data])
    found = {row["row"]: row for row in read(tmp_path / "ablations.csv")}
    assert {row: found[row]["parameters"] for row in rows} == {"6-3": "1920674", "aspp": "1129506"}
    assert (tmp_path / "ablations.png").read_bytes().startswith(PNG)


def test_every_ablation_differs_from_the_others() -> None:
    made = [runs.composed([*ablations.ALGORITHM["emoji"], *words]) for words in ablations.rows("emoji").values()]
    assert len({config_sha256(config) for config in made}) == len(made)
    for config in made:
        make_update(inner_config(config))


def test_update_search_compares_on_the_test_tasks(
    data: Words, in_process: list[Words], table: Path, tmp_path: Path
) -> None:
    words = ["--inits", "reptile-s0", "--tasks=2", "--jobs=1", f"--main-table={table}", f"--out={tmp_path}"]
    few = ["uho.trials=2", "uho.random=1", "uho.steps=[1]"]
    update_search.main([*words, "--", *data, *few])
    default, found = read(tmp_path / "update_search.csv")
    assert (default["row"], found["row"]) == ("reptile-s0, default ω", "reptile-s0, ω* (UHO)")
    assert float(found["gain"]) == pytest.approx(float(found["iou"]) - float(default["iou"]), abs=2e-4)
    assert float(found["val_iou"]) >= float(default["val_iou"])  # the default is the search's first trial
    for name in ("reptile-s0-search.png", "reptile-s0-gain.png", "update_search.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert (tmp_path / "reptile-s0-update.yaml").read_text().count("lr:") == 1


def test_learning_curves_give_gains_over_imagenet(
    data: Words, in_process: list[Words], table: Path, tmp_path: Path
) -> None:
    words = ["--rows", "reptile", "imagenet", "random", "--tasks=2", f"--main-table={table}", f"--out={tmp_path}"]
    few = ["curves.k=[1,5]", "curves.queries=2", "curves.steps=[1]", "dataset.min_images=7"]
    learning_curves.main([*words, "--", *data, *few])
    found = {(row["init"], row["k"]): row for row in read(tmp_path / "summary.csv")}
    assert {init for init, _ in found} == {"reptile", "imagenet", "random"}
    for k in ("1", "5"):
        gain = float(found["reptile", k]["iou"]) - float(found["imagenet", k]["iou"])
        assert float(found["reptile", k]["gain"]) == pytest.approx(gain, abs=2e-4)
        assert float(found["imagenet", k]["gain"]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_batch_norm_policies_share_their_inner_steps(
    data: Words, in_process: list[Words], table: Path, tmp_path: Path
) -> None:
    words = ["--rows", "reptile", "--seeds=0", "--tasks=2", "--jobs=1", f"--main-table={table}", f"--out={tmp_path}"]
    batchnorm.main([*words, "--", *data])
    found = read(tmp_path / "batchnorm.csv")
    assert [row["row"] for row in found] == ["reptile, running", "reptile, support", "reptile, batch"]
    assert len({row["update_lr"] for row in found}) == 1
    assert found[0]["gain"] == ""


@pytest.mark.slow
def test_scaling_measures_and_fills_its_page(data: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Words] = []

    def here(words: Words, folder: Path, threads: int) -> None:
        done.append(words)
        folder.mkdir()
        run_config(runs.composed(words), folder)

    monkeypatch.setattr(scaling, "execute", here)
    # which a test below has; of so few steps on a busy machine it may find anything
    monkeypatch.setattr(scaling, "fit", lambda steps: {"t_outer": 0.01, "t_episode": {32: 0.1}})
    page = tmp_path / "page.md"
    page.write_text((Path(__file__).parents[1] / "docs" / "scaling.md").read_text())
    words = ["--sizes=32", "--meta-batches", "1", "2", "--steps=1", "--tasks", "3", "40", "--episodes=2", "--ranks"]
    scaling.main([*words, "--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--fill", str(page), "--", *data])
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["meta_batch"] for row in found["steps"]] == [1, 2]
    assert [row["tasks"] for row in found["tasks"]] == ["the source itself", 3, 40]
    assert found["tasks"][2]["index_bytes"] > found["tasks"][1]["index_bytes"]
    assert found["reduced_bytes"] > 4 * 1_920_674  # the parameters, and the statistics
    assert found["checkpoint"]["bytes"] > 4 * 1_920_674
    assert (tmp_path / "scaling.png").read_bytes().startswith(PNG)
    filled = page.read_text()
    assert "| 32² | 2 | 1 | 1 |" in filled
    assert filled.count("<!-- measured: ") == filled.count("<!-- end -->") == 4
    scaling.fill(page, dict.fromkeys(("meta-step", "ranks", "tasks", "loading"), "again"))
    assert "| 32² |" not in page.read_text()


def test_the_model_of_a_meta_step() -> None:
    rows = [{"size": 64, "meta_batch": m, "ranks": 1, "threads": 1, "seconds": 0.5 * m + 0.25} for m in (1, 2, 5)]
    larger = {**rows[0], "size": 96, "seconds": 1.25}
    fitted = scaling.fit([*rows, larger, {**rows[0], "threads": 2, "seconds": 99.0}])
    assert fitted["t_outer"] == pytest.approx(0.25)
    assert fitted["t_episode"] == pytest.approx({64: 0.5, 96: 1.0})
    assert scaling.model(0.5, 0.25, 10**6, meta_batch=5, ranks=1, link="1 Gbit/s Ethernet") == pytest.approx(2.75)
    # two ranks: three episodes on the one; each sends half of the bytes and then the other half's sum
    reduced = 10**6 / 0.11e9 + 2 * 100e-6
    assert scaling.model(0.5, 0.25, 10**6, 5, 2, "1 Gbit/s Ethernet") == pytest.approx(1.75 + reduced)


def test_the_grid_scores_validation_tasks_on_the_way(
    data: Words, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lr_grid.LRS, "emoji", (0.01, 0.1))
    monkeypatch.setitem(lr_grid.STEPS, "emoji", (1, 3))
    words = ["--rows", "reptile", "--tasks=2", f"--main-table={table}", f"--out={tmp_path}"]
    lr_grid.main([*words, "--", *data, "update.steps=3", "evaluate.val_tasks=2"])
    found = read(tmp_path / "lr_grid.csv")
    assert [(row["lr"], row["steps"]) for row in found] == [("0.01", "1"), ("0.01", "3"), ("0.1", "1"), ("0.1", "3")]
    assert all(row["tasks"] == "2" for row in found)
    assert (tmp_path / "lr_grid.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("second", "told"), [("0.5", None), ("0.6", "the launchers do not agree")])
def test_launchers_must_agree(second: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ious = iter(["0.5", second])
    monkeypatch.setattr(launchers, "headlines", lambda name, *_: {"launcher": name, "iou_0": next(ious), "seconds": 1})
    with pytest.raises(SystemExit) as end:
        launchers.main(["--launchers", "basic", "joblib", f"--out={tmp_path}"])
    assert told in str(end.value) if told else end.value.code == 0
    assert [row["iou_0"] for row in read(tmp_path / "launchers.csv")] == ["0.5", second]


def test_a_missing_initialisation_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"reptile-s0/init.safetensors: run experiments/main_table.py first"):
        batchnorm.main(["--rows", "reptile", "--seeds=0", f"--main-table={tmp_path}", f"--out={tmp_path}"])


def test_a_run_is_done_until_its_configuration_or_its_initialisation_changes(
    data: Words, table: Path, tmp_path: Path
) -> None:
    init = tmp_path / "init.safetensors"
    init.write_bytes((table / "reptile-s0" / "init.safetensors").read_bytes())
    run = runs.Run("a row", 0, tmp_path / "run", [*data, *runs.recommended(init)])
    assert not run.done()
    run_here([run])
    assert run.done()
    assert not replace(run, overrides=[*run.overrides, "update.steps=3"]).done()
    init.touch()
    assert not run.done()


# Five images by each way a person has


@pytest.mark.slow
def test_the_files_of_an_episode_go_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    init = tmp_path / "init.safetensors"
    save_initialisation(EfficientLab("tf_efficientnet_lite0", rsd=(16,)), replace(ABOUT, seen=None), init)
    monkeypatch.setattr(five_images, "CLASSES", 1)
    here = Console(quiet=True)
    monkeypatch.setattr(five_images, "adapt_in_shell", lambda words: adapt_command.run(read_words(words), here))
    five_images.main(["--init", str(init), "--tasks", "1", "--out", str(tmp_path / "out")])
    (row,) = read(tmp_path / "out" / "five_images.csv")
    about = json.loads((tmp_path / "out" / "five_images.json").read_text())
    assert 0 <= float(row["shell"]) <= 1
    assert about["iou_shell"] == pytest.approx(float(row["shell"]), abs=1e-3)
    assert about["drawn"] == row["task"] in names_of("test")
    for way in ("shell", "python", "onnx"):
        assert (tmp_path / "out" / f"{way}.png").read_bytes().startswith(PNG)


def test_an_episodes_iou_by_the_command_is_that_of_its_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((3, 32, 32, 3), np.uint8)
    masks = np.zeros((3, 32, 32), np.uint8)
    masks[:, :16] = 1
    support = Batch.from_numpy(images, masks)

    def finds_half(words: Words) -> None:
        """Half of the object in each image but the first, which it finds whole."""
        for i in range(3):
            found = masks[i] * np.uint8(255)
            found[8 if i else 16 :] = 0
            (tmp_path / "masks" / "masks").mkdir(parents=True, exist_ok=True)
            Image.fromarray(found).save(tmp_path / "masks" / "masks" / f"{i:02}.png")

    monkeypatch.setattr(five_images, "adapt_in_shell", finds_half)
    row = five_images.by_shell(Path("init"), Episode("task", 0, support, support), tmp_path, seed=0)
    assert row["shell"] == pytest.approx((1 + 0.5 + 0.5) / 3, abs=1e-4)
    written = [find_labelled(tmp_path / "labelled")[0][i].read()[1] for i in range(3)]
    np.testing.assert_array_equal(written, masks)
