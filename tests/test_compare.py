"""`python -m metaseg.compare`, on run folders written by hand."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metaseg.compare import compare, main, read_run, task_means
from metaseg.errors import ComparisonError, UserError
from metaseg.metrics import bootstrap_ci95

EPISODES = {"seed": 0, "queries": 5, "draws": 1, "image_size": 64, "images": 4340, "data_seed": 0}
FIVE = {"ant": 0.1, "bee": 0.3, "cat": 0.5, "dog": 0.7, "eel": 0.2}


def write_run(
    folder: Path, ious: Mapping[str, float | Sequence[float]], loss: float = 0.5, split: str = "test", **head: Any
) -> Path:
    """A run's folder with these IoUs, one a task or one a draw, and the same loss everywhere."""
    scored = {"val": None, "test": None, split: {"tasks": len(ious)}}
    known = {"algo": "reptile", "batchnorm": "support", "dataset": "emoji", "splits_sha256": "0" * 64, "shots": 5}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**known, "episodes": EPISODES, **scored, **head}))
    with (folder / "per_task.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "draw", "iou", "iou_before_adaptation", "loss"])
        for task, draws in ious.items():
            for draw, iou in enumerate([draws] if isinstance(draws, float) else draws):
                writer.writerow([task, draw, iou, 0.0, loss])
    return folder


# Numbers


def test_a_constant_difference_is_its_own_interval(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", FIVE, loss=0.9)
    b = write_run(tmp_path / "b", {task: iou + 0.125 for task, iou in FIVE.items()}, loss=0.4)
    found = compare([a], [b])
    assert (found.iou.mean, *found.iou.ci95, found.iou.better) == pytest.approx((0.125, 0.125, 0.125, 1))
    assert (found.loss.mean, *found.loss.ci95, found.loss.better) == pytest.approx((-0.5, -0.5, -0.5, 1))
    assert (found.split, found.shots, found.tasks) == ("test", 5, tuple(FIVE))


def test_two_tasks_by_hand(tmp_path: Path) -> None:
    """The differences 0.4 and −0.2 are resampled to their pairs' means: −0.2, 0.1, 0.1, 0.4, one quarter each."""
    a = write_run(tmp_path / "a", {"ant": 0.2, "bee": 0.7}, algo="finetune")
    b = write_run(tmp_path / "b", {"bee": 0.5, "ant": 0.6})  # in another order
    found = compare([a], [b])
    assert found.iou.differences == pytest.approx([0.4, -0.2])
    assert (found.iou.mean, *found.iou.ci95) == pytest.approx((0.1, -0.2, 0.4))
    assert found.iou.better == 0.5
    assert (found.a.algo, found.b.algo) == ("finetune", "reptile")
    assert (found.loss.mean, found.loss.better) == (0, 0)  # equal is not better


def test_the_other_way_round_is_the_negative(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", FIVE)
    b = write_run(tmp_path / "b", {task: 0.9 - iou**2 for task, iou in FIVE.items()})
    there, back = compare([a], [b]).iou, compare([b], [a]).iou
    assert there.differences == pytest.approx(-back.differences)
    assert there.ci95 == pytest.approx([-bound for bound in reversed(back.ci95)])


def test_pairing_takes_the_spread_of_tasks_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0.1, 0.8, 40)
    gains = rng.normal(0.05, 0.02, 40)
    tasks = [f"task_{i}" for i in range(40)]
    a = write_run(tmp_path / "a", dict(zip(tasks, difficulty.tolist(), strict=True)))
    b = write_run(tmp_path / "b", dict(zip(tasks, (difficulty + gains).tolist(), strict=True)))
    low, high = compare([a], [b]).iou.ci95
    assert (low, high) == pytest.approx(bootstrap_ci95(gains))
    alone = bootstrap_ci95(difficulty)
    assert high - low < 0.2 * (alone[1] - alone[0])
    assert low > 0


def test_draws_and_then_seeds_are_averaged_before_tasks_are_resampled(tmp_path: Path) -> None:
    episodes = {**EPISODES, "draws": 2}
    a0 = write_run(tmp_path / "a0", {"ant": [0.1, 0.3], "bee": [0.4, 0.4]}, episodes=episodes)
    a1 = write_run(tmp_path / "a1", {"ant": [0.4, 0.4], "bee": [0.6, 0.4]}, episodes=episodes)
    b = write_run(tmp_path / "b", {"ant": [0.5, 0.5], "bee": [0.2, 0.4]}, algo="fomaml", episodes=episodes)
    found = compare([a0, a1], [b])
    assert found.iou.a == pytest.approx([0.3, 0.45])
    assert found.iou.b == pytest.approx([0.5, 0.3])
    assert found.iou.mean == pytest.approx((0.2 - 0.15) / 2)
    assert found.a.folders == (a0, a1)
    assert task_means([read_run(a0), read_run(a1)], "iou") == pytest.approx({"ant": 0.3, "bee": 0.45})


def test_validation_runs_are_compared_on_validation_tasks(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, FIVE, split="val") for name in "ab")
    assert compare([a], [b]).split == "val"


# Refusals


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"dataset": "folder"}, r"other data set: emoji in .*a, folder in .*b\. .* with dataset as in the other"),
        ({"splits_sha256": "1" * 64}, r"other splits: sha256 000000000000 in .*a, sha256 111111111111 in .*b"),
        ({"shots": 1}, "other shots: 5 in .*a, 1 in .*b.* evaluate.shots"),
        ({"split": "val"}, "other split: test in .*a, val in .*b.* mode"),
        ({"episodes": {**EPISODES, "seed": 1}}, "other seed of the episodes: 0 .* evaluate.seed"),
        ({"episodes": {**EPISODES, "queries": 3}}, "other query images: 5 .* evaluate.queries"),
        ({"episodes": {**EPISODES, "draws": 2}}, "other draws: 1 .* evaluate.draws"),
        ({"episodes": {**EPISODES, "image_size": 96}}, "other image size: 64 .* dataset.image_size"),
        ({"episodes": {**EPISODES, "images": 5000}}, "other number of images: 4340 .* dataset.images_per_class"),
        ({"episodes": {**EPISODES, "data_seed": 3}}, "other seed of the data set: 0 .* dataset.seed"),
        ({"episodes": None}, "b/results.json does not say which episodes .*: run it again"),
    ],
)
def test_other_episodes_are_refused(tmp_path: Path, head: dict[str, Any], message: str) -> None:
    a, b = write_run(tmp_path / "a", FIVE), write_run(tmp_path / "b", FIVE, **head)
    with pytest.raises(ComparisonError, match=message):
        compare([a], [b])
    with pytest.raises(ComparisonError, match="mode=test ckpt_path=RUN/init.safetensors update=RUN/init.safetensors"):
        compare([a, b], [a])  # nor may a side's own runs differ


def test_other_tasks_or_draws_are_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", FIVE)
    fewer = write_run(tmp_path / "fewer", {"ant": 0.5, "bee": 0.5})
    more = write_run(tmp_path / "more", {**FIVE, "ant": [0.1, 0.2]})
    with pytest.raises(ComparisonError, match=r"3 of the episodes .*cat, draw 0; dog, draw 0.* evaluate\.test_tasks"):
        compare([a], [fewer])
    with pytest.raises(ComparisonError, match=r"1 of the episodes .*ant, draw 1\).* update=RUN/init\.safetensors"):
        compare([a], [more])


def test_a_side_has_one_algorithm(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", FIVE), write_run(tmp_path / "b", FIVE, algo="fomaml")
    with pytest.raises(ComparisonError, match=r"different algorithms \(fomaml, reptile\)"):
        compare([a], [a, b])


def test_folders_without_a_finished_run_are_refused(tmp_path: Path) -> None:
    a, unfinished = write_run(tmp_path / "a", FIVE), write_run(tmp_path / "unfinished", FIVE)
    (unfinished / "results.json").unlink()
    with pytest.raises(UserError, match=r"unfinished has no results\.json: name the folder of a run that has finished"):
        compare([a], [unfinished])
    with pytest.raises(UserError, match=r"nowhere has no results\.json and no per_task\.csv"):
        compare([tmp_path / "nowhere"], [a])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "{"),
        ("results.json", "{}"),
        ("results.json", "[]"),
        ("per_task.csv", "task,iou\nant,0.5\n"),
        ("per_task.csv", "task,draw,iou,loss\nant,0,high,0.5\n"),
        ("per_task.csv", "task,draw,iou,loss\nant,0\n"),
        ("per_task.csv", ""),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, text: str) -> None:
    a, b = write_run(tmp_path / "a", FIVE), write_run(tmp_path / "b", FIVE)
    (b / name).write_text(text)
    with pytest.raises(ComparisonError, match="run it again"):
        compare([a], [b])


# The command line


def test_the_table_says_who_is_who(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a[1]", FIVE, algo="finetune", batchnorm="running")
    b = [write_run(tmp_path / f"b{seed}", {task: iou + 0.25 for task, iou in FIVE.items()}) for seed in (0, 1)]
    main([str(a), f"{b[0]},{b[1]}"])
    printed = capsys.readouterr().out
    assert f"A: finetune, batch norm: running; {a}\n" in printed
    assert f"B: reptile, batch norm: support; {b[0]}, {b[1]}\n" in printed
    assert "B − A on the same episodes: 5 test tasks, 5 shots" in printed
    assert "IoU    0.360   0.610   +0.250   +0.250 … +0.250   100%" in printed


def test_a_folder_may_have_a_comma_in_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "algo=reptile,seed=0", FIVE)
    main([str(run), str(run)])
    assert str(run) in capsys.readouterr().out


def test_json_has_the_numbers_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", FIVE, algo="finetune", loss=0.75)
    b = write_run(tmp_path / "b", {**FIVE, "ant": 0.6, "eel": 0.1}, loss=0.25)
    main([str(a), str(b), "--json", f"{tmp_path}/new/c.json", "--plot", f"{tmp_path}/plots/c.png"])
    found = json.loads((tmp_path / "new" / "c.json").read_text())
    assert found["difference"] == "b - a"
    assert found["a"] == {"algo": "finetune", "batchnorm": "support", "runs": [str(a)]}
    assert (found["split"], found["shots"], found["tasks"]) == ("test", 5, 5)
    expected = compare([a], [b]).iou
    assert found["iou"] == {
        "a": pytest.approx(0.36),
        "b": pytest.approx(0.44),
        "difference": {"mean": pytest.approx(0.08), "ci95": pytest.approx(list(expected.ci95))},
        "better": 0.2,
    }
    assert found["loss"]["difference"] == {"mean": -0.5, "ci95": [-0.5, -0.5]}
    assert found["per_task"][0] == {"task": "ant", "iou": {"a": 0.1, "b": 0.6}, "loss": {"a": 0.75, "b": 0.25}}
    with Image.open(tmp_path / "plots" / "c.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.filterwarnings("error")
def test_a_loss_that_diverged_leaves_the_iou_comparable(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", FIVE, loss=math.inf), write_run(tmp_path / "b", FIVE, loss=math.nan)
    for one, other in ((a, b), (a, a)):
        main([str(one), str(other), "--json", f"{tmp_path}/c.json"])
        found = json.loads((tmp_path / "c.json").read_text())
        assert found["iou"]["difference"] == {"mean": 0, "ci95": [0, 0]}
        assert found["loss"]["difference"] == {"mean": None, "ci95": [None, None]}
        assert found["loss"]["a"] is None


@pytest.mark.filterwarnings("error")
def test_one_side_that_diverged(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", FIVE, loss=math.inf), write_run(tmp_path / "b", FIVE)
    found = compare([a], [b]).loss
    assert (found.mean, found.better) == (-math.inf, 1)
    assert found.numbers()["difference"] == {"mean": None, "ci95": [None, None]}


@pytest.mark.parametrize("words", [["a", "nowhere"], ["a", "a", "--plot", "c.xyz"], ["a", "a", "--json", "a"]])
def test_what_the_user_can_mend_ends_in_its_message(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", FIVE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^metaseg: .*(nowhere|c\.xyz|directory)"):
        main(words)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", FIVE)
    main([str(run), str(run)])
    assert capsys.readouterr().err == ""
    command = [sys.executable, "-m", "metaseg.compare", str(run), f"{tmp_path}/b"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("metaseg: ")
    assert "Traceback" not in refused.stderr
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "RUN_A1,RUN_A2" in capsys.readouterr().out
