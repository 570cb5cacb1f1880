"""Numbers that go wrong: inner loops that diverge, while meta-training, at evaluation and on people's own images."""

import csv
import json
import math
import multiprocessing
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_adapt import OMEGA, Net, episode
from test_module import INNER, META_BATCH, STEPS, Source, fit, make_data, make_net
from test_run import job, results
from torch import Tensor, distributed, nn
from torch.optim import SGD, Adam
from trees import write_data

import metaseg
from metaseg import ranks
from metaseg.adapt import Adapter
from metaseg.algos import Reptile
from metaseg.data.episodes import EvaluationEpisodes
from metaseg.divergence import DroppedEpisodes, divergence
from metaseg.engine import Fast, Reference, auto
from metaseg.engine.flat import flat, flat_statistics
from metaseg.episode import Batch, Episode
from metaseg.errors import ConfigError, DivergedError
from metaseg.evaluate import Scoring, evaluate
from metaseg.losses import segmentation_loss
from metaseg.metrics import counts, mean_iou, predicted
from metaseg.update import Constant, Cosine, Step, Update

TOO_HIGH = 1e30  # a learning rate
BAD = "train-2"  # the task that diverges
NAN = float("nan")


def undefined_for_full_masks(logits: Tensor, masks: Tensor) -> Tensor:
    """A loss that is no number for `BAD`, whose masks are full."""
    return segmentation_loss(logits, masks) + torch.where(masks.all(), NAN, 0.0)


class OneBadTask(Source):
    def load(self, task: str, which: list[int]) -> tuple[np.ndarray, np.ndarray]:
        images, masks = super().load(task, which)
        return images, np.ones_like(masks) if task == BAD else masks


FRAGILE = replace(INNER, loss=undefined_for_full_masks, augment=0.0)


@pytest.fixture
def one_bad_task(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Meta-training of `test_module` on `OneBadTask`; the tasks of its episodes, in their order."""
    monkeypatch.setattr("test_module.Source", OneBadTask)
    monkeypatch.setattr("test_module.INNER", FRAGILE)
    return [make_data(make_net()).training[i].task for i in range(STEPS * META_BATCH)]


# One adaptation


@pytest.mark.parametrize("engine", [Reference, Fast])
def test_an_adaptation_knows_whether_its_numbers_are_finite(engine: type[Adapter]) -> None:
    torch.manual_seed(0)
    net, task = Net(), episode()
    sound, wild = engine(net, OMEGA), engine(net, replace(OMEGA, lr=TOO_HIGH))
    for adapt in (sound, wild):
        adapt(net, task)
    assert sound.finite()
    assert not wild.finite()
    last = engine(net, replace(OMEGA, lr=TOO_HIGH, schedule=lambda progress: float(progress == 0.75)))
    last(net, task)  # moves in its last step alone: the losses before it are finite
    assert all(math.isfinite(loss) for loss in last.losses)
    last.phi.head.bias.data.fill_(math.inf)
    assert not last.finite()
    for module in sound.phi.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(math.inf)
    assert not sound.finite()


@pytest.mark.parametrize(
    ("schedule", "losses", "said"),
    [
        (Constant(), [0.7, 2.0, NAN, NAN], "the loss is nan after inner step 2 of 4, at lr 0.1"),
        (Constant(), [math.inf], "the loss is inf before inner step 1 of 1, at lr 0.1"),
        (Cosine(), [0.7, 0.5, 0.4, NAN], "the loss is nan after inner step 3 of 4, at lr 0.05"),
        (Constant(), [0.7, 9.0], "the numbers are not finite after inner step 2 of 2, at lr 0.1"),
    ],
)
def test_where_it_went_wrong_is_said_with_step_and_rate(
    schedule: Callable[[float], float], losses: list[float], said: str
) -> None:
    assert divergence(Update(partial(SGD), lr=0.1, steps=4, schedule=schedule), losses) == said


# Meta-training


def test_a_diverged_episode_is_dropped_and_the_mean_is_of_the_others(one_bad_task: list[str], tmp_path: Path) -> None:
    """Each meta-step by hand: SGD moves θ by the mean of θ − φ over the sound episodes, and not at all without any."""
    steps = 3
    drawn = [one_bad_task[i : i + META_BATCH] for i in range(0, steps * META_BATCH, META_BATCH)]
    assert [BAD in tasks for tasks in drawn].count(True) >= 1
    with pytest.warns(UserWarning, match="training episodes diverged and were dropped") as caught:
        learner, _ = fit(tmp_path, steps, outer=partial(SGD, lr=0.25), max_dropped=1.0)
    theta, training, rates = make_net(), make_data(make_net()).training, [0.25 * (1 - i / 5) for i in range(steps)]
    adapt, start, statistics = Fast(theta, FRAGILE), flat(theta), flat_statistics(theta)
    for step, tasks in enumerate(drawn):
        ended = []
        for i, task in enumerate(tasks):
            if task != BAD:
                adapt(theta, training[step * META_BATCH + i])
                ended.append((adapt.vector().clone(), adapt.statistics().clone()))
        if ended:
            phi, moved = (torch.stack(part).mean(0) for part in zip(*ended, strict=True))
            start += rates[step] * (phi - start)
            statistics.copy_(moved)
    torch.testing.assert_close(flat(learner.net), start)
    torch.testing.assert_close(flat_statistics(learner.net), statistics)
    assert learner.dropped.count == sum(tasks.count(BAD) for tasks in drawn)
    said = f"task {BAD}: the loss is nan before inner step 1 of 2, at lr 0.1"
    assert any(said in str(warning.message) for warning in caught)


def test_too_many_dropped_episodes_end_the_run_and_leave_its_checkpoint(
    one_bad_task: list[str], tmp_path: Path
) -> None:
    share = one_bad_task.count(BAD) / len(one_bad_task)
    assert 0 < share < 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path / "as many", STEPS, max_dropped=share)
        counted = rf"^{one_bad_task.count(BAD)} of {len(one_bad_task)} training episodes .* max_dropped=.*"
        last = (len(one_bad_task) - 1 - one_bad_task[::-1].index(BAD)) // META_BATCH + 1
        said = (
            rf"meta-step {last}, task {BAD}: the loss is nan before inner step 1 of 2, at lr 0\.1\. Lower algo\.inner"
        )
        with pytest.raises(DivergedError, match=counted + said):
            fit(tmp_path / "more", STEPS, max_dropped=share - 0.01)
    kept = torch.load(tmp_path / "more" / f"step={STEPS - 1}.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())


def test_the_share_is_asked_from_the_twentieth_episode_on_and_at_the_end() -> None:
    dropped = DroppedEpisodes(most=0.5, meta_batch=5, meta_steps=100)
    with pytest.warns(UserWarning, match="11 training"):
        dropped.note(1, 11, ["task a: …"])  # more than there are: so few episodes say nothing yet
    dropped.check(3)
    with pytest.raises(DivergedError, match="11 of 20 training episodes"):
        dropped.check(4)
    dropped.check(5)
    short = DroppedEpisodes(most=0.5, meta_batch=2, meta_steps=2)
    with pytest.warns(UserWarning, match="3 training"):
        short.note(2, 3, ["task a: …"])
    with pytest.raises(DivergedError, match="3 of 4 training episodes"):
        short.check(2)


def test_the_warning_is_counted_and_does_not_come_each_time() -> None:
    dropped = DroppedEpisodes(most=1.0, meta_batch=1, meta_steps=1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 101):
            dropped.note(step, 1, [f"task {step}: …"])
    assert [int(str(warning.message).split()[0]) for warning in caught] == [1, 2, 4, 8, 16, 32, 64]
    assert dropped.last == "meta-step 100, task 100: …"


def test_a_resumed_run_goes_on_counting(one_bad_task: list[str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, _ = fit(tmp_path / "whole", STEPS, max_dropped=1.0)
        _, folder = fit(tmp_path / "half", 3, max_dropped=1.0)
        resumed, _ = fit(tmp_path / "rest", STEPS, resume=folder / "step=3.ckpt", max_dropped=1.0)
    assert resumed.dropped.state() == whole.dropped.state()
    assert whole.dropped.count == one_bad_task.count(BAD)
    assert torch.equal(flat(resumed.net), flat(whole.net))


def test_an_outer_step_too_long_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(self: Reptile, theta: nn.Module, episode: Episode, adapt: Adapter) -> Tensor:
        adapt(theta, episode)
        return torch.full_like(flat(theta), 1e10)

    monkeypatch.setattr(Reptile, "meta_gradient", huge)
    said = r"^θ, or what .* is not finite any more after meta-step 1, of size 1e\+30: lower algo\.outer\.lr or"
    with pytest.raises(DivergedError, match=said):
        fit(tmp_path, STEPS, outer=partial(SGD, lr=1e30))
    assert not list(tmp_path.iterdir())


def test_an_outer_optimizer_does_not_keep_infinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's mean of squares overflows before θ does, which then hardly moves any more."""

    def large(self: Reptile, theta: nn.Module, episode: Episode, adapt: Adapter) -> Tensor:
        adapt(theta, episode)
        return torch.full_like(flat(theta), 1e23)

    monkeypatch.setattr(Reptile, "meta_gradient", large)
    with pytest.raises(DivergedError, match=r"what the outer optimizer keeps of it, is not finite .* meta-step 1,"):
        fit(tmp_path, STEPS, outer=partial(Adam, lr=0.1))
    assert not list(tmp_path.iterdir())


def test_without_a_sound_episode_nothing_moves_theta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even Adam's momentum; and a pseudo-gradient that is no number is dropped like an inner loop's."""
    taken: list[str] = []

    def fails_later(self: Reptile, theta: nn.Module, episode: Episode, adapt: Adapter) -> Tensor:
        adapt(theta, episode)
        taken.append(episode.task)
        return torch.full_like(flat(theta), 1.0 if len(taken) <= 2 * META_BATCH else NAN)

    monkeypatch.setattr(Reptile, "meta_gradient", fails_later)
    two, _ = fit(tmp_path / "two", 2, outer=partial(Adam, lr=0.1))
    taken.clear()
    with pytest.warns(UserWarning, match="the numbers are not finite after inner step 2 of 2"):
        all_steps, _ = fit(tmp_path / "all", STEPS, outer=partial(Adam, lr=0.1), max_dropped=1.0)
    assert all_steps.dropped.count == (STEPS - 2) * META_BATCH
    assert torch.equal(flat(all_steps.net), flat(two.net))
    assert torch.equal(flat_statistics(all_steps.net), flat_statistics(two.net))
    assert not torch.equal(flat(two.net), flat(make_net()))


def test_the_command_names_task_step_and_rate_and_keeps_what_there_was(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    words = [*data, "algo=reptile", "logger=csv", "mode=fit", f"algo.inner.lr={TOO_HIGH}"]
    said = r"4 of 4 .* task class_[01]: the loss is nan after inner step 1 of 2, at lr 1e\+30\. Lower algo\.inner\.lr"
    with pytest.warns(UserWarning, match="dropped"), pytest.raises(DivergedError, match=said):
        job(tmp_path / "run", *words)
    with pytest.warns(UserWarning, match="dropped"):
        job(tmp_path / "run", *words, "max_dropped=1")
    with (tmp_path / "run" / "csv" / "metrics.csv").open(newline="") as file:
        counted = [row["train/dropped_episodes"] for row in csv.DictReader(file)]
    assert [float(count) for count in counted if count] == [2, 4]


def _rank(place: int, store: str, told: "multiprocessing.Queue[object]") -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=place, world_size=2)
    mine = {0: [True, True], 1: [False]}[place]
    values = [torch.full((2,), 10.0 * (place + 1) + i) for i in range(len(mine))]
    if place:
        values[0][:] = NAN
    (mean,), count = ranks.means(mine, values)
    (none,), no = ranks.means([False] * len(mine), values)
    told.put((place, mean.tolist(), count, none.tolist(), no, ranks.gathered([f"of rank {place}"] * place)))


def test_a_rank_may_have_nothing_to_give(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=_rank, args=(place, str(tmp_path / "store"), told)) for place in (0, 1)]
    for process in processes:
        process.start()
    heard = sorted(told.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    same = ([10.5, 10.5], 2, [0.0, 0.0], 0, ["of rank 1"])
    assert heard == [(0, *same), (1, *same)]


# A search over training


def test_a_trial_that_diverges_is_lost_and_the_search_goes_on(tmp_path: Path) -> None:
    words = [*write_data(tmp_path), "mode=search", "logger=csv", "evaluate.validations=1", "evaluate.train_tasks=0"]
    words += ["search.trials=2", "search.random=2", f"search.storage={tmp_path}/journal", "~search.space.update"]
    words += ["~search.space.algo.outer", "search.space.algo.inner.lr={low:0.05,high:1e35,log:true}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job(tmp_path / "search", *words)
    record = json.loads((tmp_path / "search" / "search.json").read_text())
    assert (record["trials"], record["given_up"]) == (2, 1)
    assert [trial["value"] for trial in record["history"] if trial.get("given_up")] == [0]
    assert record["values"] == {"algo.inner.lr": 0.05}


def test_a_search_of_which_all_trials_diverge_says_so(tmp_path: Path) -> None:
    words = [*write_data(tmp_path), "mode=search", "logger=csv", "search.trials=1", f"algo.inner.lr={TOO_HIGH}"]
    words += [f"search.storage={tmp_path}/journal", "search.space.algo.inner.lr={low:1e30,high:1e31}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DivergedError, match=r"all trials have diverged: lower the learning rates of search\.space"):
            job(tmp_path / "search", *words)


# Evaluation


def test_what_a_diverged_network_predicts_by_chance_does_not_count() -> None:
    omega = replace(INNER, lr=1e10, steps=5, adapts="head", batchnorm="support")
    episodes = EvaluationEpisodes(Source(), "val", ["val-0", "val-1"], omega, shots=2, queries=2, draws=1, seed=0)
    lanes = auto(make_net(), omega)
    (adapt,) = lanes.adapters
    episode = episodes[0]
    adapt(make_net(), episode)
    guessed = predicted(adapt.predict(episode.query.images, episode.support))
    assert mean_iou(counts(guessed, episode.query.masks)) > 0.1
    with pytest.warns(UserWarning, match="2 of 2 adaptations diverged, and count as finding no object"):
        found = evaluate(Scoring(make_net(), episodes, omega, auto, rungs=range(1, 5)), title="test", examples=1)
    for score in found.scores:
        assert score.steps == (0, 1, 2, 3, 4, 5)
        wrong = [i for i, loss in enumerate(score.losses) if not math.isfinite(loss)]
        assert wrong == list(range(wrong[0], 6))
        assert not score.counts[wrong, :, 0].any()  # pixels of the object that were found
    assert found.iou == pytest.approx(0, abs=1e-6)
    assert not found.examples[0].prediction.any()
    assert [math.isnan(score.losses[-1]) for score in found.scores] == [True, True]


def test_a_diverged_adaptation_counts_as_finding_nothing_and_is_told() -> None:
    omega = replace(INNER, lr=TOO_HIGH)
    episodes = EvaluationEpisodes(Source(), "val", ["val-0", "val-1"], omega, shots=2, queries=2, draws=1, seed=0)
    with pytest.warns(
        UserWarning, match=r"2 of 2 adaptations diverged, .*task val-0: the loss is nan after inner step 1 of 2"
    ):
        found = evaluate(Scoring(make_net(), episodes, omega, auto), title="test")
    assert found.iou == pytest.approx(0, abs=1e-6)
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert (summary["diverged"], summary["loss"]) == (2, {"mean": None, "ci95": [None, None]})
    assert [row["diverged"] for row in found.rows()] == [1, 1]
    sound = evaluate(Scoring(make_net(), episodes, INNER, auto), title="test")
    assert (sound.summary()["diverged"], [row["diverged"] for row in sound.rows()]) == (0, [0, 0])


def test_a_run_whose_adaptations_all_diverge_leaves_valid_json(tmp_path: Path) -> None:
    words = [*write_data(tmp_path), "algo=finetune", "logger=csv", f"update.lr={TOO_HIGH}"]
    with pytest.warns(UserWarning, match="adaptations diverged"):
        assert job(tmp_path / "run", *words) == pytest.approx(0, abs=1e-6)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "run" / "results.json").read_text()
    assert json.loads(text, parse_constant=refuse)["test"]["diverged"] == results(tmp_path / "run")["test"]["tasks"]


def test_no_number_is_no_object() -> None:
    logits = torch.tensor([[1.0, NAN, 0.0, -1.0, NAN, 5.0], [2.0, 5.0, 0.0, -3.0, NAN, NAN]]).view(1, 2, 1, 6)
    assert predicted(logits).flatten().tolist() == [1, 0, 0, 0, 0, 0]


# People's own images


def test_peoples_own_adaptation_says_where_it_went_wrong(theta: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(2)]
    masks = [(image[..., 0] > 128).astype(np.uint8) for image in images]
    said = r"the adaptation diverged \(.* inner step \d of 3, at lr 1e\+30\): lower update\.lr, which is 1e\+30"
    with pytest.raises(DivergedError, match=said):
        metaseg.load(theta, device="cpu").adapt(images, masks, update={"lr": TOO_HIGH, "steps": 3})


# Degenerate masks and supports


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_loss_and_gradient_of_empty_and_full_masks_are_finite(full: int, size: float) -> None:
    masks = torch.full((2, 16, 16), full, dtype=torch.uint8)
    for sign in (-1, 1):
        logits = (
            (sign * size * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)).expand(2, 2, 16, 16).clone().requires_grad_()
        )
        loss = segmentation_loss(logits, masks)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("mask", "prediction", "expected"), [(0, 0, 1.0), (1, 1, 1.0), (0, 1, 0.0), (1, 0, 0.0)])
def test_iou_of_empty_and_full_masks(mask: int, prediction: int, expected: float) -> None:
    pair = (torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (prediction, mask))
    assert mean_iou(counts(*pair)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("engine", [Reference, Fast])
@pytest.mark.parametrize("full", [0, 1])
def test_adapting_to_empty_or_full_masks_stays_finite(engine: type[Adapter], full: int) -> None:
    torch.manual_seed(0)
    net = Net()
    masks = torch.full((4, 8, 8), full, dtype=torch.uint8)
    task = replace(episode(), batches=tuple(Batch(batch.images, masks) for batch in episode(steps=20).batches))
    adapt = engine(net, replace(OMEGA, steps=20))
    adapt(net, task)
    assert adapt.finite()
    assert predicted(adapt.predict(task.query.images, task.support)).float().mean() == pytest.approx(full, abs=0.1)


@pytest.mark.parametrize("policy", ["running", "support", "batch"])
@pytest.mark.parametrize("model", ["efficientlab_lite0", "deeplab_aspp"])
def test_one_image_is_enough_under_every_batch_norm_policy(model: str, policy: str, tmp_path: Path) -> None:
    """At 32 pixels, where the features at stride 16 have four pixels of one image to be normalised by."""
    one = ["evaluate.shots=1", "evaluate.queries=1", "update.batch_size=1", f"update.batchnorm={policy}"]
    few = ["evaluate.val_tasks=1", "evaluate.test_tasks=1", "evaluate.panels=0", "algo=finetune", "logger=csv"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        job(tmp_path / "run", *write_data(tmp_path), *one, *few, f"model={model}")
    found = results(tmp_path / "run")
    assert (found["test"]["diverged"], found["batchnorm"]) == (0, policy)
    assert math.isfinite(found["test"]["loss"]["mean"])


@pytest.mark.parametrize(
    "schedule",
    [Cosine(final=-1.0), Cosine(final=math.inf), Step(every=0.01, factor=1e30), Step(every=0.5, factor=-1.0)],
)
def test_schedules_whose_rates_cannot_be_are_refused(schedule: Callable[[float], float]) -> None:
    with pytest.raises(ConfigError, match=r"update\.schedule=.*: give one whose rates are finite and not below 0"):
        replace(OMEGA, steps=100, schedule=schedule)


@pytest.mark.parametrize("value", [0, -0.1, math.inf, NAN])
@pytest.mark.parametrize(
    ("field", "cure"),
    [("lr", "a number above 0"), ("weight_decay", "0 or more"), ("l1", "0 or more"), ("dropout", "0 or more, below 1")],
)
def test_rates_that_cannot_be_are_refused(field: str, value: float, cure: str) -> None:
    if value == 0 and field != "lr":
        replace(OMEGA, **{field: value})
        return
    with pytest.raises(ConfigError, match=re.escape(f"update.{field}={value}: give {cure}")):
        replace(OMEGA, **{field: value})
