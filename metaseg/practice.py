"""For people with a few labelled images: `metaseg.load(path).adapt(images, masks).predict(image)`.

Images may have any size. The network sees them as it did in meta-training, squashed to a square of the initialisation's
`image_size`; what it predicts comes back at each image's own size.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from metaseg.adapt import Adapter
from metaseg.config import make_update
from metaseg.data.masks import resize_mask
from metaseg.data.source import UInt8
from metaseg.divergence import divergence
from metaseg.engine import Fast, Reference, check_optimizer
from metaseg.episode import Batch, Episode
from metaseg.errors import ConfigError, DataError, DivergedError, WeightsError
from metaseg.initialisation import About, read_network, save_initialisation
from metaseg.metrics import iou
from metaseg.pictures import PictureError, Pixels, as_mask, as_picture, check_sizes
from metaseg.seeding import derive_seed, generator
from metaseg.ship import shipped
from metaseg.update import EarlyStopping, Update

EMOJI_SIZE = 64  # of initialisations from before their files said so
MANY_SHOTS = 10  # from which on a share of the support can be held out to choose the number of steps, as in the paper
MANY_SHOT_UPDATE: dict[str, Any] = {"steps": 200, "stopping": {"_target_": "metaseg.update.EarlyStopping"}}
TILES_AT_ONCE = 32

View = tuple[UInt8, UInt8]  # an image (image_size, image_size, 3) and its mask (image_size, image_size), {0, 1}


class Progress(NamedTuple):
    """How far an adaptation is.

    Attributes:
        searching: whether it still rehearses, on a part of the support, how many steps to take (early stopping).
        step: taken, and `steps`, how many there will be at most.
        loss: of the last mini-batch, before its step.
        held_out: IoU of the part of the support that is held out, in [0, 1]; None if none is.
    """

    searching: bool
    step: int
    steps: int
    loss: float
    held_out: float | None = None


class Initialisation:
    """A network, and what is known of it.

    Attributes:
        net: an `nn.Module` in eval mode: images (n, 3, h, w), RGB, 0 … 255, uint8 or float → logits (n, 2, h, w), whose
            channel 1 is the object. h = w = `image_size` is what it learned on.
        about: what its file says; `about.update` is the update procedure ω that it recommends.
        image_size: height and width that images are resized to.
    """

    def __init__(self, net: nn.Module, about: About, image_size: int) -> None:
        self.net = net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # of modules, too
        self.about = replace(about, image_size=image_size)
        self.image_size = image_size

    def adapt(
        self,
        images: Iterable[Pixels],
        masks: Iterable[Pixels],
        *,
        update: Mapping[str, Any] | None = None,
        tile: bool = False,
        seed: int = 0,
        progress: Callable[[Progress], None] | None = None,
    ) -> "Adapted":
        """Adapt to a few labelled images; this initialisation stays as it is.

        Args:
            images: at least one; see `pictures.as_picture`.
            masks: one an image, of its size; see `pictures.as_mask`.
            update: values of ω to use instead of the recommended ones, such as {"steps": 50, "loss.darc1": 0.1}; or all
                of them, with their `_target_`. From `MANY_SHOTS` shots on, unless `steps` or `stopping` is given or
                recommended otherwise, the steps are chosen on a fifth of them, held out (`MANY_SHOT_UPDATE`). The
                batch-norm policy `batch` is taken as `support`, for images come one at a time.
            tile: learn from the images' own pixels, as `predict` does with `tile`: from all windows with some of the
                object, and as many of the others. Shots are images all the same, and whole ones are held out.
            seed: of mini-batches, augmentation and dropout.
            progress: called after each step.

        Raises:
            DataError: if an image or a mask cannot be used, naming it by its position.
            ConfigError: if ω cannot work.
            DivergedError: if its numbers stop being finite, naming the step.
        """
        groups = self._groups(images, masks, tile)
        return self.adapt_to(groups, update=update, tile=tile, seed=seed, progress=progress)

    def leave_one_out(
        self,
        images: Iterable[Pixels],
        masks: Iterable[Pixels],
        *,
        update: Mapping[str, Any] | None = None,
        tile: bool = False,
        flips: bool = False,
        seed: int = 0,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[float]:
        """The IoU of each image, at its own size, predicted after adapting to all the others: what to expect.

        It costs as many adaptations as there are images, and is a little too low, for each has one shot less. Images
        and masks are gone through twice: lists, not generators.

        Raises:
            DataError: if there are fewer than two images, and as `adapt`.
        """
        groups = self._groups(images, masks, tile)
        if len(groups) < 2:
            raise DataError("leaving one out needs two labelled images: add some, or do without the estimate")
        chosen = self.omega(update, len(groups))  # as for all of them, though each adaptation has one fewer
        if chosen.get("stopping") is not None:
            least = chosen["stopping"].get("least", EarlyStopping.least)
            chosen["stopping"] = {**chosen["stopping"], "least": max(2, min(least, len(groups) - 1))}
        ious = []
        for i, image, mask in zip(range(len(groups)), images, masks, strict=True):
            others = groups[:i] + groups[i + 1 :]
            adapted = self.adapt_to(others, update=chosen, tile=tile, seed=seed, progress=progress)
            prediction, truth = adapted.predict(image, flips=flips), as_mask(mask)
            ious.append(float(iou((prediction & truth).sum(), (prediction | truth).sum())))
        return ious

    @torch.no_grad()
    def predict(
        self, image: Pixels, *, soft: bool = False, tile: bool | None = None, flips: bool = False
    ) -> NDArray[Any]:
        """The object in an image.

        Args:
            image: see `pictures.as_picture`.
            soft: give probabilities instead of a mask.
            tile: for large images with small objects: predict windows of image_size × image_size of the image's own
                pixels, which overlap by half and are blended. The network should have adapted to objects of that
                scale: with `tile`, or to images cut out at that size. None does as it adapted.
            flips: average with what the mirrored image gives, for twice the time.

        Returns:
            Shape (h, w) of the image: 1 on the object and 0 elsewhere, uint8; or the object's probability, float32.

        Raises:
            PictureError: if the image cannot be used.
        """
        picture = as_picture(image)
        tiles = self.about.tile if tile is None else tile
        probability = self._in_tiles(picture, flips) if tiles else self._whole(picture, flips)
        return probability if soft else (probability > 0.5).astype(np.uint8)

    def save(self, path: str | Path) -> None:
        """Write the network with what is known of it; `load` reads it back."""
        save_initialisation(self.net, self.about, Path(path))

    def views(self, image: Pixels, mask: Pixels, tile: bool = False) -> list[View]:
        """What the network learns of a labelled image: the whole, or windows of its own pixels (see `adapt`).

        Raises:
            PictureError: if they cannot be used: unreadable, of different sizes, or without an object.
        """
        picture, drawn = as_picture(image), as_mask(mask)
        check_sizes(picture.shape[:2], drawn.shape)
        if tile:
            return self._windows_with_object(picture, drawn)
        small = resize_mask(drawn, self.image_size)
        if not small.any():
            cure = f"draw the object as 255 on 0, large enough to be seen at {self.image_size} pixels, or use tile"
            raise PictureError("mask without an object", cure)
        return [(_resize(picture, self.image_size), small)]

    def omega(self, update: Mapping[str, Any] | None, shots: int) -> dict[str, Any]:
        """ω as `adapt` would configure it for so many shots, in plain containers.

        Raises:
            WeightsError: if none is recommended, and `update` is not a whole one.
        """
        given = dict(update or {})
        base = {} if "_target_" in given else self.about.update
        if "_target_" not in {**base, **given}:
            raise WeightsError("the initialisation recommends no update procedure: choose one, such as update=sgd")
        chosen = any(key.partition(".")[0] in MANY_SHOT_UPDATE for key in given) or base.get("stopping") is not None
        if shots >= MANY_SHOTS and not chosen:
            given |= MANY_SHOT_UPDATE
        config = OmegaConf.create(dict(base))
        for key, value in given.items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        if config.get("batchnorm") == "batch":
            config.batchnorm = "support"
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}

    def _groups(self, images: Iterable[Pixels], masks: Iterable[Pixels], tile: bool) -> list[list[View]]:
        """The views of each image."""
        groups = []
        for i, (image, mask) in enumerate(zip_longest(images, masks)):
            if image is None or mask is None:
                raise DataError("there are not as many images as masks: give one mask an image")
            try:
                groups.append(self.views(image, mask, tile=tile))
            except PictureError as error:
                raise DataError(f"image {i}: {error}") from error
        return groups

    def adapt_to(
        self,
        images: Sequence[Sequence[View]],
        *,
        update: Mapping[str, Any] | None = None,
        tile: bool = False,
        seed: int = 0,
        progress: Callable[[Progress], None] | None = None,
    ) -> "Adapted":
        """`adapt`, to what `views` gave of each image, with `tile` or not: the one inner loop of everything here.

        Raises:
            DataError: if there are none.
            ConfigError: if ω cannot work.
            DivergedError: if its numbers stop being finite, naming the step.
        """
        if not images:
            raise DataError("no labelled image to adapt to: give at least one")
        started = time.perf_counter()
        config = self.omega(update, len(images))
        order = generator(seed, "order").permutation(len(images))  # or early stopping would hold out the last ones
        views = [view for i in order for view in images[i]]
        procedure = _holding_out_whole(make_update(OmegaConf.create(config)), [len(images[i]) for i in order])
        support = Batch.from_numpy(*(np.stack([view[part] for view in views]) for part in (0, 1)))
        episode = Episode("support", derive_seed(seed, "adapt"), support, support[:0])
        episode = procedure.prepare(episode, seed, "adapt").to(_device(self.net))
        adapt = _adapter(self.net, procedure)
        tell = progress or (lambda _: None)
        held_out: list[tuple[int, float]] = []

        def scored(step: int, score: float) -> None:
            held_out.append((step, score))
            tell(Progress(True, step, procedure.steps, float(adapt.losses[-1]), score))

        adapt.on_score = scored
        batches = adapt.batches(self.net, episode)
        adapt.start(self.net, episode.seed)
        losses = []
        for batch in batches:
            adapt.step(batch)
            losses.append(float(adapt.losses[-1]))
            tell(Progress(False, adapt.taken, len(batches), losses[-1], max((s for _, s in held_out), default=None)))
        if not adapt.finite():
            cure = f"lower update.lr, which is {procedure.lr:g}"
            raise DivergedError(f"the adaptation diverged ({divergence(procedure, losses)}): {cure}")
        # memory of its own, laid out as a file's: what an engine has made are views of one vector
        net = copy.deepcopy(self.net).to(memory_format=torch.contiguous_format)
        net.load_state_dict(adapt.network(episode.support).state_dict())
        about = replace(self.about, update=config, shots=len(images), tile=tile)
        return Adapted(net, about, self.image_size, losses, held_out, time.perf_counter() - started)

    def _forward(self, squares: UInt8, flips: bool) -> NDArray[np.float32]:
        """The object's probability in images (n, image_size, image_size, 3); shape (n, image_size, image_size)."""
        images = torch.from_numpy(squares).permute(0, 3, 1, 2).to(_device(self.net))
        probability = self.net(images).softmax(1)[:, 1]
        if flips:
            probability = (probability + self.net(images.flip(3)).softmax(1)[:, 1].flip(2)) / 2
        return np.asarray(probability.cpu().numpy(), dtype=np.float32)

    def _whole(self, picture: UInt8, flips: bool) -> NDArray[np.float32]:
        height, width = picture.shape[:2]
        small = self._forward(np.stack([_resize(picture, self.image_size)]), flips)[0]
        shrinks = max(height, width) < self.image_size
        return np.asarray(
            cv2.resize(small, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        )

    def _in_tiles(self, picture: UInt8, flips: bool) -> NDArray[np.float32]:
        """Windows that overlap by half, each weighted less towards its edges."""
        side, (height, width) = self.image_size, picture.shape[:2]
        picture = _at_least(picture, side)
        ramp = 1 - np.abs((np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1)
        weight = np.outer(ramp, ramp)
        total = np.zeros(picture.shape[:2], np.float32)
        weights = np.zeros_like(total)
        corners = _corners(picture.shape, side, side // 2)
        for start in range(0, len(corners), TILES_AT_ONCE):
            some = corners[start : start + TILES_AT_ONCE]
            tiles = np.stack([picture[y : y + side, x : x + side] for y, x in some])
            for (y, x), probability in zip(some, self._forward(tiles, flips), strict=True):
                total[y : y + side, x : x + side] += weight * probability
                weights[y : y + side, x : x + side] += weight
        return np.asarray((total / weights)[:height, :width])

    def _windows_with_object(self, picture: UInt8, mask: UInt8) -> list[View]:
        """Windows side by side: those with some of the object, and as many of the others, evenly spread."""
        side = self.image_size
        picture, mask = _at_least(picture, side), _at_least(mask, side)
        windows = [
            (picture[y : y + side, x : x + side].copy(), mask[y : y + side, x : x + side].copy())
            for y, x in _corners(mask.shape, side, side)
        ]
        holding = [window for window in windows if window[1].any()]
        if not holding:
            raise PictureError(
                "mask without an object", "draw the object as 255 on 0, or remove the image and its mask"
            )
        others = [window for window in windows if not window[1].any()]
        spread = np.linspace(0, len(others), min(len(holding), len(others)), endpoint=False).astype(int)
        return holding + [others[i] for i in spread]


class Adapted(Initialisation):
    """An adapted network; its plain forward predicts what the inner loop's own prediction does.

    `net` has in its batch norms the statistics that ω's policy asks for: the running ones, or those of the support set.
    `about.update` is the ω that it was adapted with.

    Attributes:
        losses: of the mini-batches, each before its step.
        held_out: under early stopping, (step, IoU of the held-out share of the support) on the way of its rehearsal.
        seconds: that it took.
    """

    def __init__(
        self,
        net: nn.Module,
        about: About,
        image_size: int,
        losses: Sequence[float],
        held_out: Sequence[tuple[int, float]],
        seconds: float,
    ) -> None:
        super().__init__(net, about, image_size)
        self.losses, self.held_out, self.seconds = tuple(losses), tuple(held_out), seconds

    @property
    def steps(self) -> int:
        """Inner steps taken."""
        return len(self.losses)


def load(
    path: str | Path | None = None, *, image_size: int | None = None, device: str | torch.device | None = None
) -> Initialisation:
    """An initialisation, or an adapted model, from the file that a run, `save` or the shell command left.

    Nothing in the file is executed: its configuration may name parts of metaseg and torch alone.

    Args:
        path: an `init.safetensors`, an `adapted.safetensors` or a run's `.ckpt`; None takes the shipped one, which
            `make demo` builds (see `metaseg.ship`).
        image_size: height and width that images are resized to; None takes what the file says.
        device: None takes the GPU if there is one.

    Raises:
        WeightsError: if there is no such file, it is not metaseg's, or it does not say its image size.
    """
    path = shipped() if path is None else Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"{path}: there is no such file; give the init.safetensors of a run, or an adapted.safetensors"
        )
    net, about = read_network(path)
    size = image_size or about.image_size or (EMOJI_SIZE if about.dataset.startswith("emoji") else None)
    if size is None:
        raise WeightsError(
            f"{path} does not say which image size it was trained at: give it, image_size=224 or the like"
        )
    if not isinstance(size, int) or size < 32 or size % 16:
        raise ConfigError(f"image_size={size}: give a multiple of 16 from 32 on")
    return Initialisation(net.to(_chosen(device)), about, size)


def _chosen(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()  # meta, for one, holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} cannot be used here ({str(error).splitlines()[0]}): choose cpu") from error
    return torch.device(device)


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _adapter(net: nn.Module, update: Update) -> Adapter:
    try:
        check_optimizer(update)
    except ConfigError:
        return Reference(net, update)
    return Fast(net, update)


def _holding_out_whole(update: Update, windows: Sequence[int]) -> Update:
    """ω under which early stopping holds out the last whole images: windows of one on both sides would flatter.

    Args:
        update: ω, whose rule counts images.
        windows: how many views each image has, in the order of the support.
    """
    stopping, images = update.stopping, len(windows)
    if stopping is None:
        return update
    if images < stopping.least:
        return replace(update, stopping=replace(stopping, least=sum(windows) + 1))
    held_out = min(max(1, round(stopping.share * images)), images - 1)
    share = sum(windows[-held_out:]) / sum(windows)
    return replace(update, stopping=replace(stopping, share=share))


def _resize(picture: UInt8, size: int) -> UInt8:
    """An image (h, w, 3) squashed to (size, size, 3) as the data sets of meta-training do it."""
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))


def _at_least(picture: UInt8, side: int) -> UInt8:
    """The picture (h, w, …), with its last row and column repeated where it is smaller than `side`."""
    missing = [(0, max(0, side - n)) for n in picture.shape[:2]]
    return np.pad(picture, missing + [(0, 0)] * (picture.ndim - 2), mode="edge")


def _corners(shape: Sequence[int], side: int, stride: int) -> list[tuple[int, int]]:
    """Upper left corners of windows that cover an image; the last ones of a row or column end at its edge."""
    rows, columns = ([*range(0, n - side, stride), n - side] for n in shape[:2])
    return [(y, x) for y in rows for x in columns]
