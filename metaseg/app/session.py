"""What one visitor of the page has: images, painted and predicted masks, the model adapted to them. No Gradio here."""

import io
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PureWindowsPath

import cv2
import numpy as np
from PIL import Image

from metaseg.data.faults import Fault
from metaseg.data.source import UInt8
from metaseg.errors import ConfigError, DataError
from metaseg.export import export
from metaseg.pictures import PREDICTION, TRUTH, PictureError, overlay, read_picture
from metaseg.practice import Adapted, Initialisation, Progress

VIEW = 640  # pixels of a view's longer side
MAX_IMAGES = 500  # of a session; each takes 1.3 MB of memory
THUMBNAIL = 192  # of a thumbnail's; an overlay's outline has one pixel

Tell = Callable[[float, str], None]
"""Is told how far the work is, in 0 … 1, and what is being done."""


@dataclass
class Picture:
    """One image; masks lie compressed, for a hundred photographs at full size would not fit into memory.

    Attributes:
        file: the image, in the session's folder.
        size: height and width.
        view: the image (h, w, 3), enlarged or shrunk so that it can be painted on.
        label: the mask that a person has painted or confirmed, as PNG of the image's own size, 0 and 255.
        prediction: the mask that the adapted model gives, likewise; None once a person has erased it.
        shown: what the editor shows of a mask, as PNG of the view's size; None if the image has not been opened.
        stands_for: the mask, as PNG of the image's own size, that `shown` is a view of; None if there is none.
        small: the thumbnail, and of what: the mask, and whether it is a label.
    """

    file: Path
    size: tuple[int, int]
    view: UInt8
    label: bytes | None = None
    prediction: bytes | None = None
    shown: bytes | None = None
    stands_for: bytes | None = None
    small: tuple[UInt8, tuple[bytes | None, bool]] | None = None

    @property
    def mask(self) -> bytes | None:
        """The label if there is one, else the prediction."""
        return self.label or self.prediction


class Session:
    """Images of one person, and what is known of the object in them.

    Args:
        init: shared with other sessions; it stays as it is.
        folder: of this session alone; `close` removes it.

    Attributes:
        pictures: by name, in the order in which they came; no two names have the same stem.
        adapted: the model, once there is one.
    """

    def __init__(self, init: Initialisation, folder: Path) -> None:
        self.init, self.folder = init, folder
        self.pictures: dict[str, Picture] = {}
        self.adapted: Adapted | None = None
        self._number = count()

    def add(self, files: Sequence[Path]) -> list[Fault]:
        """Add images, and predict them if there is a model already; returns the faults of those that cannot be used."""
        faults = []
        for file in files:
            if len(self.pictures) >= MAX_IMAGES:
                cure = "download the model, and predict the others with python -m metaseg.adapt query=FOLDER"
                faults.append(Fault(f"image past the first {MAX_IMAGES}", Path(file.name), cure))
                continue
            try:
                image = read_picture(file)
            except PictureError as error:
                faults.append(error.at(Path(file.name)))
                continue
            kept = self.folder / f"{next(self._number)}{file.suffix}"
            shutil.copyfile(file, kept)
            name = self._free_name(file.name)
            self.pictures[name] = Picture(kept, image.shape[:2], _fitted(image, VIEW))
            self._predict(name)
        return faults

    def layer(self, name: str) -> UInt8:
        """The mask to start painting from, the label or the prediction: shape (h, w) of the image's view, {0, 1}."""
        picture = self.pictures[name]
        size = picture.view.shape[:2]
        return np.zeros(size, np.uint8) if picture.mask is None else _resized(_decoded(picture.mask), size)

    def open(self, name: str) -> UInt8:
        """`layer`, for an editor to show: until it is opened again, `paint` and `confirm` go by what is shown there."""
        picture, layer = self.pictures[name], self.layer(name)
        picture.shown, picture.stands_for = _encoded(layer), picture.mask
        return layer

    def paint(self, name: str, painted: UInt8) -> bool:
        """Take a painted mask as the image's label, if it is not just what the editor was given; returns whether.

        Only what was changed is taken from it: elsewhere the mask that was there keeps its own, finer pixels. Where
        nothing is left of the object, the image has no label any more, and a prediction that was erased is gone.

        Args:
            name: of the image.
            painted: the object, shape (h, w) of its view, {0, 1}.
        """
        picture = self.pictures[name]
        shown = self.open(name) if picture.shown is None else _decoded(picture.shown)
        changed = (painted != shown).astype(np.uint8)
        if not changed.any():
            return False
        before = np.zeros(picture.size, np.uint8) if picture.stands_for is None else _decoded(picture.stands_for)
        touched = _resized(changed, picture.size, least=0)
        if painted.any():
            mask = np.where(touched == 1, _resized(painted, picture.size), before)
        else:
            mask = np.zeros(picture.size, np.uint8)  # also of what the view cannot show
        if picture.label is None and not mask.any():
            picture.prediction = None
        else:
            self.label(name, mask)
        picture.shown, picture.stands_for = _encoded(painted), picture.label
        return True

    def label(self, name: str, mask: UInt8) -> None:
        """Set the image's label: shape (h, w) of the image itself, {0, 1}; an empty one takes it back."""
        picture = self.pictures[name]
        picture.label = _encoded(mask) if mask.any() else None
        picture.shown = picture.stands_for = None
        if not mask.any():
            self._predict(name)

    def confirm(self, name: str) -> None:
        """Make the mask that the editor shows, or else the one that the image has, its label: a prediction, too.

        Raises:
            DataError: if there is none, or nothing in it, as where it was erased.
        """
        picture = self.pictures[name]
        mask = picture.mask if picture.shown is None else picture.stands_for
        if mask is None or not _decoded(mask).any():
            raise DataError(f"the mask of {name} is empty: paint the object first")
        picture.label = mask

    def adapt(self, *, steps: int | None = None, tile: bool = False, tell: Tell | None = None) -> str:
        """Adapt the initialisation to all labelled images, and predict all others.

        Args:
            steps: inner steps; None for as many as recommended.
            tile: see `Initialisation.adapt`.
            tell: is told of each step and each image.

        Returns:
            What was done, in a sentence.

        Raises:
            DataError: if no image is labelled, or the object of one is too small.
            ConfigError: if the update procedure cannot work.
        """
        tell = tell or (lambda fraction, said: None)
        labelled = [(name, picture) for name, picture in self.pictures.items() if picture.label]
        if not labelled:
            raise DataError("paint the object on at least one image first")
        views = []
        for name, picture in labelled:
            assert picture.label is not None
            try:
                views.append(self.init.views(read_picture(picture.file), _decoded(picture.label), tile=tile))
            except PictureError as error:
                side = self.init.image_size
                cure = "paint all of it, or use tiles" if not tile else "paint all of it"
                raise DataError(f"{name}: its object cannot be seen at the network's {side} pixels: {cure}") from error

        def progress(at: Progress) -> None:
            doing = "choosing the number of steps" if at.searching else "adapting"
            tell(at.step / at.steps, f"{doing}: step {at.step} of {at.steps}, support loss {at.loss:.2f}")

        self.adapted = self.init.adapt_to(views, update={"steps": steps} if steps else {}, tile=tile, progress=progress)
        others = [name for name, picture in list(self.pictures.items()) if not picture.label]
        for i, name in enumerate(others):
            tell(i / len(others), f"predicting image {i + 1} of {len(others)}")
            self._predict(name)
        losses = self.adapted.losses
        return (
            f"Adapted to {_counted(len(labelled), 'image')} in {_counted(len(losses), 'step')} and "
            f"{self.adapted.seconds:.1f} s: support loss {losses[0]:.2f} → {losses[-1]:.2f}."
        )

    def thumbnails(self) -> list[tuple[UInt8, str]]:
        """Small images, each as an overlay of its mask, with its name and where its mask comes from."""
        return [(_thumbnail(picture), f"{_state(picture)}{name}") for name, picture in self.pictures.items()]

    def masks_zip(self) -> Path:
        """Write the masks of all images that have one, labels and predictions: `STEM.png`, 0 and 255, as a zip file.

        Raises:
            DataError: if there are none.
        """
        masks = {Path(name).stem: picture.mask for name, picture in self.pictures.items() if picture.mask}
        if not masks:
            raise DataError("there are no masks yet: paint the object on an image, and adapt")
        path = self.folder / "masks.zip"
        with zipfile.ZipFile(path, "w") as archive:  # PNG is compressed already
            for stem, mask in masks.items():
                archive.writestr(f"{stem}.png", mask)
        return path

    def model(self, suffix: str) -> Path:
        """Write the adapted model: as `.onnx` (see `export.export`) or as `.safetensors` (see `Initialisation.save`).

        Raises:
            DataError: if there is none yet.
            ConfigError: as ONNX, if it was adapted with tiles, or if the packages are missing that it takes.
        """
        if self.adapted is None:
            raise DataError("there is no adapted model yet: paint the object on an image, and adapt")
        path = self.folder / f"adapted{suffix}"
        if suffix == ".safetensors":
            self.adapted.save(path)
        elif self.adapted.about.tile:
            raise ConfigError(
                "the model was adapted with tiles, but as ONNX it would see each image whole, shrunk to "
                f"{self.adapted.image_size} pixels: download it as safetensors, which keeps the tiles "
                "(python -m metaseg.adapt init=adapted.safetensors query=… out=…), or adapt without tiles for ONNX"
            )
        else:
            export(self.adapted.net, self.adapted.image_size, path)
        return path

    def close(self) -> None:
        """Remove the session's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _predict(self, name: str) -> None:
        picture = self.pictures[name]
        if self.adapted is not None:
            picture.prediction = _encoded(self.adapted.predict(read_picture(picture.file)))

    def _free_name(self, name: str) -> str:
        """The name, or one like `cat (2).jpg` if an image has its stem: their masks would be one file."""
        taken = {Path(other).stem.casefold() for other in self.pictures}
        bare = PureWindowsPath(name)  # it knows the separators of all systems: the zip may be unpacked on any
        stem, suffix = bare.stem, bare.suffix
        stems = (stem if i == 1 else f"{stem} ({i})" for i in count(1))
        return next(free for free in stems if free.casefold() not in taken) + suffix


def _fitted(image: UInt8, side: int) -> UInt8:
    """An image (h, w, 3) whose longer side has `side` pixels."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _resized(mask: UInt8, size: Sequence[int], least: float = 0.5) -> UInt8:
    """A mask (h, w), {0, 1}, at another size: 1 where more than `least` of a pixel is the object."""
    height, width = size
    shrinks = height < mask.shape[0]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    soft = np.asarray(cv2.resize(mask.astype(np.float32), (width, height), interpolation=how))
    return (soft > least).astype(np.uint8)


def _encoded(mask: UInt8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask * np.uint8(255)).save(file, "PNG")
    return file.getvalue()


def _decoded(mask: bytes) -> UInt8:
    return (np.asarray(Image.open(io.BytesIO(mask))) > 0).astype(np.uint8)


def _thumbnail(picture: Picture) -> UInt8:
    of = picture.mask, picture.label is not None
    if picture.small is not None and picture.small[1] == of:
        return picture.small[0]
    small = _fitted(picture.view, THUMBNAIL)
    if picture.mask is not None:
        mask = _resized(_decoded(picture.mask), small.shape[:2])
        small = overlay(small, mask, TRUTH if picture.label else PREDICTION)
    picture.small = small, of
    return small


def _state(picture: Picture) -> str:
    return "labelled · " if picture.label else "predicted · " if picture.prediction else ""


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
