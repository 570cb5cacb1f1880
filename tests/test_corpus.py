"""A tree broken in every way of `corpus.py`: named with its cure, the rest used as it was, and nothing else touched."""

import hashlib
import os
import shutil
import stat
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from corpus import BREAKAGES, SIZE, Breakage, write_sound
from machine import rights_mean_something

from metaseg import check
from metaseg.check import describe
from metaseg.data.folder import FolderSource
from metaseg.data.shards import ShardSource, write_shards
from metaseg.data.source import SPLITS
from metaseg.errors import DataError

MIN_IMAGES = 2

Rows = dict[str, tuple[np.ndarray, np.ndarray]]


def source_of(folder: Path) -> FolderSource:
    return FolderSource(folder / "tree", folder / "splits.json", SIZE, MIN_IMAGES)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_sound(folder)
    return folder


@pytest.fixture(scope="module")
def rows(sound: Path) -> Rows:
    """Each image and mask of the unbroken tree, as it is loaded."""
    return rows_of(source_of(sound))


def rows_of(source: FolderSource) -> Rows:
    """By the class and the number that each image's name begins with."""
    return {
        f"{task}/{pair.image[0]}": (images[0], masks[0])
        for split in SPLITS
        for task in source.names(split)
        for number, pair in enumerate(source._pairs[task])
        for images, masks in [source.load(task, [number])]
    }


def what_lies_in(folder: Path) -> dict[str, object]:
    """Every name below a folder with its kind, its rights, and its content or target."""
    found: dict[str, object] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            mode = path.lstat().st_mode
            content = os.readlink(path) if stat.S_ISLNK(mode) else None
            if stat.S_ISREG(mode) and mode & stat.S_IRUSR:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[os.fsdecode(path.relative_to(folder))] = (mode, content)
    return found


@pytest.mark.parametrize("breakage", [pytest.param(one, id=one.name) for one in BREAKAGES])
def test_what_is_broken_is_named_with_its_cure_and_the_rest_is_used(
    breakage: Breakage, sound: Path, rows: Rows, tmp_path: Path
) -> None:
    break_copy(breakage, sound, tmp_path)
    before = what_lies_in(tmp_path)
    with as_needed(breakage), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            source = source_of(tmp_path)
        except DataError as error:
            assert not breakage.usable
            assert_told(breakage, str(error))
        else:
            assert_told(breakage, describe(source))
            assert_used(breakage, rows_of(source), rows)
            write_shards(source, tmp_path / "out", 2**20)
            assert_written(tmp_path / "out", source)
            shutil.rmtree(tmp_path / "out")
            (tmp_path / ".out.lock").unlink()
    assert what_lies_in(tmp_path) == before
    silent = not breakage.kind or breakage.quiet or not breakage.usable
    assert len(warned) == (0 if silent else 1)
    assert all(breakage.kind in str(one.message) for one in warned)


# all that end it; and one each of sound, left out, only ignored
ENDS = {("" if one.usable else one.name, one.quiet, not one.kind): one for one in reversed(BREAKAGES)}.values()


@pytest.mark.parametrize("breakage", [pytest.param(one, id=one.name) for one in ENDS])
def test_the_command_ends_with_1_if_nothing_can_be_used(
    breakage: Breakage,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And tells what the data set itself tells, which the test above looks at for every breakage."""
    break_copy(breakage, sound, tmp_path)
    before = what_lies_in(tmp_path)
    words = [f"dataset.root={tmp_path / 'tree'}", f"dataset.splits={tmp_path / 'splits.json'}"]
    words += ["dataset=folder", f"dataset.image_size={SIZE}", f"dataset.min_images={MIN_IMAGES}"]
    monkeypatch.setattr(sys, "argv", ["check", *words])
    with as_needed(breakage):
        if breakage.usable:
            check.main()
            assert_told(breakage, capsys.readouterr().out)
        else:
            with pytest.raises(SystemExit) as end:
                check.main()
            assert isinstance(end.value.code, str)  # which the interpreter prints, and ends with 1
            assert_told(breakage, end.value.code)
    assert what_lies_in(tmp_path) == before


def break_copy(breakage: Breakage, sound: Path, folder: Path) -> None:
    if breakage.needs == "bytes" and (sound / "TREE").exists():
        pytest.skip("this disk does not tell upper from lower case")
    shutil.copytree(sound, folder, dirs_exist_ok=True)
    breakage.do(folder / "tree")


def as_needed(breakage: Breakage) -> AbstractContextManager[None]:
    return rights_mean_something() if breakage.needs == "rights" else nullcontext()


def assert_told(breakage: Breakage, report: str) -> None:
    if not breakage.kind:
        assert " × " not in report
        return
    lines = [line for line in report.splitlines() if " × " in line] if breakage.usable else [report]
    assert len(lines) == breakage.lines
    assert any(all(part in line for part in (breakage.kind, breakage.place, breakage.cure)) for line in lines)


def assert_written(out: Path, source: FolderSource) -> None:
    """Whole, and alone."""
    written = ShardSource(out)
    for split in SPLITS:
        assert list(written.names(split)) == list(source.names(split))
        assert [written.count(task) for task in written.names(split)] == [source.count(t) for t in source.names(split)]
    assert not list(out.parent.glob("*.partial"))


def assert_used(breakage: Breakage, used: Rows, rows: Rows) -> None:
    """All but what is lost is there; and unless it was to change, with the pixels of the unbroken tree."""
    expected = {name for name in rows if breakage.usable and not {name, name.partition("/")[0]} & {*breakage.lost}}
    assert set(used) == expected
    for name in expected - {*breakage.other}:
        for one, sound in zip(used[name], rows[name], strict=True):
            np.testing.assert_array_equal(one, sound)
