"""What runs leave in W&B, and the page and the W&B workspace and report that show them."""

import csv
import json
import re
import shutil
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import wandb_files
from hydra import compose, initialize_config_dir
from PIL import Image
from trees import write_data
from wandb.proto.wandb_internal_pb2 import Record

from metaseg import dashboard
from metaseg.config import config_dir, config_sha256
from metaseg.dashboard import SECTIONS, main, wandb_report, workspace, write_page
from metaseg.errors import ConfigError, UserError
from metaseg.lineage import init_artifact, use_inits
from metaseg.page import find
from metaseg.run import run
from metaseg.sweep import OUTCOME
from metaseg.tracking import WANDB_ID, AxesLogger, make_loggers, wandb_logger

DONE = {"state": "finished"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs: two seeds of Reptile, the baseline, a search and curves, and two broken ones."""
    top = tmp_path_factory.mktemp("runs")
    data = [
        *write_data(tmp_path_factory.mktemp("data")),
        "debug=fast",
        "model.weights=null",
        "model.rsd=[16]",
        "trainer=cpu",
    ]
    data.append("++algo.inner.steps=1")

    def do(name: str, *words: str) -> None:
        (top / name / ".hydra").mkdir(parents=True)
        (top / name / ".hydra" / "overrides.yaml").write_text(json.dumps(words))  # as Hydra does
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            run(compose("config", overrides=[*data, *words]), top / name)

    do("imagenet", "algo=finetune", "logger=csv")
    do("reptile-s0", "algo=reptile", "evaluate.rungs=[1]", "logger.tags=[mine]")
    do("reptile-s1", "algo=reptile", "evaluate.rungs=[1]", "seed=1", "logger=csv")
    theta = f"{top}/reptile-s0/init.safetensors"
    do("search", "mode=uho", "algo=reptile", f"ckpt_path={theta}", "uho.trials=2", "uho.steps=[1]")
    study = ("search.trials=2", "search.random=1", f"search.storage={top}/training.journal", "~search.space.update")
    do("training", "mode=search", "algo=reptile", *study)
    (top / "worker" / ".hydra").mkdir(parents=True)  # which has not tested the best
    (top / "worker" / ".hydra" / "overrides.yaml").write_text("[]")
    (top / "worker" / OUTCOME).write_text(json.dumps(dict.fromkeys(("headline", "config_sha256", "error")) | DONE))
    few = ("curves.k=[1,2]", "curves.queries=2", "curves.steps=[1]")
    do("curves", "mode=curves", f"curves.inits={{ours:{theta}}}", *few)
    (top / "<b>&killed" / ".hydra").mkdir(parents=True)
    (top / "<b>&killed" / ".hydra" / "overrides.yaml").write_text("[]")
    shutil.copytree(top / "imagenet", top / "torn", ignore=shutil.ignore_patterns("wandb"))
    (top / "torn" / "results.json").write_text('{"test": {')
    return top


def records(folder: Path) -> list[Record]:
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return wandb_files.finished(path)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# W&B's runs


def test_metrics_have_axes_of_their_own_names(runs: Path) -> None:
    found = records(runs / "reptile-s0")
    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in found if r.HasField("metric")}
    named = {"train/*": "meta_step", "val/iou": "meta_step", "adaptation/*": "inner_step", "uho/*": "trial"}
    assert named.items() <= axes.items()
    assert not any("trainer/global_step" in keys for keys in wandb_files.logged(found))
    (best,) = [r.metric.summary for r in found if r.metric.name == "val/iou"]
    assert (best.max, best.last) == (True, True)
    assert {"reptile", "mine"} <= set(next(r.run.tags for r in found if r.HasField("run")))


def test_the_adaptation_curve_is_that_of_the_results(runs: Path) -> None:
    history = wandb_files.history(records(runs / "reptile-s0"))
    course = results(runs / "reptile-s0")["test"]["course"]
    assert [at["step"] for at in course] == [0, 1, 2]
    assert history["adaptation/test/iou"] == [at["iou"] for at in course]
    assert history["adaptation/val/loss"] == [at["loss"] for at in results(runs / "reptile-s0")["val"]["course"]]
    assert course[-1]["iou"] == pytest.approx(results(runs / "reptile-s0")["test"]["iou"]["mean"])
    with (runs / "reptile-s0" / "csv" / "metrics.csv").open() as file:
        assert not any(name.startswith("adaptation/") for name in next(csv.reader(file)))  # its steps are meta-steps


def test_rungs_change_no_number_and_no_hash() -> None:
    def config(*words: str) -> Any:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("config", overrides=["evaluate.test_tasks=1", *words])

    assert config_sha256(config("evaluate.rungs=[]")) == config_sha256(config())
    assert config_sha256(config("evaluate.test_tasks=2")) != config_sha256(config())


@pytest.mark.parametrize("folder", ["reptile-s0", "search"])
def test_the_initialisation_is_an_artifact(runs: Path, folder: str) -> None:
    (made,) = [record.artifact for record in records(runs / folder) if record.artifact.type == "model"]
    assert (made.name, made.type) == ("init-reptile-folder", "model")
    assert [entry.path for entry in made.manifest.contents] == ["init.safetensors"]
    metadata = json.loads(made.metadata)
    assert metadata["test_iou"] == results(runs / folder)["test"]["iou"]["mean"]
    assert (metadata["meta_steps"], metadata["classes_seen"]) == (
        results(runs / folder)["meta_steps"],
        {"train": 2, "val": 2},
    )
    assert made.description == (runs / folder / "card.md").read_text()


def test_a_copied_initialisation_is_the_same_artifact(runs: Path, tmp_path: Path) -> None:
    """So that a run which tests the copy stands below the run that made it."""
    made = init_artifact(runs / "reptile-s0" / "init.safetensors")
    copied = init_artifact(Path(shutil.copy(runs / "reptile-s0" / "init.safetensors", tmp_path)))
    other = init_artifact(runs / "reptile-s1" / "init.safetensors")
    assert (made.name, made.digest) == (copied.name, copied.digest)
    assert made.digest != other.digest


class OnlineRun:
    """Of W&B, so far as a logger needs it, with what it was told."""

    offline = disabled = False
    id = "abc123"

    def __init__(self, refuses: bool = False) -> None:
        self.used: list[str] = []
        self.refuses = refuses

    def use_artifact(self, artifact: wandb.Artifact) -> None:
        if self.refuses:
            raise wandb.CommError("no network")
        self.used.append(artifact.name)

    def define_metric(self, *_: object, **__: object) -> None: ...


def online_logger(online: OnlineRun) -> AxesLogger:
    logger = AxesLogger.__new__(AxesLogger)  # Lightning's own asks whether it is a real run
    logger._experiment = online
    return logger


@pytest.mark.parametrize(
    "words",
    [["mode=test", "ckpt_path={}"], ["mode=uho", "ckpt_path={}"], ["mode=curves", "curves.inits={{a:{},b:imagenet}}"]],
)
def test_online_a_run_names_the_initialisations_that_it_tests(
    runs: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "reptile-s0" / "init.safetensors"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config", overrides=[word.format(path) for word in words])
    online = OnlineRun()
    use_inits([online_logger(online)], config)
    assert online.used == ["init-reptile-folder"]
    use_inits([online_logger(OnlineRun(refuses=True))], config)  # which stops no run
    assert "not noted as this run's input (no network)" in capsys.readouterr().out


def test_a_resumed_online_run_goes_on_in_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []

    def init(**given: Any) -> OnlineRun:
        begun.append(given)
        return OnlineRun()

    monkeypatch.setattr("metaseg.tracking.wandb.init", init)
    monkeypatch.setattr("metaseg.tracking.AxesLogger", lambda experiment: None)
    monkeypatch.setenv("WANDB_MODE", "online")
    (tmp_path / "wandb").mkdir()
    for _ in range(2):
        wandb_logger(str(tmp_path), facts=["a", None], tags=["a", "b"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb_logger(str(tmp_path), facts=[], tags=[])
    assert [(given.get("id"), given.get("resume")) for given in begun] == [
        (None, None),
        ("abc123", "allow"),
        (None, None),
    ]
    assert begun[0]["tags"] == ["a", "b"]

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        make_loggers(compose("config", overrides=["logger=csv", "ckpt_path=x.ckpt"]), tmp_path)
        assert (tmp_path / WANDB_ID).is_file()
        shutil.rmtree(tmp_path / "csv")
        make_loggers(compose("config", overrides=["logger=csv"]), tmp_path)  # a new run in the old folder
    assert not (tmp_path / WANDB_ID).exists()


# The specification


def test_panels_show_what_runs_log_over_their_axes(runs: Path) -> None:
    logs = [
        keys
        for name in ("reptile-s0", "search", "training", "curves")
        for keys in wandb_files.logged(records(runs / name))
    ]
    media = {key.removesuffix("/_type") for keys in logs for key in keys if key.endswith("/_type")}
    for panel in (panel for section in SECTIONS for panel in section.panels):
        if panel.kind in ("table", "media"):
            assert panel.metric in media, panel
            continue
        with_it = [keys for keys in logs if any(re.fullmatch(panel.metric, key) for key in keys)]
        assert with_it, panel
        assert all(panel.x in keys for keys in with_it), panel


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # of wandb-workspaces, at its import
def test_workspace_and_report_have_the_same_panels_and_need_no_network() -> None:
    pytest.importorskip("wandb_workspaces", reason='pip install "metaseg-lightning[dashboard]"')
    sections = (
        workspace("team", "project")
        ._to_model()
        .model_dump(by_alias=True)["spec"]["section"]["panelBankConfig"]["sections"]
    )
    blocks = wandb_report("team", "project")._to_model().model_dump(by_alias=True)["spec"]["blocks"]
    grids = [block["metadata"]["panelBankSectionConfig"]["panels"] for block in blocks if block["type"] == "panel-grid"]
    titles = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    wanted = ["Algorithms", "Searches", "Learning curves", "Adaptation curves", "Worst tasks"]
    assert [section["name"] for section in sections] == titles == wanted

    def shown(panels: list[dict[str, Any]]) -> list[tuple[str, str | None, Any, str | None]]:
        return [
            (
                panel["viewType"],
                panel["config"].get("xAxis"),
                panel["config"].get("metrics")
                or panel["config"].get("mediaKeys")
                or panel["config"].get("metricRegex"),
                panel["config"].get("groupBy"),
            )
            for panel in panels
        ]

    assert [shown(section["panels"]) for section in sections] == [shown(panels) for panels in grids]
    line, bar = "Run History Line Plot", "Bar Chart"
    assert shown(grids[0])[0] == (bar, None, ["test/iou"], "algo.value.name")
    assert shown(grids[1])[0] == (line, "trial", ["uho/best_iou"], None)
    assert shown(grids[1])[2] == ("Media Browser", None, ["uho"], None)
    assert shown(grids[2])[0] == (line, "meta_step", ["val/iou"], "algo.value.name")
    assert shown(grids[2])[3] == (line, "shots", "curves/.*/iou", None)
    assert shown(grids[3])[0] == (line, "inner_step", ["adaptation/test/iou"], "algo.value.name")
    assert '"val": "test/per_task"' in json.dumps(grids[4][0])


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_upload_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces", reason='pip install "metaseg-lightning[dashboard]"')
    for name in ("project", "a/b/c", "/b", "a/"):
        with pytest.raises(ConfigError, match="ENTITY/PROJECT"):
            dashboard.upload(name)
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    with pytest.raises(UserError, match="`wandb login` first"):
        dashboard.upload("team/project")
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(dashboard, "workspace", lambda *_: Saved("refused"))
    with pytest.raises(UserError, match="refused team/project \\(no such entity"):
        dashboard.upload("team/project")
    for name in ("workspace", "wandb_report"):
        monkeypatch.setattr(dashboard, name, lambda *at: Saved("/".join(at)))
    assert dashboard.upload("team/project") == ["https://w/team/project"] * 2
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"metaseg-lightning\[dashboard\]"):
        dashboard.upload("team/project")


class Saved:
    """A workspace or report whose saving needs no server."""

    def __init__(self, at: str) -> None:
        self.url = f"https://w/{at}"

    def save(self) -> "Saved":
        if self.url.endswith("refused"):
            raise wandb.CommError("no such entity")
        return self


# The page


def section(page: str, title: str) -> str:
    (found,) = re.findall(rf"<section><h2>{title}</h2>(.*?)</section>", page, re.DOTALL)
    return found


def pictures(part: str) -> list[tuple[str, tuple[int, int]]]:
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)">', part)
    return [(alt, Image.open(BytesIO(b64decode(data))).size) for alt, data in found]


def cells(part: str) -> list[list[str]]:
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", part)]


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out") / "new" / "report.html"
    write_page([runs], out)
    return out.read_text()


def test_the_page_is_whole_in_itself(page: str) -> None:
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|\.\./)', page) == []
    assert "<script" not in page
    assert "@import" not in page


def test_seeds_stand_together_and_gains_are_paired(runs: Path, page: str) -> None:
    """By hand from the runs' own files."""
    part = section(page, "Algorithms")
    by_algo = {row[0].split(" ")[0]: row for row in cells(part)[1:] if "mode=fit_test" in row[0]}
    reptile = [results(runs / f"reptile-s{seed}")["test"]["iou"]["mean"] for seed in (0, 1)]
    row = by_algo["algo=reptile"]
    assert row[1:4] == ["folder, 2 test tasks, 5 shots", "0 1", f"{100 * np.mean(reptile):.1f}"]
    half = 12.7062 * abs(reptile[0] - reptile[1]) / 2  # Student's t of one degree of freedom × s / √2
    assert row[4] == f"± {100 * half:.1f}"
    base = results(runs / "imagenet")["test"]["iou"]["mean"]
    assert by_algo["algo=finetune"][3] == f"{100 * base:.1f}"
    assert by_algo["algo=finetune"][-1] == "baseline"
    assert row[-1].startswith(f"{100 * (np.mean(reptile) - base):+.1f}\u00a0[")
    assert [alt for alt, _ in pictures(part)] == ["IoU by row"]


def test_the_page_shows_searches_and_curves(runs: Path, page: str) -> None:
    record = json.loads((runs / "search" / "uho.json").read_text())
    row = cells(section(page, "Searches"))[1]
    assert row[1:5] == [
        "2",
        *(f"{100 * record[key]:.1f}" for key in ("default_val_iou", "val_iou")),
        f"{100 * record['test']['iou']['mean']:.1f}",
    ]
    assert f"steps={record['update']['steps']}" in row[-1]
    record = json.loads((runs / "training" / "search.json").read_text())
    assert cells(section(page, "Searches"))[3][3] == f"{100 * record['val_iou']:.1f}"
    for title, wanted in {"Learning curves": 2, "Adaptation curves": 1, "Searches": 2}.items():
        assert len(pictures(section(page, title))) == wanted, title


def test_worst_tasks_come_first_with_their_pictures(runs: Path, page: str) -> None:
    part = section(page, "Worst tasks")
    head, *lines = cells(part)
    assert len(head) == 2 + 4  # the baseline, Reptile, the two searches
    means = [np.mean([float(value) for value in line[2:]]) for line in lines]
    assert [line[0] for line in lines] in (["class_4", "class_5"], ["class_5", "class_4"])
    assert means == sorted(means)
    assert {alt for alt, _ in pictures(part)} == {"class_4"}  # evaluate.panels=1 of debug=fast


def test_what_has_no_result_is_named(page: str, runs: Path) -> None:
    part = section(page, "Runs")
    assert "<b>" not in part
    killed, torn = cells(part)[-2:]
    assert "&lt;b&gt;&amp;killed" in killed[0]
    assert killed[1] == "killed, or still running"
    assert "results.json" in torn[1]
    listed = {re.sub("<.*?>", "", line[0]).removeprefix(f"{runs}/"): line for line in cells(part)[1:-3]}
    assert listed.keys() == {"imagenet", "reptile-s0", "reptile-s1", "search", "training", "curves"}
    assert listed["reptile-s1"][7] == results(runs / "reptile-s1")["config_sha256"][:12]


def test_the_command_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(runs / "imagenet"), str(runs / "torn"), "--out", str(tmp_path / "r.html")])
    said = capsys.readouterr().out
    assert "r.html: 1 runs" in said
    assert f"{runs / 'torn'}: " in said
    assert "None." in section((tmp_path / "r.html").read_text(), "Searches")
    (tmp_path / "empty").mkdir()
    for folders in (["empty"], ["nowhere"]):
        with pytest.raises(SystemExit, match="metaseg: .*such as|metaseg: .*give folders"):
            main([str(tmp_path / name) for name in folders])
    with pytest.raises(SystemExit):
        main([])


# Rows and gains, of files written by hand


def leave(folder: Path, iou: float = 0.5, words: tuple[str, ...] = (), **results: Any) -> Path:
    """A finished run's folder: one task with this IoU."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(words))
    part = {"iou": {"mean": iou, "ci95": [iou, iou]}, "tasks": 1}
    facts = {"algo": "reptile", "mode": "test", "dataset": "folder", "splits_sha256": "s", "shots": 5, "batchnorm": "b"}
    told = {"seed": 0, "trained_on": {"dataset": "folder"}, "episodes": {"seed": 0}, "test": part}
    (folder / "results.json").write_text(json.dumps({**facts, **told, **results}))
    (folder / "per_task.csv").write_text(f"task,draw,iou,loss\na,0,{iou},1.0\n")
    return folder


def test_every_initialisation_is_a_row(tmp_path: Path) -> None:
    """Their paths may share the last parts; relative ones are seen from where the run was begun."""
    paths = ["n_A/0/init.safetensors", "n_A2/0/init.safetensors", "/n_A/0/init.safetensors"]
    for number, path in enumerate(paths):
        hydra = leave(tmp_path / str(number), number / 10, (f"ckpt_path={path}",)) / ".hydra" / "hydra.yaml"
        hydra.write_text(f"hydra: {{runtime: {{cwd: /{number}}}}}")
    leave(tmp_path / "3", 0.4, ("ckpt_path=/0/n_A/0/init.safetensors",))  # the first once more
    names = {f"ckpt_path={path}/0/init.safetensors": [] for path in ("0/n_A", "1/n_A2", "/n_A")}
    found = find([tmp_path])
    assert [row.name for row, _ in found.rows] == [*names]
    assert [(row.seeds, row.mean) for row, _ in found.rows] == [("0×2", 0.2), ("0", 0.1), ("0", 0.2)]
    write_page([tmp_path], tmp_path / "r.html")
    assert [line[0] for line in cells(section((tmp_path / "r.html").read_text(), "Algorithms"))[1:]] == [*names]


def test_rows_are_named_by_what_changes_numbers(tmp_path: Path) -> None:
    leave(tmp_path / "0", words=("update.lr=${algo.inner.lr}", "search.storage=postgresql://me:secret@host/db"))
    leave(tmp_path / "1", words=("trainer=gpu", "+trainer.precision=16", "worker=1", "hydra/launcher=ray", "workers=0"))
    leave(tmp_path / "2", words=("trainer.max_steps=9", "evaluate.panels=1", "logger.tags=[a]", "uho.workers=2"))
    leave(tmp_path / "3", words=("~uho.space.adapts", "uho.storage=a", "evaluate.processes=2"))
    names = [row.name for row, _ in find([tmp_path]).rows]
    assert names == ["update.lr=${algo.inner.lr}", "all", "trainer.max_steps=9", "uho.space.adapts=removed"]


def test_a_rows_baseline_has_met_its_episodes(tmp_path: Path) -> None:
    untrained = {"algo": "finetune", "trained_on": None}
    leave(tmp_path / "0", 0.7, **untrained, mode="uho")  # its ω was searched for: no baseline
    leave(tmp_path / "1", 0.1, **untrained, shots=1, words=("evaluate.shots=1",))
    leave(tmp_path / "2", 0.2, **untrained)
    leave(tmp_path / "3", 0.5)
    leave(tmp_path / "4", 0.5, shots=1, words=("evaluate.shots=1",))
    leave(tmp_path / "5", 0.5, shots=10, words=("evaluate.shots=10",))
    write_page([tmp_path], tmp_path / "r.html")
    gains = [
        line[-1].split("\u00a0")[0] for line in cells(section((tmp_path / "r.html").read_text(), "Algorithms"))[1:]
    ]
    assert gains == ["+50.0", "baseline", "baseline", "+30.0", "+40.0", "other episodes"]


def test_a_broken_run_does_not_stop_the_others(tmp_path: Path) -> None:
    part = {"iou": {"mean": 0.5, "ci95": [0.5, 0.5]}, "tasks": 1}
    for name, wrong in {
        "time": {"wall_s": "long"},
        "commit": {"git_commit": 7},
        "episodes": {"episodes": [1]},
        "course": {"test": {**part, "course": [{}]}},
    }.items():
        leave(tmp_path / name, **wrong)
    (leave(tmp_path / "overrides") / ".hydra" / "overrides.yaml").write_text("- a: [")
    good = leave(tmp_path / "²", mode="fit_test", words=("a='$\\b$'",))
    leave(tmp_path / "2", mode="fit_test")
    (good / "csv").mkdir()
    (good / "csv" / "metrics.csv").write_text("step,val/iou\n1,0.25\n2,0.5\n3,0.\x00\nx")
    found = write_page([tmp_path], tmp_path / "r.html")
    assert {path.name for path in found.broken} == {"time", "commit", "episodes", "course", "overrides"}
    assert [run.folder.name for _, run in found.runs] == ["2", "²"]


def test_a_fresh_run_in_a_used_folder_leaves_no_old_curves(tmp_path: Path) -> None:
    for name in ("csv", "csv2", "csv-mine"):
        (tmp_path / name).mkdir()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for words, left in ((["ckpt_path=x.ckpt"], {"csv", "csv2", "csv3"}), ([], {"csv"})):
            make_loggers(compose("config", overrides=["logger=csv", *words]), tmp_path)[0].save()
            assert {path.name for path in tmp_path.iterdir()} == left | {"csv-mine"}
