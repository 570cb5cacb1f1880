import os
import pickle
import shutil
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpus import EPS
from omegaconf import OmegaConf
from PIL import EpsImagePlugin, Image, ImageFile
from trees import write_splits, write_tree

from metaseg.data import opening
from metaseg.data import tree as tree_module
from metaseg.data.folder import FolderSource, read_image, read_mask
from metaseg.data.fss1000 import Fss1000Source, fss1000_splits
from metaseg.data.source import SPLITS
from metaseg.errors import DataError
from metaseg.pictures import PictureError, read_picture
from metaseg.pictures import read_mask as read_picture_mask

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def tree(tmp_path):
    """Four classes of ten images of 48 × 48, ant and bee for training; and the splits file."""
    root = write_tree(tmp_path / "tree", CLASSES)
    return root, write_splits(tmp_path / "splits.json", ["bee", "ant"], ["cat"], ["dog"])


def warned(*arguments, says="the rest is used", **settings) -> tuple[FolderSource, str]:
    with pytest.warns(UserWarning, match=says) as caught:
        source = FolderSource(*arguments, **settings)
    assert len(caught) == 1
    return source, str(caught[0].message)


def quiet(*arguments, **settings) -> FolderSource:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return FolderSource(*arguments, **settings)


# The sound path


def test_sound_tree(tree):
    root, splits = tree
    (root / "README.txt").write_text("beside the class folders: ignored")
    source = quiet(root, splits, image_size=48)
    assert [list(source.names(split)) for split in SPLITS] == [["ant", "bee"], ["cat"], ["dog"]]
    assert [source.count(name) for name in CLASSES] == [10] * 4
    assert source.faults == ()
    assert source.report().splitlines() == [
        str(root),
        "train: 2 of 2 classes, 20 images",
        "val: 1 of 1 classes, 10 images",
        "test: 1 of 1 classes, 10 images",
    ]

    images, masks = source.load("cat", [3, 0, 3])
    assert images.shape == (3, 48, 48, 3)
    assert masks.shape == (3, 48, 48)
    assert images.dtype == masks.dtype == np.uint8
    assert set(np.unique(masks)) == {0, 1}
    with Image.open(root / "cat" / "4.jpg") as stored:
        np.testing.assert_array_equal(images[0], np.asarray(stored))
    with Image.open(root / "cat" / "1.png") as stored:
        np.testing.assert_array_equal(masks[1], np.asarray(stored) // 255)
    np.testing.assert_array_equal(images[0], images[2])


def test_splits_may_be_a_mapping_as_hydra_hands_it_over(tree):
    root, _ = tree
    mapping = OmegaConf.create({"train": ["ant", "bee"], "val": [], "test": ["dog"]})
    source = quiet(root, mapping, image_size=48)
    assert [len(source.names(split)) for split in SPLITS] == [2, 0, 1]


def test_a_pickled_source_loads_the_same(tree):
    source = quiet(*tree, image_size=32)
    copy = pickle.loads(pickle.dumps(source))
    for one, other in zip(source.load("dog", range(10)), copy.load("dog", range(10)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_stems_sort_naturally(tree):
    root, splits = tree
    stems = ["2", "10", "010x", "a", "view 1b", "view 3", "view 3 c", "view 12b", "view 100", "é 1"]
    for number, stem in zip((3, 1, 4, 10, 5, 9, 2, 6, 8, 7), stems, strict=True):
        for suffix in ("jpg", "png"):
            (root / "ant" / f"{number}.{suffix}").rename(root / "ant" / f"_{stem}.{suffix}")
    for stem in stems:
        for suffix in ("jpg", "png"):
            (root / "ant" / f"_{stem}.{suffix}").rename(root / "ant" / f"{stem}.{suffix}")
    source = quiet(root, splits, image_size=48)
    _, masks = source.load("ant", range(10))
    for mask, stem in zip(masks, stems, strict=True):
        np.testing.assert_array_equal(mask, read_mask(root / "ant" / f"{stem}.png", 48))


def test_jpeg_and_upper_case_suffixes(tree):
    root, splits = tree
    (root / "ant" / "1.jpg").rename(root / "ant" / "1.jpeg")
    (root / "ant" / "2.jpg").rename(root / "ant" / "2.JPG")
    (root / "ant" / "2.png").rename(root / "ant" / "2.PNG")
    assert quiet(root, splits).count("ant") == 10


# Files to arrays


def test_masks_of_every_kind_are_equal(tmp_path):
    wanted = np.zeros((20, 20), np.uint8)
    wanted[3:9, 5:17] = 1
    palette = Image.fromarray(wanted, mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    opaque = np.full_like(wanted, 255)
    kinds = {
        "01": wanted,
        "255": wanted * np.uint8(255),
        "01_rgb": np.stack([wanted] * 3, axis=-1),
        "255_rgb": np.stack([wanted * np.uint8(255)] * 3, axis=-1),
        "red": np.stack([wanted * np.uint8(255), 0 * wanted, 0 * wanted], axis=-1),
        "rgba": np.stack([wanted * np.uint8(255)] * 3 + [opaque], axis=-1),
        "grey_alpha": np.stack([wanted * np.uint8(255), opaque], axis=-1),
        "16_bit": wanted.astype(np.uint16) * 65535,
        "bits": wanted.astype(bool),
        "palette": palette,
    }
    for name, mask in kinds.items():
        file = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        file.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png", 20), wanted, err_msg=name)


def test_the_threshold_of_a_255_mask_is_128(tmp_path):
    Image.fromarray(np.array([[0, 1, 127], [128, 200, 255], [2, 3, 4]], np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", 3).tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_masks_are_resized_by_nearest_neighbour(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (24, 24), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", 48), mask.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", 8), mask[1::3, 1::3])


def test_images_become_rgb_squares_and_shrink_by_area(tmp_path):
    checkers = np.indices((96, 192)).sum(0) % 2 * 255
    Image.fromarray(checkers.astype(np.uint8)).save(tmp_path / "grey.jpg", quality=100)
    image = read_image(tmp_path / "grey.jpg", 24)
    assert image.shape == (24, 24, 3)
    assert abs(image.astype(int) - 127).max() <= 8


def test_grey_and_cmyk_files_are_read_as_what_they_show(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.jpg", "PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.jpg", 16), np.stack([grey] * 3, axis=-1))
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)  # red ink
    assert abs(read_image(tmp_path / "cmyk.jpg", 16).astype(int) - [255, 0, 0]).max() <= 3


# Formats: a file is what its content says, and only what may lie there is opened


def test_no_file_of_a_tree_or_among_pictures_reaches_ghostscript(tree, tmp_path, monkeypatch):
    root, splits = tree
    marker = tmp_path / "run"
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {marker}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # where Pillow keeps what it has found
    for name in ("ant/5.jpg", "bee/5.png"):
        (root / name).write_bytes(EPS)
    source, _ = warned(root, splits, min_images=9)
    assert (source.count("ant"), source.count("bee")) == (9, 9)
    for read in (
        partial(read_image, image_size=48),
        partial(read_mask, image_size=48),
        read_picture,
        read_picture_mask,
    ):
        with pytest.raises((OSError, PictureError)):
            read(root / "ant/5.jpg")
    assert not marker.exists()
    with suppress(OSError), Image.open(root / "ant/5.jpg") as file:
        file.load()
    assert marker.exists()  # it would have been run


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "BMP", "PPM", "ICNS", "PCX", "JPEG2000"])
def test_formats_that_do_not_belong_into_a_tree_are_not_opened(tree, kind):
    root, splits = tree
    with Image.open(root / "ant/5.jpg") as file:
        file.convert("RGB").save(root / "ant/5.jpg", kind)
    source, message = warned(root, splits, min_images=9)
    assert source.count("ant") == 9
    assert "ant/5.jpg (no known image format)" in message


def test_an_image_larger_than_what_is_decoded_is_refused_by_its_head(tree, monkeypatch):
    root, splits = tree
    monkeypatch.setattr(opening, "MAX_PIXELS", 48 * 48)
    assert quiet(root, splits).count("ant") == 10
    monkeypatch.setattr(opening, "MAX_PIXELS", 48 * 48 - 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="40 × image of too many pixels .*48×48"):
        FolderSource(root, splits)


# Faults of single files: left out, listed, and the rest is used


def test_what_the_memory_does_not_hold_is_told_and_the_rest_used(tree, monkeypatch):
    judge = tree_module._mask_fault

    def short(mask, *args):
        if mask == Path("ant/3.png"):
            raise MemoryError
        return judge(mask, *args)

    monkeypatch.setattr(tree_module, "_mask_fault", short)
    source, message = warned(*tree, min_images=9)
    assert "1 × image of too many pixels (cut it into parts or shrink it" in message
    assert "ant/3.png (the memory is short)" in message
    assert source.count("ant") == 9


def test_large_images_are_looked_at_one_by_one(tree, monkeypatch):
    """Their pixels are gone when the next one's turn comes."""
    judge, busy, most = tree_module._mask_fault, [], []

    def watched(*args):
        busy.append(None)
        time.sleep(0.002)
        most.append(len(busy))
        busy.pop()
        return judge(*args)

    monkeypatch.setattr(tree_module, "_mask_fault", watched)
    FolderSource(*tree)
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr(opening, "LARGE", 100)
    FolderSource(*tree)
    assert max(most) == 1
    with opening.opened(tree[0] / "ant/1.jpg", ["JPEG"]) as file:
        with opening.by_turns(file):
            file.load()
        with pytest.raises(ValueError, match="closed"):
            file.load()


def test_image_without_mask_and_mask_without_image(tree):
    root, splits = tree
    (root / "ant" / "4.png").unlink()
    (root / "bee" / "7.jpg").unlink()
    source, message = warned(root, splits, min_images=9)
    assert (source.count("ant"), source.count("bee"), source.count("cat")) == (9, 9, 10)
    assert "1 × image without a mask (add the mask as <stem>.png, or remove the image): ant/4.jpg" in message
    assert "1 × mask without an image (add the image as <stem>.jpg, or remove the mask): bee/7.png" in message
    assert [fault.path for fault in source.faults] == [Path("bee/7.png"), Path("ant/4.jpg")]


def test_empty_mask(tree):
    root, splits = tree
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(root / "cat" / "2.png")
    source, message = warned(root, splits, min_images=9)
    assert source.count("cat") == 9
    assert "1 × mask without an object (draw the object as 1 or 255 on 0" in message
    assert "cat/2.png" in message
    assert all(mask.any() for mask in source.load("cat", range(9))[1])


def test_an_object_that_vanishes_at_the_image_size_is_an_empty_mask(tree):
    root, splits = tree
    speck = np.zeros((48, 48), np.uint8)
    speck[0, 0] = 255
    Image.fromarray(speck).save(root / "cat" / "2.png")
    assert quiet(root, splits, image_size=48).count("cat") == 10
    _, message = warned(root, splits, image_size=16, min_images=9)
    assert "seen at 16 pixels" in message


def test_odd_sized_mask(tree):
    root, splits = tree
    Image.fromarray(np.full((48, 40), 255, np.uint8)).save(root / "dog" / "10.png")
    source, message = warned(root, splits, min_images=9)
    assert source.count("dog") == 9
    assert "1 × mask of another size than its image (export the mask at its image's size" in message
    assert "dog/10.png (40×48, its image 48×48)" in message


@pytest.mark.parametrize("name", ["5.jpg", "5.png"])
@pytest.mark.parametrize("kept", [0, 20, 0.5])
def test_truncated_file(tree, name, kept):
    root, splits = tree
    whole = (root / "ant" / name).read_bytes()
    (root / "ant" / name).write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    source, message = warned(root, splits, min_images=9)
    assert source.count("ant") == 9
    assert f"1 × unreadable file (fetch or export it again, or remove the image and its mask): ant/{name} (" in message


def test_two_images_of_one_stem(tree):
    root, splits = tree
    shutil.copy(root / "ant" / "1.jpg", root / "ant" / "1.jpeg")
    source, message = warned(root, splits)
    assert source.count("ant") == 10
    assert "1 × second file of one stem (give each a stem of its own, with its own partner): ant/1.jpg" in message


def test_stray_files_are_counted_without_a_warning(tree):
    root, splits = tree
    (root / "ant" / "Thumbs.db").write_bytes(b"x")
    (root / "ant" / "._1.jpg").write_bytes(b"x")
    (root / "bee" / "more.png").mkdir()
    source = quiet(root, splits)
    assert source.count("ant") == 10
    assert "3 × stray file (nothing to do; it is ignored): bee/more.png, ant/._1.jpg, ant/Thumbs.db" in source.report()


def test_a_long_list_ends_in_a_count(tmp_path):
    root = write_tree(tmp_path / "tree", CLASSES[:2], images=25)
    for number in range(1, 14):
        (root / "ant" / f"{number}.png").unlink()
    source, message = warned(root, {"train": ["ant"], "val": [], "test": ["bee"]})
    assert "13 × image without a mask" in message
    assert "ant/9.jpg, ant/10.jpg and 3 more" in message
    assert len(source.faults) == 13
    assert message.splitlines()[1] in source.report()


def test_what_is_used_in_doubt_is_told_apart_from_what_is_left_out(tree):
    root, splits = tree
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(root / "ant/3.jpg") as file:
        file.save(root / "ant/3.jpg", exif=exif)
    source, message = warned(root, splits, says="in doubt")
    assert message.splitlines() == [
        f"of {root} this is used, though in doubt:",
        "1 × image with an EXIF rotation, read as it is stored (save it upright, without the rotation, and its mask "
        "likewise): ant/3.jpg",
    ]
    assert source.count("ant") == 10
    (root / "ant/4.png").unlink()
    _, message = warned(root, splits, min_images=9)
    assert [line.partition(":")[0] for line in message.splitlines()[::2]] == [
        f"part of {root} is left out, the rest is used",
        f"of {root} this is used, though in doubt",
    ]


# Faults of classes


def test_class_with_too_few_images(tree):
    root, splits = tree
    (root / "bee" / "3.png").unlink()
    source, message = warned(root, splits)
    assert list(source.names("train")) == ["ant"]
    assert "1 × class with too few images (add or mend images, take the class out" in message
    assert "bee (9 sound of at least 10)" in message
    assert "train: 1 of 2 classes, 10 images" in source.report()
    with pytest.raises(KeyError):
        source.count("bee")


def test_class_without_a_folder(tree):
    root, splits = tree
    shutil.rmtree(root / "bee")
    source, message = warned(root, splits)
    assert list(source.names("train")) == ["ant"]
    assert "1 × class without a folder (add it, or take it out of the splits): bee" in message


@pytest.mark.parametrize(("split", "gone"), [("train", ["bee", "ant"]), ("val", ["cat"]), ("test", ["dog"])])
def test_a_split_without_a_sound_class_is_an_error(tree, split, gone):
    root, splits = tree
    for name in gone:
        shutil.rmtree(root / name)
    with pytest.raises(DataError, match=f"the {split} split has no sound class") as caught:
        FolderSource(root, splits)
    wanted = f"{len(gone)} × class without a folder (add it, or take it out of the splits): {', '.join(gone)}"
    assert wanted in str(caught.value)


def test_splits_may_be_empty_by_choice(tree):
    root, _ = tree
    source = FolderSource(root, {"train": [], "val": [], "test": ["ant"]})
    assert [list(source.names(split)) for split in SPLITS] == [[], [], ["ant"]]


# Faults of the whole


def test_missing_root(tree, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a folder: dataset\.root names"):
        FolderSource(tmp_path / "nowhere", tree[1])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("{'train'", "is not JSON"),
        ("[]", "found list"),
        ('{"train": ["ant"], "test": ["dog"]}', r"exactly train, val, test, found \['test', 'train'\]"),
        ('{"train": ["ant"], "val": [], "test": ["dog"], "hidden": ["bee"]}', "found .*hidden"),
        ('{"train": "ant", "val": [], "test": ["dog"]}', "the train split is not a list"),
        ('{"train": ["ant"], "val": [1], "test": ["dog"]}', "the val split is not a list"),
    ],
)
def test_splits_that_cannot_be_used(tree, text, says):
    root, splits = tree
    if text is None:
        splits.unlink()
    else:
        splits.write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        FolderSource(root, splits)
    assert "dataset.splits=FILE" in str(caught.value)


def test_a_class_in_two_splits(tree):
    root, splits = tree
    write_splits(splits, ["ant", "bee"], ["cat"], ["dog", "bee"])
    with pytest.raises(DataError, match="listed more than once in the splits, keep each class in one place: bee"):
        FolderSource(root, splits)


# FSS-1000


def test_shipped_splits_of_fss1000():
    splits = fss1000_splits()
    assert [len(splits[split]) for split in SPLITS] == [520, 240, 240]
    names = [name for split in SPLITS for name in splits[split]]
    assert len(set(names)) == 1000
    assert all(name and name == name.strip() for name in names)
    assert all(splits[split] == sorted(splits[split]) for split in SPLITS)
    places = {"airliner": "val", "bus": "test", "motorbike": "test", "potted_plant": "train", "television": "val"}
    for name, split in places.items():
        assert name in splits[split]


@pytest.mark.parametrize("nested", [False, True])
def test_fss1000_is_found_flat_or_nested(tmp_path, nested):
    write_tree(tmp_path / "fewshot_data" if nested else tmp_path, ["ac_wall", "abacus", "accordion"])
    with pytest.warns(UserWarning, match="997 × class without a folder"):
        source = Fss1000Source(tmp_path, image_size=48)
    assert [list(source.names(split)) for split in SPLITS] == [["ac_wall"], ["abacus"], ["accordion"]]
    assert source.load("accordion", [9])[0].shape == (1, 48, 48, 3)


@pytest.mark.parametrize("exists", [True, False])
def test_fss1000_says_where_it_is_to_be_had(tmp_path, exists):
    with pytest.raises(DataError, match=r"github\.com/HKUSTCV/FSS-1000") as caught:
        Fss1000Source(tmp_path if exists else tmp_path / "nowhere")
    assert "dataset.root=/path/to/fewshot_data" in str(caught.value)
