"""Learning curves: one set of queries and nested supports for all initialisations, and what the mode leaves."""

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_run import results
from test_uho import composed
from trees import write_splits, write_tree

from metaseg.config import check
from metaseg.errors import ConfigError, DataError
from metaseg.run import run

CLASSES = [f"class_{i}" for i in range(5)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = write_tree(tmp_path_factory.mktemp("tree"), CLASSES)
    splits = write_splits(root / "splits.json", CLASSES[:2], CLASSES[2:3], CLASSES[3:])
    return (
        *(
            "dataset=folder",
            f"dataset.root={root}",
            f"dataset.splits={splits}",
            "debug=fast",
            "model.rsd=[16]",
            "logger=csv",
        ),
        *("model.weights=null", "trainer=cpu", "evaluate.processes=1"),
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_curves_of_two_initialisations(words: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run(composed(*words, "algo=reptile", "update.lr=0.02"), folder)
    settings = ["mode=curves", "curves.k=[1,3,7]", "curves.queries=2", "curves.draws=2", "curves.steps=[1]"]
    settings += ["curves.baseline=scratch"]
    config = composed(*words, *settings, f"curves.inits={{ours:{folder}/init.safetensors,scratch:random}}")
    value = run(config, tmp_path)
    found = rows(tmp_path / "curves.csv")
    assert len(found) == 2 * 3 * 2 * 2  # initialisations, shots, tasks, draws
    assert {(row["init"], row["lr"]) for row in found} == {("ours", "0.02"), ("scratch", "0.05")}
    assert {int(row["steps_to_95"]) for row in found} <= {0, 1, 2}
    summary = rows(tmp_path / "summary.csv")
    assert [(row["init"], int(row["k"])) for row in summary] == [(i, k) for i in ("scratch", "ours") for k in (1, 3, 7)]
    ours = [float(row["iou"]) for row in found if (row["init"], row["k"]) == ("ours", "7")]
    assert value == pytest.approx(sum(ours) / 4)
    assert float(summary[5]["iou"]) == pytest.approx(value)
    assert float(summary[5]["gain"]) == pytest.approx(value - float(summary[2]["iou"]))
    assert results(tmp_path)["curves"][5]["iou"] == pytest.approx(value)
    inits = results(tmp_path)["inits"]
    assert (inits["ours"]["algo"], inits["scratch"]) == ("reptile", "random")
    assert results(tmp_path)["episodes"]["k"] == [1, 3, 7]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500


def test_too_few_images_for_the_most_shots_fail_before_any_work(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an episode needs 420 different images"):
        run(composed(*words, "mode=curves", "curves.inits={a:random}"), tmp_path)
    assert not (tmp_path / "curves.csv").exists()


def test_a_learning_rate_is_not_lent_to_another_optimizer(words: tuple[str, ...], tmp_path: Path) -> None:
    run(composed(*words, "algo=finetune"), tmp_path)
    settings = ["mode=curves", "curves.k=[1]", "curves.queries=2", f"curves.inits={{ours:{tmp_path}/init.safetensors}}"]
    with pytest.raises(ConfigError, match=r"a learning rate for torch.optim.SGD: give the update=… of that"):
        run(composed(*words, *settings, "update=adam"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "name them, as .curves.inits="),
        (["curves.inits={a:nowhere.safetensors}"], "curves.inits.a=nowhere.safetensors: there is no such file"),
        (["curves.inits={a:random}", "evaluate.lrs=[0.1]"], "leave ckpt_path and evaluate.lrs null"),
        (["curves.inits={a:random}", "curves.k=[5,1]"], "ascending"),
        (["curves.inits={a:random}", "curves.queries=0"], "curves.queries=0: give 1 or more"),
        (["curves.inits={a:random}", "curves.tasks=0"], "curves.tasks=0"),
        (["curves.inits={a:random}", "curves.baseline=b"], "curves.baseline=b is none of curves.inits: a"),
    ],
)
def test_impossible_curves_are_refused(overrides: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(composed("mode=curves", *overrides))
