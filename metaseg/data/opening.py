"""How the image files of data sets and of people are opened: of formats expected there, and small enough to decode.

Pillow goes by a file's content, whatever its name says, and some of the formats that it knows reach old code or another
program: EPS is handed to Ghostscript. So a caller says which formats it takes, and no other code sees the file.
"""

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from metaseg.data.faults import Fault

TREE_FORMATS = ("JPEG", "PNG")  # of data sets; as JPEG, Pillow also opens the first of a phone's several pictures (MPO)
MAX_PIXELS = 89_000_000  # just under Pillow's own limit, from which on it warns of decompression bombs
LARGE = 2**25  # pixels of an image that threads do not decode side by side
LINK_CURE = "fetch what it points to, or remove it"

_turn = threading.Lock()


@contextmanager
def opened(path: Path, formats: Sequence[str]) -> Iterator[Image.Image]:
    """Open an image file, which is decoded only when its pixels are asked for.

    Args:
        path: of the file; its suffix does not matter.
        formats: Pillow's names of those that it may have.

    Raises:
        PIL.Image.DecompressionBombError: if its head claims more than `MAX_PIXELS`.
        Exception: Pillow raises errors of all kinds over damaged files, also while the pixels are decoded.
    """
    # not Pillow's own block: before 11 it fails over a file that is closed in it, and it keeps the pixels
    with closing(Image.open(path, formats=tuple(formats))) as file:
        if file.width * file.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{file.width}×{file.height}")
        yield file


@contextmanager
def by_turns(file: Image.Image) -> Iterator[None]:
    """Where threads open many files: the block in which one's pixels are in memory, for large ones one at a time."""
    with _turn if file.width * file.height > LARGE else nullcontext(), closing(file):
        yield


def fault_of(error: Exception, path: Path, place: Path, cure: str) -> Fault:
    """The fault of a file that could not be opened or decoded.

    Args:
        error: that was raised.
        path: of the file.
        place: of the file, as the fault is to name it.
        cure: of damaged content; other reasons have their own.
    """
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning | MemoryError):
        smaller = f"cut it into parts or shrink it to at most {MAX_PIXELS // 1_000_000} megapixels"
        short = isinstance(error, MemoryError)
        return Fault("image of too many pixels", place, smaller, "the memory is short" if short else str(error))
    if isinstance(error, PermissionError):
        return Fault("file that may not be read", place, "chmod u+r it, and chmod u+x its folder, or ask its owner to")
    if leads_nowhere(error, path):
        return Fault("link that leads nowhere", place, LINK_CURE, os.readlink(path))
    # whose own message is the path
    foreign = isinstance(error, UnidentifiedImageError)
    detail = "no known image format" if foreign else f"{type(error).__name__}: {error}"
    return Fault("unreadable file", place, cure, detail)


def leads_nowhere(error: Exception, path: Path) -> bool:
    """Whether the error is that of a link to what is not there, or to itself; as of data that were not fetched."""
    return isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path)
