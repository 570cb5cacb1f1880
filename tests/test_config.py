"""Configs: every preset composes, mistakes fail at once with a cure."""

import re
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import Trainer
from torch import nn
from torch.optim import SGD, Adam

from metaseg.adapt import Lanes
from metaseg.config import (
    ConfigError,
    check,
    check_overrides,
    config_dir,
    expand_update,
    inner_config,
    make_update,
    plain,
    trains,
)
from metaseg.errors import WeightsError
from metaseg.initialisation import About, save_initialisation
from metaseg.job import build
from metaseg.losses import SegmentationLoss
from metaseg.models import EfficientLab
from metaseg.run import main
from metaseg.update import Constant, Cosine

GROUPS = ["algo", "dataset", "update", "model", "trainer", "logger", "engine", "experiment", "debug"]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def presets(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def test_the_groups_are_the_documented_ones() -> None:
    assert sorted(path.name for path in config_dir().iterdir() if path.is_dir()) == sorted([*GROUPS, "hydra"])


@pytest.mark.parametrize(("group", "preset"), [(group, preset) for group in GROUPS for preset in presets(group)])
def test_every_preset_composes_and_is_documented(group: str, preset: str) -> None:
    config = composed(f"{group}={preset}")
    assert set(config) == set(composed())
    text = (config_dir() / group / f"{preset}.yaml").read_text()
    assert next(line for line in text.splitlines() if not line.startswith("# @package")).startswith("# ")
    make_update(config["update"])
    if trains(config):
        make_update(inner_config(config))


@pytest.mark.parametrize("preset", presets("engine"))
def test_every_engine_makes_lanes(preset: str) -> None:
    config = composed(f"engine={preset}")
    lanes = instantiate(config.engine)(EfficientLab("tf_efficientnet_lite0", (16,)), make_update(config["update"]))
    assert isinstance(lanes, Lanes)
    assert len(lanes) == 1  # on the CPU


@pytest.mark.parametrize("override", ["engine.lanes=0", "engine.precision=fp16", "evaluate.processes=0"])
def test_impossible_engines_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override):
        check(composed(override))


def test_an_inner_optimizer_that_only_the_reference_has_is_refused_elsewhere() -> None:
    adagrad = "algo.inner.optimizer._target_=torch.optim.Adagrad"
    check(composed(adagrad, "engine=reference"))
    with pytest.raises(ConfigError, match="Adagrad.*engine=reference"):
        check(composed(adagrad))


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("preset", presets("model"))
def test_every_model_has_the_parameters_that_its_header_says(preset: str) -> None:
    net = instantiate(composed(f"model={preset}", "model.weights=null").model)
    header = " ".join((config_dir() / "model" / f"{preset}.yaml").read_text().replace("\n# ", " ").split())
    said = re.search(r"([\d,]{7,}) parameters(?:; with backbone=(\S+) ([\d,]+))?", header)
    assert said, "no parameter count"
    assert size(net) == int(said[1].replace(",", ""))
    if said[2]:
        other = instantiate(composed(f"model={preset}", "model.weights=null", f"model.backbone={said[2]}").model)
        assert size(other) == int(said[3].rstrip(",").replace(",", ""))


@pytest.mark.parametrize(
    ("overrides", "b0", "lite0"),  # a decoder's share is derived by hand in test_models
    [
        (["model=efficientlab_6_3"], 2_071_714, 1_920_674),
        (["model=efficientlab_6_3", "model.residual=false"], 2_071_714, 1_920_674),
        (["model=efficientlab_3"], 1_368_242, 1_217_202),
        (["model=efficientlab_6_3", "model.rsd=[16]"], 1_555_506, 1_404_466),
        (["model=deeplab_aspp"], 1_280_546, 1_129_506),
        (["model=deeplab_v3plus"], 1_556_690, 1_405_650),
    ],
)
def test_parameters_of_the_ablations(overrides: list[str], b0: int, lite0: int) -> None:
    check_overrides(overrides)
    sizes = [
        size(instantiate(composed(*overrides, "model.weights=null", f"model.backbone={name}").model))
        for name in ("tf_efficientnet_b0", "tf_efficientnet_lite0")
    ]
    assert sizes == [b0, lite0]


def test_without_residual_the_graph_is_another() -> None:
    nets = [
        instantiate(composed("model.weights=null", f"model.residual={residual}").model) for residual in (True, False)
    ]
    nets[1].load_state_dict(nets[0].state_dict())  # as many parameters, of the same names
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = [net.eval()(images) for net in nets]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("update.dropout=0.1", "dropout", 0.1),
        ("update.weight_decay=0.01", "weight_decay", 0.01),
        ("update.l1=0.001", "l1", 0.001),
        ("update.loss.label_smoothing=0.1", "loss", SegmentationLoss(label_smoothing=0.1)),
        ("update.loss.darc1=0.01", "loss", SegmentationLoss(darc1=0.01)),
    ],
)
def test_regularisers_reach_omega_and_training(override: str, field: str, value: object) -> None:
    check_overrides([override])
    config = composed(override)
    assert getattr(make_update(config["update"]), field) == value
    assert getattr(make_update(inner_config(config)), field) == value
    assert getattr(make_update(composed()["update"]), field) != value


@pytest.mark.parametrize("preset", [preset for preset in presets("trainer") if preset != "gpu"])
def test_every_trainer_is_one(preset: str) -> None:
    trainer = instantiate(composed(f"trainer={preset}").trainer, logger=False, enable_progress_bar=False)
    assert isinstance(trainer, Trainer)
    assert trainer.max_steps == 60


def test_training_adapts_with_omega_but_for_what_the_algorithm_says() -> None:
    config = composed("algo=reptile", "update=sgd_cosine", "update.dropout=0.1", "algo.inner.steps=3")
    inner, update = make_update(inner_config(config)), make_update(config["update"])
    assert (inner.steps, inner.lr, inner.dropout) == (3, 0.05, 0.1)
    assert isinstance(inner.schedule, Constant)
    assert isinstance(update.schedule, Cosine)
    assert update.steps == config["update"].steps


def test_another_inner_optimizer_comes_without_the_first_ones_arguments() -> None:
    inner = make_update(inner_config(composed("algo=joint", "update=adam")))
    assert inner.optimizer.func is SGD
    assert inner.optimizer.keywords == {}
    assert isinstance(inner.schedule, Constant)
    assert make_update(composed("update=adam")["update"]).optimizer.func is Adam


@pytest.mark.parametrize("preset", presets("update"))
def test_the_update_procedure_that_an_initialisation_recommends_can_be_chosen(preset: str, tmp_path: Path) -> None:
    wanted = plain(composed(f"update={preset}", "update.lr=0.003", "update.adapts=head")["update"])
    about = About({}, "reptile", "emoji", "0" * 64, seed=0, meta_steps=3, update=wanted)
    save_initialisation(nn.Conv2d(1, 1, 1), about, tmp_path / "init.safetensors")
    words = expand_update([f"update={tmp_path}/init.safetensors", "update.dropout=0.1"])
    check_overrides(words)
    found = composed(*words)["update"]
    assert plain(found) == {**wanted, "dropout": 0.1}
    make_update(found)


def test_a_file_without_a_recommendation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        expand_update([f"update={tmp_path}/init.safetensors"])
    (tmp_path / "init.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="no initialisation that metaseg wrote"):
        expand_update([f"update={tmp_path}/init.safetensors"])
    about = About({}, "reptile", "emoji", "0" * 64, seed=0, meta_steps=3, update={})
    save_initialisation(nn.Conv2d(1, 1, 1), about, tmp_path / "init.safetensors")
    with pytest.raises(ConfigError, match="holds no update procedure"):
        expand_update([f"update={tmp_path}/init.safetensors"])


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [
        ("updat.lr=0.1", "update.lr"),
        ("update.lrr=0.1", "update.lr"),
        ("trainer.max_step=3", "trainer.max_steps"),
        ("dataset.imagesize=64", "dataset.image_size"),
        ("evaluate.test_task=3", "evaluate.test_tasks"),
        ("datset=emoji", "dataset"),
        ("sed=1", "seed"),
    ],
)
def test_a_mistyped_override_names_the_nearest_key(mistyped: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean .*{nearest}"):
        check_overrides([mistyped])


@pytest.mark.parametrize(
    "right",
    [
        ["algo=fomaml_star", "algo.method.tail=3"],
        ["dataset=folder", "dataset.splits=a.json", "dataset.root=x"],
        ["-m", "algo=reptile,joint", "update.lr=0.1,0.2", "seed=range(3)"],
        ["++algo.inner.augment=0.0", "+algo.inner.augment=0", "hydra.run.dir=x", "hydra/launcher=basic"],
        ["debug=fast", "experiment=paper_fomaml_star"],
    ],
)
def test_right_overrides_pass(right: list[str]) -> None:
    check_overrides(right)


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["mode=tset"], "choose fit_test, fit, test, uho, search, curves"),
        (["mode=test"], "needs ckpt_path=PATH"),
        (["mode=fit", "algo=finetune"], "nothing to fit"),
        (["mode=test", "ckpt_path=/no/such.ckpt"], "no such file"),
        (["algo=finetune", f"ckpt_path={__file__}"], "add mode=test"),
        ([f"ckpt_path={__file__}"], "resume from a .ckpt"),
        (["dataset.image_size=50"], "multiple of 16"),
        (["evaluate.shots=0"], "evaluate.shots=0: give 1 or more"),
        (["evaluate.test_tasks=0"], "null for all tasks"),
        (["evaluate.rungs=[5,2]"], "or \\[\\] for none"),
        (["evaluate.rungs=5"], "give ascending steps from 1"),
        (["evaluate.rungs=null"], "give ascending steps from 1"),
        (["evaluate.lrs=[]"], "null to test update.lr"),
        (["evaluate.lrs=0.05"], "give a list of numbers"),
        (["update.lr=abc"], "update.lr=abc: give a number"),
        (["dataset=fss1000"], "dataset.root has no value: give dataset.root=…"),
        (["algo.outer.lr=0"], "algo.outer.lr=0: give a number above 0"),
        (["checkpoint_every=0"], "give 1 or more meta-steps"),
        (["evaluate.lrs=[0.1,0]"], "above 0"),
        (["workers=-1"], "give 0 or more"),
        (["trainer.max_steps=0"], "algo=finetune"),
        (["algo.meta_batch=0"], "algo.meta_batch=0: give 1 or more"),
        (["trainer.devices=2"], "trainer.devices=1"),
        (["update.lr=0"], "update.lr=0: give a number above 0"),
        (["update.steps=0"], "update.steps=0: give 1 or more"),
        (["update.l1=-1"], "update.l1=-1: give 0 or more"),
        (["update.l1=abc"], "update.l1=abc: give a number"),
        (["update.loss.darc1=-1"], "update.loss.darc1=-1: give 0 or more"),
        (["update.loss.darc1=abc"], "update.loss.darc1=abc: give a number"),
        (["update.loss.label_smoothing=1"], "update.loss.label_smoothing=1: give 0 or more, below 1"),
        (["update.loss=abc"], "update.loss=abc: give a loss with its _target_"),
        (["update.loss=null"], "update.loss=None: give a loss with its _target_"),
        (["+algo.inner.loss.darc1=0.1"], "algo.inner.loss={'darc1': 0.1}: give a loss with its _target_"),
        (["update.batchnorm=none"], "running"),
        (["update.adapts=everything"], "decoder"),
        (["+algo.inner.step=3"], "did you mean steps"),
        (["algo.inner.lr=-1"], "algo.inner.lr=-1: give a number above 0"),
        (["uho.trials=abc"], "uho.trials=abc: give a whole number, 1 or more"),
        (["uho.random=2.5"], "uho.random=2.5: give a whole number, 1 or more"),
        (["evaluate.shots=abc"], "evaluate.shots=abc: give a whole number, 1 or more"),
        (["evaluate.shots=null"], "evaluate.shots=None: give a whole number, 1 or more"),
        (["evaluate.shots=true"], "evaluate.shots=True: give a whole number, 1 or more"),
        (["evaluate.train_tasks=abc"], "train_tasks=abc: give a whole number, 0 or more, or null for all tasks"),
        (["evaluate.val_tasks=2.5"], "val_tasks=2.5: give a whole number, 1 or more, or null for all tasks"),
        (["evaluate.processes=abc"], "give a whole number, 1 or more, or null for one a thread"),
        (["evaluate.lrs=[true]"], "give a list of numbers"),
        (["engine.lanes=abc"], "engine.lanes=abc: give a whole number"),
        (["workers=abc"], "workers=abc: give a whole number, 0 or more"),
        (["checkpoint_every=abc"], "checkpoint_every=abc: give a whole number, 1 or more meta-steps"),
        (
            ["trainer.max_steps=abc"],
            "trainer.max_steps=abc: give a whole number, 1 or more meta-steps, or algo=finetune",
        ),
        (["algo.meta_batch=2.5"], "algo.meta_batch=2.5: give a whole number"),
        (["algo.outer.lr=abc"], "algo.outer.lr=abc: give a number above 0"),
        (["dataset.image_size=abc"], "dataset.image_size=abc: give a multiple of 16"),
        (["mode=curves", "curves.queries=null"], "curves.queries=None: give a whole number, 1 or more"),
        (["mode=curves", "curves.inits=foo"], "name them, as 'curves.inits="),
        (["update.lr=null"], "update.lr=None: give a number"),
        (["update.steps=2.5"], "update.steps=2.5: give 1 or more, a whole number"),
        (["update.batch_size=2.5"], "update.batch_size=2.5: give 1 or more, a whole number"),
        (["update.schedule=foo"], "update.schedule=foo: give one with its _target_"),
        (["mode=uho", "algo=finetune", "update.schedule=null"], "update.schedule=None: give one with its _target_"),
        (["update.optimizer=null"], "update.optimizer=None: give one with its _target_"),
        (["update.stopping=true"], "update.stopping=True: give null, or a rule with its _target_"),
        (["update.stopping={share: 0.2}"], "update.stopping={'share': 0.2}: give null, or a rule with its _target_"),
        (["algo.inner.steps=2.5"], "algo.inner.steps=2.5: give 1 or more, a whole number"),
        (["update.lr=inf"], "update.lr=inf: give a number"),
        (["update.weight_decay=nan"], "update.weight_decay=nan: give a number"),
        (["algo.outer.lr=nan"], "algo.outer.lr=nan: give a number above 0"),
        (["algo.outer.lr=1e39"], "algo.outer.lr=1e\\+39: give a number above 0"),
        (["algo.final_lr=-1"], "algo.final_lr=-1: give 0 or more"),
        (["max_dropped=1.5"], "max_dropped=1.5: give a share of the episodes, from 0 to 1"),
        (["max_dropped=null"], "max_dropped=None: give a share of the episodes"),
        (["uho.steps=[true]"], "uho.steps=\\[True\\]: give ascending steps from 1"),
        (["seed=20000000000000000000"], "seed=2\\d+: give less than 2\\*\\*63"),
        (["algo.name=[1]"], "algo.name=\\[1\\]: give a name"),
        (["+algo.outer.nestrov=true"], "algo.outer cannot take a meta-step .*nestrov"),
        (["+algo.outer.momentum=nan"], "algo.outer cannot take a meta-step .*NaN of numbers"),
        (["+algo.outer.weight_decay=-1"], "algo.outer cannot take a meta-step .*weight_decay"),
        (["algo.outer._target_=torch.optim.LBFGS"], "algo.outer cannot take a meta-step .*closure.*as torch.optim.SGD"),
        (["algo=joint", "algo.outer._target_=torch.optim.Adan"], "algo.outer cannot take a meta-step .*Adan"),
        (["trainer.profiler=banana"], "trainer cannot be made of these values: .*profiler"),
        (["trainer.accelerator=banana"], "trainer cannot be made of these values: .*accelerator"),
        (["+trainer.max_stepss=5"], "trainer cannot be made of these values: .*max_stepss"),
        (["trainer.log_every_n_steps=banana"], "trainer.log_every_n_steps=banana: give a whole number"),
        (["trainer.log_every_n_steps=-1"], "trainer.log_every_n_steps=-1: give 0 or more meta-steps, or null"),
        (["logger.tags=night"], "logger.tags=night: give a list of texts"),
        (["logger.tags=[5]"], "logger.tags=\\[5\\]: give a list of texts"),
        (["logger.project=[1]"], "logger.project=\\[1\\]: give a text"),
    ],
)
def test_impossible_combinations_are_refused_with_a_cure(overrides: list[str], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        check(composed(*overrides))


def test_possible_combinations_pass() -> None:
    own = ["trainer.log_every_n_steps=null", "+trainer.callbacks=[{_target_: pytorch_lightning.callbacks.Timer}]"]
    for overrides in ([], ["algo=finetune"], ["algo=joint"], ["mode=test", "algo=finetune"], ["debug=fast"], own):
        check(composed(*overrides))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="use trainer=cpu"):
        check(composed("trainer=gpu"))


def test_the_command_line_fails_at_once_on_a_mistyped_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["metaseg", "udpate.lr=0.1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, str)  # which the interpreter prints, and ends with 1
    assert re.match(r"metaseg: there is no key 'udpate.lr'; did you mean update.lr", end.value.code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.backbone=tf_efficentnet_b0", "timm has no such model; did you mean tf_efficientnet_b0"),
        ("model.backbone=5", "model.backbone=5: timm has no such model"),
        ("model.rsd=4", "metaseg.models.EfficientLab cannot be made of .*'rsd': 4.*TypeError: 'int' object is not"),
        ("model._target_=metaseg.models.EfficientLap", "cannot be made of .*EfficientLap"),
        ("algo.method.shots=abc", "algo.method.shots=abc: give 1 or more, a whole number"),
        ("dataset.images_per_class=abc", "metaseg.data.emoji.EmojiSource cannot be made of .*TypeError"),
        ("seed=abc", "seed=abc: give a whole number"),
        ("algo.outer=null", "algo.outer=None: it holds values of its own; change them one by one"),
        ("evaluate=5", "evaluate=5: it holds values of its own"),
        ("model.residual=no", "model.residual=no: give true or false"),
        ("model.drop_path=2", "model.drop_path=2: give a rate from 0 to below 1"),
        (
            "update.batch_size=100000000",
            "could not be read again: its update asks for .* of 32², more than memory",
        ),
        ("mode=uho algo=finetune uho.steps=[9,9000000]", "update asks for 144000000 images of 32².*: lower its steps"),
        ("model.drop_path=abc", "EfficientLab cannot be made of .*TypeError"),
    ],
)
def test_values_of_a_wrong_kind_are_named_without_a_traceback(override: str, said: str, tmp_path: Path) -> None:
    small = [
        "dataset.classes=9",
        "dataset.images_per_class=10",
        "dataset.image_size=32",
        f"dataset.cache_dir={tmp_path}",
    ]
    with pytest.raises(ConfigError, match=said):
        build(composed("trainer=cpu", "model.weights=null", *small, *override.split(" ")))
