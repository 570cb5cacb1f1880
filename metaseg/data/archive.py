"""Data sets as they are published, in a zip or tar file: unpacked once, into the cache.

An archive may come from anywhere. So all that it lists is checked before the first byte is written: one thing that does
not belong into a data set refuses the whole. No file becomes longer than the list says. What is written comes into
being whole, in a folder beside its place that is renamed at the end.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from stat import S_IFDIR, S_IFMT, S_IFREG
from typing import IO, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from metaseg.atomic import folder_whole
from metaseg.cache import cache_folder
from metaseg.errors import DataError

OPENERS: dict[str, Callable[[Path], Any]] = {  # by suffix; of a tar file as what it is compressed with
    ".zip": lambda path: path.open("rb"),
    ".tar": lambda path: path.open("rb"),
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
MOST_MEMBERS = 500_000  # files and folders; VOC has 57,000
MOST_GROWTH = 20  # how many times larger than the archive its content may be: images hardly compress
SMALL = 2**26  # bytes that it may have in any case
MOST_DEPTH = 32  # folders in each other
MOST_LISTING = 2**27  # bytes of a zip file's list of members
CHUNK = 2**20  # bytes that are read at once; of a tar file the most of a header, and of the padding at the end
LOCAL_HEADER = 30  # bytes in front of a zip member's content, at least
UTF_8 = 0x800  # flag of a zip member whose name it is
BLOCK = 4096  # bytes by which a file's place on a disk is counted
BY_MACOS = ("__MACOSX", ".DS_Store", "._*")  # which its archives bring along; left out
CURE = "fetch it again from its publisher; or unpack it by other means, and give the folder"


class Member(NamedTuple):
    """A file or folder that an archive lists.

    Attributes:
        name: as the archive spells it.
        size: of the file, in bytes, as declared; 0 of a folder.
        is_folder: whether it is one.
        odd: why it cannot be unpacked whatever its name is; empty if it can.
        entry: what the archive's reader knows it by.
    """

    name: str
    size: int
    is_folder: bool
    odd: str
    entry: Any

    @property
    def place(self) -> PurePosixPath:
        """Where it belongs, relative to the archive's folder; never outside, once its name is checked."""
        return PurePosixPath(self.name)


class Opened(NamedTuple):
    """An archive that is being read: what it lists, one by one, and the way to a file's content."""

    members: Iterable[Member]
    read: Callable[[Any], Any]


def unpacked(root: str | os.PathLike[str]) -> Path:
    """The folder that `root` names: itself, or where the archive that it is has been unpacked, now or earlier.

    Archives are unpacked into `unpacked/` of the cache, in a folder named after the archive, its place, size and time.
    Where all folders in it lie in one, as in most, that one is meant.

    Args:
        root: a folder, or a file that ends in .zip, .tar, .tar.gz, .tgz, .tar.bz2 or .tar.xz. What is not there is
            returned as it is: whoever asked knows what is missing.

    Raises:
        DataError: if it is another file, cannot be read, holds what does not belong into a data set (a name that leads
            out of it, a link, two files of one name, far more bytes than itself), or there is no room.
    """
    path = Path(root).expanduser()
    if not os.path.isfile(path):  # which takes a name that is too long, or where one may not look, for none
        return path
    suffix = _suffix(path)
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode(errors="surrogateescape"))
    stem = path.name[: -len(suffix)]
    folder = cache_folder() / "unpacked" / f"{stem}-{key.hexdigest()[:12]}"
    if not folder.is_dir():
        _unpack(path, folder)
    return _data_set(folder)


def _suffix(path: Path) -> str:
    for suffix in OPENERS:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError(
        f"{path} is neither a folder nor an archive that can be unpacked ({', '.join(OPENERS)}): give the folder that "
        "holds the data, or such an archive of it"
    )


def _unpack(path: Path, folder: Path) -> None:
    """Unpack an archive so that `folder` comes into being whole; of several processes that want it one does it."""
    with ExitStack() as stack:
        with _reading(path):
            opened = _opened(path, stack)
            members = _checked(path, opened.members)
        try:
            with folder_whole(folder, "unpacks", Path.is_dir) as partial:
                if partial:
                    _check_room(path, members, partial.parent)
                    _write(path, opened.read, members, partial)
        except OSError as error:
            if folder.is_dir():  # without locks another process was faster, and wrote the same
                return
            raise DataError(
                f"{path} cannot be unpacked in {folder.parent} ({error.strerror}): make room or get the right to "
                "write there, or name another folder in the environment variable METASEG_CACHE"
            ) from error


def _data_set(folder: Path) -> Path:
    """What is inside of folders that hold one folder, and perhaps files; a folder without folders in it is a class."""
    inside = _folders(folder)
    while len(inside) == 1 and (deeper := _folders(inside[0])):
        folder, inside = inside[0], deeper
    return folder


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


# ------------------------------------------------------------------------------------------------- before it is written


def _checked(path: Path, members: Iterable[Member]) -> list[Member]:
    """Those of the members that are to be unpacked, once it is sure that none of all is odd.

    Raises:
        DataError: naming the first one that is; what is behind it is not read.
    """
    most = _most(path)
    kept: list[Member] = []
    known: dict[str, bool] = {}
    total = 0
    for count, member in enumerate(members, start=1):
        total += member.size
        odd = member.odd or _odd_name(member) or _odd_place(member, known)
        if count > MOST_MEMBERS:
            odd = f"is one more than the {MOST_MEMBERS} files and folders that a data set may have"
        elif total > most:
            odd = f"makes it more than {MOST_GROWTH} times larger than the archive, as in a bomb"
        if odd:
            raise DataError(f"{path}: {member.name!r} {odd}; nothing of the archive was unpacked: {CURE}")
        if not any(fnmatchcase(part, pattern) for part in member.place.parts for pattern in BY_MACOS):
            kept.append(member)
    if all(member.is_folder for member in kept):
        raise DataError(f"{path} holds no file: {CURE}")
    return kept


def _odd_name(member: Member) -> str:
    """Why nothing shall get this name; empty if it may."""
    parts, windows = member.place.parts, PureWindowsPath(member.name)  # which knows drives, and both slashes
    if windows.anchor or not all(part.strip(" .") for part in windows.parts):  # Windows takes ".. " for ".."
        return "leads out of the archive's folder"
    if "\\" in member.name or any(unicodedata.category(letter) == "Cc" for letter in member.name):
        return "has a backslash or a control character in its name"
    if len(parts) > MOST_DEPTH or any(len(part.encode(errors="replace")) > 255 for part in parts):
        return f"lies more than {MOST_DEPTH} folders deep, or has a name of more than 255 bytes"
    return "" if parts or member.is_folder else "has no name"


def _odd_place(member: Member, known: dict[str, bool]) -> str:
    """Whether its place is taken; empty if not, which is noted in `known`.

    Args:
        member: whose name is not odd.
        known: whether it is a folder, by place; as file systems know it that tell neither case nor the spelling of
            accents.
    """
    own, *around = (
        unicodedata.normalize("NFC", str(place)).casefold() for place in (member.place, *member.place.parents)
    )
    if not all(known.setdefault(folder, True) for folder in around):
        return "lies in what is a file"
    if own in known and not (known[own] and member.is_folder):
        return "is there twice, at least in a file system that does not tell case"
    known[own] = member.is_folder
    return ""


def _most(path: Path) -> int:
    """Bytes that the content of an archive may have."""
    return max(SMALL, MOST_GROWTH * path.stat().st_size)


def _check_room(path: Path, members: Iterable[Member], place: Path) -> None:
    """Refuse an archive whose files the disk has no room for."""
    needed = sum(-(-member.size // BLOCK) * BLOCK for member in members)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{path} needs {needed / 1e6:,.1f} MB in {place}, which has {free / 1e6:,.1f} MB: make room, or name a "
            "folder on another disk in the environment variable METASEG_CACHE"
        )


# -------------------------------------------------------------------------------------------------------------- reading


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the archive's fault: over damaged ones, Python's readers raise a dozen kinds."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        why = str(error) or type(error).__name__
        kept_out = isinstance(error, OSError) and error.errno is not None  # gzip has OSErrors of its own
        what = "cannot be read" if kept_out else "is damaged, or no archive of its kind"
        raise DataError(f"{path} {what} ({why}): {CURE}") from error


class _Reader:
    """A file of which no more than `most` bytes can be had at once: a header may ask for more than the memory has."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes, or up to the end."""
        content = self._file.read(self._most + 1 if size < 0 else min(size, self._most + 1))
        if len(content) > self._most:
            raise ValueError(f"a list or a header of more than {self._most} bytes")
        return content


def _opened(path: Path, stack: ExitStack) -> Opened:
    """The archive, open for reading until the stack is left."""
    suffix = _suffix(path)
    file = stack.enter_context(OPENERS[suffix](path))
    if suffix == ".zip":
        zipped = stack.enter_context(zipfile.ZipFile(_Reader(file, MOST_LISTING)))
        return Opened(_of_zip(zipped), zipped.open)
    reader = _Reader(file, CHUNK)
    tar = stack.enter_context(tarfile.TarFile(fileobj=reader))  # type: ignore[arg-type]
    return Opened(_of_tar(tar, reader, _most(path)), tar.extractfile)


def _of_zip(archive: zipfile.ZipFile) -> Iterator[Member]:
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
    for entry, end in zip(entries, ends, strict=True):
        kind = S_IFMT(entry.external_attr >> 16)  # of Unix; 0 elsewhere
        odd = ""
        if kind not in (0, S_IFREG, S_IFDIR):
            odd = "is a link or a device"
        elif entry.flag_bits & 1:
            odd = "is encrypted"
        elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            odd = "is compressed in an unusual way"  # bzip2 and LZMA give no bound on what a few bytes become
        elif entry.header_offset + LOCAL_HEADER + entry.compress_size > end:
            odd = "overlaps another member, as in a bomb"
        yield Member(_name(entry), entry.file_size, entry.is_dir(), odd, entry)


def _name(entry: zipfile.ZipInfo) -> str:
    """The name in a zip file: where no flag says that it is UTF-8, it may be all the same, as macOS's Finder has it."""
    name = entry.orig_filename
    with suppress(UnicodeError):
        return name if entry.flag_bits & UTF_8 else name.encode("cp437").decode()
    return name


def _of_tar(archive: tarfile.TarFile, reader: _Reader, most: int) -> Iterator[Member]:
    """What a tar file lists.

    Args:
        archive: the tar file.
        reader: of its bytes.
        most: bytes that members and what is between them may have, so that headers are no bomb either.
    """
    for entry in archive:
        archive.pax_headers = entry.pax_headers = {}  # comments and the like, which would all stay in memory
        odd = ""
        if entry.issparse() or not (entry.isreg() or entry.isdir()):
            odd = "is a link, a device or a file with holes"
        elif entry.size < 0:  # from which the reader would go backwards for ever
            odd = "has fewer than 0 bytes"
        elif entry.offset_data > most:
            odd = f"comes behind more than {MOST_GROWTH} times the archive's size, as in a bomb"
        yield Member(entry.name, entry.size if entry.isreg() else 0, entry.isdir(), odd, entry)
    # Python takes a file that is cut off between two members for a whole one
    reader.seek(archive.offset)
    padding = reader.read(CHUNK)
    if len(padding) < tarfile.BLOCKSIZE or padding.strip(b"\0") or reader.read(1):
        raise EOFError("it does not end as a tar file does")


# -------------------------------------------------------------------------------------------------------------- writing


def _write(path: Path, read: Callable[[Any], Any], members: list[Member], folder: Path) -> None:
    """Write the members into a folder that is empty."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"unpacking {path.name}, once", total=sum(member.size for member in members))
        for member in members:
            target = folder / member.place
            if member.is_folder:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                for chunk in _content(path, read, member):
                    file.write(chunk)
                    bar.advance(task, len(chunk))


def _content(path: Path, read: Callable[[Any], Any], member: Member) -> Iterator[bytes]:
    """The bytes of a file, exactly as many as it was said to have; with the last ones, the checksum is compared."""
    with _reading(path), read(member.entry) as content:
        left = member.size
        while left:
            chunk = content.read(min(left, CHUNK))
            if not chunk:
                raise EOFError(f"{member.name!r} has fewer bytes than the list says")
            left -= len(chunk)
            yield chunk
