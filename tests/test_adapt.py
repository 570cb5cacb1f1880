"""The inner loop and the batch-norm policies."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from metaseg.adapt import Adapter
from metaseg.engine import Fast, Reference
from metaseg.episode import Batch, Episode
from metaseg.update import Cosine, EarlyStopping, Update

OMEGA = Update(partial(SGD), lr=0.1, steps=4, batch_size=4, dropout=0.5, augment=0.0, batchnorm="support")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoders = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.01))
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.decoders(images / 255)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(params=[Reference, Fast])
def engine(request: pytest.FixtureRequest) -> type[Adapter]:
    return request.param


def data(seed: int, n: int) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return Batch.from_numpy(images, (images[..., 0] > 128).astype(np.uint8))


def adapted(adapt: Adapter, theta: nn.Module, episode: Episode) -> torch.Tensor:
    adapt(theta, episode)
    return adapt.vector().clone()


def started(adapt: Adapter, theta: nn.Module) -> Adapter:
    adapt.start(theta, seed=0)
    return adapt


def episode(seed: int = 3, steps: int = 4) -> Episode:
    batches = tuple(data(10 + i, 4) for i in range(steps))
    return Episode("a task", seed, support=data(1, 6), query=data(2, 3), batches=batches)


def test_the_same_episode_adapts_the_same_and_dropout_is_its_seeds(net: Net, engine: type[Adapter]) -> None:
    adapt = engine(net, OMEGA)
    first = adapted(adapt, net, episode())
    torch.rand(7)  # the global generator has no say
    assert torch.equal(adapted(adapt, net, episode()), first)
    assert not torch.equal(adapted(adapt, net, episode(seed=4)), first)


def test_the_global_generator_is_left_alone(net: Net, engine: type[Adapter]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine(net, OMEGA)(net, episode())
    assert torch.equal(torch.rand(3), expected)


def test_an_adaptation_starts_from_theta_whatever_came_before(net: Net, engine: type[Adapter]) -> None:
    adapt = engine(net, replace(OMEGA, optimizer=partial(SGD, momentum=0.9)))
    fresh = adapted(adapt, net, episode())
    adapt(net, episode(seed=9))
    assert torch.equal(adapted(adapt, net, episode()), fresh)


def test_the_schedule_moves_the_learning_rate(net: Net, engine: type[Adapter]) -> None:
    adapt = engine(net, replace(OMEGA, schedule=Cosine(), weight_decay=0.0))
    adapt.start(net, seed=0)
    seen = []
    for batch in episode().batches:
        adapt.step(batch)
        seen.append(adapt.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(seen, [0.1 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)])


@pytest.mark.parametrize(("part", "moving"), [("all", {0, 1, 2, 3, 4, 5}), ("head", {4, 5}), ("batchnorm", {2, 3})])
def test_only_what_adapts_moves(net: Net, engine: type[Adapter], part: str, moving: set[int]) -> None:
    phi = engine(net, replace(OMEGA, adapts=part))(net, episode())
    pairs = zip(net.parameters(), phi.parameters(), strict=True)
    assert {i for i, (ours, theirs) in enumerate(pairs) if not torch.equal(ours, theirs)} == moving


@pytest.mark.parametrize(("part", "moving"), [("all", {0, 1, 4, 5}), ("head", {4, 5}), ("batchnorm", set())])
def test_l1_and_l2_of_a_loss_without_gradient(net: Net, engine: type[Adapter], part: str, moving: set[int]) -> None:
    """A step then is w ← w − lr · (λ₂·w + λ₁·sign w), of what moves and is no batch norm's; the reported loss is 0."""
    with torch.no_grad():
        net.head.bias.zero_()  # where |w| has no derivative, sign says 0
    omega = replace(OMEGA, adapts=part, steps=1, weight_decay=0.5, l1=0.01, loss=lambda logits, masks: 0 * logits.sum())
    adapt = engine(net, omega)
    phi = adapt(net, episode(steps=1))
    assert adapt.losses[-1] == 0
    for i, (w, got) in enumerate(zip(net.parameters(), phi.parameters(), strict=True)):
        torch.testing.assert_close(got.detach(), w - 0.1 * (0.5 * w + 0.01 * w.sign()) if i in moving else w)


def test_l1_reaches_all_parameters_in_a_step_that_moves_everything(net: Net, engine: type[Adapter]) -> None:
    adapt = engine(net, replace(OMEGA, adapts="head", weight_decay=0.0, l1=0.01, loss=lambda x, masks: 0 * x.sum()))
    started(adapt, net).step(data(10, 4), everything=True)
    for i, (w, got) in enumerate(zip(net.parameters(), adapt.phi.parameters(), strict=True)):
        torch.testing.assert_close(got.detach(), w if i in {2, 3} else w - 0.1 * 0.01 * w.sign())


def test_inner_steps_descend_omegas_loss(net: Net, engine: type[Adapter]) -> None:
    adapt = engine(net, replace(OMEGA, dropout=0.0, loss=lambda logits, masks: logits[:, 1].mean()))
    one = episode(steps=1)
    expected = net(one.batches[0].images)[:, 1].mean()
    phi = adapt(net, one)
    torch.testing.assert_close(adapt.losses[-1], expected.detach())
    torch.testing.assert_close(phi.head.bias.detach(), net.head.bias * (1 - 0.1 * 5e-4) - 0.1 * torch.tensor([0.0, 1]))


def by_hand(net: Net, images: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    conv, norm = net.decoders
    x = (conv(images / 255) - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + norm.eps).sqrt()
    return net.head(x * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))


@torch.no_grad()
def test_each_policy_predicts_with_its_statistics(net: Net, engine: type[Adapter]) -> None:
    norm = net.decoders[1]
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(2.0)
    support, query = data(1, 4), data(2, 3)

    def statistics(images: torch.Tensor, unbiased: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = net.decoders[0](images / 255)
        return x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=unbiased)

    expected = {
        "running": by_hand(net, query.images, norm.running_mean, norm.running_var),
        "support": by_hand(net, query.images, *statistics(support.images, unbiased=True)),  # as running averages are
        "batch": by_hand(net, query.images, *statistics(query.images, unbiased=False)),
    }
    for policy, logits in expected.items():
        adapt = started(engine(net, replace(OMEGA, batchnorm=policy)), net)
        got = adapt.predict(query.images, support)
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)
        for kept in (norm, adapt.phi.decoders[1]):
            assert (kept.running_mean == 0.3).all()
            assert (kept.running_var == 2.0).all()
            assert kept.momentum == 0.01


def test_running_statistics_move_with_the_inner_steps(net: Net, engine: type[Adapter]) -> None:
    one = episode(steps=1)
    phi = engine(net, OMEGA)(net, one)
    x = net.decoders[0](one.batches[0].images / 255)
    torch.testing.assert_close(phi.decoders[1].running_mean, 0.01 * x.mean(dim=(0, 2, 3)))


def test_prediction_has_no_dropout(net: Net, engine: type[Adapter]) -> None:
    query = data(2, 3)
    for policy in ("running", "support", "batch"):
        adapt = started(engine(net, replace(OMEGA, batchnorm=policy, dropout=0.9)), net)
        first = adapt.predict(query.images, data(1, 4))
        assert torch.equal(adapt.predict(query.images, data(1, 4)), first)


# Early stopping


class Foretold(Reference):
    """Predicts what gives `ious` on square masks, one score after another."""

    ious: tuple[float, ...] = ()

    def predict(self, images: torch.Tensor, support: Batch) -> torch.Tensor:
        self.scored.append(self.taken)
        rows = round(100 * self.ious[len(self.scored) - 1])
        logits = torch.zeros(len(images), 2, 100, 1)
        logits[:, 1, :rows], logits[:, 0, rows:] = 1.0, 1.0
        return logits


@pytest.mark.parametrize(
    ("ious", "scored", "chosen"),
    [
        ((0.2, 0.5, 0.5, 0.4), [2, 4, 6, 8], 4),  # an equal one is no better; patience ends it at 8
        ((0.1, 0.2, 0.3, 0.4, 0.5), [2, 4, 6, 8, 9], 9),  # the last step is scored, whatever `every`
        ((0.9, 0.1, 0.1, 0.1, 0.1), [2, 4, 6], 2),
        ((0.0, 0.0, 0.0), [2, 4, 6], 2),  # at least the first
    ],
)
def test_early_stopping_takes_as_many_steps_as_served_the_held_out_best(
    net: Net, ious: tuple[float, ...], scored: list[int], chosen: int
) -> None:
    full = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 100, 1, dtype=torch.uint8))
    batches = tuple(data(10 + i, 4) for i in range(9))
    rehearsal = replace(episode(), batches=batches, query=full)
    one = replace(episode(), batches=tuple(data(30 + i, 4) for i in range(9)), rehearsal=rehearsal)
    adapt = Foretold(net, replace(OMEGA, steps=9, stopping=EarlyStopping(patience=4, every=2, least=2)))
    adapt.ious, adapt.scored = ious, []
    phi = adapted(adapt, net, one)
    assert adapt.scored == scored
    assert adapt.taken == chosen
    plain = Reference(net, replace(OMEGA, steps=9))
    assert torch.equal(adapted(plain, net, replace(one, batches=one.batches[:chosen], rehearsal=None)), phi)


def test_meta_training_and_unstopped_updates_know_no_rehearsal(net: Net, engine: type[Adapter]) -> None:
    one = replace(episode(), rehearsal=episode(seed=9))
    assert engine(net, OMEGA).batches(net, one) == one.batches


@pytest.mark.parametrize("policy", ["running", "support"])
def test_the_network_of_an_adaptation_predicts_by_itself(net: Net, engine: type[Adapter], policy: str) -> None:
    adapt, task = engine(net, replace(OMEGA, batchnorm=policy)), episode()
    adapt(net, task)
    expected = adapt.predict(task.query.images, task.support)
    alone = adapt.network(task.support)
    before = adapt.statistics().clone()
    with torch.no_grad():
        torch.testing.assert_close(alone(task.query.images), expected, rtol=0, atol=0)
        # whatever is beside it, but for the last bit: another batch size may have another kernel
        torch.testing.assert_close(alone(task.query.images[:1]), alone(task.query.images)[:1], rtol=1e-5, atol=1e-6)
    assert torch.equal(adapt.statistics(), before)
    adapt.start(net, seed=0)  # φ is taken for another task, and the network stays as it is
    with torch.no_grad():
        assert torch.equal(alone(task.query.images), expected)


def test_under_batch_the_network_of_an_adaptation_has_the_running_statistics(net: Net, engine: type[Adapter]) -> None:
    task = episode()
    networks = []
    for policy in ("running", "batch"):
        adapt = engine(net, replace(OMEGA, batchnorm=policy))
        adapt(net, task)
        networks.append(adapt.network(task.support).state_dict())
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])


def test_the_scores_of_a_rehearsal_can_be_heard(net: Net, engine: type[Adapter]) -> None:
    adapt = engine(net, replace(OMEGA, stopping=EarlyStopping(every=2)))
    heard = []
    adapt.on_score = lambda step, iou: heard.append((step, iou))
    task = replace(episode(), rehearsal=replace(episode(), batches=episode(steps=5).batches))
    adapt(net, task)
    assert [step for step, _ in heard] == [2, 4, 5]
    assert all(0 <= iou <= 1 for _, iou in heard)
