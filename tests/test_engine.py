"""Every engine against the plain loop, and the flat storage that the fast ones stand on."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from metaseg.adapt import Adapter
from metaseg.algos import Fomaml, Joint, Reptile
from metaseg.engine import Fast, Reference, auto
from metaseg.engine.flat import flat, flat_statistics, gather, ordered_parameters
from metaseg.episode import Batch, Episode
from metaseg.losses import SegmentationLoss
from metaseg.models import DeepLab, EfficientLab
from metaseg.models.network import Dropout
from metaseg.update import Cosine, Update

SIZE, K = 32, 3
OMEGA = Update(partial(SGD), lr=0.01, steps=K, batch_size=3, schedule=Cosine(), dropout=0.5, augment=0.5)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_net(weights: str | None = None) -> EfficientLab:
    torch.manual_seed(0)
    return EfficientLab(
        "tf_efficientnet_lite0", rsd=(16, 4), drop_path=0.2 if weights is None else 0.0, weights=weights
    )


def data(seed: int, n: int, size: int = SIZE) -> Batch:
    """Noise, with a brighter disc as the object."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centres, radius = rng.uniform(size / 4, 3 * size / 4, (n, 2, 1, 1)), size / 4
    masks = (((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2) < radius**2).astype(np.uint8)
    images = rng.integers(0, 128, (n, size, size, 3)) + 127 * masks[..., None]
    return Batch.from_numpy(images.astype(np.uint8), masks)


def episode(omega: Update = OMEGA, seed: int = 3, size: int = SIZE) -> Episode:
    support = data(seed, 5, size)
    batches = omega.minibatches(support, np.random.default_rng(seed))
    return Episode("a task", seed, support, data(seed + 100, 3, size), batches)


def both(omega: Update) -> tuple[nn.Module, Adapter, Adapter]:
    """In float64: whatever differs by more than rounding shows, though the steps of a random network blow it up."""
    theta = make_net().double()
    return theta, Reference(theta, omega), Fast(theta, omega)


def close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Relative to the whole vector: single elements near zero round as they like."""
    assert (ours - truth).norm() <= tolerance * truth.norm()


def agree(plain: Adapter, fast: Adapter, theta: nn.Module, omega: Update) -> None:
    start = gather(ordered_parameters(theta))
    for seed in (3, 4):  # the second on what the first left behind
        one = episode(omega, seed)
        plain(theta, one)
        fast(theta, one)
        close(fast.vector() - start, plain.vector() - start)
        close(fast.statistics(), plain.statistics())
        close(fast.losses[-1], plain.losses[-1])
        theirs, ours = (adapt.predict(one.query.images, one.support) for adapt in (plain, fast))
        close(ours, theirs)


@pytest.mark.parametrize("optimizer", [partial(SGD), partial(SGD, momentum=0.9), partial(Adam), partial(AdamW)])
def test_phi_after_k_steps_is_the_plain_loops(optimizer: partial[torch.optim.Optimizer]) -> None:
    lr = 0.01 if optimizer.func is SGD else 1e-4
    omega = replace(OMEGA, optimizer=optimizer, lr=lr)
    theta, plain, fast = both(omega)
    agree(plain, fast, theta, omega)


def adapted(adapt: Adapter, theta: nn.Module, one: Episode) -> tuple[torch.Tensor, torch.Tensor]:
    adapt(theta, one)
    masks = adapt.predict(one.query.images, one.support).argmax(dim=1)
    return adapt.vector().cpu(), masks.cpu()


def test_in_float32_they_part_by_rounding_alone() -> None:
    omega = replace(OMEGA, lr=0.001, batch_size=8, steps=2)
    theta = make_net("imagenet")
    start, one = gather(ordered_parameters(theta)), episode(omega, size=64)
    (truth, right), (ours, masks) = (adapted(kind(theta, omega), theta, one) for kind in (Reference, Fast))
    close(ours - start, truth - start, 2e-2)
    assert (masks & right).sum() >= 0.98 * (masks | right).sum()


@pytest.mark.parametrize("part", ["decoder", "head", "batchnorm"])
def test_whatever_part_adapts(part: str) -> None:
    omega = replace(OMEGA, adapts=part)
    theta, plain, fast = both(omega)
    agree(plain, fast, theta, omega)


@pytest.mark.parametrize("policy", ["running", "batch"])
def test_whatever_statistics_predict(policy: str) -> None:
    omega = replace(OMEGA, batchnorm=policy)
    theta, plain, fast = both(omega)
    agree(plain, fast, theta, omega)


@pytest.mark.parametrize("optimizer", [partial(SGD), partial(AdamW)])
@pytest.mark.parametrize("part", ["all", "decoder"])
def test_whatever_regularises(optimizer: partial[torch.optim.Optimizer], part: str) -> None:
    lr = 0.01 if optimizer.func is SGD else 1e-4
    loss = SegmentationLoss(label_smoothing=0.1, darc1=0.01)
    omega = replace(OMEGA, optimizer=optimizer, lr=lr, adapts=part, l1=1e-3, loss=loss)
    theta, plain, fast = both(omega)
    agree(plain, fast, theta, omega)


@pytest.mark.parametrize(
    "network", [partial(EfficientLab, residual=False), partial(DeepLab, skip=None), partial(DeepLab, rates=(1, 2))]
)
def test_whatever_the_decoders_are(network: partial[nn.Module]) -> None:
    torch.manual_seed(0)
    theta = network("tf_efficientnet_lite0").double()
    agree(Reference(theta, OMEGA), Fast(theta, OMEGA), theta, OMEGA)


@pytest.mark.parametrize(
    ("algo", "omega"),
    [
        (Reptile(shots=5), OMEGA),
        (Fomaml(shots=5), replace(OMEGA, adapts="head", l1=1e-3)),
        (Fomaml(shots=5), OMEGA),
        (Fomaml(shots=5), replace(OMEGA, adapts="head", optimizer=partial(SGD, momentum=0.9))),
        (Joint(), replace(OMEGA, lr=1.0, steps=1, schedule=lambda progress: 1.0)),
    ],
)
def test_meta_gradients_are_the_plain_loops(algo: Reptile, omega: Update) -> None:
    theta, plain, fast = both(omega)
    before = gather(ordered_parameters(theta))
    for seed in (3, 4):
        one = episode(omega, seed)
        close(algo.meta_gradient(theta, one, fast), algo.meta_gradient(theta, one, plain))
    assert torch.equal(gather(ordered_parameters(theta)), before)


def test_optimizers_that_flat_storage_would_change_are_refused() -> None:
    for optimizer in (partial(RMSprop), partial(SGD, momentum=0.9, dampening=0.1), partial(Adam, foreach=True)):
        with pytest.raises(ValueError, match="choose one of them, or engine=reference"):
            Fast(make_net(), replace(OMEGA, optimizer=optimizer))


def test_what_the_loss_does_not_reach_decays_in_every_engine() -> None:
    theta = make_net().double()
    theta.unused = nn.Conv2d(3, 4, 1).double()
    omega = replace(OMEGA, weight_decay=0.1)
    plain, fast = Reference(theta, omega), Fast(theta, omega)
    one = episode(omega)
    plain(theta, one)
    fast(theta, one)
    decayed = plain.phi.unused.weight.norm()
    assert decayed < theta.unused.weight.norm()
    torch.testing.assert_close(fast.phi.unused.weight.norm(), decayed)


# Flat storage


def test_parameters_become_views_of_one_vector() -> None:
    net = make_net()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    vector = flat(net)
    assert len(vector) == 1_920_674
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    vector.zero_()
    assert not any(p.any() for p in net.parameters())
    assert net.decoders[0].dilated[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_flat_network_stays_as_it_is_and_one_that_is_no_longer_flat_becomes_so_again() -> None:
    net = make_net()
    vector, statistics = flat(net), flat_statistics(net)
    assert flat(net).data_ptr() == vector.data_ptr()
    assert flat_statistics(net).data_ptr() == statistics.data_ptr()
    net.double()
    again = flat(net)
    assert again.dtype == torch.float64
    assert again.data_ptr() == flat(net).data_ptr()
    torch.testing.assert_close(again.float(), vector)


def test_a_copy_of_a_flat_network_shares_nothing_with_it() -> None:
    net = make_net()
    before = flat(net).clone()
    twin = copy.deepcopy(net)
    flat(twin).zero_()
    assert torch.equal(flat(net), before)


# Dropout


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(8, 64, 32, 32)
    y = Dropout(p).train()(x)
    n = x.numel()
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert abs((y == 0).double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(Dropout(p).eval()(x), x)


def test_dropout_drops_the_same_in_every_layout() -> None:
    x = torch.rand(2, 5, 7, 3)
    torch.manual_seed(1)
    rows = Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x.to(memory_format=torch.channels_last)), rows)


# On a GPU


@pytest.fixture
def on_cuda() -> tuple[nn.Module, Update, Episode]:
    omega = replace(OMEGA, lr=0.001, batch_size=8, steps=2, dropout=0.0)  # the devices' random numbers differ
    return make_net("imagenet").cuda(), omega, episode(omega, size=64)


@pytest.mark.cuda
@CUDA
def test_a_replayed_graph_gives_the_plain_loops_phi(
    on_cuda: tuple[nn.Module, Update, Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    theta, omega, one = on_cuda
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    start = flat(theta).cpu()
    lanes = auto(theta, omega, precision="fp32", lanes=2)
    there = one.to(torch.device("cuda"))
    truth, _ = adapted(Reference(theta, omega), theta, there)
    for _ in range(2):  # captured, then replayed alone
        for phi in lanes.map(lambda adapt, e: (adapt(theta, e), adapt.vector().clone())[1], [there, there]):
            close(phi.cpu() - start, truth - start, 2e-2)
    net = make_net("imagenet")
    cpu, _ = adapted(Reference(net, omega), net, one)
    close(truth - start, cpu - start, 2e-2)


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize(
    ("algo", "optimizer"),
    [(Fomaml(10), partial(SGD)), (Reptile(10), partial(SGD, momentum=0.9)), (Reptile(10), partial(Adam))],
)
def test_replayed_meta_gradients_are_the_plain_loops(
    on_cuda: tuple[nn.Module, Update, Episode], algo: Fomaml | Reptile, optimizer: partial[torch.optim.Optimizer]
) -> None:
    theta, omega, one = on_cuda
    lr = 1e-5 if optimizer.func is Adam else omega.lr
    omega = replace(omega, optimizer=optimizer, lr=lr, adapts="head")  # FOMAML's last step moves everything
    there = one.to(torch.device("cuda"))
    truth = algo.meta_gradient(theta, there, Reference(theta, omega)).clone()
    lanes = auto(theta, omega, precision="fp32", lanes=2)
    for gradient in lanes.map(lambda adapt, e: algo.meta_gradient(theta, e, adapt).clone(), [there] * 5):
        close(gradient, truth, 2e-2)


@pytest.mark.cuda
@CUDA
def test_a_graph_is_captured_for_each_shape_and_theta_may_move(on_cuda: tuple[nn.Module, Update, Episode]) -> None:
    theta, omega, _ = on_cuda
    (adapt,) = auto(theta, omega, precision="fp32", lanes=1).adapters
    for size in (64, 96, 64):
        there = episode(omega, size=size).to(torch.device("cuda"))
        start = flat(theta).cpu()
        truth, _ = adapted(Reference(theta, omega), theta, there)
        phi, _ = adapted(adapt, theta, there)
        close(phi - start, truth - start, 2e-2)
        with torch.no_grad():
            flat(theta).add_(1e-3 * flat(theta).sign())


@pytest.mark.cuda
@CUDA
def test_bf16_predicts_the_same_masks_but_for_a_few_pixels(on_cuda: tuple[nn.Module, Update, Episode]) -> None:
    theta, omega, one = on_cuda
    there = one.to(torch.device("cuda"))
    (adapt,) = auto(theta, omega, precision="bf16", lanes=1).adapters
    _, masks = adapted(adapt, theta, there)
    _, truth = adapted(Reference(theta, omega), theta, there)
    both_on, either_on = (masks & truth).sum(), (masks | truth).sum()
    assert both_on >= 0.95 * either_on


@pytest.mark.cuda
@CUDA
def test_dropout_under_replay_is_the_seeds_alone(on_cuda: tuple[nn.Module, Update, Episode]) -> None:
    theta, omega, one = on_cuda
    omega, there = replace(omega, dropout=0.5), one.to(torch.device("cuda"))
    start = flat(theta).clone()
    lanes = auto(theta, omega, precision="fp32", lanes=2)
    run = partial(lanes.map, lambda adapt, e: (adapt(theta, e), adapt.vector() - start)[1])
    other = replace(there, seed=4)
    first, second = run([there, other])
    again, swapped = run([other, there])
    close(swapped, first, 2e-2)
    close(again, second, 2e-2)
    assert (first - second).norm() > 0.1 * first.norm()
