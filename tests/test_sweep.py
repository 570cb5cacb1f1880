"""Multiruns: how each job ended, what is run again, and the table of all."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import wandb_files
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from test_config import presets
from trees import write_data

from metaseg.config import config_dir
from metaseg.errors import RESUMABLE, ConfigError, DataError
from metaseg.summary import Row, failures, latex, main, read_sweep, rows, summarise
from metaseg.sweep import OUTCOME, SummaryAtTheEnd, finished, read_outcome, recorded

LAUNCHERS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "submitit", "ray": "ray"}


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


# One job


def test_skip_done_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="skip_done=no: give true or false"):
        recorded(lambda *_: 0.5, config("skip_done=no"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_leaves_how_it_ended_and_skip_done_returns_that(tmp_path: Path) -> None:
    taken: list[int] = []

    def run(config: DictConfig, folder: Path) -> float:
        taken.append(config.seed)
        return 0.25

    assert recorded(run, config(), tmp_path) == 0.25
    assert read_outcome(tmp_path)["state"] == "finished"
    assert recorded(run, config("skip_done=true"), tmp_path) == 0.25
    assert taken == [0]  # not run again
    recorded(run, config("skip_done=true", "seed=1"), tmp_path)  # another configuration
    recorded(run, config("seed=1"), tmp_path)  # not asked to skip
    assert taken == [0, 1, 1]


@pytest.mark.parametrize("broken", ["", "{", "[1]", '{"state": "finished"}'])
def test_what_is_no_outcome_is_run_again(tmp_path: Path, broken: str) -> None:
    (tmp_path / OUTCOME).write_text(broken)
    assert read_outcome(tmp_path) is None
    assert recorded(lambda *_: 0.5, config("skip_done=true"), tmp_path) == 0.5


@pytest.mark.parametrize(("error", "told"), [(ConfigError("mend it"), "mend it"), (KeyError("k"), "Traceback")])
def test_a_failure_is_written_down(tmp_path: Path, error: Exception, told: str) -> None:
    def run(config: DictConfig, folder: Path) -> float:
        raise error

    for words in ([], ["skip_done=true"]):  # a failed one is never skipped
        with pytest.raises(type(error)):
            recorded(run, config(*words), tmp_path)
        assert told in read_outcome(tmp_path)["error"]


def test_a_run_of_an_initialisation_written_since_has_not_finished(tmp_path: Path) -> None:
    init = tmp_path / "init.safetensors"
    init.touch()
    tests = config("mode=test", f"ckpt_path={init}")
    recorded(lambda *_: 0.5, tests, tmp_path)
    assert finished(tests, tmp_path) == 0.5
    os.utime(init, (time.time() + 10, time.time() + 10))
    assert finished(tests, tmp_path) is None


# The table


def sweep(folder: Path, jobs: dict[str, float | None]) -> Path:
    """A multirun's folder: by each job's overrides, its headline."""
    for number, (words, headline) in enumerate(jobs.items()):
        place = folder / str(number)
        (place / ".hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(words.split()), place / ".hydra" / "overrides.yaml")
        if headline is not None:
            outcome = {"state": "finished", "headline": headline, "config_sha256": "", "error": None}
            (place / OUTCOME).write_text(json.dumps(outcome))
    return folder


def test_seeds_are_one_row_with_students_interval(tmp_path: Path) -> None:
    jobs: dict[str, float | None] = {
        "trainer=cpu algo=reptile seed=0": 0.50,
        "trainer=cpu algo=reptile seed=1": 0.60,
        "trainer=cpu algo=reptile seed=2": 0.55,
        "trainer=cpu algo=fomaml seed=0": 0.40,
        "trainer=cpu algo=fomaml seed=1": None,
    }
    reptile, fomaml = rows(read_sweep(sweep(tmp_path, jobs)))
    assert reptile.values == {"algo": "reptile"}  # what all share, and the seed, is not in the name
    assert reptile.mean == pytest.approx(0.55)
    assert reptile.half_width == pytest.approx(4.302653 * 0.05 / math.sqrt(3), rel=1e-5)  # t of 2 degrees of freedom
    assert (fomaml.mean, fomaml.half_width, fomaml.missing) == (0.40, None, ["1"])
    assert [path.name for path in failures(tmp_path)] == ["4"]


def test_jobs_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    sweep(tmp_path, {f"update.steps={n}": n / 100 for n in range(1, 13)})
    assert [row.values["update.steps"] for row in rows(read_sweep(tmp_path))] == [str(n) for n in range(1, 13)]


def test_the_table_as_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs: dict[str, float | None] = {"algo=a seed=0": 0.5, "algo=a seed=1": 0.7, "algo=b_c seed=0": 0.8}
    main([str(sweep(tmp_path, jobs))])
    assert "a" in capsys.readouterr().out
    with (tmp_path / "summary.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["algo"], first["iou"], first["seeds"], first["iou_by_seed"]) == (
        "a",
        "0.6000",
        "0 1",
        "0.5000 0.7000",
    )
    assert (second["iou"], second["half_width"]) == ("0.8000", "")
    tex = (tmp_path / "summary.tex").read_text()
    assert "a & $60.0 \\pm 127.1$ & 2 \\\\" in tex  # 12.7062 · 0.1, t of 1 degree of freedom
    assert "b\\_c & $\\mathbf{80.0}$ & 1 \\\\" in tex
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert summarise(tmp_path) == rows(read_sweep(tmp_path))


def test_a_row_without_a_result_is_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = summarise(sweep(tmp_path, {"seed=0": None}))
    assert "killed, or still running" in capsys.readouterr().out
    assert "$--$ & 0" in latex(table)


def test_a_folder_without_jobs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no jobs of a multirun"):
        read_sweep(tmp_path)
    with pytest.raises(SystemExit, match="metaseg: .* holds no jobs"):
        main([str(tmp_path)])


@pytest.mark.parametrize("word", ["x.url=sqlite\\:///a.db", "x.url='sqlite:///a.db'", "x.url=sqlite://me:pw@/a.db"])
def test_values_are_shown_plain_and_without_a_password(tmp_path: Path, word: str) -> None:
    job = read_sweep(sweep(tmp_path, {f"{word} ++a.b=${{dataset.name}} c=[1,true,null,{{d:e}}] ~f.g": None}))[0]
    plain = {"a.b": "${dataset.name}", "c": "[1,true,null,{d:e}]", "f.g": "removed"}
    assert job.values == {"x.url": "sqlite:///a.db", **plain}


def test_a_deletion_a_null_and_an_empty_text_are_no_absence(tmp_path: Path) -> None:
    jobs = read_sweep(sweep(tmp_path, {"seed=0": 0.1, "~a.b": 0.2, "a.b=null": 0.3, "a.b=''": 0.4}))
    assert [row.name for row in rows(jobs)] == ["all", "a.b=removed", "a.b=null", "a.b=''"]


def test_overrides_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for broken in ("- a: [", "- 'a=[1'", "- a"):
        (sweep(tmp_path / broken, {"seed=0": 0.5}) / "0" / ".hydra" / "overrides.yaml").write_text(broken)
        with pytest.raises(DataError, match=r"0/\.hydra/overrides\.yaml is not what Hydra writes"):
            read_sweep(tmp_path / broken)


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    for part, jobs in {"a": {"seed=0": 0.2, "seed=1": 0.5}, "b": {"seed=0": 0.4}}.items():
        sweep(tmp_path / part, jobs)
    (row,) = rows(read_sweep(tmp_path))
    assert (row.seeds, row.mean) == ("0×2 1", pytest.approx(0.4))  # (0.3 + 0.5) / 2
    assert row.half_width == pytest.approx(12.7062 * 0.1, rel=1e-4)  # Student's t of one degree of freedom


def test_latex_takes_any_text() -> None:
    table = latex([Row({"a^b": "[1,2]"}, {}, []), Row({"a^b": "~\\x$"}, {}, [])])
    assert "a\\textasciicircum{}b & IoU" in table
    assert "\n{}[1,2] & " in table
    assert "\n\\textasciitilde{}\\textbackslash{}x\\$ & " in table


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    assert summarise(sweep(tmp_path, {"a=${b\\}}$": 0.5, "'a=$\\b$'": 0.4} and {"a='$\\b$'": 0.5, "a=c": 0.4}))


def test_jobs_of_an_earlier_sweep_in_the_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, {"seed=0": 0.5, "seed=1": 0.5, "seed=2": None})
    (tmp_path / "multirun.yaml").touch()
    os.utime(tmp_path / "2" / ".hydra" / "overrides.yaml", (0, 0))
    os.utime(tmp_path / "multirun.yaml", (1, 1))
    summarise(tmp_path)
    assert f"\n2: older than {tmp_path}/multirun.yaml" in capsys.readouterr().out


# Workers


WORKERS: dict[str, float | None] = {"seed=0 worker=0": 0.5, "seed=0 worker=1": 0.6, "seed=1 worker=0": None}


def at_the_end(folder: Path) -> None:
    SummaryAtTheEnd().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))


def test_workers_are_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One has tested; the other's metric is of validation tasks."""
    (sweep(tmp_path, WORKERS) / "1" / "results.json").touch()
    assert summarise(tmp_path) == []
    said = capsys.readouterr().out
    assert f"study of 2 workers, seed=0; tested: {tmp_path}/1\n" in said
    assert "study of 1 workers, seed=1; tested: not yet; the same command" in said
    assert not [*tmp_path.glob("summary.*")]


def test_a_study_is_complete_once_it_is_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The elected worker may die while it tests, when the others have ended."""
    with pytest.raises(SystemExit, match="2 studies of 2 .*seed=0; seed=1. The same command tests it"):
        at_the_end(sweep(tmp_path, WORKERS))
    (tmp_path / "0" / "results.json").touch()
    with pytest.raises(SystemExit, match="1 studies of 2 .*: seed=1. The same command tests it"):
        at_the_end(tmp_path)
    (tmp_path / "2" / "results.json").touch()
    at_the_end(tmp_path)
    assert "1 workers have not finished; the others did without them" in capsys.readouterr().err


# The real thing


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = write_data(tmp_path_factory.mktemp("data"))
    return [*data, "debug=fast", "algo.inner.steps=1", "model.weights=null", "model.rsd=[16]"]


@pytest.fixture(scope="module")
def multirun(words: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def start(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "metaseg.run", "-m", *words, f"hydra.sweep.dir={folder}", *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, timeout=300)

    return start


@pytest.fixture(scope="module")
def serial(multirun: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multirun, one job after the other, one of which cannot work; then the same once more, with one that can."""
    folder = tmp_path_factory.mktemp("serial") / "sweep"
    done = multirun(folder, "evaluate.shots=5,50", "logger.tags=[night]")
    assert done.returncode == 1
    assert "metaseg: 1 jobs have not finished: 1. The same command with skip_done=true" in done.stderr
    assert "Lower evaluate.shots" in read_outcome(folder / "1")["error"]
    assert "Lower evaluate.shots" in done.stderr
    before = (folder / "0" / "results.json").stat().st_mtime_ns
    again = multirun(folder, "evaluate.shots=5,4", "skip_done=true")
    assert again.returncode == 0, again.stderr
    assert (folder / "0" / "results.json").stat().st_mtime_ns == before
    return folder


def headlines(folder: Path) -> dict[str, float | None]:
    return {job.folder.name: job.headline for job in read_sweep(folder)}


@pytest.mark.slow
def test_a_failure_ends_no_other_job_and_is_all_that_is_run_again(serial: Path) -> None:
    assert all(headline is not None for headline in headlines(serial).values())


@pytest.mark.slow
def test_wandb_groups_the_jobs_by_the_sweep(serial: Path) -> None:
    (path,) = (serial / "0").glob("wandb/offline-run-*/*.wandb")
    (started,) = [record.run for record in wandb_files.finished(path) if record.HasField("run")]
    assert (started.run_group, started.job_type) == (f"{serial.parent.name}/sweep", "fit_test")
    assert started.display_name == "reptile-s0 fit_test evaluate.shots=5"
    assert list(started.tags) == ["reptile", "folder", "efficientlab_lite0", "night"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_serial_runs_numbers(
    launcher: str,
    serial: Path,
    multirun: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    pytest.importorskip(LAUNCHERS[launcher])
    shots = "5,4" if launcher == "joblib" else "5"  # each job has three processes to start
    done = multirun(tmp_path / "sweep", f"evaluate.shots={shots}", "logger=csv", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    expected = headlines(serial)
    assert headlines(tmp_path / "sweep") == {job: expected[job] for job in "01"[: len(shots.split(","))]}


@pytest.mark.parametrize("launcher", [*LAUNCHERS, "submitit_slurm"])
def test_launchers_compose(launcher: str) -> None:
    pytest.importorskip(LAUNCHERS.get(launcher, "submitit"))
    assert launcher in presets("hydra/launcher")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        made = compose("config", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert made.hydra.launcher._target_.startswith("hydra_plugins.")


SBATCH = """#!/bin/bash
# a cluster of one node that begins the tasks of an array at once
script=$1
cp "$script" "$0.seen"  # which is run: submitit puts a link in its place meanwhile
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=7_$task SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NAME=metaseg SLURM_NTASKS=1 \
  SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=localhost \
  nohup bash "$0.seen" >"$0.log$task" 2>&1 &
done
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do  # its own options
  [[ $1 == --unbuffered ]] || shift
  shift
done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script that sbatch was given, later; sacct knows nothing yet, as on a slow cluster."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/bin/sh\n"}.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tools / "sbatch.seen"


@pytest.mark.slow
def test_slurm_runs_the_jobs_as_an_array(
    slurm: Path,
    serial: Path,
    multirun: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    pytest.importorskip("submitit")
    done = multirun(tmp_path / "sweep", "evaluate.shots=5,4", "logger=csv", "hydra/launcher=submitit_slurm")
    assert done.returncode == 0, done.stderr
    assert headlines(tmp_path / "sweep") == headlines(serial)
    asked = slurm.read_text()
    for option in ("array=0-1%2", "gpus-per-node=1", "cpus-per-task=4", "mem=16GB", "time=1440", "signal=USR2@120"):
        assert f"#SBATCH --{option}\n" in asked


@pytest.mark.slow
def test_a_killed_job_ends_no_other_and_a_stopped_multirun_can_go_on(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    long = ["seed=0,1,2,3", "logger=csv", "checkpoint_every=1", "trainer.max_steps=100000", f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "metaseg.run", "-m", *words, *long]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    def wait_for_meta_steps(job: str) -> None:
        while process.poll() is None and not (folder / job / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.05)

    wait_for_meta_steps("0")
    (job,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(job), signal.SIGKILL)
    wait_for_meta_steps("1")
    (job,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(job), signal.SIGTERM)
    wait_for_meta_steps("2")
    process.send_signal(signal.SIGTERM)  # to Hydra's process alone
    _, stderr = process.communicate()
    assert process.returncode == RESUMABLE, stderr
    assert "killed by SIGKILL; the machine may be out of memory" in read_outcome(folder / "0")["error"]
    assert "this job was stopped; the same command" in read_outcome(folder / "1")["error"]
    assert stderr.count("stopped by SIGTERM at meta-step") == 2
    assert read_outcome(folder / "2") is None
    assert not (folder / "3").exists()  # not begun


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere jobs go on")
def test_jobs_side_by_side_stop_when_the_command_is_told_to(words: list[str], tmp_path: Path) -> None:
    """As a script's background job, in which Ctrl-C is ignored."""
    pytest.importorskip("joblib")
    folder = tmp_path / "sweep"
    more = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1,2", "logger=csv", "checkpoint_every=1"]
    long = [*more, "trainer.max_steps=100000", f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "metaseg.run", "-m", *words, *long]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=partial(signal.signal, 2, signal.SIG_IGN)
    )
    checkpoints = [folder / job / "checkpoints" / "last.ckpt" for job in "01"]
    while process.poll() is None and not all(path.exists() for path in checkpoints):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()  # ends when the jobs have, too, which hold the pipe
    assert process.returncode == RESUMABLE, stderr
    assert "the jobs at work leave checkpoints; the same command with skip_done=true ckpt_path=last goes on" in stderr
    assert stderr.count("stopped by SIGTERM at meta-step") == 2
    assert not (folder / "2" / "checkpoints").exists()  # not begun
