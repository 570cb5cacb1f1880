"""metaseg.load(path).adapt(images, masks).predict(image): what it gives, and what it says when it cannot."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import metaseg
from metaseg import practice
from metaseg.adapt import Adapter
from metaseg.data.source import UInt8
from metaseg.engine import Reference
from metaseg.episode import Batch, Episode
from metaseg.errors import ConfigError, DataError, WeightsError
from metaseg.initialisation import About, save_initialisation
from metaseg.metrics import iou
from metaseg.models import EfficientLab
from metaseg.pictures import PictureError
from metaseg.practice import Adapted, Initialisation, Progress
from metaseg.update import EarlyStopping, Update

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZE = 32
UPDATE: dict[str, Any] = {
    "_target_": "metaseg.update.Update",
    "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True},
    "lr": 0.05,
    "steps": 2,
    "batch_size": 2,
    "batchnorm": "support",
}
MODEL = {
    "_target_": "metaseg.models.EfficientLab",
    "backbone": "tf_efficientnet_lite0",
    "rsd": [16],
    "drop_path": 0.0,
    "weights": "imagenet",
}
ABOUT = About(MODEL, "reptile", "folder", "0" * 64, seed=0, meta_steps=3, update=UPDATE, image_size=SIZE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("theta") / "init.safetensors"
    save_initialisation(EfficientLab("tf_efficientnet_lite0", rsd=(16,), drop_path=0.0), ABOUT, file)
    return file


@pytest.fixture
def init(path: Path) -> Initialisation:
    return metaseg.load(path, device="cpu")


def labelled(n: int, height: int = 40, width: int = 56) -> tuple[list[UInt8], list[UInt8]]:
    """Images (height, width, 3) of a red box on noise, and masks of 0 and 255."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 200, (height, width, 3), dtype=np.uint8) for _ in range(n)]
    masks = []
    for image in images:
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask = np.zeros((height, width), np.uint8)
        mask[top : top + height // 2, left : left + width // 2] = 255
        image[mask == 255] = (250, 10, 10)
        masks.append(mask)
    return images, masks


# What comes back


def test_predictions_have_the_images_own_sizes_whatever_they_came_as(init: Initialisation) -> None:
    adapted = init.adapt(*labelled(3))
    image = labelled(1, 47, 91)[0][0]
    mask, soft = adapted.predict(image), adapted.predict(image, soft=True, flips=True)
    assert (mask.shape, mask.dtype, soft.shape, soft.dtype) == ((47, 91), np.uint8, (47, 91), np.float32)
    assert set(np.unique(mask)) <= {0, 1}
    assert 0 <= soft.min() <= soft.max() <= 1
    np.testing.assert_array_equal(adapted.predict(image, soft=True) > 0.5, mask)
    for same in (Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1)):
        np.testing.assert_array_equal(adapted.predict(same, soft=True), adapted.predict(image, soft=True))


def test_adapting_is_the_seeds_and_leaves_the_initialisation_alone(init: Initialisation) -> None:
    before = {key: value.clone() for key, value in init.net.state_dict().items()}
    image = labelled(1)[0][0]
    soft = [init.adapt(*labelled(3), seed=seed).predict(image, soft=True) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(soft[0], soft[1])
    assert (soft[0] != soft[2]).any()
    assert all(torch.equal(value, before[key]) for key, value in init.net.state_dict().items())
    assert not init.net.training


@pytest.mark.parametrize("policy", ["running", "support", "batch"])
def test_the_plain_forward_is_the_inner_loops_prediction(
    init: Initialisation, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    made: list[tuple[Adapter, Any]] = []
    network = Adapter.network

    def remembered(self: Adapter, support: Any) -> nn.Module:
        made.append((self, support))
        return network(self, support)

    monkeypatch.setattr(Adapter, "network", remembered)
    adapted = init.adapt(*labelled(5), update={"batchnorm": policy})
    ((adapter, support),) = made
    images = torch.from_numpy(np.stack(labelled(3, SIZE, SIZE)[0])).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = adapted.net(images)
    torch.testing.assert_close(logits, adapter.predict(images, support), rtol=1e-5, atol=1e-5)
    assert not any(module.training for module in adapted.net.modules())
    assert adapted.about.update["batchnorm"] == ("support" if policy == "batch" else policy)
    # at the network's own size there is nothing to resize
    whole = [adapted.predict(image.permute(1, 2, 0).numpy()) for image in images]
    np.testing.assert_array_equal(whole, logits.argmax(1).numpy())


def adapted_by_the_plain_loop(init: Initialisation) -> nn.Module:
    """φ by the reference engine; without anything random, for a mini-batch is the whole support."""
    images, masks = labelled(3, SIZE, SIZE)
    support = Batch.from_numpy(np.stack(images), np.stack(masks) // 255)
    update = Update(torch.optim.SGD, lr=1e-5, steps=2, dropout=0.0, augment=0.0)
    net = copy.deepcopy(init.net).cpu()
    adapt = Reference(net, update)
    adapt(net, Episode("a task", 0, support, support[:0], batches=(support, support)))
    return adapt.network(support)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, CUDA])])
def test_it_is_the_one_inner_loop(device: str) -> None:
    # not a random net: that one turns the last digits into the first ones
    torch.manual_seed(0)
    net = EfficientLab("tf_efficientnet_lite0", rsd=(16,), drop_path=0.0, weights="imagenet")
    init = Initialisation(net.to(device), ABOUT, SIZE)
    omega = {"lr": 1e-5, "batch_size": 3, "dropout": 0.0, "augment": 0.0}
    adapted = init.adapt(*labelled(3, SIZE, SIZE), update=omega)
    query = torch.from_numpy(np.stack(labelled(5, SIZE, SIZE)[0][3:])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = adapted_by_the_plain_loop(init)(query)
        logits = adapted.net(query.to(device)).cpu()
        before = net(query.to(device)).cpu()
    assert (before - expected).abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=0.1 if device == "cpu" else 0.5)


def test_what_is_saved_predicts_at_once(init: Initialisation, tmp_path: Path) -> None:
    adapted = init.adapt(*labelled(3), update={"lr": 0.01, "steps": 3})
    adapted.save(tmp_path / "adapted.safetensors")
    again = metaseg.load(tmp_path / "adapted.safetensors", device="cpu")
    image = labelled(1)[0][0]
    np.testing.assert_array_equal(again.predict(image, soft=True), adapted.predict(image, soft=True))
    assert again.about == adapted.about
    about = again.about
    assert (about.shots, about.image_size, about.update["lr"], about.update["steps"]) == (3, SIZE, 0.01, 3)
    assert (adapted.steps, len(adapted.losses)) == (3, 3)
    assert init.about.shots is None


def test_leaving_one_out_predicts_each_image_from_the_others(init: Initialisation) -> None:
    images, masks = labelled(3)
    ious = init.leave_one_out(images, masks, seed=4)
    for i in range(3):
        others = [j for j in range(3) if j != i]
        adapted = init.adapt([images[j] for j in others], [masks[j] for j in others], seed=4)
        p, m = adapted.predict(images[i]) == 1, masks[i] == 255
        assert ious[i] == pytest.approx(iou((p & m).sum(), (p | m).sum()))
    with pytest.raises(DataError, match="needs two labelled images"):
        init.leave_one_out(images[:1], masks[:1])


def test_progress_tells_each_step_and_the_held_out_curve(init: Initialisation) -> None:
    told: list[Progress] = []
    stopping = {"_target_": "metaseg.update.EarlyStopping", "every": 2}
    adapted = init.adapt(*labelled(10), update={"steps": 4, "stopping": stopping}, progress=told.append)
    searching = [one for one in told if one.searching]
    assert [(one.step, one.held_out) for one in searching] == list(adapted.held_out)
    assert [one.step for one in searching] == [2, 4]
    assert [one.loss for one in told if not one.searching] == list(adapted.losses)
    best = max(adapted.held_out, key=lambda one: one[1])[0]
    assert adapted.steps == best
    assert told[-1].steps == told[-1].step == best


def test_from_ten_images_on_the_steps_are_chosen_unless_that_is_said(init: Initialisation) -> None:
    assert init.omega(None, 9) == UPDATE
    chosen = init.omega({"lr": 0.1}, 10)
    assert (chosen["steps"], chosen["stopping"]["_target_"]) == (200, "metaseg.update.EarlyStopping")
    assert chosen["lr"] == 0.1
    for said in ({"steps": 7}, {"stopping": None}):
        assert init.omega(said, 10) == {**UPDATE, **said}
    own = {**UPDATE, "stopping": {"_target_": "metaseg.update.EarlyStopping", "share": 0.5}}
    assert Initialisation(init.net, replace(ABOUT, update=own), SIZE).omega(None, 10) == own


def test_values_of_omega_are_replaced_one_by_one_or_as_a_whole(init: Initialisation) -> None:
    assert init.omega({"optimizer.momentum": 0.9}, 5)["optimizer"] == {**UPDATE["optimizer"], "momentum": 0.9}
    other = {**UPDATE, "lr": 0.3}
    del other["batchnorm"]
    assert init.omega(other, 5) == other
    with pytest.raises(ConfigError, match="no field 'step'; did you mean steps"):
        init.adapt(*labelled(1), update={"step": 3})
    with pytest.raises(WeightsError, match="recommends no update procedure: choose one, such as update=sgd"):
        Initialisation(init.net, replace(ABOUT, update={}), SIZE).omega(None, 5)


def test_an_optimizer_that_only_the_plain_loop_has_works_too(init: Initialisation) -> None:
    assert init.adapt(*labelled(2), update={"optimizer._target_": "torch.optim.RMSprop"}).steps == 2


# Resizing, tiles and flips, with a network whose answer is known


class Redness(nn.Module):
    """Each pixel by itself: the probability of the object is sigmoid(red / 10 − 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, -12.0]))
        self.seen: list[torch.Size] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.shape)
        red = images[:, :1].float() * self.weight[0] + self.weight[1]
        return torch.cat([torch.zeros_like(red), red], dim=1)


def redness(image: UInt8) -> np.ndarray:
    return 1 / (1 + np.exp(12 - image[..., 0] / 10))


@pytest.fixture
def pointwise() -> Initialisation:
    return Initialisation(Redness(), ABOUT, SIZE)


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (77, 130), (32, 33), (20, 90), (9, 5)])
def test_tiles_cover_the_image_at_its_own_scale_without_seams(
    pointwise: Initialisation, height: int, width: int
) -> None:
    image = labelled(1, height, width)[0][0]
    np.testing.assert_allclose(pointwise.predict(image, soft=True, tile=True), redness(image), atol=1e-5)
    assert all(shape[2:] == (SIZE, SIZE) for shape in pointwise.net.seen)
    assert max(shape[0] for shape in pointwise.net.seen) <= practice.TILES_AT_ONCE


def test_the_whole_image_is_seen_at_the_image_size_in_any_proportion(pointwise: Initialisation) -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 50:] = (250, 0, 0)
    assert pointwise.predict(image)[:, 52:].all()
    assert not pointwise.predict(image)[:, :48].any()
    assert set(pointwise.net.seen) == {torch.Size([1, 3, SIZE, SIZE])}


def test_flips_make_the_prediction_symmetric(init: Initialisation) -> None:
    image = labelled(1, SIZE, SIZE)[0][0]
    there, back = (init.predict(one, soft=True, flips=True) for one in (image, image[:, ::-1]))
    np.testing.assert_allclose(there, back[:, ::-1], atol=1e-6)
    plain = [init.predict(one, soft=True) for one in (image, image[:, ::-1])]
    np.testing.assert_allclose(there, (plain[0] + plain[1][:, ::-1]) / 2, atol=1e-6)
    assert np.abs(plain[0] - plain[1][:, ::-1]).max() > 1e-4


def test_with_tile_the_shots_are_windows_at_the_images_own_scale(init: Initialisation) -> None:
    image = np.zeros((3 * SIZE, 4 * SIZE, 3), np.uint8)
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[SIZE : SIZE + 3, 0 : 2 * SIZE] = 1
    views = init.views(image, mask, tile=True)
    assert [int(view[1].sum()) for view in views] == [3 * SIZE, 3 * SIZE, 0, 0]  # two with it, as many without
    assert all(view[0].shape == (SIZE, SIZE, 3) for view in views)
    adapted = init.adapt([image], [mask], tile=True)
    assert (adapted.about.shots, adapted.about.tile) == (1, True)  # one image
    np.testing.assert_array_equal(adapted.predict(image, soft=True), adapted.predict(image, soft=True, tile=True))
    assert (adapted.predict(image, soft=True) != adapted.predict(image, soft=True, tile=False)).any()
    small = init.views(image[:9, :20], np.ones((9, 20), bool), tile=True)
    assert [view[0].shape for view in small] == [(SIZE, SIZE, 3)]


def test_whole_images_are_held_out_however_many_windows_they_have() -> None:
    sgd = partial(torch.optim.SGD)
    update = Update(sgd, lr=0.1, steps=3, stopping=EarlyStopping(share=0.3, least=4))
    windows = [2, 5, 1, 4]
    n = sum(windows)
    images, masks = np.zeros((n, SIZE, SIZE, 3), np.uint8), np.zeros((n, SIZE, SIZE), np.uint8)
    images[:, 0, 0, 0] = np.repeat(np.arange(4), windows)  # each knows its image
    episode = Episode("task", 0, Batch.from_numpy(images, masks), Batch.from_numpy(images[:0], masks[:0]))
    rehearsal = practice._holding_out_whole(update, windows).prepare(episode, 0).rehearsal
    assert rehearsal is not None
    assert rehearsal.query.images[:, 0, 0, 0].tolist() == [3, 3, 3, 3]  # 0.3 of four images is one
    few = practice._holding_out_whole(update, windows[:3])
    assert few.prepare(replace(episode, support=episode.support[:8]), 0).rehearsal is None  # 8 windows of 3 images


def test_leaving_one_out_of_ten_chooses_the_steps_as_all_ten_do(
    init: Initialisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(practice.MANY_SHOT_UPDATE, "steps", 4)
    told: list[Progress] = []
    init.leave_one_out(*labelled(10), progress=told.append)
    assert any(one.searching for one in told)


# Errors


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda i, m: (i, m[:1]), "not as many images as masks"),
        (lambda i, m: ([], []), "no labelled image to adapt to"),
        (lambda i, m: (i, [m[0], m[1] * 0]), r"image 1: mask without an object: draw the object.*at 32 pixels"),
        (lambda i, m: (i, [m[0].T, m[1]]), r"image 0: mask of another size than its image \(mask 40×56, image 56×40\)"),
        (lambda i, m: ([i[0], i[1][None]], m), r"image 1: no picture .*: give numbers of shape"),
    ],
)
def test_pictures_that_cannot_be_used_are_named_by_their_place(
    init: Initialisation, spoil: Callable[..., Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        init.adapt(*spoil(*labelled(2)))


def test_an_object_too_small_for_the_image_size_is_refused_but_not_in_tiles(init: Initialisation) -> None:
    image, mask = np.zeros((320, 320, 3), np.uint8), np.zeros((320, 320), np.uint8)
    mask[1, 1] = 1
    with pytest.raises(PictureError, match="large enough to be seen at 32 pixels, or use tile"):
        init.views(image, mask)
    assert init.views(image, mask, tile=True)[0][1].sum() == 1
    with pytest.raises(PictureError, match="mask without an object"):
        init.views(image, mask * 0, tile=True)


def written(path: Path, about: About, net: nn.Module | None = None) -> Path:
    net = net or EfficientLab("tf_efficientnet_lite0", rsd=(16,), drop_path=0.0)
    save_initialisation(net, about, path / "theta.safetensors")
    return path / "theta.safetensors"


def test_files_that_are_no_initialisation(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere: there is no such file; give the init.safetensors of a run"):
        metaseg.load(tmp_path / "nowhere")
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("foreign", "text"):
        with pytest.raises(WeightsError, match=f"{name}.safetensors is no initialisation that metaseg wrote"):
            metaseg.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="theta.safetensors holds another network"):
        metaseg.load(written(tmp_path, ABOUT, nn.Conv2d(1, 1, 1)))
    with pytest.raises(WeightsError, match="does not describe a network of metaseg.s: .*dephts"):
        metaseg.load(written(tmp_path, replace(ABOUT, model={**MODEL, "dephts": 3})))


def test_an_old_file_says_its_image_size_or_is_asked_for_it(tmp_path: Path) -> None:
    old = {key: value for key, value in asdict(ABOUT).items() if key not in ("image_size", "shots", "seen")}
    state = EfficientLab("tf_efficientnet_lite0", rsd=(16,), drop_path=0.0).state_dict()
    for dataset in ("emoji_many_shot", "folder"):
        metadata = {key: json.dumps(value) for key, value in {**old, "dataset": dataset}.items()}
        save_file(state, tmp_path / f"{dataset}.safetensors", metadata=metadata)
    assert metaseg.load(tmp_path / "emoji_many_shot.safetensors").image_size == 64
    with pytest.raises(WeightsError, match="does not say which image size it was trained at: give it, image_size=224"):
        metaseg.load(tmp_path / "folder.safetensors")
    assert metaseg.load(tmp_path / "folder.safetensors", image_size=96).about.image_size == 96
    with pytest.raises(ConfigError, match="image_size=100: give a multiple of 16 from 32 on"):
        metaseg.load(tmp_path / "folder.safetensors", image_size=100)


def test_a_device_that_is_not_there(path: Path) -> None:
    with pytest.raises(ConfigError, match="device=warp cannot be used here .*: choose cpu"):
        metaseg.load(path, device="warp")


def test_the_package_offers_what_it_names_and_nothing_else() -> None:
    assert (metaseg.load, metaseg.Initialisation, metaseg.Adapted) == (practice.load, Initialisation, Adapted)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        metaseg.lode  # noqa: B018
