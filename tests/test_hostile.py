"""Files that may come from anywhere, made to do harm: nothing of them is run, and each ends in a message with a cure.

Archives have tests of their own, in test_archive.py.
"""

import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from markdown_it import MarkdownIt
from markdown_it.token import Token
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution
from safetensors.torch import save_file
from scipy.io import savemat
from test_compare import write_run
from test_practice import ABOUT, MODEL, UPDATE
from torch import Tensor, nn
from trees import write_data

import metaseg
from metaseg import export, ship
from metaseg.adapt import __main__ as adapt_command
from metaseg.adapt.output import Output
from metaseg.app import __main__ as app_command
from metaseg.card import write_card
from metaseg.checkpoints import BestCheckpoint, CheckpointFiles
from metaseg.compare import compare, print_table, read_run, write_plot
from metaseg.config import config_dir, expand_update, make_update
from metaseg.dashboard import SECTIONS, write_page
from metaseg.dashboard import main as dashboard_command
from metaseg.data import pascal
from metaseg.data.folder import read_splits
from metaseg.data.shards import ShardSource
from metaseg.errors import ComparisonError, ConfigError, DataError, UserError, WeightsError, printable
from metaseg.initialisation import check_resumable, read_about, read_network, save_initialisation
from metaseg.job import build, fingerprint
from metaseg.models import EfficientLab
from metaseg.models.weights import read_weights
from metaseg.page import find
from metaseg.run import main as run_command
from metaseg.run import run
from metaseg.search import search
from metaseg.study import open_storage, open_study
from metaseg.summary import Row, draw, read_job, summarise
from metaseg.sweep import read_outcome
from metaseg.texts import read_csv
from metaseg.trust import OPTIMIZERS, PARTS


class Trap:
    """Makes a folder where it is unpickled; Hydra makes one of `harmful`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def harmful(trace: Path) -> dict[str, Any]:
    return {"_target_": "os.mkdir", "path": str(trace)}  # which Hydra itself does not refuse


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Where a folder would be, had anything been run."""
    return tmp_path / "trace"


@pytest.fixture(scope="module")
def net() -> EfficientLab:
    torch.manual_seed(0)
    return EfficientLab("tf_efficientnet_lite0", rsd=(16,), drop_path=0.0)


TINY = nn.Linear(1, 1)  # in files that are refused before a network is made


def save_checkpoint(net: nn.Module, about: Any, path: Path, **more: Any) -> Path:
    """What is read of a run's checkpoint."""
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    checkpoint = {"state_dict": state, "hyper_parameters": {"about": about}, "global_step": 3, "callbacks": {}}
    torch.save(checkpoint | more, path)
    return path


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# Pickles in place of weights


def as_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def as_tar(content: Any, path: Path) -> None:
    """Torch's before 0.1.10, whose three parts are pickles."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


FORMS: dict[str, Callable[[Any, Path], None]] = {
    "torch": torch.save,
    "old": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": as_pickle,
    "tar": as_tar,
}


@pytest.mark.parametrize("form", FORMS)
def test_code_in_a_torch_file_is_not_run(tmp_path: Path, trace: Path, form: str) -> None:
    """Beside sound tensors, as a checkpoint and as weights; nor is a whole module made."""
    path = tmp_path / "evil.ckpt"
    tensors = {"state_dict": {"net.head.weight": torch.zeros(1)}, "global_step": 1}
    FORMS[form]({**tensors, "hyper_parameters": {"about": Trap(trace)}}, path)
    with pytest.raises(WeightsError, match="is no checkpoint that metaseg wrote: .*; give the init.safetensors of a"):
        read_about(path)
    with pytest.raises(WeightsError, match="cannot be read as weights .*: fetch it again, or give another"):
        read_weights(path)
    FORMS[form](nn.Conv2d(1, 1, 1), path)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_weights(path)
    assert not trace.exists()
    if form != "tar":  # which torch would take apart first
        FORMS[form](Trap(trace), path)
        torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
        assert trace.exists()  # the trap does work


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_is_not_run(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "script.pt")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_weights(tmp_path / "script.pt")


def test_the_message_does_not_say_how_to_have_the_code_run(tmp_path: Path, trace: Path) -> None:
    """Torch's does."""
    torch.save(Trap(trace), tmp_path / "evil.ckpt")
    with pytest.raises(WeightsError, match="holds code beside tensors and names; nothing of it was run") as caught:
        metaseg.load(tmp_path / "evil.ckpt")
    assert "weights_only" not in str(caught.value)
    assert "add_safe_globals" not in str(caught.value)


# Every way in


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_data(tmp_path_factory.mktemp("data"))


def composed(*words: str) -> DictConfig:
    quick = ("debug=fast", "model.weights=null", "trainer=cpu", "logger=csv", "update=sgd", "model.rsd=[16]")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=[*quick, *words])


def job(*words: str) -> Callable[[Path, Sequence[str]], None]:
    return lambda path, data: run(composed(*data, *(word.format(path) for word in words)), path.parent / "out")


def command(main: Callable[[], None], *words: str) -> Callable[[Path, Sequence[str]], None]:
    """A command line, which ends in exit code 1 and a message."""

    def call(path: Path, data: Sequence[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["", *(word.format(path, path.parent) for word in words)])
            main()

    return call


INTO_RUNS = {
    "mode=test": job("mode=test", "ckpt_path={}"),
    "mode=uho": job("mode=uho", "ckpt_path={}"),
    "mode=curves": job("mode=curves", "curves.inits={{a:{}}}", "curves.k=[1]"),
}
INTO_PRACTICE = {
    "metaseg.load": lambda path, data: metaseg.load(path),
    "metaseg.adapt": command(adapt_command.main, "init={0}", "support={1}/in", "query={1}/in", "out={1}/masks"),
    "metaseg.export": command(export.main, "{0}", "{1}/model.onnx"),
    "metaseg.app": command(app_command.main, "--init", "{0}"),
}
TAKING_CHECKPOINTS = {
    **INTO_RUNS,
    **INTO_PRACTICE,
    "resume": job("algo=reptile", "ckpt_path={}"),
    "ckpt_path=last": job("algo=reptile", "ckpt_path=last"),
    "model.weights": job("algo=reptile", "model.weights={}"),
}
TAKING_SAFETENSORS = {
    **INTO_RUNS,
    **INTO_PRACTICE,
    "model.weights": TAKING_CHECKPOINTS["model.weights"],
    "update=FILE": command(run_command, "update={0}"),
    "adapt's update=FILE": command(adapt_command.main, "update={0}", "support={1}/in", "out={1}/masks"),
}


def refused(call: Callable[[Path, Sequence[str]], None], path: Path, data: Sequence[str]) -> str:
    """The message; on the disk around the file, which is a run's last checkpoint as well, nothing has changed."""
    for name in ("in", "out/checkpoints"):
        (path.parent / name).mkdir(parents=True)
    (path.parent / "out" / "results.json").write_text("of an earlier run")
    (path.parent / "out" / "checkpoints" / "last.ckpt").write_bytes(path.read_bytes())
    before = everything(path.parent)
    with pytest.raises((UserError, SystemExit)) as caught:
        call(path, data)
    assert everything(path.parent) == before
    if isinstance(caught.value, UserError):
        return str(caught.value)
    assert str(caught.value.code).startswith("metaseg: ")  # which is printed alone, and makes the exit code 1
    return str(caught.value.code)


@pytest.mark.parametrize("way", TAKING_CHECKPOINTS)
def test_a_checkpoint_with_code_in_it_is_refused_wherever_one_is_taken(
    tmp_path: Path, trace: Path, data: list[str], way: str
) -> None:
    path = save_checkpoint(TINY, asdict(ABOUT), tmp_path / "evil.ckpt", code=Trap(trace))
    assert "holds code beside tensors and names; nothing of it was run" in refused(TAKING_CHECKPOINTS[way], path, data)
    assert not trace.exists()


@pytest.mark.parametrize("way", TAKING_SAFETENSORS)
def test_a_pickle_that_is_called_safetensors_is_refused_wherever_one_is_taken(
    tmp_path: Path, trace: Path, data: list[str], way: str
) -> None:
    path = tmp_path / "evil.safetensors"
    torch.save({"head.weight": torch.zeros(1), "code": Trap(trace)}, path)
    message = refused(TAKING_SAFETENSORS[way], path, data)
    assert "is no initialisation that metaseg wrote" in message or "cannot be read as weights" in message
    assert not trace.exists()


@pytest.mark.parametrize("way", [way for way in TAKING_SAFETENSORS if way != "model.weights"])  # which reads no names
def test_a_file_that_names_code_is_refused_wherever_one_is_taken(
    tmp_path: Path, trace: Path, data: list[str], way: str
) -> None:
    """Runs compare the network with their own, and have an ω of their own."""
    spoilt: dict[str, Any] = {"model": {**MODEL, "drop_path": harmful(trace)}}
    if way not in INTO_RUNS:
        spoilt["update"] = {**UPDATE, "loss": harmful(trace)}
    path = tmp_path / "evil.safetensors"
    save_initialisation(TINY, replace(ABOUT, **spoilt), path)
    message = refused(TAKING_SAFETENSORS[way], path, data)
    told = "holds another network than model=" if way in INTO_RUNS else "asks for os.mkdir, which is neither metaseg's"
    assert told in message
    assert not trace.exists()


def test_hydra_would_make_it(trace: Path) -> None:
    """The trap works."""
    instantiate({"_target_": "collections.OrderedDict", "a": [{"b": harmful(trace)}]})
    assert trace.exists()


def test_what_names_code_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASEG_CACHE", str(tmp_path / "cache"))
    results = {"meta_steps": 3, "dataset": "", "splits_sha256": "", "episodes": {}, "shots": 5}
    (tmp_path / "results.json").write_text(json.dumps({**results, "val": {"iou": {"mean": 1}, "tasks": 2}}))
    save_initialisation(TINY, replace(ABOUT, update={**UPDATE, "loss": harmful(tmp_path)}), tmp_path / ship.NAME)
    with pytest.raises(SystemExit, match=r"^metaseg: .* asks for os.mkdir"):
        ship.main([str(tmp_path)])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("mean", [10**400, "0.5", float("nan")], ids=["huge", "text", "none"])
def test_what_has_no_iou_is_not_shipped(tmp_path: Path, mean: Any) -> None:
    results = {"meta_steps": 3, "dataset": "", "splits_sha256": "", "episodes": {}, "shots": 5}
    (tmp_path / "results.json").write_text(json.dumps({**results, "val": {"iou": {"mean": mean}, "tasks": 2}}))
    with pytest.raises(DataError, match="holds no finished run"):
        ship.ship([tmp_path])


# What a file can have made: the list, and nothing else


def test_the_list_is_short_and_all_on_it_are_parts_of_a_network_or_of_omega() -> None:
    """Each is a class of metaseg's or an optimizer of torch's, and no callable goes into one."""
    assert {name for place, names in PARTS.items() if place != "update.optimizer" for name in names} == {
        *("metaseg.models.EfficientLab", "metaseg.models.DeepLab", "metaseg.update.Update"),
        *("metaseg.update.Constant", "metaseg.update.Cosine", "metaseg.update.Step", "metaseg.update.EarlyStopping"),
        "metaseg.losses.SegmentationLoss",
    }
    assert {"torch.optim.SGD", "torch.optim.Adam", "torch.optim.sgd.SGD"} <= OPTIMIZERS
    for name in OPTIMIZERS:
        found = getattr(torch.optim, name.rpartition(".")[2])
        assert issubclass(found, torch.optim.Optimizer)
        assert name in (f"torch.optim.{found.__name__}", f"{found.__module__}.{found.__name__}")


def test_what_the_presets_configure_is_on_the_list() -> None:
    presets = [path.read_text() for group in ("update", "model") for path in (config_dir() / group).glob("*.yaml")]
    configured = {name for text in presets for name in re.findall(r"^ *_target_: (\S+)$", text, re.MULTILINE)}
    assert len(configured) > 5
    assert configured <= {name for names in PARTS.values() for name in names}


SGD = UPDATE["optimizer"]
NAMES = {  # that a `_target_` may not have, by the part of ω
    "optimizer": [
        *("os.system", "builtins.eval", "torch.optim.nothing", "torch.optim.Optimizer", " torch.optim.SGD"),
        *("torch.optim.lr_scheduler.LambdaLR", "torch.optim.swa_utils.AveragedModel", "metaseg.models.EfficientLab"),
        *("torch.load", "torch.hub.load", "torch.optim.sgd.torch.load", ["torch.optim.SGD"], None, {"a": 1}),
    ],
    "schedule": ["metaseg.update.replace", "metaseg.update.generator", "metaseg.update.batchnorm_parameters"],
    "loss": ["metaseg.losses", "metaseg.losses.soft_iou", "metaseg.losses.SegmentationLoss.__call__", "os.system"],
    "stopping": ["metaseg.config.Path", "metaseg.update.Update", "metaseg.models.backbone.Path"],
}
STRANGE: dict[str, tuple[Any, str]] = {  # in an update, and what the file is said to ask for
    **{f"{part}: {name}": ({part: {**SGD, "_target_": name}}, str(name)) for part in NAMES for name in NAMES[part]},
    "no update": ({"_target_": "metaseg.losses.SegmentationLoss"}, "metaseg.losses.SegmentationLoss"),
    "an option of an optimizer": ({"optimizer": {**SGD, "maximize": "TRAP"}}, "os.mkdir"),
    "deep inside": ({"stopping": [[{"a": [{"b": "TRAP"}]}]]}, "os.mkdir"),
    "a trusted one in another's place": ({"dropout": [{"_target_": "torch.optim.SGD"}]}, "torch.optim.SGD"),
    "a key with a dot": ({"loss._target_": "os.mkdir"}, "loss._target_ in update"),
    "a key with more in it": ({"lr=0.1 +x": 1}, "lr=0.1 +x in update"),
    "an empty key": ({"": 1}, " in update"),
    "arguments": ({"schedule": {"_target_": "metaseg.update.Cosine", "_args_": [1]}}, "_args_ in update.schedule"),
    "no recursion": ({"_recursive_": False}, "_recursive_ in update"),
    "no conversion": ({"_convert_": "all"}, "_convert_ in update"),
    "a part that is not finished": ({"loss": {"_partial_": True}}, "_partial_ in update.loss"),
    "an environment variable": ({"batchnorm": "${oc.env:HOME}"}, "${oc.env:HOME}"),
    "a resolver that makes a configuration": ({"loss": "${oc.decode:'{_target_: os.mkdir}'}"}, "${oc.decode:"),
    "a value that is missing": ({"lr": "???"}, "???"),
}
STRANGE_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "a function of ours": ({"_target_": "metaseg.models.use_shortcuts"}, "asks for metaseg.models.use_shortcuts"),
    "an import of ours": (
        {"_target_": "metaseg.models.backbone.timm.create_model"},
        "asks for metaseg.models.backbone.",
    ),
    "an optimizer": ({"_target_": "torch.optim.SGD"}, "asks for torch.optim.SGD"),
    "a list as a name": ({"_target_": ["metaseg.models.EfficientLab"]}, "asks for"),
    "nothing": ({"_target_": None}, "asks for None"),
    "in the backbone": ({"backbone": "TRAP"}, "asks for os.mkdir"),
    "in a list": ({"rsd": ["TRAP"]}, "asks for os.mkdir"),
    "in a number": ({"drop_path": "TRAP"}, "asks for os.mkdir"),
    "in what is not read": ({"weights": "TRAP"}, "asks for os.mkdir"),
    "not finished": ({"_partial_": True}, "asks for _partial_ in model"),
    "an environment variable": ({"backbone": "${oc.env:HOME}"}, r"asks for \$\{oc.env:HOME\}"),
    "a hub": ({"backbone": "hf-hub:someone/something"}, "names 'hf-hub:someone/something' as its backbone"),
    "a folder": ({"backbone": "local-dir:/tmp"}, "names 'local-dir:/tmp' as its backbone"),
    "no backbone of ours": ({"backbone": "resnet18"}, "does not describe a network|is a ResNet: choose"),
    "another backbone": ({"backbone": "tf_efficientnet_b0"}, "holds another network"),
    "an option that there is none of": ({"dephts": 3}, "does not describe a network of metaseg's: .*dephts"),
    "a list of decoders that is none": ({"rsd": "16"}, "model.rsd=|does not describe a network"),
}


def with_trap(node: Any, trace: Path) -> Any:
    if isinstance(node, dict):
        return {key: with_trap(value, trace) for key, value in node.items()}
    if isinstance(node, list):
        return [with_trap(value, trace) for value in node]
    return harmful(trace) if node == "TRAP" else node


@pytest.mark.parametrize("how", STRANGE)
def test_an_update_procedure_out_of_a_file_is_of_the_parts_on_the_list(tmp_path: Path, trace: Path, how: str) -> None:
    """From an initialisation, a checkpoint and a YAML file alike, and whoever asks."""
    spoilt, message = with_trap(STRANGE[how][0], trace), STRANGE[how][1]
    update = {**UPDATE, **spoilt}
    about = replace(ABOUT, update=update)
    save_initialisation(TINY, about, tmp_path / "evil.safetensors")
    save_checkpoint(TINY, asdict(about), tmp_path / "evil.ckpt")
    (tmp_path / "evil.yaml").write_text(json.dumps(update))
    for call in (
        lambda: metaseg.load(tmp_path / "evil.safetensors"),
        lambda: metaseg.load(tmp_path / "evil.ckpt"),
        lambda: expand_update([f"update={tmp_path}/evil.safetensors"]),
        lambda: expand_update([f"update={tmp_path}/evil.yaml"]),
    ):
        with pytest.raises(WeightsError, match=rf" asks for {re.escape(message)}.*, which is neither .*your own"):
            call()
    assert not trace.exists()


@pytest.mark.parametrize("how", STRANGE_MODELS)
def test_a_network_out_of_a_file_is_metaseg_s(tmp_path: Path, trace: Path, how: str) -> None:
    spoilt, message = with_trap(STRANGE_MODELS[how][0], trace), STRANGE_MODELS[how][1]
    save_initialisation(TINY, replace(ABOUT, model={**MODEL, **spoilt}), tmp_path / "evil.safetensors")
    with pytest.raises(UserError, match=message):
        read_network(tmp_path / "evil.safetensors")
    assert not trace.exists()


# Files of metaseg's form with other things in them


ABOUTS: dict[str, dict[str, Any]] = {
    "no model": {"model": None},
    "a list as the model": {"model": [MODEL]},
    "a name as the update": {"update": "sgd"},
    "a number as the algorithm": {"algo": 3},
    "a terminal's commands": {"dataset": "\x1b]0;owned\x07"},
    "two lines": {"algo": "reptile\n---\n"},
    "no seed": {"seed": None},
    "a true seed": {"seed": True},
    "meta-steps below zero": {"meta_steps": -1},
    "a fraction of an image": {"image_size": 64.0},
    "an image of terabytes": {"image_size": 2**20},
    "shots by name": {"shots": "five"},
    "a tile": {"tile": 1},
    "seen as a list": {"seen": ["a"]},
    "seen numbers": {"seen": {"train": [1]}},
    "not a number": {"update": {**UPDATE, "lr": float("nan")}},
    "infinite": {"model": {**MODEL, "drop_path": float("inf")}},
    "a number of a hundred digits": {"update": {**UPDATE, "steps": 10**100}},
    "steps without end": {"update": {**UPDATE, "steps": 10**9}},
    "batches without end": {"update": {**UPDATE, "batch_size": 10**9}},
    "deep": {"update": {**UPDATE, "loss": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]}},
    "long": {"model": {**MODEL, "rsd": [16] * 2000}},
    "a field that there is none of": {"author": "me"},
}


@pytest.mark.parametrize("how", ABOUTS)
def test_what_a_file_says_of_itself_is_of_its_kind(tmp_path: Path, how: str) -> None:
    about = {**asdict(ABOUT), **ABOUTS[how]}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    save_file(TINY.state_dict(), tmp_path / "init.safetensors", metadata=metadata)
    steps = {"global_step": about["meta_steps"]}
    for path in (tmp_path / "init.safetensors", save_checkpoint(TINY, about, tmp_path / "last.ckpt", **steps)):
        with pytest.raises(WeightsError, match=r" that metaseg wrote: .+; give the init\.safetensors of a run"):
            read_about(path)


@pytest.mark.parametrize("side", [64, None, 128])
def test_an_update_draws_no_more_images_than_memory_has(tmp_path: Path, side: int | None) -> None:
    """Two billion pixels at most: eight images a step, of 64 where their size is not known."""
    most = 2**31 // (8 * (side or 64) ** 2)
    for steps in (most, most + 1):
        about = replace(ABOUT, image_size=side, update={**UPDATE, "steps": steps, "batch_size": 8})
        save_initialisation(TINY, about, tmp_path / f"{steps}.safetensors")
    assert read_about(tmp_path / f"{most}.safetensors").update["steps"] == most
    with pytest.raises(WeightsError, match=rf"asks for {8 * (most + 1)} images of {side or 64}², more than memory has"):
        read_about(tmp_path / f"{most + 1}.safetensors")


@pytest.mark.parametrize(
    "value",
    [(harmful(Path("trace")),), {1: 2}, {("_target_",): 1}, {b"_target_": 1}, {1}, b"bytes", torch.zeros(2), 1j],
    ids=lambda value: type(value).__name__,
)
def test_a_checkpoint_s_values_are_those_that_json_has(tmp_path: Path, value: Any) -> None:
    """A pickle may have others: OmegaConf would make a list of a tuple, and Hydra something of what is in it."""
    for field in ("model", "update", "algo", "seed"):
        about = {**asdict(ABOUT), field: {**UPDATE, "loss": value} if field in ("model", "update") else value}
        with pytest.raises(WeightsError, match="is no checkpoint that metaseg wrote"):
            read_about(save_checkpoint(TINY, about, tmp_path / "last.ckpt"))


def rewritten(path: Path, edit: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Another torch file, with its pickle edited."""
    out = path.with_stem("rewritten")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for record in old.infolist():
            content = old.read(record)
            new.writestr(record.filename, edit(content) if record.filename.endswith("data.pkl") else content)
    return out


def test_what_is_nested_ten_thousand_deep_is_refused(tmp_path: Path) -> None:
    """Written by hand: Python's own writers would not get so far."""
    metadata = {key: json.dumps(value) for key, value in asdict(ABOUT).items()}
    metadata["update"] = 10_000 * "[" + 10_000 * "]"
    save_file(TINY.state_dict(), tmp_path / "init.safetensors", metadata=metadata)
    path = save_checkpoint(TINY, {**asdict(ABOUT), "update": {"optimizer": "DEEP"}}, tmp_path / "last.ckpt")
    deep = rewritten(path, lambda content: content.replace(b"X\4\0\0\0DEEP", 10_000 * b"]" + 9_999 * b"a"))
    for evil in (tmp_path / "init.safetensors", deep):
        with pytest.raises(WeightsError, match=" that metaseg wrote: "):
            read_about(evil)


TENSORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "double": (lambda t: t.double(), "as torch.float64, torch.strided, where the network has torch.float32"),
    "half": (lambda t: t.half(), "as torch.float16"),
    "integer": (lambda t: t.long(), "as torch.int64"),
    "complex": (lambda t: t.to(torch.complex64), "as torch.complex64"),
    "sparse": (lambda t: t.to_sparse(), "as torch.float32, torch.sparse_coo"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "as torch.qint8"),
    "meta": (lambda t: t.to("meta"), r"without numbers \(meta\)"),
    "not a number": (lambda t: t.clone().index_fill_(0, torch.tensor([1]), float("nan")), "none .NaN. or infinite"),
    "infinite": (lambda t: t.clone().index_fill_(0, torch.tensor([1]), float("inf")), "none .NaN. or infinite"),
    "another shape": (lambda t: t[:1], "holds another network: 1 tensors differ, first head.bias"),
    "terabytes by a stride of nothing": (lambda t: t[:1].expand(2**40), "holds another network: 1 tensors differ"),
    "a list": (lambda t: t.tolist(), "does not hold tensors alone|holds no plain state dict"),
    "nothing": (lambda t: None, "does not hold tensors alone|holds no plain state dict"),
}


@pytest.mark.parametrize("how", TENSORS)
@pytest.mark.filterwarnings("ignore")  # torch's own, on what it is about to drop
def test_tensors_of_another_kind_are_refused_and_not_cast(tmp_path: Path, net: EfficientLab, how: str) -> None:
    spoil, message = TENSORS[how]
    state = net.state_dict()
    path = save_checkpoint(net, asdict(ABOUT), tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["net.head.bias"] = spoil(state["head.bias"])
    torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        read_network(path)


@pytest.mark.parametrize("how", ["double", "not a number", "a list"])
def test_tensors_of_another_kind_are_refused_as_weights_to_begin_from(
    tmp_path: Path, net: EfficientLab, how: str
) -> None:
    spoil, message = TENSORS[how]
    torch.save({**net.state_dict(), "head.bias": spoil(net.head.bias.detach())}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=message):
        EfficientLab("tf_efficientnet_lite0", rsd=(16,), weights=str(tmp_path / "weights.pt"))


def test_weights_of_a_backbone_are_checked_alike(tmp_path: Path, net: EfficientLab) -> None:
    state = net.backbone.state_dict()
    for value, message in ((torch.zeros(32).double(), "as torch.float64"), (torch.full((32,), torch.nan), "NaN")):
        save_file({**state, "bn1.weight": value}, tmp_path / "timm.safetensors")
        with pytest.raises(WeightsError, match=f"bn1.weight .*{message}|{message}.*bn1.weight|in bn1.weight"):
            EfficientLab("tf_efficientnet_lite0", rsd=(16,), weights=str(tmp_path / "timm.safetensors"))


def test_a_torch_file_does_not_become_larger_than_it_is(tmp_path: Path) -> None:
    """40 MB of zeros in 40 KB."""
    torch.save({"a": torch.zeros(10**7)}, tmp_path / "zeros.pt")
    bomb = rewritten(tmp_path / "zeros.pt", bytes, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 50_000
    with pytest.raises(WeightsError, match="its records are compressed, which torch does not do"):
        read_weights(bomb)


def test_a_torch_file_that_is_compressed_is_refused_even_if_it_is_no_larger(tmp_path: Path) -> None:
    """Mapped into memory as it is, what is compressed would pass for the numbers."""
    torch.save({"a": torch.randint(256, (10**5,), dtype=torch.uint8)}, tmp_path / "noise.pt")
    path = rewritten(tmp_path / "noise.pt", bytes, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        assert sum(record.file_size for record in archive.infolist()) < path.stat().st_size
    with pytest.raises(WeightsError, match="its records are compressed, which torch does not do"):
        read_weights(path)


def test_a_torch_file_that_claims_terabytes(tmp_path: Path) -> None:
    four, many = b"K\4", b"\x8a\6" + (2**40).to_bytes(6, "little")
    path = tmp_path / "four.pt"
    torch.save({"a": torch.zeros(4)}, path)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_weights(rewritten(path, lambda content: content.replace(four, many)))
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(four, many))
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_weights(path)


def test_a_safetensors_file_that_claims_terabytes(tmp_path: Path) -> None:
    head = json.dumps({"head.bias": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "big.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    (tmp_path / "head.safetensors").write_bytes((2**60).to_bytes(8, "little") + head)
    for name in ("big", "head"):
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            read_weights(tmp_path / f"{name}.safetensors")
        with pytest.raises(WeightsError, match="is no initialisation that metaseg wrote"):
            read_about(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    "model",
    [
        {**MODEL, "backbone": "eva_giant_patch14_336"},  # a billion parameters
        {**MODEL, "backbone": "tf_efficientnet_l2"},
        {"_target_": "metaseg.models.DeepLab", "backbone": "tf_efficientnet_b8", "rates": [1] * 50, "skip": None},
    ],
    ids=lambda model: model["backbone"],
)
def test_no_network_is_made_that_is_larger_than_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]
) -> None:
    """Not with memory, that is."""
    save_initialisation(TINY, replace(ABOUT, model=model), tmp_path / "init.safetensors")
    made: list[bool] = []
    monkeypatch.setattr(nn.Conv2d, "reset_parameters", lambda conv: made.append(conv.weight.is_meta))
    with pytest.raises(UserError, match="holds another network|is a Eva: choose|does not describe"):
        read_network(tmp_path / "init.safetensors")
    assert all(made)
    assert len(made) > 0


# What a checkpoint, a study or a configuration would have a run do

RESUMABLE = ("mode=fit", "algo=reptile", "++algo.inner.steps=1", "trainer.max_steps=2", "evaluate.validations=1")


@pytest.fixture(scope="module")
def stopped(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that was stopped behind the first of its two meta-steps."""

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == 1:
                raise InterruptedError

    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaseg.fit.MetaProgressBar", Stop)
        with pytest.raises(InterruptedError):
            run(composed(*data, *RESUMABLE), folder)
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def noted(stopped: Path) -> dict[str, Any]:
    """What Lightning has noted there of the best checkpoint so far."""
    (best,) = torch.load(stopped, weights_only=True)["callbacks"].values()
    return best


@pytest.mark.parametrize(
    "place", ["local://{}", "file://{}", "memory://{}", "simplecache::file://{}", "{}", "{}/best.ckpt/../../in"]
)
@pytest.mark.parametrize("field", ["best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"])
def test_a_checkpoint_does_not_name_what_lightning_removes(
    tmp_path: Path, noted: dict[str, Any], place: str, field: str
) -> None:
    """The best checkpoint so far is removed once there is a better one: a folder, or what is behind a URL, too."""
    named = place.format(tmp_path / "in")
    best = noted | {field: {named: torch.tensor(-1.0)} if field == "best_k_models" else named}
    path = save_checkpoint(TINY, asdict(ABOUT), tmp_path / "evil.ckpt", callbacks={"BestCheckpoint": best})
    with pytest.raises(WeightsError, match=f"names '{named}' as a checkpoint of its run; give"):
        check_resumable(path, ABOUT, {})
    assert field in noted


def test_lightning_removes_no_folder(tmp_path: Path) -> None:
    """Not if it is asked to, either."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "best.ckpt").touch()
    files = CheckpointFiles()
    for place in (f"local://{tmp_path}/photos", f"file://{tmp_path}/photos", f"{tmp_path}/best.ckpt"):
        files.remove_checkpoint(place)
    with pytest.raises(OSError, match="photos"):
        files.remove_checkpoint(str(tmp_path / "photos"))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("training", {"update.lr": torch.zeros(2)}, "what it says of its training is not what a run writes"),
        ("training", {("a",): 1}, "what it says of its training is not what a run writes"),
        ("training", [1], "has no attribute 'items'"),
        ("callbacks", [1], "has no attribute 'values'"),
        ("callbacks", {"a": {"best_model_path": 3}}, "is no checkpoint that metaseg wrote"),
    ],
)
def test_a_checkpoint_to_resume_is_of_its_form(tmp_path: Path, part: str, value: Any, message: str) -> None:
    more = {"hyper_parameters": {"about": asdict(ABOUT), part: value}} if part == "training" else {part: value}
    with pytest.raises(WeightsError, match=message):
        check_resumable(save_checkpoint(TINY, asdict(ABOUT), tmp_path / "last.ckpt", **more), ABOUT, {})


def test_what_is_not_finite_is_not_resumed(tmp_path: Path, data: list[str], stopped: Path) -> None:
    """Nor is anything written."""
    checkpoint = torch.load(stopped, weights_only=True)
    checkpoint["state_dict"]["net.head.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    message = refused(job(*RESUMABLE, "ckpt_path={}"), tmp_path / "evil.ckpt", data)
    assert "holds numbers in head.bias that are none (NaN) or infinite" in message


def with_momentum(buffer: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["state"] = {0: {"momentum_buffer": buffer}}
        checkpoint["optimizer_states"][0]["param_groups"][0]["momentum"] = 0.9

    return spoil


def with_value(value: Any, *place: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(checkpoint: dict[str, Any]) -> None:
        *way, last = place
        for key in way:
            checkpoint = checkpoint[key]
        checkpoint[last] = value

    return spoil


def around(value: Any) -> list[Any]:
    """Itself, and what is in it, often."""
    node = [value]
    for _ in range(50):
        node = [node, node]
    return node


GROUP = ("optimizer_states", 0, "param_groups", 0)
STATES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {  # found before a network is made
    "of a stride of nothing": (with_momentum(torch.zeros(1).expand(15 * 10**8)), "its tensors in .* larger than the"),
    "that is cast": (with_momentum(torch.zeros(9, dtype=torch.float64)), "a tensor in optimizer_states .*float64"),
    "sparse": (with_momentum(torch.zeros(9).to_sparse()), "a tensor in optimizer_states .*sparse"),
    "without numbers": (with_momentum(torch.zeros(9, device="meta")), "a tensor in optimizer_states"),
    "not finite": (with_momentum(torch.tensor([0.0, torch.nan])), "numbers in optimizer_states that are none"),
    "without end": (with_momentum(around(1.0)), "the same values twice in optimizer_states"),
    "a rate that is none": (with_value(float("nan"), *GROUP, "lr"), "it has nan in optimizer_states"),
    "a course without end": (with_value(float("inf"), "lr_schedulers", 0, "base_lrs", 0), "it has inf in lr_sch"),
    "a set": (with_value({1}, "loops", "fit_loop"), "it has .1. in loops"),
    "a best of terabytes": (
        with_value({"best_k_models": {"": torch.zeros(1).expand(2**40)}}, "callbacks", "B"),
        "larger",
    ),
}
RESTORED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {  # found before the first step
    "of another shape": (with_momentum(torch.zeros(3)), "cannot be resumed: its optimizer, .*size of tensor"),
    "a rate as text": (with_value("x", *GROUP, "lr"), "cannot be resumed"),
    "no optimizer": (with_value([], "optimizer_states"), "cannot be resumed: .*not enough values"),
    "no group": (with_value([], "optimizer_states", 0, "param_groups"), "cannot be resumed"),
    "another schedule": (with_value({"base_lrs": "x", "step": 3}, "lr_schedulers", 0), "cannot be resumed"),
    "a schedule of another step": (with_value(3, "lr_schedulers", 0, "step"), "cannot be resumed: .*callable"),
    "other loops": (with_value({}, "loops", "fit_loop", "epoch_progress"), "epoch_progress of its loops"),
    "no loops": (with_value({}, "loops"), "cannot be resumed: .*fit_loop"),
    "a count as text": (with_value("x", "dropped_episodes"), "cannot be resumed"),
}


@pytest.mark.parametrize("how", STATES)
def test_the_state_to_resume_from_is_no_larger_than_its_file(tmp_path: Path, stopped: Path, how: str) -> None:
    spoil, message = STATES[how]
    checkpoint = torch.load(stopped, weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    with pytest.raises(WeightsError, match=rf"that metaseg wrote: .*{message}.*; give the init.safetensors of a run"):
        check_resumable(tmp_path / "evil.ckpt", ABOUT, {})


def test_a_sound_state_is_that_of_another_run(stopped: Path) -> None:
    """So that the test above is one of what it changes."""
    with pytest.raises(ConfigError, match="is of a run with"):
        check_resumable(stopped, ABOUT, {})


@pytest.mark.parametrize("how", RESTORED)
def test_a_state_that_training_cannot_go_on_from_is_refused(
    tmp_path: Path, data: list[str], stopped: Path, how: str
) -> None:
    """With the cure, and not as the error that it makes in Lightning."""
    spoil, message = RESTORED[how]
    checkpoint = torch.load(stopped, weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    with pytest.raises(WeightsError, match=rf"(?s){message}.*Give an earlier one, or model.weights=PATH"):
        run(composed(*data, *RESUMABLE, f"ckpt_path={tmp_path}/evil.ckpt"), tmp_path / "out")


@pytest.mark.parametrize(
    "spoilt",
    [
        {"best_model_score": "0.5"},
        {"best_k_models": [1]},
        {"best_k_models": {"best.ckpt": 0.5}},
        {"best_k_models": {"best.ckpt": torch.zeros(1)}},
        {"best_k_models": {"best.ckpt": torch.zeros(2)}, "kth_best_model_path": "best.ckpt"},
        {"more": 1},
    ],
    ids=str,
)
def test_the_best_so_far_is_one_that_can_be_compared_with(
    tmp_path: Path, noted: dict[str, Any], spoilt: dict[str, Any]
) -> None:
    best = BestCheckpoint(tmp_path)
    best.load_state_dict(noted)
    sound = {"best_k_models": {"best.ckpt": torch.tensor(0.5)}, "kth_best_model_path": "best.ckpt"}
    best.load_state_dict(noted | sound)
    assert best.best_k_models == sound["best_k_models"]
    with pytest.raises(WeightsError, match="does not say of its best what a run does: give an earlier one"):
        best.load_state_dict(noted | spoilt)


def test_a_study_chooses_no_code(tmp_path: Path, trace: Path, data: list[str], stopped: Path) -> None:
    """Its best trial's values become the configuration of the run that is tested."""
    place = tmp_path / "study.journal"
    asked = build(composed(*data, "mode=search", "algo=reptile", "search.trials=1", f"search.storage={place}"))
    study = open_study(open_storage(str(place), ""), fingerprint(asked), (0,), 1)
    sound = {"algo.outer.lr": 0.1, "algo.inner.lr": 0.1, "update.lr": 0.1}
    code = {"update.schedule._target_": "os.mkdir", "update.schedule.path": str(trace)}
    for given in ({**sound, **code}, {**sound, "update.lr": "${oc.env:HOME}"}, {"update.lr": 0.1}):
        trial = optuna.create_trial(
            params=given,
            distributions={key: CategoricalDistribution([value]) for key, value in given.items()},
            value=0.5 + len(study.trials) / 10,
            user_attrs={"checkpoint": str(stopped)},
        )
        study.add_trial(trial)
        with pytest.raises(ConfigError, match=r"has .*, which is not of the space that is searched: nothing of it is"):
            search(asked, [], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"study.journal"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: !!python/object/apply:os.mkdir [TRACE]", "could not determine a constructor"),
        ("optimizer: !!python/name:os.mkdir ''", "could not determine a constructor"),
        ("a: &a [1]\nb: &b [*a, *a]\noptimizer: [*b, *b]", "has aliases"),
        (400 * "{", "is no YAML file of plain values"),
        ("optimizer: {a: [1", "is no YAML file of plain values"),
        ("\0", "is no YAML file of plain values"),
        ("- optimizer", "holds no update procedure"),
        ("optimizer: .nan", "holds no update procedure"),
        ("1: 2\noptimizer: 1", "holds no update procedure"),
    ],
    ids=range(9),
)
def test_a_yaml_file_of_an_update_is_plain(tmp_path: Path, trace: Path, text: str, message: str) -> None:
    (tmp_path / "evil.yaml").write_text(text.replace("TRACE", str(trace)))
    with pytest.raises(ConfigError, match=message):
        expand_update([f"update={tmp_path}/evil.yaml"])
    assert not trace.exists()


@pytest.mark.parametrize(
    "spoilt",
    [
        {"optimizer": {**SGD, "momentum": "much"}},
        {"optimizer": {**SGD, "params": [1]}},
        {"optimizer": {**SGD, "momentun": 0.9}},
        {"schedule": {"_target_": "metaseg.update.Cosine", "final": "low"}},
        {"schedule": {"_target_": "metaseg.update.Step", "factor": [1]}},
        {"loss": {"_target_": "metaseg.losses.SegmentationLoss", "darc1": "a"}},
        {"stopping": {"_target_": "metaseg.update.EarlyStopping", "share": "half"}},
        {"steps": "ten"},
        {"lr": [1]},
        {"batchnorm": {"a": 1}},
    ],
    ids=lambda spoilt: next(iter(spoilt)),
)
def test_options_of_omega_that_cannot_be_used_are_found_at_once(spoilt: dict[str, Any]) -> None:
    """And not in the first inner step."""
    with pytest.raises(ConfigError, match="update"):
        make_update(OmegaConf.create({**UPDATE, **spoilt}))


# What other people's runs would have a page, a terminal or a card do

MARKUP = """'"></td></p><script>alert(1)</script><img src=x onerror=alert(1)><a href="javascript:alert(1)">{b}$x$"""
TAGS = {"html", "head", "meta", "title", "style", "h1", "h2", "p", "section", "main", "div", "figure", "figcaption"}
TAGS |= {"table", "tr", "th", "td", "img", "a"}


class Page(HTMLParser):
    """Takes note of what a page has that could do something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.odd: list[object] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        harmless = ("charset", "name", "content", "lang", "alt", "loading")
        for name, value in attrs:
            leads_away = ":" in (value or "").removeprefix("data:image/png;base64,")
            if name not in harmless and (name not in ("src", "href") or leads_away):
                self.odd.append((name, value))
        if tag not in TAGS:
            self.odd.append(tag)


def other_people_s_run(folder: Path, **more: Any) -> Path:
    """All texts in it are markup."""
    write_run(folder, {MARKUP: 0.5, f"{MARKUP}2": 0.25}, algo=MARKUP, batchnorm=MARKUP, dataset=MARKUP)
    results = json.loads((folder / "results.json").read_text())
    texts = dict.fromkeys(("mode", "seed", "meta_steps", "config_sha256", "git_commit", "splits_sha256"), MARKUP)
    course = [{"step": 0, "iou": 0.1, "loss": 0.2}]
    test = {"tasks": MARKUP, "iou": {"mean": 0.5, "ci95": [0.4, 0.6]}, "course": course}
    (folder / "results.json").write_text(json.dumps({**results, **texts, "test": test, **more}))
    (folder / ".hydra").mkdir()
    overrides = [f"algo={json.dumps(MARKUP)}", "ckpt_path=theta.ckpt"]
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    (folder / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {cwd: '${oc.env:SECRET}'}}")
    return folder


def test_a_page_of_other_people_s_runs_holds_no_markup_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a script in a link, an environment variable, or what a link in a run's folder leads to."""
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    other_people_s_run(tmp_path / "runs" / "javascript:alert(1)")
    uho = other_people_s_run(tmp_path / "runs" / MARKUP.replace("/", "∕"), mode="uho")
    trials = [{"value": 1, "params": {MARKUP: MARKUP}}]
    record = {"trials": MARKUP, "history": trials, "default_val_iou": 0, "val_iou": 0, "test": {"iou": {"mean": 0}}}
    (uho / "uho.json").write_text(json.dumps(record))
    (uho / "uho.png").symlink_to(tmp_path / "secret")
    failed = tmp_path / "runs" / "failed"
    (failed / ".hydra").mkdir(parents=True)
    (failed / ".hydra" / "overrides.yaml").write_text("[]")
    outcome = {"state": "failed", "headline": None, "config_sha256": "", "error": f"{MARKUP}\n{MARKUP}"}
    (failed / "outcome.json").write_text(json.dumps(outcome))
    write_page([tmp_path / "runs"], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert Page(text).odd == []
    assert text.count("&lt;script&gt;") > 10  # it is told, as text
    assert "hunter2" not in text
    assert b64encode(b"hunter2").decode() not in text


def test_the_page_s_check_finds_what_it_is_for() -> None:
    for odd in (MARKUP, "<p onclick=alert(1)>", "<a href='javascript:alert(1)'>", "<img src='https://x'>", "<svg>"):
        assert Page(odd).odd


def test_a_contact_sheet_holds_no_markup_of_its_names(tmp_path: Path) -> None:
    names = [f"{MARKUP.replace('/', '∕')}.jpg", "javascript:alert(1).png"]
    out = Output(tmp_path, names, adapts=False, soft=False)
    out.write_index(MARKUP, [MARKUP], names)
    text = (tmp_path / "index.html").read_text()
    assert Page(text).odd == []
    assert "&lt;script&gt;" in text


def test_a_plot_reads_no_formula_in_a_task_s_name(tmp_path: Path) -> None:
    """Matplotlib would refuse this one, and draw others."""
    a = write_run(tmp_path / "a", {"$\\evil{$": 0.5, "b": 0.5})
    b = write_run(tmp_path / "b", {"$\\evil{$": 0.7, "b": 0.1})
    write_plot(compare([a], [b]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


TEXTS = ("algo", "batchnorm", "dataset", "splits_sha256")


@pytest.mark.parametrize(
    ("key", "value"),
    [*((key, value) for key in TEXTS for value in ([1], {"a": 1}, 1e999)), ("shots", "5"), ("episodes", [1])],
)
def test_results_of_other_kinds_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    run = write_run(tmp_path / "run", {"ant": 0.5}, **{key: value})
    with pytest.raises(ComparisonError, match=rf"is not what a run writes .*{key}.*: run it again"):
        read_run(run)


UNREADABLE = {
    "deep": 400 * "[",
    "code": "!!python/object/apply:os.mkdir [TRACE]",
    "a number": "3",
    "no text": '"\0',
    "aliases": "a: &a 1\nb: *a",
}


@pytest.mark.parametrize("name", ["results.json", "outcome.json", ".hydra/overrides.yaml", "per_task.csv"])
@pytest.mark.parametrize("how", UNREADABLE)
def test_a_run_that_cannot_be_read_is_named_and_stops_nothing(tmp_path: Path, trace: Path, name: str, how: str) -> None:
    for folder in ("sound", "evil"):
        other_people_s_run(tmp_path / "runs" / folder)
    deeper = 250 if name.endswith(".json") else 1  # Python's reader of JSON goes down further
    (tmp_path / "runs" / "evil" / name).write_text(deeper * UNREADABLE[how].replace("TRACE", str(trace)))
    found = find([tmp_path / "runs"])
    assert len(found.runs) + len(found.broken) == 2
    assert tmp_path / "runs" / "sound" not in found.broken
    assert (tmp_path / "runs" / "evil" in found.broken) == (name != "outcome.json")
    assert read_outcome(tmp_path / "runs" / "evil") is None
    if name.endswith(".yaml"):
        with pytest.raises(DataError, match=r"overrides.yaml is not what Hydra writes: run it again, or remove it"):
            read_job(tmp_path / "runs" / "evil")
    else:
        summarise(tmp_path / "runs")
    assert not trace.exists()


def scored(mean: Any = 0.5, ci95: Any = (0.4, 0.6), **more: Any) -> dict[str, Any]:
    """The test's numbers in a results.json."""
    return {"test": {"tasks": 2, "iou": {"mean": mean, "ci95": ci95}, **more}}


def at(step: Any = 1, iou: Any = 0.5, loss: Any = 0.5) -> dict[str, Any]:
    return scored(course=[{"step": step, "iou": iou, "loss": loss}])


ODD_RESULTS: dict[str, dict[str, Any]] = {
    "an IoU of 400 digits": scored(10**400),
    "an IoU as text": scored("0.5"),
    "an IoU that is none": scored(float("nan")),
    "an IoU out of sight": scored(1e308),
    "half an interval": scored(ci95=[0.4]),
    "an interval as text": scored(ci95=["0.4", "0.6"]),
    "a truth for an IoU": scored(True),
    "a step of 400 digits": at(step=10**400),
    "a step as text": at(step="1"),
    "a loss as text": at(loss="1"),
    "an IoU on the way of 400 digits": at(iou=10**400),
    "seconds of 400 digits": {"wall_s": 10**400},
    "seconds as text": {"wall_s": "1"},
}
ODD_FILES: dict[str, dict[str, str | None]] = {  # content by name; None is a pipe, nothing a folder
    "a pipe for metrics": {"csv/metrics.csv": None},
    "a folder for metrics": {"csv/metrics.csv": ""},
    "a meta-step of 400 digits": {"csv/metrics.csv": f"step,val/iou\n1{400 * '0'},0.5\n"},
    "metrics out of sight": {"csv/metrics.csv": "step,val/iou\n1,1e308\n2,-1e308\n3,inf\n4,0.5\n"},
    "a pipe for a picture": {"panels/00-t1.png": None},
    "a folder for a picture": {"panels/00-t1.png": ""},
    "a pipe for a search": {"uho.json": None, "uho.png": None},
    "a folder for a search": {"uho.json": "", "uho.png": ""},
    "a search of 400 digits": {"uho.json": f'{{"trials": 1, "history": [], "default_val_iou": 1{400 * "0"}}}'},
    "a search of no trials": {"uho.json": '{"history": {}}'},
    "an outcome of no lines": {"outcome.json": '{"state": 1, "headline": null, "config_sha256": "", "error": " "}'},
    "a headline of 400 digits": {
        "outcome.json": f'{{"state": 1, "headline": 1{400 * "0"}, "config_sha256": "", "error": ""}}'
    },
}


def leave(folder: Path, files: dict[str, str | None]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            os.mkfifo(folder / name)
        elif content:
            (folder / name).write_text(content)
        else:
            (folder / name).mkdir()


def test_one_broken_run_does_not_end_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor one that never ends, nor those whose names have no encoding or are as long as a file may be."""
    top, sound = tmp_path / "runs", {"t1": 0.5, "t2": 0.25}
    write_run(top / "sound", sound, mode="fit_test", **at(loss=-1e308))
    for how, more in ODD_RESULTS.items():
        write_run(top / how, sound, **{**scored(), **more})
    for how, files in ODD_FILES.items():
        write_run(top / how, sound, mode="uho" if "search" in how else "fit_test", **scored())
        leave(top / how, files)
    leave(top / "an end of no lines", {".hydra/overrides.yaml": "[]", **ODD_FILES["an outcome of no lines"]})
    write_run(top / "nobody's folder", sound, **scored())
    leave(top / "nobody's folder", {".hydra/overrides.yaml": "['ckpt_path=~no-such-user/x']"})
    write_run(top / "a name that none can write", sound, mode="fit_test", algo="\ud800", **at())
    leave(top / "a name that none can write", {"csv/metrics.csv": "step,val/iou\n1,0.5\n"})
    write_run(top / "a name that none can read", sound, mode="fit_test", algo="$a" * 10**6, **at())
    leave(top / "a name that none can read", {"csv/metrics.csv": "step,val/iou\n1,0.5\n"})
    write_run(top / os.fsdecode(b"\xff\xfe"), sound, **scored())
    write_run(top / os.fsdecode(b"\xff"), sound, **scored("0.5"))
    dashboard_command([str(top), "--out", str(tmp_path / "report.html")])

    found = find([top])
    broken = {*ODD_RESULTS, "an end of no lines", "nobody's folder", os.fsdecode(b"\xff")}
    assert {path.name for path in found.broken} == broken
    assert len(found.runs) + len(broken) == len([*top.iterdir()])
    assert found.broken[top / "an end of no lines"] == "killed, or still running"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).odd == []
    assert text.count("<h2>") == len(SECTIONS) + 1
    assert 'href="runs/%FF%FE"' in text
    assert r"\udcff: " in capsys.readouterr().out  # as the terminal is told


def test_a_run_s_files_are_read_up_to_a_size(tmp_path: Path) -> None:
    """These have holes, and take no room on the disk."""
    run = write_run(tmp_path / "run", {"t1": 0.5}, mode="uho", **scored())
    names = ("uho.json", "uho.png", "csv/metrics.csv", "panels/00-t1.png")
    leave(run, dict.fromkeys(names, "\x89PNG"))
    for name in names:
        os.truncate(run / name, 2**36)
    write_page([run], tmp_path / "report.html")
    assert "uho.json has more than 16,777,216 bytes" in (tmp_path / "report.html").read_text()
    for name in ("per_task.csv", "results.json"):
        os.truncate(run / name, 2**36)
        with pytest.raises(ComparisonError, match=rf"{name} has more than [\d,]+ bytes"):
            read_run(run)
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").touch()
    os.truncate(run / ".hydra" / "overrides.yaml", 2**36)
    with pytest.raises(DataError, match=r"overrides.yaml has more than 131,072 bytes"):
        read_job(run)


def test_a_long_head_over_many_lines_stays_small(tmp_path: Path) -> None:
    """Ten million cells, if each line had them all."""
    (tmp_path / "metrics.csv").write_text("x," * 10_000 + "step\n" + "1\n" * 1_000)
    tracemalloc.start()
    assert list(read_csv(tmp_path / "metrics.csv", ("step", "loss"))) == [{}] * 1_000
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_a_name_of_megabytes_is_drawn_at_once() -> None:
    """Breaking it into lines would take minutes, and one line of it more than Matplotlib draws."""
    started = time.perf_counter()
    draw([Row({"algo": "a" * 4_000_000}, {"0": [0.5]}, [])], io.BytesIO())
    assert time.perf_counter() - started < 10


def test_a_run_of_too_many_episodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", {"ant": 0.5, "bee": 0.5, "cat": 0.5})
    monkeypatch.setattr("metaseg.compare.MOST_EPISODES", 3)
    assert len(read_run(run).scores) == 3
    monkeypatch.setattr("metaseg.compare.MOST_EPISODES", 2)
    with pytest.raises(ComparisonError, match="per_task.csv has 3 episodes, and intervals are made of 2 at most"):
        read_run(run)


@pytest.mark.parametrize("iou", ["nan", "inf", "1e308"])
def test_a_task_s_iou_is_a_number(tmp_path: Path, iou: str) -> None:
    """A loss may be infinite, of an adaptation that diverged."""
    run = write_run(tmp_path / "run", {"ant": 0.5}, loss=float("inf"))
    assert read_run(run).task_means("loss") == {"ant": float("inf")}
    (run / "per_task.csv").write_text(f"task,draw,iou,loss\nant,0,{iou},0.5\n")
    with pytest.raises(ComparisonError, match="an IoU is no number"):
        read_run(run)


def test_a_page_reads_searches_of_the_run_s_own_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "run", {"ant": 0.5}, mode="../../uho", **scored())
    (tmp_path / "uho.json").write_text("{}")
    write_page([tmp_path / "runs"], tmp_path / "report.html")
    assert "is not what a search writes" not in (tmp_path / "report.html").read_text()


def test_an_outcome_of_other_kinds_is_none(tmp_path: Path) -> None:
    sound = {"state": "finished", "headline": 0.5, "config_sha256": "", "error": None}
    for spoilt in ({"headline": "0.5"}, {"headline": [1]}, {"headline": 10**400}, {"error": 3}, {"error": ["a"]}):
        (tmp_path / "outcome.json").write_text(json.dumps(sound))
        assert read_outcome(tmp_path) == sound
        (tmp_path / "outcome.json").write_text(json.dumps(sound | spoilt))
        assert read_outcome(tmp_path) is None


def test_no_message_steers_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By names out of files, and of files."""
    title = "\x1b]0;owned\x07\x9b2J"
    shown = r"\x1b]0;owned\x07\x9b2J"
    assert str(DataError(f"{title}\nof two lines")) == f"{shown}\nof two lines"
    path = tmp_path / f"{title}.safetensors"
    save_initialisation(TINY, replace(ABOUT, model={**MODEL, "_target_": "os.system"}), path)
    with pytest.raises(SystemExit) as end:
        export.main([str(path), str(tmp_path / "model.onnx")])
    assert f"{shown}.safetensors asks for os.system" in str(end.value.code)
    a = write_run(tmp_path / "a", {"ant": 0.5}, algo=title)
    print_table(compare([a], [a]))
    (a / ".hydra").mkdir()
    (a / ".hydra" / "overrides.yaml").write_text(json.dumps([f"algo='{title}'"]))
    leave(tmp_path / title, {".hydra/overrides.yaml": "[]"})
    outcome = {"state": "failed", "headline": None, "config_sha256": "", "error": f"once\n\n{title}\n"}
    (tmp_path / title / "outcome.json").write_text(json.dumps(outcome))
    summarise(tmp_path)
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert f"{shown}: {shown}\n" in said


def tokens(markdown: str) -> list[Token]:
    """What a page that knows tables and HTML makes of a text."""
    blocks = MarkdownIt("commonmark").enable("table").parse(markdown)
    return [token for block in blocks for token in (block, *(block.children or ()))]


CARDS = {
    "tags": f"<script>alert(1)</script> {MARKUP} &lt;b&gt;",
    "links": "[x](javascript:alert(1)) ![x](https://x) <https://x>",
    "behind a backslash": "\\<img src=x onerror=alert(1)> \\[x](https://x) \\| \\`<b>",
    "code and cells": "`` ``` | x `<b>`",
    "emphasis": "__x__ *x* _x_",
    "no encoding has it": "\ud800",
}


@pytest.mark.parametrize("lines", ["", "\n\n<script>alert(1)</script>\n\n", "\n---\n", "\r\x1b\u2028"], ids=ascii)
@pytest.mark.parametrize("how", CARDS)
def test_a_card_holds_no_markup_of_a_file_s(tmp_path: Path, how: str, lines: str) -> None:
    """A hub shows it as a page: no tag, link or emphasis begins in it, and no code, cell or block ends early.

    An initialisation's texts have one line; nobody has looked at those of the results beside it.
    """
    evil = CARDS[how]
    model = {**MODEL, "backbone": evil, "weights": "imagenet", "drop_path": evil}
    update = {**UPDATE, "adapts": f"{'a ' * 60}```\u2028```{evil}"}
    about = replace(ABOUT, algo=evil, dataset=evil, splits_sha256=evil, model=model, update=update)
    save_initialisation(TINY, about, tmp_path / "init.safetensors")
    part = {
        "tasks": 2,
        "iou": {"mean": 0.5, "ci95": [0.4, 0.6]},
        "iou_before_adaptation": 0,
        "miou_class": 0,
        "fb_iou": 0,
    }
    drawn = {"queries": 5, "draws": 1, "image_size": 64}
    known = {key: getattr(about, key) for key in ("algo", "seed", "meta_steps", "update")}
    texts = {key: f"{key} {evil}{lines}{evil}" for key in ("dataset", "batchnorm", "git_commit")}
    results = {**known, **texts, "shots": 5, "episodes": drawn, "train": None, "val": None, "test": part}
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = write_card(tmp_path / "init.safetensors").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert re.fullmatch(r"[\w .-]+", OmegaConf.create(front).tags[2])
    found = tokens(body)
    marks = {"heading_open", "paragraph_open", "bullet_list_open", "list_item_open", "fence", "code_inline", "text"}
    marks |= {f"{part}_open" for part in ("table", "thead", "tbody", "tr", "th", "td")}
    assert {token.type for token in found if token.nesting >= 0 and token.type != "inline"} == marks
    told = "".join(token.content for token in found if token.type == "text")
    assert told.count(printable(evil)) == 9
    assert told.count(printable(texts["dataset"])) == 1
    code = [token.content for token in found if token.type == "code_inline"]
    assert printable(texts["git_commit"]).replace("`", "'") in code  # the pipe, too, which ends no cell
    assert not {"html_inline", "html_block"} & {token.type for token in tokens(text)}  # with the front matter
    (tmp_path / "results.json").write_text(json.dumps({**results, "test": {**part, "tasks": evil}}))
    assert "None: no results.json of it lies beside it." in write_card(tmp_path / "init.safetensors").read_text()


# Data


def test_a_matlab_file_does_not_become_larger_than_masks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros become a thousandth. The bound is the test's."""
    monkeypatch.setattr(pascal, "MOST_BYTES", 2**20)
    for side in (1000, 1050):
        content = {"GTcls": {"Segmentation": np.zeros((side, side), np.uint8)}}
        savemat(tmp_path / f"{side}.mat", content, do_compression=True)
        savemat(tmp_path / f"second {side}.mat", {"GTinst": np.zeros(3), **content}, do_compression=True)
        savemat(tmp_path / f"plain {side}.mat", content)
    for name in ("", "second ", "plain "):
        assert pascal.read_labels(tmp_path / f"{name}1000.mat").shape == (1000, 1000)
        with pytest.raises(ValueError, match="more than 1 MiB"):
            pascal.read_labels(tmp_path / f"{name}1050.mat")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", [(1000, 10_000), (2**31 - 1, 1)])
def test_a_matlab_file_gets_no_memory_for_what_it_claims(
    tmp_path: Path, shape: tuple[int, int], compressed: bool
) -> None:
    """A struct of so many elements, which are not there; and a matrix."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    def head(kind: int, name: bytes) -> bytes:
        return element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<2i", *shape)) + element(1, name)

    matrix = element(14, head(9, b"") + element(2, b"1"))
    for fields in (b"", b"Segmentation".ljust(32, b"\0")):
        content = element(14, head(2, b"GTcls") + element(5, struct.pack("<i", 32)) + element(1, fields) + matrix)
        content = element(15, zlib.compress(content)) if compressed else content
        (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + content)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="no GTcls.Segmentation can be read"):
                pascal.read_labels(tmp_path / "a.mat")
            assert tracemalloc.get_traced_memory()[1] < 2 * pascal.MOST_BYTES
        finally:
            tracemalloc.stop()


DEEP = 100_000 * "[" + 100_000 * "]"


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    """Of splits, of shards and of a study."""
    for name, begins in (("splits.json", ""), ("shards.json", ""), ("study.journal", '{"a": ')):
        (tmp_path / name).write_text(f"{begins}{DEEP}\n")
    with pytest.raises(DataError, match=r"the splits file .* is not JSON"):
        read_splits(tmp_path / "splits.json")
    with pytest.raises(DataError, match=r"shards\.json is not JSON"):
        ShardSource(tmp_path)
    with pytest.raises(ConfigError, match="search.storage=.*: line 1 is broken"):
        open_storage(str(tmp_path / "study.journal"), "search.storage")
