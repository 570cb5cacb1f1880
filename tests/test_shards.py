"""Shards: every byte as the original source gives it, wherever they lie; damage is named, and nothing is half made."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir
from machine import rights_mean_something, small_disk
from omegaconf import OmegaConf
from PIL import Image
from trees import write_data, write_splits, write_tree

from metaseg import shard
from metaseg.algos import Reptile
from metaseg.config import config_dir, make_update
from metaseg.data import shards
from metaseg.data.episodes import check_counts, choose_tasks
from metaseg.data.folder import FolderSource
from metaseg.data.shards import IMAGE, IMAGES, META, TASKS, ShardSource, write_index, write_shards
from metaseg.data.source import SPLITS, TaskSource, image_counts, splits_sha256
from metaseg.errors import DataError, UserError
from metaseg.job import build, fingerprint
from metaseg.run import run

CLASSES = ["Ähre", "ant", "a.b", "bee", "cow", "dog"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """Six classes of 6 images of 48², read at 32²."""
    folder = tmp_path_factory.mktemp("original")
    root = write_tree(folder / "tree", CLASSES, images=6)
    splits = write_splits(folder / "splits.json", ["bee", "a.b", "Ähre"], ["cow"], ["ant", "dog"])
    return FolderSource(root, splits, image_size=32, min_images=6)


@pytest.fixture(scope="module")
def written(original: FolderSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's shards, for reading only: two tasks a shard or three."""
    out = tmp_path_factory.mktemp("written") / "out"
    write_shards(original, out, shard_bytes=40_000)
    return out


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in written.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def assert_same(one: TaskSource, other: TaskSource) -> None:
    assert (one.name, one.family, one.image_size) == (other.name, other.family, other.image_size)
    assert splits_sha256(one) == splits_sha256(other)
    for split in SPLITS:
        assert list(one.names(split)) == list(other.names(split))
        np.testing.assert_array_equal(image_counts(one, split), image_counts(other, split))
        for task in other.names(split):
            for which in (range(other.count(task)), [3, 0, 3], []):
                for ours, theirs in zip(one.load(task, which), other.load(task, which), strict=True):
                    assert ours.dtype == theirs.dtype
                    np.testing.assert_array_equal(ours, theirs)


# The sound path


def test_shards_give_what_the_original_gives(original: FolderSource, written: Path) -> None:
    assert len(list(written.glob("*.tar"))) > 1
    assert_same(ShardSource(written), original)
    assert_same(ShardSource(written, image_size=32), original)
    with pytest.raises(KeyError, match="no task in .* called 'emu'"):
        ShardSource(written).count("emu")
    with pytest.raises(IndexError, match=r"images 0 … 5, not -1"):
        ShardSource(written).load("ant", [0, -1])


def test_they_may_lie_behind_a_url(original: FolderSource, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    for path in written.iterdir():
        memory.pipe_file(f"/bucket/data/{path.name}", path.read_bytes())
    assert_same(ShardSource("memory://bucket/data"), original)
    assert_same(ShardSource("memory://bucket/data/"), original)
    memory.pipe_file("/bucket/data/shard-000000.tar", b"short")
    with pytest.raises(DataError, match="memory://bucket/data/shard-000000.tar gave 0 bytes"):
        ShardSource("memory://bucket/data").load(original.names("train")[0], [1])
    monkeypatch.setattr(type(memory), "cat_ranges", lambda *_, **__: [bytes(10**5)])
    with pytest.raises(DataError, match="gave 100000 bytes from .*server does not know ranges"):
        ShardSource("memory://bucket/data").load("dog", [1])
    with pytest.raises(DataError, match="memory://elsewhere/shards.json"):
        ShardSource("memory://elsewhere")
    with pytest.raises(DataError, match="nosuch.*mend the URL"):
        ShardSource("nosuch://bucket")


def test_an_episode_asks_for_its_images_alone(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    storage = type(fsspec.filesystem("file"))
    real = storage.cat_ranges

    def noted(self: object, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int], **more: object) -> object:
        asked.extend(zip(starts, ends, strict=True))
        return real(self, paths, starts, ends, **more)

    monkeypatch.setattr(storage, "cat_ranges", noted)
    ShardSource(written).load("dog", [4, 1])
    with tarfile.open(sorted(written.glob("*.tar"))[-1]) as tar:
        members = {member.name: member for member in tar}
    wanted = [(members[f"dog/{i:03}.png"], members[f"dog/{i:03}.mask.png"]) for i in (4, 1)]
    assert asked == [(image.offset_data, mask.offset_data + mask.size) for image, mask in wanted]


def test_any_tar_reader_finds_webdataset_samples(original: FolderSource, written: Path) -> None:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(written.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")  # WebDataset: what is before the file name's first dot is its key
                samples.setdefault(f"{folder}/{stem}", {})[suffix] = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
    assert list(samples) == [f"{task}/{i:03}" for split in SPLITS for task in original.names(split) for i in range(6)]
    assert all(set(sample) == {"png", "mask.png"} for sample in samples.values())
    images, masks = original.load("cow", [2])
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(samples["cow/002"]["png"]))), images[0])
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(samples["cow/002"]["mask.png"]))), masks[0] == 1)


def test_the_same_source_gives_the_same_bytes(original: FolderSource, written: Path, tmp_path: Path) -> None:
    write_shards(original, tmp_path / "again", shard_bytes=40_000)
    names = sorted(path.name for path in written.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (written / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def episode_bytes(source: TaskSource, index: int) -> str:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        update = make_update(compose("config")["update"])
    episode = Reptile(shots=4).episode(source, update, 7, index)
    parts = [episode.support, *episode.batches]
    digest = hashlib.sha256(episode.task.encode())
    for part in parts:
        digest.update(part.images.contiguous().numpy().tobytes() + part.masks.numpy().tobytes())
    return digest.hexdigest()


def test_episodes_equal_the_originals_in_any_process(original: FolderSource, written: Path) -> None:
    source = ShardSource(written)
    source.load("ant", [0])
    wanted = [episode_bytes(original, index) for index in range(4)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(partial(episode_bytes, source), range(4))) == wanted
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000  # not the index
    assert [episode_bytes(pickle.loads(pickled), index) for index in range(4)] == wanted


def test_a_million_tasks_are_not_a_million_strings(original: FolderSource, tmp_path: Path) -> None:
    million = 10**6
    tasks = np.zeros(million, shards.task_type(7))
    tasks["name"] = np.char.zfill(np.arange(million).astype("S7"), 7)
    tasks["first"], tasks["count"] = np.arange(million), 1
    images = np.zeros(million, IMAGE)
    images["start"] = 512
    (tmp_path / "shard-000000.tar").write_bytes(bytes(10_240))
    splits = {"train": million - 20, "val": 10, "test": 10}
    write_index(tmp_path, original, splits, tasks, images, [10_240])
    tracemalloc.start()
    source = ShardSource(tmp_path)
    names = source.names("train")
    assert (len(names), names[0], names[-1], names[777]) == (million - 20, "0000000", "0999979", "0000777")
    assert names[5:7] == ["0000005", "0000006"]
    assert source.count("0123456") == 1
    check_counts(names, image_counts(source, "train"), 1, ["a"])
    chosen = choose_tasks(source, "train", 3, seed=0)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(chosen)) == 3
    assert held < 2**20
    assert peak < 32 * 2**20  # the counts, once
    assert list(source.names("val")) == [f"{i:07}" for i in range(million - 20, million - 10)]


def test_a_search_is_of_one_image_size(original: FolderSource, written: Path, tmp_path: Path) -> None:
    larger = FolderSource(original.root, original._listed, image_size=48, min_images=6)
    write_shards(larger, tmp_path / "larger", 2**20)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        words = ["mode=uho", "algo=finetune", "model.weights=null", "dataset=shards", f"dataset.root={written}"]
        config = compose("config", overrides=[*words, "evaluate.shots=3", "evaluate.queries=3"])
    job = build(config)
    moved = OmegaConf.merge(config, {"dataset": {"root": str(tmp_path / "larger")}})
    assert fingerprint(replace(job, source=ShardSource(written))) == fingerprint(job)
    assert fingerprint(replace(job, config=moved, source=ShardSource(tmp_path / "larger"))) != fingerprint(job)


# Damage


def change(**values: object) -> Callable[[Path], None]:
    """Other values in the metadata."""

    def damage(folder: Path) -> None:
        meta = json.loads((folder / META).read_text())
        (folder / META).write_text(json.dumps(meta | values))

    return damage


def cut(name: str, length: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, length)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flip(name: str, at: int) -> Callable[[Path], None]:
    """Another byte at a place of a file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


def reindex(name: str, alter: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """Another index whose hash is right, as an attacker's would be."""

    def damage(folder: Path) -> None:
        array = np.load(folder / name)
        altered = alter(array)
        np.save(folder / name, array if altered is None else altered, allow_pickle=True)
        meta = json.loads((folder / META).read_text())
        meta["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / META).write_text(json.dumps(meta))

    return damage


def put(field: str, value: int) -> Callable[[np.ndarray], None]:
    def alter(array: np.ndarray) -> None:
        array[field] = value

    return alter


def rename(**names: bytes) -> Callable[[np.ndarray], None]:
    """Other names of the tasks of a row: a.b, bee, Ähre, cow, ant, dog."""

    def alter(array: np.ndarray) -> None:
        for row, name in names.items():
            array["name"][int(row[1:])] = name

    return alter


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove(META), "there is no .*shards.json: dataset.root names"),
        (remove(TASKS), "there is no .*tasks.npy"),
        (remove("shard-000001.tar"), "there is no .*shard-000001.tar"),
        (cut(META, 30), "shards.json is not JSON"),
        (cut("shard-000001.tar", 9_000), "shard-000001.tar has 9000 bytes instead of"),
        (cut(IMAGES, 200), "images.npy is not the one that shards.json is of"),
        (flip(TASKS, 200), "tasks.npy is not the one that shards.json is of"),
        (flip(META, 3), "shards.json"),
        (change(format=2), "later format, 2: install a newer metaseg"),
        (change(name=3), "does not describe shards"),
        (change(splits={"train": 6}), "does not describe shards"),
        (change(splits={"train": 3, "val": 1, "test": 3}), "are not of this shards.json"),
        (change(image_size=40), "images of 40²: write a multiple of 16"),
        (change(image_size=2**20), "images of 1048576²: write a multiple of 16 from 32 to 4096"),
        (change(image_size=2**40), "images of 1099511627776²: write a multiple of 16"),
        (change(shards="many"), "does not describe shards"),
        (reindex(TASKS, lambda array: np.array([{"run": "this"}])), "tasks.npy is no array of NumPy's"),
        (reindex(TASKS, lambda array: array["first"].copy()), "are not of this shards.json"),
        (reindex(IMAGES, lambda array: array["start"].copy()), "are not of this shards.json"),
        (reindex(TASKS, put("count", 2**32 - 1)), "tasks.npy: a task has images that images.npy has not: copy the"),
        (reindex(TASKS, put("first", 2**64 - 1)), "tasks.npy: a task has images that images.npy has not"),
        (reindex(TASKS, put("first", 31)), "tasks.npy: a task has images that images.npy has not"),
        (reindex(TASKS, rename(_1=b"bee\xc3", _2=b"\xa4hre")), "tasks.npy: a name is no text"),
        (reindex(TASKS, rename(_0=b"ant")), "tasks.npy: a task is in two splits, or twice in one"),
        (reindex(TASKS, rename(_0=b"bee", _1=b"a.b")), "tasks.npy: the names are not in their order"),
    ],
)
def test_damage_is_found_at_the_start(copy: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copy)
    with pytest.raises(DataError, match=said):
        ShardSource(copy)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (reindex(TASKS, put("shard", 99)), "image 0 of ant does not lie in .*shard-000099.tar"),
        (reindex(IMAGES, put("start", 2**63)), "image 0 of ant does not lie in"),
        (reindex(IMAGES, put("image", 2**32 - 1)), "image 0 of ant does not lie in"),
        (reindex(IMAGES, put("mask", 2**32 - 1)), "image 0 of ant does not lie in"),
        (reindex(IMAGES, put("mask", 0)), "image 0 of ant in .*: no PNG file"),
        (reindex(IMAGES, put("start", 0)), "no PNG file .*copy the folder again"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(copy: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copy)
    with pytest.raises(DataError, match=said):
        ShardSource(copy).load("ant", [0])


def test_an_image_larger_than_one_can_be_is_not_fetched(copy: Path) -> None:
    """Though the shard has so many bytes."""
    damage = reindex(IMAGES, put("image", 4 * 32**2 + 2**16 + 1))
    damage(copy)
    meta = json.loads((copy / META).read_text())
    for number, length in enumerate(meta["shards"]):
        os.truncate(copy / f"shard-{number:06d}.tar", length + 10**6)
    change(shards=[length + 10**6 for length in meta["shards"]])(copy)
    with pytest.raises(DataError, match="image 0 of ant does not lie in"):
        ShardSource(copy).load("ant", [0])


def png(size: int, mode: str, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new(mode, (size, size)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png(4000, "RGB"), "4000×4000 of mode RGB instead of 32×32"),
        (png(32, "L"), "32×32 of mode L instead"),
        (png(32, "RGB", "BMP"), "no PNG file"),
        (png(32, "RGB")[:60], "no PNG file"),
        (png(32, "RGB")[:44] + b"\xff" + png(32, "RGB")[45:], "no PNG file"),
        (b"GIF89a", "no PNG file"),
    ],
)
def test_a_shard_may_hold_anything(copy: Path, content: bytes, said: str) -> None:
    source = ShardSource(copy)
    start = int(np.load(copy / IMAGES)["start"][0])  # of the first task's first image, in the first shard
    with (copy / "shard-000000.tar").open("r+b") as file:
        file.seek(start)
        file.write(content[:2000].ljust(2000, b"\0"))
    with pytest.raises(DataError, match=rf"image 0 of a.b in .*shard-000000.tar, byte {start}: {said}"):
        source.load("a.b", [0])


def test_a_shard_that_vanishes_later_is_named(copy: Path) -> None:
    source = ShardSource(copy)
    (copy / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"there is no .*shard-000000.tar"):
        source.load("a.b", [0])


def test_another_image_size_is_refused(written: Path) -> None:
    with pytest.raises(DataError, match=r"are of 32², not 64²: leave dataset.image_size null, or write"):
        ShardSource(written, image_size=64)


# The writer


class Named:
    """A source of one-image tasks with these names."""

    name = family = "named"

    def __init__(self, *names: str, image_size: int = 32) -> None:
        self.image_size = image_size
        self._names = names

    def names(self, split: str) -> Sequence[str]:
        return self._names if split == "train" else ()

    def count(self, task: str) -> int:
        return 1

    def load(self, task: str, which: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if task == "killed":
            raise KeyboardInterrupt
        size = self.image_size
        return np.full((1, size, size, 3), len(task), np.uint8), np.ones((1, size, size), np.uint8)


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "/etc", "a\0", "é" * 78, "\udc80"])
def test_names_that_a_tar_file_would_not_give_back_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be in shards: give it a name"):
        write_shards(Named("fine", name), tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())


def test_long_names_and_names_of_any_script_come_back(tmp_path: Path) -> None:
    source = Named("a" * 155, "é" * 77, "中文", "a b", "__x__")
    source._names = tuple(sorted(source._names))
    write_shards(source, tmp_path / "out", 1)
    found = ShardSource(tmp_path / "out")
    assert list(found.names("train")) == list(source.names("train"))
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5
    assert all((found.load(name, [0])[0] == len(name)).all() for name in source.names("train"))


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(Named("fine", "killed"), tmp_path / "out", 1)
    assert what_lies_in(tmp_path) == set()
    left = tmp_path / f".out.{0:032x}.partial"  # of one that was killed
    left.mkdir()
    (left / "shard-000009.tar").write_bytes(b"half")
    with pytest.raises(DataError, match="there is no"):
        ShardSource(left)
    others = {"out.partial", f".out.2.{0:032x}.partial"}  # a folder of somebody's, and one that becomes out.2
    for name in others:
        (tmp_path / name).mkdir()
    write_shards(Named("fine"), tmp_path / "out", 1)
    assert what_lies_in(tmp_path) == {"out", *others}
    assert len(list((tmp_path / "out").iterdir())) == 4


def what_lies_in(folder: Path) -> set[str]:
    """But for the lock of `out`, which stays."""
    return {path.name for path in folder.iterdir()} - {".out.lock"}


class Overtaken(Named):
    """While its names are asked for, or its images, another writer does something."""

    def __init__(self, *names: str, at: str, does: Callable[[], object]) -> None:
        super().__init__(*names)
        self.at, self.does = at, does

    def names(self, split: str) -> Sequence[str]:
        if self.at == "names" and split == "train":
            self.does()
        return super().names(split)

    def load(self, task: str, which: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if self.at == "load":
            self.does()
        return super().load(task, which)


def test_of_two_writers_the_second_waits_and_takes_nothing_from_the_first(tmp_path: Path) -> None:
    out, held = tmp_path / "out", []

    def asks_for_the_lock() -> None:
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".out.lock").acquire(timeout=0)
        held.append(True)

    write_shards(Overtaken("first", at="load", does=asks_for_the_lock), tmp_path / "out", 1)
    assert held
    shutil.rmtree(out)
    with pytest.raises(DataError, match="out is already there: choose another out"):
        write_shards(Overtaken("second", at="names", does=lambda: write_shards(Named("first"), out, 1)), out, 1)
    assert list(ShardSource(out).names("train")) == ["first"]
    assert what_lies_in(tmp_path) == {"out"}


def test_without_locks_the_slower_writer_takes_nothing_from_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(NotImplementedError))
    with pytest.raises(DataError, match=r"out cannot be written .*not empty.*choose another out"):
        write_shards(Overtaken("second", at="load", does=lambda: write_shards(Named("first"), out, 1)), out, 1)
    assert list(ShardSource(out).names("train")) == ["first"]
    assert what_lies_in(tmp_path) == {"out"}


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="two splits, or twice"):
        write_shards(Named("a", "a"), tmp_path / "out", 1)
    with pytest.raises(DataError, match="no task to write"):
        write_shards(Named(), tmp_path / "out", 1)
    with pytest.raises(DataError, match="images of 40²"):
        write_shards(Named("a", image_size=40), tmp_path / "out", 1)
    monkeypatch.setattr(shards, "MOST_NAMES", 20)
    with pytest.raises(DataError, match="2 names take 0 MB .* give shorter names"):
        write_shards(Named("a", "b"), tmp_path / "out", 1)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="already there"):
        write_shards(Named("a"), tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt"}


def test_a_full_disk_is_named_and_nothing_is_left(
    original: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "disk" / "out"
    with small_disk(tmp_path / "disk", kilobytes=64) as resize:
        with pytest.raises(
            DataError, match=r"disk/out cannot be written .*No space left.*: make room or see to the rights"
        ):
            write_shards(original, out, 40_000)
        assert what_lies_in(out.parent) == set()
        resize(1024)
        write_shards(original, out, 40_000)
        assert_same(ShardSource(out), original)


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with rights_mean_something(), pytest.raises(DataError, match=r"out cannot be written .*Permission denied"):
        write_shards(Named("a"), tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())


def test_images_that_vanish_while_they_are_written_are_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", ["ant"], images=3)
    source = FolderSource(root, {"train": ["ant"], "val": [], "test": []}, image_size=48, min_images=3)
    (root / "ant" / "2.png").unlink()
    with pytest.raises(DataError, match=r"images of ant cannot be read any more .*2\.png"):
        write_shards(source, tmp_path / "out", 2**20)
    assert what_lies_in(tmp_path) == {"tree"}


# The command, and a run


def test_the_command_writes_what_a_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = write_data(tmp_path)
    shard.run([*words, f"out={tmp_path / 'out'}", "shard_mb=1"])
    said = capsys.readouterr().err
    assert "train: 2 classes, 20 images" in said
    assert f"dataset=shards dataset.root={tmp_path / 'out'}" in said
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        common = ["debug=fast", "model.weights=null", "model.rsd=[16]", "trainer=cpu", "logger=csv", "algo=reptile"]
        config = compose("config", overrides=[*common, "dataset=shards", f"dataset.root={tmp_path / 'out'}"])
    (tmp_path / "run").mkdir()
    run(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["dataset"], results["episodes"]["images"], results["test"]["tasks"]) == ("folder", 60, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset=folder", "out=x"], "dataset.root has no value: give dataset.root="),
        (["dataset=emoji"], "out has no value: give out="),
        (["out=x", "shard_mb=0"], "shard_mb=0: give a whole number, 1 or more"),
        (["dataset=folder", "dataset.root=/nowhere", "dataset.splits=x", "out=x"], "/nowhere is not a folder"),
        (["out=x", "shards_mb=1"], "there is no key 'shards_mb'; did you mean shard_mb"),
    ],
)
def test_what_the_command_cannot_do_is_named(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        shard.run(words)
    assert not list(tmp_path.iterdir())


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["metaseg.shard", "--help"])
    shard.main()
    assert "shard_mb: 64 #" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["metaseg.shard", "shard_mb=0"])
    with pytest.raises(SystemExit, match="metaseg: out has no value"):
        shard.main()
