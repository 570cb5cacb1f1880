"""Tar shards with an index of byte offsets, as a data set: for very many tasks, in a folder or in object storage.

The shards are WebDataset's: plain tar files of samples `TASK/000.png` with masks `TASK/000.mask.png`, which its tools
read, too. They are not streamed here. An episode is a pure function of (seed, split, index), so that any worker of any
rank draws it and a resumed run meets the same; it needs a few images of a task that chance has chosen. A sequential
stream gives tasks in the order of its files, and a store of chunks would fetch a whole one for a class. So an index
says where each image lies, and the ranges of bytes that an episode needs are fetched, all at once, through fsspec:
`root` is a folder or a URL (s3://…, gs://…, https://…). Nothing stays open between two calls.

    shards.json         what it is: name, splits, shards' bytes, and the hashes of the index
    tasks.npy           a row a task: its name, first image, number of images, shard
    images.npy          a row an image: where in the shard it begins, its bytes and its mask's
    shard-000000.tar    …
"""

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, overload

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from metaseg.atomic import folder_whole
from metaseg.data.source import SPLITS, Split, TaskSource, UInt8
from metaseg.errors import DataError

FORMAT = 1
META, TASKS, IMAGES = "shards.json", "tasks.npy", "images.npy"
IMAGE = np.dtype([("start", "<u8"), ("image", "<u4"), ("mask", "<u4")])
BLOCK = tarfile.BLOCKSIZE
MOST_NAMES = 95_000_000  # bytes as JSON: the head of a safetensors file, 100 MB, has to hold them
MOST_SIDE = 4096  # pixels of an image's height and width
TOGETHER = 256  # tasks that the writer has in memory
CURE = "copy the folder again, or write it again with python -m metaseg.shard"

Index = NDArray[np.void]


def task_type(width: int) -> np.dtype[np.void]:
    """A row of `tasks.npy` where the longest name has `width` bytes of UTF-8."""
    return np.dtype([("name", f"S{width}"), ("first", "<u8"), ("count", "<u4"), ("shard", "<u4")])


class TaskNames(Sequence[str]):
    """The names of a split, decoded when they are asked for: a list of a million would be 70 MB in each process."""

    def __init__(self, encoded: NDArray[np.bytes_]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """A name, or a list of some."""
        if isinstance(index, slice):
            return [name.decode() for name in self._encoded[index].tolist()]
        return bytes(self._encoded[index]).decode()

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self[i : i + 4096] for i in range(0, len(self), 4096))


class ShardSource:
    """Shards that `python -m metaseg.shard` wrote, as a `TaskSource`; every image equals the original source's.

    Args:
        root: the folder, or a URL that fsspec knows. A folder's index is mapped into memory and shared by all
            processes; a URL's is read once, and shared by what is forked.
        image_size: what the caller expects; None takes the shards' own.

    Raises:
        DataError: if shards or index are missing, damaged, or of another size.
    """

    def __init__(self, root: str | os.PathLike[str], image_size: int | None = None) -> None:
        self.root, self._asked = os.fspath(root), image_size
        meta = _checked(self._json(), self._at(META))
        self.name: str = meta["name"]
        self.family: str = meta["family"]
        self.image_size: int = meta["image_size"]
        self._bytes: list[int] = meta["shards"]
        if image_size not in (None, self.image_size):
            raise DataError(
                f"the shards in {self.root} are of {self.image_size}², not {image_size}²: leave dataset.image_size "
                f"null, or write others with dataset.image_size={image_size}"
            )
        tasks, self._images = (self._array(name, meta["sha256"][name]) for name in (TASKS, IMAGES))
        fits = tasks.dtype.fields and tasks.dtype == task_type(tasks.dtype[0].itemsize) and self._images.dtype == IMAGE
        ends = list(accumulate(meta["splits"][split] for split in SPLITS))
        if not fits or tasks.shape != (ends[-1],) or self._images.ndim != 1:
            raise DataError(f"{self._at(TASKS)} and {self._at(IMAGES)} are not of this {META}: {CURE}")
        self._tasks = tasks
        self._first = dict(zip(SPLITS, [0, *ends[:-1]], strict=True))
        self._names = {
            split: TaskNames(tasks["name"][self._first[split] : end]) for split, end in zip(SPLITS, ends, strict=True)
        }
        self._check_tasks()
        self._check_sizes()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self._asked)

    def names(self, split: Split) -> TaskNames:
        """Names of the split's tasks, sorted."""
        return self._names[split]

    def count(self, task: str) -> int:
        """Number of images that the task has."""
        return int(self._row(task)["count"])

    def counts(self, split: Split) -> NDArray[np.int64]:
        """`count` of all of the split's tasks, in their order."""
        first = self._first[split]
        return self._tasks["count"][first : first + len(self._names[split])].astype(np.int64)

    def load(self, task: str, which: Sequence[int]) -> tuple[UInt8, UInt8]:
        """Fetch and decode the task's images number `which`; see `TaskSource.load`."""
        row, size = self._row(task), self.image_size
        images = np.empty((len(which), size, size, 3), np.uint8)
        masks = np.empty((len(which), size, size), np.uint8)
        shard, ranges = self._ranges(task, row, which)
        fetched = self._fetch(shard, [(start, start + padded(image) + BLOCK + mask) for start, image, mask in ranges])
        for i, (start, image, mask) in enumerate(ranges):
            where = f"image {which[i]} of {task} in {shard}, byte {start}"
            images[i] = _decoded(fetched[i][:image], "RGB", size, where)
            masks[i] = _decoded(fetched[i][len(fetched[i]) - mask :], "1", size, where)
        return images, masks

    def _row(self, task: str) -> np.void:
        for split, names in self._names.items():
            at = bisect_left(names, task)
            if at < len(names) and names[at] == task:
                row: np.void = self._tasks[self._first[split] + at]
                return row
        raise KeyError(f"no task in {self.root} is called {task!r}; names(split) lists them")

    def _ranges(self, task: str, row: np.void, which: Sequence[int]) -> tuple[str, list[tuple[int, int, int]]]:
        """The task's shard, and (start, bytes of the image, bytes of the mask) of each image, all inside of it."""
        count, first, shard = int(row["count"]), int(row["first"]), int(row["shard"])
        for number in which:
            if not 0 <= number < count:
                raise IndexError(f"{task!r} has images 0 … {count - 1}, not {number}")
        name = self._at(_shard_name(shard))
        length = self._bytes[shard] if shard < len(self._bytes) else 0
        # stored without any compression a file is not larger; what claims to be is not read into memory
        most = 4 * self.image_size**2 + 2**16
        ranges = []
        for number in which:
            entry = self._images[first + number].tolist() if first + number < len(self._images) else (length, 0, 0)
            start, image, mask = entry
            if max(image, mask) > most or start + padded(image) + BLOCK + mask > length:
                raise DataError(f"{self._at(IMAGES)}: image {number} of {task} does not lie in {name}: {CURE}")
            ranges.append(entry)
        return name, ranges

    def _fetch(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """These ranges of bytes, fetched side by side where the storage is far away."""
        try:
            # anew: it costs microseconds, and a connection does not survive a fork
            storage, at = url_to_fs(path)
            starts, ends = ([pair[i] for pair in ranges] for i in (0, 1))
            found: list[bytes] = storage.cat_ranges([at] * len(ranges), starts, ends, on_error="raise")
        except Exception as error:  # each protocol has its own
            raise _unreachable(path, error) from error
        for part, (start, end) in zip(found, ranges, strict=True):
            if len(part) != end - start:
                cure = CURE if len(part) < end - start else "its server does not know ranges of bytes: take another one"
                raise DataError(f"{path} gave {len(part)} bytes from {start} on instead of {end - start}: {cure}")
        return found

    def _at(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _read(self, name: str) -> bytes:
        try:
            storage, path = url_to_fs(self._at(name))
            content: bytes = storage.cat_file(path)
        except Exception as error:  # each protocol has its own; that of an unknown one is a ValueError
            raise _unreachable(self._at(name), error) from error
        return content

    def _json(self) -> Any:
        content = self._read(META)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._at(META)} is not JSON ({error}): {CURE}") from error

    def _array(self, name: str, sha256: str) -> Index:
        """A part of the index, once it is sure that it is the one that was written."""
        storage, path = url_to_fs(self._at(name))
        near = isinstance(storage, LocalFileSystem)
        try:
            file: io.BufferedIOBase
            with open(path, "rb") if near else io.BytesIO(self._read(name)) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    file.seek(0)
                    return np.asarray(np.load(path if near else file, "r" if near else None, allow_pickle=False))
        except OSError as error:
            raise _unreachable(self._at(name), error) from error
        except (ValueError, EOFError, MemoryError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._at(name)} is no array of NumPy's ({error}): {CURE}") from error
        raise DataError(f"{self._at(name)} is not the one that {META} is of: {CURE}")

    def _check_tasks(self) -> None:
        """Names are text, each there once and in its order; images are of the index. For a million tasks, 0.1 s."""
        names, first, count = (self._tasks[field] for field in ("name", "first", "count"))
        every, most = np.sort(names, kind="stable"), len(self._images)
        odd = ""
        try:
            every.astype(f"S{every.itemsize + 1}").tobytes().decode()  # with a zero between any two
        except UnicodeDecodeError:
            odd = "a name is no text"
        if not ((first <= most) & (count <= most - first)).all():
            odd = f"a task has images that {IMAGES} has not"
        elif not (every[:-1] < every[1:]).all():
            odd = "a task is in two splits, or twice in one"
        elif not all((split._encoded[:-1] < split._encoded[1:]).all() for split in self._names.values()):
            odd = "the names are not in their order"
        if odd:
            raise DataError(f"{self._at(TASKS)}: {odd}: {CURE}")

    def _check_sizes(self) -> None:
        """A folder's shards are as long as they were written; those behind a URL are not asked one by one."""
        storage, _ = url_to_fs(self.root)
        if not isinstance(storage, LocalFileSystem):
            return
        for number, length in enumerate(self._bytes):
            path = Path(url_to_fs(self._at(_shard_name(number)))[1])
            try:
                found = path.stat().st_size
            except OSError as error:
                raise _unreachable(str(path), error) from error
            if found != length:
                raise DataError(f"{path} has {found} bytes instead of {length}: {CURE}")


def write_shards(source: TaskSource, out: Path, shard_bytes: int) -> None:
    """Write a data set as shards into the folder `out`, which comes into being whole.

    The same source gives the same bytes, with the same versions of Pillow and zlib. Images are PNG, so nothing is lost.

    Args:
        source: what to write.
        out: is not there yet, or is empty.
        shard_bytes: a shard that has as many gets no further task; ≥ 1.

    Raises:
        DataError: if `out` is there or cannot be written, or a task has a name that cannot be one in a tar file.
    """
    if _is_taken(out):
        raise _taken(out)
    names = {split: sorted(source.names(split)) for split in SPLITS}
    _check_image_size(source.image_size, source.name)
    _check_names(list(chain.from_iterable(names.values())), source.family)
    try:
        with folder_whole(out, "writes", _is_taken) as partial:
            if not partial:  # another process has written it by now
                raise _taken(out)
            _write(source, names, partial, shard_bytes)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error}): make room or see to the rights, or choose another out"
        ) from error


def _is_taken(out: Path) -> bool:
    return out.exists() and not (out.is_dir() and not any(out.iterdir()))


def _taken(out: Path) -> DataError:
    return DataError(f"{out} is already there: choose another out, or remove it")


def _write(source: TaskSource, names: Mapping[Split, Sequence[str]], folder: Path, shard_bytes: int) -> None:
    """Write shards and index into a folder that is empty."""
    every = list(chain.from_iterable(names.values()))
    tasks = np.zeros(len(every), task_type(max(len(name.encode()) for name in every)))
    images, shards = bytearray(), 1
    pending = track(_encoded(source, every), "writing shards", len(every), transient=True)
    with ExitStack() as opened:
        tar = opened.enter_context(_new(folder, 0))
        for row, (name, files) in enumerate(zip(every, pending, strict=True)):
            if tar.offset >= shard_bytes:
                opened.close()
                shards += 1
                tar = opened.enter_context(_new(folder, shards - 1))
            tasks[row] = name.encode(), len(images) // IMAGE.itemsize, len(files), shards - 1
            added = [_add(tar, f"{name}/{i:03d}", *pair) for i, pair in enumerate(files)]
            images += np.array(added, IMAGE).tobytes()
    sizes = [(folder / _shard_name(number)).stat().st_size for number in range(shards)]
    splits = {split: len(names[split]) for split in SPLITS}
    write_index(folder, source, splits, tasks, np.frombuffer(images, IMAGE), sizes)


def write_index(
    folder: Path, source: TaskSource, splits: Mapping[Split, int], tasks: Index, images: Index, shards: Sequence[int]
) -> None:
    """Write what is beside the shards; `shards.json`, without which it is no data set, as the last.

    Args:
        folder: of the shards.
        source: whose name, family and image size they have.
        splits: tasks of each.
        tasks: of `task_type`, train's by name, then val's, then test's.
        images: of `IMAGE`, task after task.
        shards: their bytes.
    """
    sha256 = {}
    for name, array in ((TASKS, tasks), (IMAGES, images)):
        np.save(folder / name, array, allow_pickle=False)
        with (folder / name).open("rb") as file:
            sha256[name] = hashlib.file_digest(file, "sha256").hexdigest()
    meta = {
        "format": FORMAT,
        "name": source.name,
        "family": source.family,
        "image_size": source.image_size,
        "splits": splits,
        "shards": list(shards),
        "sha256": sha256,
    }
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def padded(length: int) -> int:
    """Bytes that a file of `length` bytes takes in a tar file, without its header."""
    return -(-length // BLOCK) * BLOCK


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _new(folder: Path, number: int) -> tarfile.TarFile:
    return tarfile.open(folder / _shard_name(number), "w", format=tarfile.USTAR_FORMAT, encoding="utf-8")


def _add(tar: tarfile.TarFile, key: str, image: bytes, mask: bytes) -> tuple[int, int, int]:
    """Append a sample; returns its row of the index."""
    start = int(tar.offset) + BLOCK  # behind the header, which ustar has in one block
    for suffix, content in (("png", image), ("mask.png", mask)):
        info = tarfile.TarInfo(f"{key}.{suffix}")  # of 1970, nobody's
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return start, len(image), len(mask)


def _encoded(source: TaskSource, names: Sequence[str]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Each task's images and masks as PNG files, in their order; threads serve, since zlib works outside the GIL."""

    def encode(task: str) -> list[tuple[bytes, bytes]]:
        try:
            images, masks = source.load(task, range(source.count(task)))
        except OSError as error:
            raise DataError(f"the images of {task} cannot be read any more ({error}): begin again") from error
        return [(_png(image), _png(mask.astype(bool))) for image, mask in zip(images, masks, strict=True)]

    with ThreadPoolExecutor() as pool:
        for i in range(0, len(names), TOGETHER):
            yield from pool.map(encode, names[i : i + TOGETHER])


def _png(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _decoded(content: bytes, mode: str, size: int, where: str) -> UInt8:
    """The pixels of a PNG file, if it is of this mode and size: its head is asked before anything is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
            if file.mode != mode or file.size != (size, size):
                found = f"{file.width}×{file.height} of mode {file.mode}"
                raise DataError(f"{where}: {found} instead of {size}×{size} of mode {mode}: {CURE}")
            file.verify()  # the checksums, which decoding passes over
        with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
            return np.asarray(file).astype(np.uint8)
    except DataError:
        raise
    except Exception as error:  # over damaged files Pillow raises all kinds
        raise DataError(f"{where}: no PNG file ({error}): {CURE}") from error


def _check_names(names: Sequence[str], family: str) -> None:
    """Refuse names that a tar file or its readers would not give back, or an initialisation cannot keep."""
    if not names:
        raise DataError("there is no task to write: put at least one class into a split")
    if len(set(names)) != len(names):
        raise DataError("a task is in two splits, or twice in one: keep each in one place")
    for name in names:
        # ustar keeps 155 bytes of a folder's name; WebDataset's readers pass over what begins with a dot
        encoded = name.encode(errors="replace")
        if not 0 < len(encoded) <= 155 or encoded.decode() != name or name[0] == "." or "/" in name or "\0" in name:
            raise DataError(
                f"the task {name!r} cannot be in shards: give it a name of 1 to 155 bytes of UTF-8, without '/', that "
                "does not begin with '.'"
            )
    kept = len(json.dumps(json.dumps([f"{family}/{name}" for name in names])))
    if kept > MOST_NAMES:
        raise DataError(
            f"the {len(names)} names take {kept / 1e6:.0f} MB in an initialisation, which says what it has seen, and "
            f"its file has room for {MOST_NAMES / 1e6:.0f} MB: give shorter names"
        )


def _checked(meta: Any, path: str) -> dict[str, Any]:
    """The metadata, once it is sure that all of them are there and of their kinds."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if isinstance(meta, dict) and whole(meta.get("format")) and meta["format"] > FORMAT:
        raise DataError(f"{path} is of a later format, {meta['format']}: install a newer metaseg")
    try:
        sound = (
            meta["format"] == FORMAT
            and isinstance(meta["name"], str)
            and isinstance(meta["family"], str)
            and whole(meta["image_size"])
            and all(whole(meta["splits"][split]) for split in SPLITS)
            and all(map(whole, meta["shards"]))
            and all(isinstance(meta["sha256"][name], str) for name in (TASKS, IMAGES))
        )
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{path} does not describe shards of metaseg's: {CURE}")
    _check_image_size(meta["image_size"], path)
    return dict(meta)


def _check_image_size(size: int, where: str) -> None:
    if not 32 <= size <= MOST_SIDE or size % 16:
        cure = f"write a multiple of 16 from 32 to {MOST_SIDE}, by dataset.image_size"
        raise DataError(f"{where} has images of {size}²: {cure}")


def _unreachable(path: str, error: Exception) -> DataError:
    """The error for what cannot be read, with the cure for the reason."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"there is no {path}: dataset.root names a folder or URL with {META} in it; {CURE}")
    cure = "pip install it" if isinstance(error, ImportError) else "mend the URL, the way to it or the rights"
    return DataError(f"{path} cannot be read ({error}): {cure}, and try again")
