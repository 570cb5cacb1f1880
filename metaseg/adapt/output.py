"""The folder that the command leaves: masks, probabilities, overlays, a contact sheet, and what was done."""

import html
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metaseg.data.source import UInt8
from metaseg.errors import ConfigError
from metaseg.pictures import PREDICTION, overlay
from metaseg.texts import MOST_READ, read_json

RECORD, INDEX, MODEL, CARD = "adaptation.json", "index.html", "adapted.safetensors", "card.md"
PREDICTIONS = ("masks", "overlays", "probabilities")
THUMBNAIL = 768  # pixels of an overlay's longer side, at most


class Output:
    """The results' folder. Files of an earlier run in it are replaced; a file of anybody else's is never touched.

    Args:
        folder: may not be there yet.
        names: of the query's files, each once.
        adapts: whether a model is written, too.
        soft: whether probabilities are.

    Raises:
        ConfigError: if a file of somebody else's is in the way, or one may not write there.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, adapts: bool, soft: bool) -> None:
        nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"out={folder} cannot be made in {nearest}: choose another folder")
        self.folder, self.soft = folder, soft
        stems = Counter(Path(name).stem.casefold() for name in names)
        # a.jpg and a.png would both become a.png, and beside them a.jpg.png what a.jpg becomes then
        taken = {name.casefold() for name in names if stems[Path(name).stem.casefold()] > 1}
        self.stem = {
            name: name if {name.casefold(), Path(name).stem.casefold()} & taken else Path(name).stem for name in names
        }
        planned = [RECORD, INDEX, *([MODEL, CARD] if adapts else [])]
        for stem in self.stem.values():
            planned += [f"masks/{stem}.png", f"overlays/{stem}.jpg", *([f"probabilities/{stem}.png"] if soft else [])]
        self.earlier = earlier = self._earlier()
        foreign = [name for name in planned if name not in earlier and os.path.lexists(folder / name)]
        if foreign:
            raise ConfigError(
                f"out={folder}: {foreign[0]} is there and not from an earlier run of this command; choose a new folder"
            )
        self.planned, self.files = set(planned), sorted({*earlier, *planned})

    def make(self) -> None:
        """Make the folder, once there is something to write: an adaptation that fails leaves none.

        Raises:
            ConfigError: if it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in {Path(name).parent for name in self.planned}:
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out={self.folder} cannot be made ({error.strerror}): choose another folder") from error

    def clear(self) -> None:
        """Remove an earlier run's predictions, which would pass for this one's."""
        old = {name for name in self.earlier if Path(name).parts[:-1] in {(folder,) for folder in PREDICTIONS}}
        for name in old:
            (self.folder / name).unlink(missing_ok=True)
        self.files = sorted(self.planned | (set(self.files) - old))

    def write_prediction(self, name: str, image: UInt8, probability: NDArray[np.float32]) -> None:
        """Write what was found in an image (h, w, 3): the mask, 0 and 255; an overlay; probabilities if wanted.

        Args:
            name: the image's file name.
            image: in its own size.
            probability: of the object, (h, w), in [0, 1].
        """
        stem, mask = self.stem[name], (probability > 0.5).astype(np.uint8)
        Image.fromarray(mask * np.uint8(255)).save(self.folder / "masks" / f"{stem}.png")
        if self.soft:
            levels = np.rint(probability * 65535).astype(np.uint16)
            Image.fromarray(levels).save(self.folder / "probabilities" / f"{stem}.png")
        shown, small = Image.fromarray(image), Image.fromarray(mask)
        shown.thumbnail((THUMBNAIL, THUMBNAIL))
        drawn = overlay(np.asarray(shown), np.asarray(small.resize(shown.size)), PREDICTION)
        Image.fromarray(drawn).save(self.folder / "overlays" / f"{stem}.jpg", quality=90)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write `adaptation.json`, which also says which files are ours."""
        text = json.dumps({**record, "files": self.files}, indent=2, ensure_ascii=False)
        # names that are no UTF-8 become JSON's own escapes
        (self.folder / RECORD).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")

    def write_index(self, title: str, lines: Sequence[str], predicted: Sequence[str]) -> None:
        """Write the contact sheet: a page of overlays, each a link to its mask, that needs nothing beside this folder.

        Args:
            title: its heading.
            lines: what is to be said above the pictures.
            predicted: names of the query's files, in their order.
        """
        figures = "\n".join(
            f'<figure><a href="{quote(os.fsencode(f"masks/{self.stem[name]}.png"))}">'
            f'<img loading="lazy" src="{quote(os.fsencode(f"overlays/{self.stem[name]}.jpg"))}" alt=""></a>'
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name in predicted
        )
        said = "\n".join(f"<p>{html.escape(line)}</p>" for line in lines)
        page = _PAGE.format(title=html.escape(title), said=said, figures=figures)
        (self.folder / INDEX).write_text(page, encoding="utf-8", errors="backslashreplace")

    def _earlier(self) -> set[str]:
        """The files that an earlier run left here."""
        try:
            record = read_json(self.folder / RECORD, MOST_READ)
            ours = "metaseg" in record  # its version
            return {str(name) for name in record["files"]} if ours else set()
        except (OSError, ValueError, KeyError, TypeError):
            return set()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; align-items: end }}
figure {{ margin: 0 }}
img {{ width: 100% }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
{said}
<main>
{figures}
</main>
</html>
"""
