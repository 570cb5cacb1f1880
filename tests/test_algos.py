"""Algorithms against updates derived by hand, on a network of one 1×1 convolution and on a quadratic."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from metaseg.adapt import Adapter
from metaseg.algos import Fomaml, FomamlStar, Joint, Reptile
from metaseg.engine import Fast, Reference
from metaseg.engine.flat import flat, gather, ordered_parameters, split
from metaseg.episode import Batch, Episode
from metaseg.losses import segmentation_loss
from metaseg.update import Update

LR, L2 = 0.1, 0.01


class Tiny(nn.Module):
    """Pixel-wise logistic regression with the parts that an update procedure asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.decoders = nn.Conv2d(3, 4, 1, dtype=torch.float64)
        self.head = nn.Conv2d(4, 2, 1, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.decoders(images.double() / 255)))


def batch(seed: int, n: int = 3) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    return Batch.from_numpy(images, (images[..., 0] > 128).astype(np.uint8))


def episode(*batches: Batch) -> Episode:
    return Episode("a task", seed=1, support=batches[0], query=batches[0][:0], batches=batches)


def update(**changes: object) -> Update:
    return Update(partial(SGD), **{"lr": LR, "steps": 3, "weight_decay": L2, "dropout": 0.0, "augment": 0.0, **changes})


@pytest.fixture(params=[Reference, Fast])
def engine(request: pytest.FixtureRequest) -> type[Adapter]:
    return request.param


@pytest.fixture
def net() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def gradient(net: nn.Module, data: Batch) -> torch.Tensor:
    """Of the loss and L2, independently of `adapt`."""
    parameters = list(net.parameters())
    loss = segmentation_loss(net(data.images), data.masks)
    loss = loss + L2 / 2 * sum((p**2).sum() for p in parameters)
    return gather(list(torch.autograd.grad(loss, parameters)))


def moved(net: nn.Module, by: torch.Tensor) -> nn.Module:
    net = copy.deepcopy(net)
    with torch.no_grad():
        parameters = ordered_parameters(net)
        for p, part in zip(parameters, split(by, parameters), strict=True):
            p += part
    return net


def test_one_step_reptile_is_an_sgd_step(net: Tiny, engine: type[Adapter]) -> None:
    data = batch(0)
    g = Reptile(shots=3).meta_gradient(net, episode(data), engine(net, update(steps=1)))
    torch.testing.assert_close(g, LR * gradient(net, data))


def test_reptile_sums_the_inner_steps(net: Tiny, engine: type[Adapter]) -> None:
    batches = [batch(i) for i in range(3)]
    g = Reptile(shots=3).meta_gradient(net, episode(*batches), engine(net, update()))
    phi, total = net, torch.zeros_like(g)
    for data in batches:
        step = LR * gradient(phi, data)
        phi, total = moved(phi, -step), total + step
    torch.testing.assert_close(g, total)


@pytest.mark.parametrize("algo", [Fomaml(shots=3), FomamlStar(shots=10, tail=5)])
def test_fomaml_is_the_last_step_at_the_adapted_weights(net: Tiny, engine: type[Adapter], algo: Fomaml) -> None:
    first, second, last = (batch(i) for i in range(3))
    g = algo.meta_gradient(net, episode(first, second, last), engine(net, update()))
    phi = moved(net, -LR * gradient(net, first))
    phi = moved(phi, -LR * gradient(phi, second))
    torch.testing.assert_close(g, LR * gradient(phi, last))


def test_fomaml_with_an_adapting_head_still_learns_the_rest(net: Tiny, engine: type[Adapter]) -> None:
    first, last = batch(0), batch(1)
    g = Fomaml(shots=3).meta_gradient(net, episode(first, last), engine(net, update(steps=2, adapts="head")))
    frozen = sum(p.numel() for p in net.decoders.parameters())
    step = -LR * gradient(net, first)
    step[:frozen] = 0
    torch.testing.assert_close(g, LR * gradient(moved(net, step), last))


def test_reptile_on_a_quadratic(engine: type[Adapter]) -> None:
    """Of ½‖φ − c‖² each step keeps the share 1 − lr of the distance, so θ − φ_K = (1 − (1 − lr)^K)(θ − c)."""
    target, steps = 2.0, 7

    class Quadratic(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 0.5 * sum(((p - target) ** 2).sum() for p in self.parameters())

    net = Quadratic()
    omega = update(steps=steps, weight_decay=0.0, loss=lambda output, masks: output)
    g = Reptile(shots=3).meta_gradient(net, episode(*[batch(0)] * steps), engine(net, omega))
    torch.testing.assert_close(g, (1 - (1 - LR) ** steps) * (flat(net) - target))


def test_joint_is_the_gradient_of_the_mixed_batch(net: Tiny, engine: type[Adapter]) -> None:
    data = batch(0, n=8)
    g = Joint().meta_gradient(net, episode(data), engine(net, update(lr=1.0, steps=1, batch_size=8)))
    torch.testing.assert_close(g, gradient(net, data))


def test_theta_is_left_as_it_was(net: Tiny, engine: type[Adapter]) -> None:
    before = flat(net).clone()
    for algo in (Reptile(shots=3), Fomaml(shots=3)):
        algo.meta_gradient(net, episode(batch(0), batch(1)), engine(net, update()))
    assert torch.equal(flat(net), before)
    assert all(p.requires_grad for p in net.parameters())


def test_fomaml_star_ends_with_the_tail_as_it_is() -> None:
    support = batch(0, n=10)
    omega = update(steps=4, batch_size=8, augment=1.0)
    *others, last = FomamlStar(shots=10, tail=5).minibatches(support, omega, np.random.default_rng(0))
    assert [len(b) for b in others] == [8, 8, 8]
    assert torch.equal(last.images, support.images[5:])
    assert torch.equal(last.masks, support.masks[5:])


class TwoClasses:
    name, image_size = "two", 6

    def names(self, split: str) -> list[str]:
        return ["bright", "dark"]

    def count(self, task: str) -> int:
        return 4

    def load(self, task: str, which: list[int]) -> tuple[np.ndarray, np.ndarray]:
        level = 200 if task == "bright" else 20
        images = np.stack([np.full((6, 6, 3), level + i, np.uint8) for i in which])
        return images, np.ones((len(which), 6, 6), np.uint8)


def test_joint_mixes_classes() -> None:
    omega = update(lr=1.0, steps=1, batch_size=16)
    (mixed,) = Joint().episode(TwoClasses(), omega, seed=0, index=0).batches
    levels = mixed.images[:, 0, 0, 0]
    assert len(mixed) == 16
    assert (levels >= 200).any()
    assert (levels < 200).any()


@pytest.mark.parametrize("changes", [{"steps": 2}, {"lr": 0.5}, {"optimizer": partial(Adam)}])
def test_joint_refuses_an_inner_step_that_is_no_gradient(changes: dict[str, object]) -> None:
    omega = Update(**{"optimizer": SGD, "lr": 1.0, "steps": 1, **changes})
    with pytest.raises(ValueError, match="leave algo.inner.steps=1"):
        Joint().check(TwoClasses(), omega)


def test_impossible_algorithms_are_refused() -> None:
    with pytest.raises(ValueError, match="algo.method.shots=0: give 1 or more"):
        Reptile(shots=0)
    with pytest.raises(ValueError, match="algo.method.tail=5: give 1 … 4"):
        FomamlStar(shots=5, tail=5)
    with pytest.raises(ValueError, match="needs 2 or more"):
        FomamlStar(shots=4, tail=2).check(TwoClasses(), update(steps=1))
    with pytest.raises(ValueError, match="bright"):
        Reptile(shots=5).check(TwoClasses(), update())
