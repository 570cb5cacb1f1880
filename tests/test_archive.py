"""Data sets in archives: the same as their folders; of what does not belong into one, nothing is written anywhere."""

import bz2
import errno
import gzip
import io
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import tracemalloc
import unicodedata
import zipfile
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from machine import rights_mean_something
from trees import stripes, write_sbd, write_splits, write_tree, write_voc

from metaseg.data import archive
from metaseg.data.archive import unpacked
from metaseg.data.folder import FolderSource
from metaseg.data.fss1000 import Fss1000Source
from metaseg.data.pascal import PascalSource
from metaseg.data.source import SPLITS, TaskSource
from metaseg.errors import DataError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "tgz": gzip.compress} | {
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "tar": bytes,
}
FORK = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None

Listed = Sequence[tuple[str | zipfile.ZipInfo | tarfile.TarInfo, bytes]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the test alone, and not there yet; beside it a current folder in which nothing shall appear."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("METASEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(path: Path, members: Listed) -> Path:
    """An archive of these members, in their order; a name that ends in / is a folder."""
    file = io.BytesIO()
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in members:
                zipped.writestr(name, content)  # type: ignore[arg-type]
        path.write_bytes(file.getvalue())
        return path
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(str(name))
            info.type = tarfile.DIRTYPE if info.name.endswith("/") else info.type
            info.size = 0 if info.isdir() else len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(PACKERS[path.suffix[1:]](file.getvalue()))
    return path


def packed(folder: Path, path: Path) -> Path:
    """All below `folder`, in a folder of its name, as `zip -r` and `tar c` pack it."""
    names = [(found.relative_to(folder.parent).as_posix(), found) for found in (folder, *sorted(folder.rglob("*")))]
    return written(path, [(f"{name}/", b"") if at.is_dir() else (name, at.read_bytes()) for name, at in names])


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(path: Path, message: str) -> None:
    """The archive is, with this message, and nothing has changed on the disk, wherever its names point to."""
    around = path.parents[1]
    before = everything(around)
    with pytest.raises(DataError, match=message) as caught:
        unpacked(path)
    assert str(path) in str(caught.value)
    assert everything(around) == before


def same(one: TaskSource, other: TaskSource) -> bool:
    names = [(split, task) for split in SPLITS for task in one.names(split)]
    assert names == [(split, task) for split in SPLITS for task in other.names(split)] != []
    for _, task in names:
        pairs = zip(one.load(task, range(one.count(task))), other.load(task, range(other.count(task))), strict=True)
        assert all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    return True


# Sound archives


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_is_the_same_data_set_as_its_folder(tmp_path: Path, cache: Path, suffix: str) -> None:
    tree = write_tree(tmp_path / "animals", ["ant", "bee", "cat"], images=2)
    splits = write_splits(tmp_path / "splits.json", ["ant"], ["bee"], ["cat"])
    path = packed(tree, tmp_path / f"some.animals{suffix}")
    assert same(FolderSource(path, splits, 32, 2), FolderSource(tree, splits, 32, 2))
    (made,) = (found for found in (cache / "unpacked").iterdir() if not found.name.startswith("."))
    assert re.fullmatch(r"some\.animals-[0-9a-f]{12}", made.name)
    assert sum(found.is_file() for found in made.rglob("*")) == 12


def test_fss_1000_comes_in_a_folder_in_a_folder(tmp_path: Path) -> None:
    write_tree(tmp_path / "fewshot_data" / "fewshot_data", ["abacus", "ac_wall", "accordion"], images=2)
    path = packed(tmp_path / "fewshot_data", tmp_path / "fewshot_data.zip")
    with pytest.warns(UserWarning, match="the rest is used"):
        assert same(Fss1000Source(path, 32, 2), Fss1000Source(tmp_path / "fewshot_data", 32, 2))


def test_voc_and_sbd_come_as_they_are_published(tmp_path: Path) -> None:
    voc = write_voc(tmp_path, {f"2007_00000{n}": stripes(n) for n in (1, 2)})
    sbd = write_sbd(tmp_path, {"2008_000003": stripes(3)})
    paths = (
        packed(tmp_path / "VOCdevkit", tmp_path / "VOCtrainval_11-May-2012.tar"),
        packed(tmp_path / "benchmark_RELEASE", tmp_path / "benchmark.tgz"),
    )
    splits = {"train": ["aeroplane"], "val": ["bicycle"], "test": ["bird"]}
    assert same(PascalSource(*paths, splits, 32, min_images=1), PascalSource(voc, sbd, splits, 32, min_images=1))


def test_a_class_alone_is_no_folder_around_a_data_set(tmp_path: Path) -> None:
    """Though it is the only one in the archive; of folders around it, it is found, too."""
    inside = [("cat/1.jpg", b"1"), ("cat/1.png", b"2")]
    for i, around in enumerate(("", "animals/", "set/animals/")):
        path = written(tmp_path / f"{i}.zip", [(f"{around}{name}", content) for name, content in inside])
        assert [found.name for found in unpacked(path).iterdir()] == ["cat"]


@pytest.mark.parametrize("beside", ["._animals", "README.txt", "Thumbs.db", ".DS_Store"])
def test_files_beside_the_folder_around_a_data_set_do_not_hide_it(tmp_path: Path, beside: str) -> None:
    tree = write_tree(tmp_path / "animals", ["ant", "bee", "cat"], images=2)
    path = packed(tree, tmp_path / "animals.tar")
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo(beside))
    splits = write_splits(tmp_path / "splits.json", ["ant"], ["bee"], ["cat"])
    assert same(FolderSource(path, splits, 32, 2), FolderSource(tree, splits, 32, 2))


def test_folders_stay_where_they_are_and_other_files_are_refused(tmp_path: Path) -> None:
    assert unpacked(tmp_path) == tmp_path
    assert unpacked(str(tmp_path / "nowhere.zip")) == tmp_path / "nowhere.zip"  # its source says what is missing
    (tmp_path / "here" / "data.rar").write_bytes(b"Rar!")
    refused(tmp_path / "here" / "data.rar", r"neither a folder nor an archive .*\.zip, \.tar, .*: give the folder")


def test_it_is_unpacked_once_and_a_newer_one_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "data.ZIP", [("cat/1.jpg", b"1")])
    first = unpacked(path)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_unpack", None)
        assert unpacked(path) == first
    written(path, [("cat/1.jpg", b"22")])
    second = unpacked(path)
    assert (second / "cat" / "1.jpg").read_bytes() == b"22"
    assert (first / "cat" / "1.jpg").read_bytes() == b"1"


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_what_macos_adds_is_left_out(tmp_path: Path, suffix: str) -> None:
    added = [("__MACOSX/cat/1.jpg", b"?"), ("cat/.DS_Store", b"?"), (".DS_Store", b"?"), ("cat/._1.jpg", b"?")]
    path = written(tmp_path / f"data{suffix}", [("cat/", b""), ("./cat/1.jpg", b"1"), *added])
    folder = unpacked(path)
    assert [found.relative_to(folder).as_posix() for found in sorted(folder.rglob("*"))] == ["cat", "cat/1.jpg"]


def test_names_in_utf_8_need_no_flag(tmp_path: Path) -> None:
    """As in zip files of macOS's Finder; what is no UTF-8 is in the code page of DOS."""
    path = written(tmp_path / "data.zip", [("caf\u00e9/1.jpg", b"1"), ("\u732b/1.jpg", b"1"), ("cat/1.jpg", b"1")])
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        for found in re.finditer(mark, bytes(content)):
            content[found.start() + flags] &= 0xF7
    path.write_bytes(content)
    with zipfile.ZipFile(path) as zipped:
        assert zipped.namelist()[0] != "caf\u00e9/1.jpg"
    assert sorted(found.name for found in unpacked(path).iterdir()) == ["caf\u00e9", "cat", "\u732b"]
    path.write_bytes(content.replace("caf\u00e9".encode(), b"caf\x82\x82"))
    assert sorted(found.name for found in unpacked(path).iterdir()) == ["caf\u00e9\u00e9", "cat", "\u732b"]


def test_an_archive_may_lie_where_names_are_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this disk has names of UTF-8 alone")
    path = written(Path(os.fsdecode(folder)) / "data.zip", [("cat/1.jpg", b"1")])
    assert (unpacked(path) / "cat" / "1.jpg").read_bytes() == b"1"


@pytest.mark.parametrize("closed", [True, False])
def test_a_place_that_cannot_be_looked_at_is_named_with_its_cure(tmp_path: Path, closed: bool) -> None:
    (tmp_path / "closed" / "data").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    place, said = (
        ("closed/data", "may not be read: chmod u") if closed else ("x" * 300, "is not a folder: dataset.root")
    )
    try:
        with rights_mean_something(), pytest.raises(DataError, match=said):
            FolderSource(tmp_path / place, {"train": ["ant"], "val": [], "test": []}, 32, 2)
    finally:
        (tmp_path / "closed").chmod(0o700)


# What does not belong into a data set


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
@pytest.mark.parametrize(
    "name",
    [
        *("../evil", "cat/../../evil", "cat/..", "..", ".../evil", "cat/.. /evil"),
        *("{}/evil", "//server/evil", "C:/evil", "C:evil", "c:\\evil", "\\evil", "..\\evil", "cat\\..\\..\\evil"),
        *("{}/evil/", "../evil/"),
    ],
)
def test_names_that_lead_out_are_refused(tmp_path: Path, suffix: str, name: str) -> None:
    """Also behind a sound member, and though macOS's extras would not be written."""
    name = name.format(tmp_path)
    for i, members in enumerate(([(name, b"!")], [("cat/1.jpg", b"1"), (name, b"!")], [(f"{name}/__MACOSX/a", b"!")])):
        path = written(tmp_path / "here" / f"{i}{suffix}", members)
        refused(path, r"'.+' leads out of the archive's folder; nothing of .* and give the folder$")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat\\1.jpg", r"'cat\\\\1.jpg' has a backslash or a control character"),
        ("cat/\x1b[2J.jpg", r"'cat/\\x1b\[2J.jpg' has a backslash or a control character"),
        (33 * "a/" + "1.jpg", "lies more than 32 folders deep"),
        (f"cat/{256 * 'a'}", "has a name of more than 255 bytes"),
        (f"cat/{86 * '猫'}", "has a name of more than 255 bytes"),
    ],
)
def test_names_that_are_no_image_s_are_refused(tmp_path: Path, suffix: str, name: str, message: str) -> None:
    refused(written(tmp_path / "here" / f"data{suffix}", [("cat/1.jpg", b"1"), (name, b"!")]), message)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("cat/1.jpg", "cat/1.jpg", "is there twice"),
        ("cat/1.jpg", "./cat//1.jpg", "is there twice"),
        ("cat/1.jpg", "Cat/1.JPG", "is there twice"),
        ("cat/\u00e9.jpg", unicodedata.normalize("NFD", "cat/\u00e9.jpg"), "is there twice"),
        ("cat/1.jpg", "cat/1.jpg/", "is there twice"),
        ("cat/1.jpg", "cat", "is there twice"),
        ("cat/", "CAT", "is there twice"),
        ("cat", "cat/1.jpg", "lies in what is a file"),
        ("cat", "CAT/a/1.jpg", "lies in what is a file"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_of_one_name_are_refused(tmp_path: Path, suffix: str, first: str, second: str, message: str) -> None:
    refused(written(tmp_path / "here" / f"data{suffix}", [(first, b"1"), (second, b"2")]), message)


def tar_entry(kind: bytes, name: str = "cat/1.jpg", to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


@pytest.mark.parametrize(
    "kind",
    [*(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE), tarfile.GNUTYPE_SPARSE],
)
def test_links_and_devices_in_tar_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    """As a link to a folder outside, a file through it would be written there."""
    members = [(tar_entry(kind, "cat", to=str(tmp_path)), b""), ("cat/evil", b"!")]
    refused(written(tmp_path / "here" / "data.tar", members), "'cat' is a link, a device or a file with holes")
    assert not (tmp_path / "evil").exists()


def zip_entry(**changed: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("cat/1.jpg")
    for name, value in changed.items():
        setattr(info, name, value)
    return info


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (zip_entry(external_attr=0o120777 << 16), "is a link or a device"),
        (zip_entry(external_attr=0o020666 << 16), "is a link or a device"),
        (zip_entry(compress_type=zipfile.ZIP_BZIP2), "is compressed in an unusual way"),
        (zip_entry(compress_type=zipfile.ZIP_LZMA), "is compressed in an unusual way"),
    ],
)
def test_links_and_rare_compression_in_zip_files_are_refused(tmp_path: Path, entry: Any, message: str) -> None:
    refused(written(tmp_path / "here" / "data.zip", [(entry, str(tmp_path).encode())]), f"'cat/1.jpg' {message}")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "here" / "data.zip", [("cat/1.jpg", b"1")])
    content = bytearray(path.read_bytes())
    for at in (content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8):  # the flags, in both headers
        content[at] |= 1
    path.write_bytes(content)
    refused(path, "'cat/1.jpg' is encrypted")


# Bombs


@pytest.mark.parametrize("suffix", [".zip", ".tgz", ".tar.bz2", ".tar.xz"])
def test_more_than_images_can_become_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Zeros become a thousandth and less. A small archive may grow to `SMALL`, here of the test's."""
    monkeypatch.setattr(archive, "SMALL", 10**6)
    zeros = bytes(600_000)
    path = written(tmp_path / "here" / f"data{suffix}", [("cat/1.jpg", zeros), ("cat/2.jpg", zeros)])
    refused(path, r"'cat/2.jpg' makes it more than 20 times larger than the archive, as in a bomb")
    written(path, [("cat/1.jpg", zeros)])
    assert (unpacked(path) / "cat" / "1.jpg").read_bytes() == zeros


def test_a_tar_bomb_is_not_decompressed_to_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 MB of zeros behind a header that says so."""
    header = tar_entry(tarfile.REGTYPE)
    header.size = 200_000_000
    path = tmp_path / "here" / "data.tar.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(header.tobuf())
        for _ in range(200):
            file.write(bytes(1_000_000))
    had: list[int] = []
    read = archive._Reader.read
    monkeypatch.setattr(archive._Reader, "read", lambda *args: (had.append(len(content := read(*args))), content)[1])
    refused(path, "'cat/1.jpg' makes it more than 20 times larger")
    assert sum(had) < 10_000


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [2_000_000, 8**11 - 1, -512])
def test_headers_of_megabytes_are_not_read_into_memory(tmp_path: Path, kind: bytes, size: int) -> None:
    header = tar_entry(kind)
    header.size = size
    path = tmp_path / "here" / "data.tar.gz"
    path.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(3_000_000), 1))
    refused(path, r"is damaged, or no archive of its kind \(a list or a header of more than 1048576 bytes\)")


def test_a_size_below_zero_does_not_go_round_for_ever(tmp_path: Path) -> None:
    header = tar_entry(tarfile.REGTYPE)
    header.size = -512
    path = tmp_path / "here" / "data.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    refused(path, "'cat/1.jpg' has fewer than 0 bytes")


def commented(path: Path, members: int, comment: int) -> Path:
    """A tar file of empty members, each behind a header with a comment of so many bytes."""
    infos = [tarfile.TarInfo(f"cat/{i}.jpg") for i in range(members)]
    for info in infos:
        info.pax_headers = {"comment": "x" * comment}
    return written(path, [(info, b"") for info in infos])


def test_headers_of_a_tar_file_are_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count as what is in it, and do not stay in memory."""
    path = commented(tmp_path / "here" / "data.tar.gz", members=100, comment=50_000)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "SMALL", 10**6)
        refused(path, r"'cat/19.jpg' comes behind more than 20 times the archive's size, as in a bomb")
    tracemalloc.start()
    try:
        unpacked(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_MEMBERS", 3)
    for suffix in (".zip", ".tar"):
        path = written(tmp_path / "here" / f"data{suffix}", [(f"cat/{i}.jpg", b"1") for i in range(4)])
        refused(path, "'cat/3.jpg' is one more than the 3 files and folders")


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """One content under many names, as in Fifield's bombs: the second entry of the list is led to the first one's."""
    path = written(tmp_path / "here" / "data.zip", [("cat/1.jpg", b"1"), ("cat/2.jpg", b"2")])
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\1\2")
    content[second + 42 : second + 46] = bytes(4)  # where its own header begins
    path.write_bytes(content)
    refused(path, "overlaps another member, as in a bomb")


def test_members_that_share_the_place_of_a_header_are_refused(tmp_path: Path) -> None:
    """The second one begins where the first one's content would end, had it no header in front of it."""
    path = written(tmp_path / "here" / "data.zip", [(zip_entry(), bytes(100)), ("cat/2.jpg", b"2")])
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\1\2")
    content[second + 42 : second + 46] = (110).to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, "overlaps another member, as in a bomb")


@pytest.mark.parametrize(("said", "message"), [(10, "Bad CRC-32"), (90_000, "has fewer bytes than the list says")])
def test_no_file_becomes_longer_than_its_header_says(tmp_path: Path, cache: Path, said: int, message: str) -> None:
    path = written(tmp_path / "here" / "data.zip", [("cat/0.jpg", b"0"), ("cat/1.jpg", bytes(80_000))])
    content = path.read_bytes()
    path.write_bytes(content.replace((80_000).to_bytes(4, "little"), said.to_bytes(4, "little")))
    with pytest.raises(DataError, match=rf"is damaged, or no archive of its kind \(.*{message}.*\): fetch it again"):
        unpacked(path)
    assert nothing_but_a_lock(cache)


def nothing_but_a_lock(cache: Path) -> bool:
    (found,) = (cache / "unpacked").iterdir()
    return found.name.endswith(".lock")


# Damage, disks and processes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_part_of_an_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).bytes(3000)
    path = written(tmp_path / "here" / f"data{suffix}", [("cat/1.jpg", noise), ("cat/2.jpg", noise)])
    whole = path.read_bytes()
    blocks = (3584, 7168)  # of a tar file, where its two members end
    for end in (0, 1, 511, 512, 3000, *blocks) if suffix == ".tar" else (0, 1, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:end])
        refused(path, r"is damaged, or no archive of its kind \(.+\): fetch it again from its publisher")
    path.write_bytes(whole)
    assert (unpacked(path) / "cat" / "2.jpg").read_bytes() == noise


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_wrong_checksum_is_found_before_anything_is_written(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / "here" / f"data{suffix}", [("cat/1.jpg", bytes(3000))])
    content = bytearray(path.read_bytes())
    content[-6 if suffix == ".tar.gz" else len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(path, "is damaged, or no archive of its kind")


def test_something_behind_the_end_of_a_tar_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "here" / "data.tar", [("cat/1.jpg", b"1")])
    once = path.read_bytes()
    path.write_bytes(once + once)
    refused(path, "it does not end as a tar file does")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_without_files_or_of_another_kind_is_refused(tmp_path: Path, suffix: str) -> None:
    refused(written(tmp_path / "here" / f"data{suffix}", [("cat/", b"")]), "holds no file")
    (tmp_path / "here" / f"text{suffix}").write_text("not an archive")
    refused(tmp_path / "here" / f"text{suffix}", "is damaged, or no archive of its kind")


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Each file takes whole blocks."""
    path = written(tmp_path / "here" / "data.zip", [(f"cat/{i}.jpg", bytes(20_001)) for i in range(3)])
    usage = namedtuple("usage", "total used free")  # as shutil's
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 60_003))
    said = rf"{path} needs 0\.1 MB in {cache}/unpacked, which has 0\.1 MB: make room, or name .* METASEG_CACHE"
    with pytest.raises(DataError, match=said):
        unpacked(path)
    assert nothing_but_a_lock(cache)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    path = written(tmp_path / "data.zip", [("cat/1.jpg", b"1"), ("cat/2.jpg", b"2")])
    content = archive._content

    def full(*args: Any) -> Any:
        if args[-1].name == "cat/2.jpg":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return content(*args)

    with monkeypatch.context() as patch:
        patch.setattr(archive, "_content", full)
        with pytest.raises(DataError, match=r"cannot be unpacked in .* \(No space left on device\): make room"):
            unpacked(path)
    assert nothing_but_a_lock(cache)
    assert (unpacked(path) / "cat" / "2.jpg").read_bytes() == b"2"


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file")
    path = written(tmp_path / "here" / "data.zip", [("cat/1.jpg", b"1")])
    refused(path, "cannot be unpacked in .*: make room or get the right to write there, or name another folder")


@pytest.mark.skipif(FORK is None, reason="needs fork")
def test_a_process_killed_midway_leaves_nothing_that_passes_for_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = written(tmp_path / "data.tar.gz", [("cat/1.jpg", b"1"), ("cat/2.jpg", b"2")])
    content = archive._content

    def killed(*args: Any) -> Any:
        if args[-1].name == "cat/2.jpg":
            os.kill(os.getpid(), signal.SIGKILL)
        return content(*args)

    with monkeypatch.context() as patch:
        patch.setattr(archive, "_content", killed)
        child = FORK.Process(target=unpacked, args=(path,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    (midway,) = cache.glob("unpacked/.data-*.partial")
    assert (midway / "cat" / "1.jpg").read_bytes() == b"1"
    used = shutil.disk_usage  # a disk with room for one copy
    monkeypatch.setattr(shutil, "disk_usage", lambda place: used(place)._replace(free=0 if midway.exists() else 10**6))
    assert sorted(found.name for found in unpacked(path).rglob("*.jpg")) == ["1.jpg", "2.jpg"]
    assert len(list(cache.rglob("*.jpg"))) == 2


@pytest.mark.skipif(FORK is None, reason="needs fork")
def test_of_processes_at_once_one_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Each has found that the data are not there before any begins to write."""
    path = written(tmp_path / "data.zip", [(f"cat/{i}.jpg", b"1") for i in range(20)])
    ready = FORK.Barrier(3)
    checked, write = archive._checked, archive._write

    def together(*args: Any) -> Any:
        found = checked(*args)
        ready.wait(60)
        return found

    def counted(*args: Any) -> None:
        with (tmp_path / "writers").open("a") as file:
            file.write("1")
        write(*args)

    def wanted() -> None:
        assert len(list(unpacked(path).rglob("*.jpg"))) == 20

    monkeypatch.setattr(archive, "_checked", together)
    monkeypatch.setattr(archive, "_write", counted)
    children = [FORK.Process(target=wanted) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "writers").read_text() == "1"
    assert sorted(found.name[:1] for found in (cache / "unpacked").iterdir()) == [".", "d"]


def test_without_locks_whoever_is_first_serves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """What another process may be writing is left to it; and what it has finished meanwhile is taken."""
    monkeypatch.setattr(FileLock, "acquire", lambda *args, **options: (_ for _ in ()).throw(NotImplementedError))
    path = written(tmp_path / "data.zip", [("cat/1.jpg", b"1")])
    first = unpacked(path)
    others = first.with_name(f".{first.name}.1.partial")
    first.rename(others)
    assert (unpacked(path) / "cat" / "1.jpg").read_bytes() == b"1"
    assert others.is_dir()
    shutil.rmtree(first)
    write = archive._write

    def late(*args: Any) -> None:
        write(*args)
        others.rename(first)

    monkeypatch.setattr(archive, "_write", late)
    assert (unpacked(path) / "cat" / "1.jpg").read_bytes() == b"1"
    assert [found.name for found in (cache / "unpacked").iterdir()] == [first.name]
