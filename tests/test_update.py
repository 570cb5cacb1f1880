"""The update procedure: schedules, mini-batches, and which parameters decay and move."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam

from metaseg.engine import Reference
from metaseg.engine.flat import ordered_parameters
from metaseg.episode import Batch, Episode
from metaseg.models import EfficientLab
from metaseg.update import Constant, Cosine, EarlyStopping, Schedule, Step, Update, batchnorm_parameters


def update(**changes: Any) -> Update:
    return Update(**{"optimizer": SGD, "lr": 0.1, "steps": 3, "augment": 0.0, **changes})


def support(shots: int, size: int = 8) -> Batch:
    """Images whose first channel is their number; the rest is texture."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (shots, size, size, 3), dtype=np.uint8)
    images[..., 0] = np.arange(shots)[:, None, None]
    return Batch.from_numpy(images, rng.integers(0, 2, (shots, size, size), dtype=np.uint8))


def numbers(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), {0: 1, 0.5: 1, 1: 1}),
        (Cosine(), {0: 1, 0.25: (1 + np.sqrt(0.5)) / 2, 0.5: 0.5, 1: 0}),
        (Cosine(final=0.1), {0: 1, 0.5: 0.55, 1: 0.1}),
        (Step(), {0: 1, 0.49: 1, 0.5: 0.1, 0.99: 0.1, 1: 0.01}),
        (Step(every=0.25, factor=0.5), {0: 1, 0.25: 0.5, 0.5: 0.25, 0.75: 0.125, 1: 0.0625}),
        (Step(every=0.1, factor=0.5), {i / 10: 0.5**i for i in range(11)}),  # 0.3 / 0.1 is 2.9999999999999996
    ],
)
def test_schedules(schedule: Schedule, expected: dict[float, float]) -> None:
    assert {progress: schedule(progress) for progress in expected} == pytest.approx(expected)


def test_the_learning_rate_follows_the_schedule() -> None:
    rates: list[float] = []

    class Spy(SGD):
        def step(self, closure: Any = None) -> None:
            rates.extend({group["lr"] for group in self.param_groups})
            super().step(closure)

    net = EfficientLab("tf_efficientnet_lite0", rsd=(16,), weights=None)
    omega = update(optimizer=Spy, steps=4, lr=0.2, schedule=Cosine(), batch_size=2)
    few = support(2, size=32)
    Reference(net, omega)(net, Episode("task", 0, few, few[:0], omega.minibatches(few, np.random.default_rng(0))))
    assert rates == pytest.approx([0.2, 0.1 * (1 + np.sqrt(0.5)), 0.1, 0.1 * (1 - np.sqrt(0.5))])


# Validation


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("lr", 0.0, "a number above 0"),
        ("lr", -1.0, "a number above 0"),
        ("lr", float("nan"), "a number above 0"),
        ("optimizer", None, "one with its _target_ and _partial_=true, as torch.optim.SGD"),
        ("steps", 0, "1 or more, a whole number"),
        ("steps", 2.5, "1 or more, a whole number"),
        ("batch_size", 0, "1 or more, a whole number"),
        ("batch_size", 2.5, "1 or more, a whole number"),
        ("schedule", "foo", "one with its _target_, as metaseg.update.Constant"),
        ("schedule", None, "one with its _target_, as metaseg.update.Constant"),
        ("stopping", True, "null, or a rule with its _target_, metaseg.update.EarlyStopping"),
        ("stopping", {"share": 0.2}, "null, or a rule with its _target_, metaseg.update.EarlyStopping"),
        ("weight_decay", -1e-3, "0 or more"),
        ("l1", -1e-3, "0 or more"),
        ("l1", float("nan"), "0 or more"),
        ("loss", None, "a loss with its _target_, as metaseg.losses.SegmentationLoss"),
        ("dropout", 1.0, "0 or more, below 1"),
        ("dropout", -0.1, "0 or more, below 1"),
        ("augment", 1.1, "a rate from 0 to 1"),
        ("augment", -0.1, "a rate from 0 to 1"),
        ("batchnorm", "group", r"one of \('running', 'support', 'batch'\)"),
        ("adapts", "tail", r"one of \('all', 'decoder', 'head', 'batchnorm'\)"),
    ],
)
def test_impossible_values_are_refused_with_a_cure(name: str, value: object, cure: str) -> None:
    with pytest.raises(ValueError, match=rf"^update\.{name}={value}: give {cure}$"):
        update(**{name: value})


def test_the_ends_of_the_ranges_are_allowed() -> None:
    update(lr=1e-9, steps=1, batch_size=1, weight_decay=0.0, dropout=0.0, augment=0.0)
    update(augment=1.0, dropout=0.999)


# Mini-batches


@pytest.mark.parametrize(
    ("shots", "batch_size", "steps"), [(5, 8, 5), (10, 8, 5), (8, 8, 3), (1, 8, 2), (7, 3, 7), (3, 7, 3)]
)
def test_minibatches_go_round_the_support(shots: int, batch_size: int, steps: int) -> None:
    few = support(shots)
    batches = update(steps=steps, batch_size=batch_size).minibatches(few, np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    order = [number for batch in batches for number in numbers(batch)]
    rounds = [order[i : i + shots] for i in range(0, len(order), shots)]
    for one in rounds[: len(order) // shots]:
        assert sorted(one) == list(range(shots))
    assert max(Counter(order).values()) - min(Counter(order).values()) <= 1
    if len(order) % shots == 0:
        assert set(Counter(order).values()) == {len(order) // shots}


def test_each_round_is_shuffled_afresh() -> None:
    (batch,) = update(steps=1, batch_size=80).minibatches(support(10), np.random.default_rng(0))
    order = numbers(batch)
    assert len({tuple(order[i : i + 10]) for i in range(0, 80, 10)}) == 8


def test_without_augmentation_the_images_are_the_supports() -> None:
    few = support(5)
    for batch in update(steps=4, batch_size=8).minibatches(few, np.random.default_rng(0)):
        assert torch.equal(batch.images, few.images[numbers(batch)])
        assert torch.equal(batch.masks, few.masks[numbers(batch)])


def test_with_augmentation_a_repeated_image_is_augmented_afresh() -> None:
    (batch,) = update(steps=1, batch_size=8, augment=1.0).minibatches(support(1), np.random.default_rng(0))
    assert len({image.numpy().tobytes() for image in batch.images}) == 8


def test_minibatches_leave_the_support_as_it_was() -> None:
    few, before = support(5), support(5)
    update(augment=1.0, batch_size=8).minibatches(few, np.random.default_rng(0))
    assert torch.equal(few.images, before.images)
    assert torch.equal(few.masks, before.masks)


def test_the_generator_decides_the_minibatches() -> None:
    omega, few = update(augment=0.5, batch_size=8), support(5)
    first, again, other = (omega.minibatches(few, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks) for a, b in zip(first, again, strict=True)
    )
    assert not all(torch.equal(a.images, b.images) for a, b in zip(first, other, strict=True))


def test_minibatches_are_uint8_images_and_masks() -> None:
    for batch in update(augment=1.0, batch_size=4).minibatches(support(3), np.random.default_rng(0)):
        assert (tuple(batch.images.shape), batch.images.dtype) == ((4, 3, 8, 8), torch.uint8)
        assert (tuple(batch.masks.shape), batch.masks.dtype) == ((4, 8, 8), torch.uint8)


# Parameters

BATCH_NORM = re.compile(r"(backbone\..*\bbn\d|decoders\.\d\.(point|dilated|fuse)\.2)\.(weight|bias)")


@pytest.fixture(scope="module")
def net() -> EfficientLab:
    torch.manual_seed(0)
    return EfficientLab("tf_efficientnet_lite0", weights=None)


def names(net: EfficientLab, parameters: list[torch.nn.Parameter]) -> set[str]:
    ids = [id(p) for p in parameters]
    assert len(set(ids)) == len(ids)
    return {name for name, p in net.named_parameters() if id(p) in set(ids)}


def weights_and_norms(net: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    norms = batchnorm_parameters(net)
    return ordered_parameters(net)[len(norms) :], norms


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_everything_decays_but_batch_norm(net: EfficientLab, kind: Any) -> None:
    groups = update(optimizer=kind, weight_decay=0.25).make_optimizer(*weights_and_norms(net)).param_groups
    decays = {name: group["weight_decay"] for group in groups for name in names(net, group["params"])}
    assert decays == {name: 0.0 if BATCH_NORM.fullmatch(name) else 0.25 for name, _ in net.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(decays)
    assert {group["lr"] for group in groups} == {0.1}


def test_weight_decay_is_the_gradient_of_half_the_square() -> None:
    """With no other gradient, an SGD step takes lr · weight_decay of each weight away."""
    net = EfficientLab("tf_efficientnet_lite0", rsd=(16,))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    update(lr=0.1, weight_decay=0.5).make_optimizer(*weights_and_norms(net)).step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 if BATCH_NORM.fullmatch(name) else 0.95))


def test_a_network_without_batch_norm_has_one_group() -> None:
    assert len(update().make_optimizer(*weights_and_norms(torch.nn.Conv2d(3, 2, 1))).param_groups) == 1


def selected(net: EfficientLab, part: str) -> set[str]:
    """What each part means, by name."""
    rules = {"all": r".*", "decoder": r"(decoders|head)\..*", "head": r"head\..*", "batchnorm": BATCH_NORM}
    return {name for name, _ in net.named_parameters() if re.fullmatch(rules[part], name)}


@pytest.mark.parametrize("part", ["all", "decoder", "head", "batchnorm"])
def test_the_parts_that_adapt(net: EfficientLab, part: Any) -> None:
    assert names(net, update(adapts=part).select(net)) == selected(net, part)


def test_the_sizes_of_the_parts(net: EfficientLab) -> None:
    """Golden: RSD₁₆ 703,472 + RSD₄ 516,208 + head 226; and batch norm's, two a channel."""
    sizes = {part: sum(p.numel() for p in update(adapts=part).select(net)) for part in ("decoder", "head")}
    assert sizes == {"decoder": 703_472 + 516_208 + 226, "head": 226}
    in_decoders = [p for n, p in net.named_parameters() if n in selected(net, "batchnorm") and "decoders" in n]
    assert sum(p.numel() for p in in_decoders) == 2 * 3 * 2 * 112


@pytest.mark.parametrize("part", ["all", "decoder", "head", "batchnorm"])
def test_only_the_selected_part_moves(net: EfficientLab, part: Any) -> None:
    omega, few = update(adapts=part, steps=1, batch_size=2, dropout=0.0, weight_decay=0.1), support(2, size=32)
    episode = Episode("task", 0, few, few[:0], omega.minibatches(few, np.random.default_rng(0)))
    phi = Reference(net, omega)(net, episode)
    theta = dict(net.named_parameters())
    moved = {name for name, p in phi.named_parameters() if not torch.equal(p, theta[name])}
    assert moved == selected(net, part)


@pytest.mark.parametrize("every", [0, -0.5, 1.5])
def test_a_step_schedule_that_never_passes_is_refused(every: float) -> None:
    with pytest.raises(ValueError, match="update.schedule.every"):
        Step(every=every)


# Early stopping


def prepared(shots: int, **stopping: Any) -> Episode:
    omega = update(steps=6, batch_size=4, stopping=EarlyStopping(**stopping))
    return omega.prepare(Episode("a task", 1, support(shots), support(2)), 0, "test", "a task", 0)


def test_a_rehearsal_holds_out_a_share_of_the_support_and_never_learns_from_it() -> None:
    episode = prepared(20, share=0.2)
    rehearsal = episode.rehearsal
    assert rehearsal is not None
    fit, held_out = numbers(rehearsal.support), numbers(rehearsal.query)
    assert sorted(fit + held_out) == list(range(20))
    assert len(held_out) == 4
    assert {n for batch in rehearsal.batches for n in numbers(batch)} == set(fit)
    assert len(rehearsal.batches) == len(episode.batches) == 6
    assert {n for batch in episode.batches for n in numbers(batch)} == set(range(20))


@pytest.mark.parametrize(("shots", "share", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.2, 2), (11, 0.99, 10)])
def test_something_is_held_out_and_something_kept(shots: int, share: float, held_out: int) -> None:
    rehearsal = prepared(shots, share=share, least=2).rehearsal
    assert rehearsal is not None
    assert len(rehearsal.query) == held_out


def test_too_few_shots_rehearse_nothing_and_see_the_same_mini_batches() -> None:
    episode, plain = prepared(9), update(steps=6, batch_size=4)
    assert episode.rehearsal is None
    same = plain.prepare(Episode("a task", 1, support(9), support(2)), 0, "test", "a task", 0)
    assert [numbers(batch) for batch in same.batches] == [numbers(batch) for batch in episode.batches]
    fewer = prepared(9, steps_below=2)
    assert [numbers(batch) for batch in same.batches[:2]] == [numbers(batch) for batch in fewer.batches]
    assert len(prepared(10, steps_below=2).batches) == 6  # shots enough


@pytest.mark.parametrize(
    "field", [{"share": 0.0}, {"share": 1.0}, {"patience": 0}, {"every": 0}, {"least": 1}, {"steps_below": 0}]
)
def test_impossible_stopping_is_refused(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(ValueError, match=f"update.stopping.{name}={field[name]}: give"):
        EarlyStopping(**field)
