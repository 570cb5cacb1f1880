"""PASCAL VOC + SBD and FP-k, on miniature trees in the published layouts."""

import os
import pickle
import shutil
import struct
import warnings

import numpy as np
import pytest
from corpus import EPS, png_head
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from machine import rights_mean_something
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat
from trees import stripes, write_sbd, write_splits, write_tree, write_voc

from metaseg.check import describe
from metaseg.config import check_overrides, config_dir
from metaseg.data.folder import read_mask
from metaseg.data.fpk import FPK_CLASSES, FpkSource
from metaseg.data.fss1000 import Fss1000Source, fss1000_splits
from metaseg.data.pascal import PASCAL_CLASSES, VOID, PascalSource, read_labels
from metaseg.data.source import SPLITS, task_ids
from metaseg.errors import DataError

BUS, CAR, CAT, DOG, TV = (PASCAL_CLASSES.index(name) + 1 for name in ("bus", "car", "cat", "dog", "tvmonitor"))
SPLIT = {"train": ["car", "cat"], "val": ["dog"], "test": ["bus"]}
SIZE = 32


@pytest.fixture
def roots(tmp_path):
    """VOC and SBD with the images 2007_000002 and …3 in both, of different masks."""
    voc = {
        "2007_000001": stripes(CAR),
        "2007_000002": stripes(CAR, CAT),
        "2007_000003": stripes(CAT, VOID),
        "2007_000004": stripes(BUS),
    }
    sbd = {
        "2007_000002": stripes(DOG),
        "2007_000003": stripes(DOG),
        "2008_000005": stripes(DOG),
        "2008_000006": stripes(BUS, TV),
        "2008_000007": stripes(CAR, height=60, width=40),
    }
    return write_voc(tmp_path, voc), write_sbd(tmp_path, sbd)


def quiet(voc, sbd, splits=SPLIT, **settings) -> PascalSource:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PascalSource(voc, sbd, splits, **{"image_size": SIZE, "min_images": 1} | settings)


def warned(voc, sbd, splits=SPLIT, **settings) -> tuple[PascalSource, str]:
    with pytest.warns(UserWarning, match="the rest is used") as caught:
        source = PascalSource(voc, sbd, splits, **{"image_size": SIZE, "min_images": 1} | settings)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return source, str(caught[0].message)


# PASCAL


def test_a_tree_as_published(roots):
    source = quiet(*roots)
    assert [list(source.names(split)) for split in SPLITS] == [["car", "cat"], ["dog"], ["bus"]]
    # an image of both is used once, with VOC's mask: the dogs of 2007_000002 and …3 do not count
    assert {task: source.count(task) for task in ("car", "cat", "dog", "bus")} == {
        "car": 3,
        "cat": 2,
        "dog": 1,
        "bus": 2,
    }
    images, masks = source.load("car", [2, 0, 1])
    assert images.shape == (3, SIZE, SIZE, 3)
    assert masks.shape == (3, SIZE, SIZE)
    assert images.dtype == masks.dtype == np.uint8
    assert set(np.unique(masks)) == {0, 1}
    assert masks.mean((1, 2)) == pytest.approx([0.9, 0.9, 0.45], abs=0.04)
    assert np.median(images[masks == 1]) == 10 * CAR  # image and mask belong together
    assert source.load("bus", [0])[1].mean() == pytest.approx(0.9, abs=0.04)
    assert source.faults == ()
    assert source.report().splitlines()[1:] == [
        "train: 2 of 2 classes, car 3, cat 2",
        "val: 1 of 1 classes, dog 1",
        "test: 1 of 1 classes, bus 2",
        "of their images, 0 show too little of the class, 0 are of a later split",
    ]


def test_void_is_background(roots):
    source = quiet(*roots)
    mask = source.load("cat", [1])[1][0]  # 2007_000003: cat, then void
    assert mask.mean() == pytest.approx(0.45, abs=0.04)
    assert not mask[:, -SIZE // 3 :].any()


def test_voc_alone(roots):
    source = quiet(roots[0], None, {"train": ["car", "cat"], "val": [], "test": ["bus"]})
    assert {task: source.count(task) for task in ("car", "cat", "bus")} == {"car": 2, "cat": 2, "bus": 1}


def test_the_folders_around_the_roots_serve_too(roots, tmp_path):
    wanted = quiet(*roots).load("car", range(3))
    for around in ((tmp_path, tmp_path), (tmp_path / "VOCdevkit", tmp_path / "benchmark_RELEASE")):
        for one, other in zip(wanted, quiet(*around).load("car", range(3)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_no_image_is_in_two_splits(tmp_path):
    speck = stripes(CAR)
    speck[0, 0] = BUS  # too small for a test image, but a bus that training must not see
    images = {"a": stripes(CAR, BUS), "b": stripes(CAR, DOG, CAT), "c": stripes(CAR), "d": speck, "e": stripes(CAR, TV)}
    source = quiet(
        write_voc(tmp_path, images), None, {"train": ["car"], "val": ["dog"], "test": ["bus"]}, min_share=0.01
    )
    assert {task: source.count(task) for task in ("car", "dog", "bus")} == {"car": 2, "dog": 1, "bus": 1}
    # the bus of d is too small; the cars of a, b and d are in images of val and test
    assert "1 show too little of the class, 3 are of a later split" in source.report()


def test_an_object_needs_its_share_of_the_pixels(tmp_path):
    labels = np.zeros((40, 60), np.uint8)
    labels[:4, :6] = CAR  # 1 %
    voc = write_voc(tmp_path, {"a": labels, "b": stripes(CAR)})
    splits = {"train": ["car"], "val": [], "test": []}
    for min_share, count in ((0.0, 2), (0.01, 2), (0.011, 1)):
        assert quiet(voc, None, splits, min_share=min_share).count("car") == count
    with pytest.raises(DataError, match="min_share is 1: give a share of the pixels"):
        quiet(voc, None, splits, min_share=1)


def test_an_object_that_vanishes_at_the_image_size_is_left_out(tmp_path):
    labels = np.zeros((40, 60), np.uint8)
    labels[0, 0] = CAR
    voc = write_voc(tmp_path, {"a": labels, "b": stripes(CAR)})
    assert quiet(voc, None, {"train": ["car"], "val": [], "test": []}, min_share=0, image_size=16).count("car") == 1


def test_a_pickled_source_loads_the_same(roots):
    source = quiet(*roots)
    copy = pickle.loads(pickle.dumps(source))
    for one, other in zip(source.load("car", range(3)), copy.load("car", range(3)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_palette_indices_and_matlab_matrices_are_read_as_they_are(tmp_path):
    labels = stripes(*range(21), VOID, height=5, width=440)
    np.testing.assert_array_equal(read_labels(write_voc(tmp_path, {"a": labels}) / "SegmentationClass/a.png"), labels)
    labels = stripes(*range(21), height=5, width=440)
    np.testing.assert_array_equal(read_labels(write_sbd(tmp_path, {"a": labels}) / "cls/a.mat"), labels)


@pytest.mark.parametrize("name", ["2008_000005.jpg", "2008_000005.mat", "2007_000001.jpg", "2007_000001.png"])
@pytest.mark.parametrize("kept", [0, 20, 0.5])
def test_a_broken_file_is_listed_and_the_rest_used(roots, tmp_path, name, kept):
    (path,) = tmp_path.rglob(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    gone = "dog" if "2008" in name else "car"
    source, message = warned(*roots, SPLIT if gone == "car" else SPLIT | {"val": []})
    assert f"1 × unreadable file (unpack it again from the archive it came in): {path} (" in message
    assert source.count("car") == (2 if gone == "car" else 3)
    assert [fault.path for fault in source.faults] == [path]


def test_a_matlab_file_whose_compression_has_no_end_is_read(tmp_path):
    """As MATLAB left some: without the checksum."""
    path = tmp_path / "mask.mat"
    savemat(path, {"GTcls": {"CategoriesPresent": [CAR], "Segmentation": stripes(CAR, CAT)}}, do_compression=True)
    content = path.read_bytes()
    kind, length = struct.unpack_from("<II", content, 128)
    path.write_bytes(content[:128] + struct.pack("<II", kind, length - 4) + content[136 : 132 + length])
    np.testing.assert_array_equal(read_labels(path), stripes(CAR, CAT))


def test_a_matlab_file_of_something_else_is_unreadable(roots):
    savemat(roots[1] / "cls" / "2008_000007.mat", {"GTinst": {"Segmentation": stripes(CAR)}})
    savemat(roots[1] / "cls" / "2008_000006.mat", {"GTcls": {"Segmentation": stripes(CAR) * 1.0}})
    source, message = warned(*roots)
    assert source.count("car") == 2
    assert "2 × unreadable file" in message
    assert "no GTcls.Segmentation can be read (ValueError: it is no matrix of uint8)" in message
    assert "no GTcls.Segmentation can be read (ValueError: there is none)" in message


def test_masks_that_are_no_class_numbers(roots):
    masks = roots[0] / "SegmentationClass"
    with Image.open(masks / "2007_000001.png") as mask:
        coloured = mask.convert("RGB")
    coloured.save(masks / "2007_000001.png")
    Image.fromarray(stripes(21)).save(masks / "2007_000002.png")
    Image.fromarray(stripes(CAT, width=50)).save(masks / "2007_000003.png")
    source, message = warned(*roots, {"train": ["car"], "val": ["dog"], "test": ["bus"]})
    assert source.count("car") == 1
    assert source.count("dog") == 1  # VOC's mask is the one that counts, even where only SBD's is sound
    assert "an image of mode RGB instead of a palette of class numbers" in message
    assert "mask with values that are no class (use the published masks" in message
    assert "2007_000002.png (value 21)" in message
    assert "2007_000003.png (50×40, its image 60×40)" in message


def test_a_mask_without_its_image(roots):
    (roots[1] / "img" / "2008_000007.jpg").unlink()
    (roots[0] / "SegmentationClass" / "._2007_000001.png").write_bytes(b"x")
    source, message = warned(*roots)
    assert source.count("car") == 2
    assert "1 × mask without an image (unpack img/2008_000007.jpg again): " in message


def test_hostile_files_are_not_opened(roots):
    """Of formats that do not belong there, too large, or pipes, on which one might wait for ever."""
    images, masks = roots[0] / "JPEGImages", roots[0] / "SegmentationClass"
    (images / "2007_000001.jpg").write_bytes(EPS)
    (masks / "2007_000002.png").write_bytes(png_head(10_000))
    (masks / "2007_000003.png").unlink()
    os.mkfifo(masks / "2007_000003.png")
    (masks / "2007_000004.png").unlink()
    (masks / "2007_000004.png").symlink_to("2007_000004.png")
    source, message = warned(*roots, {"train": ["car"], "val": ["dog"], "test": ["bus"]})
    assert {task: source.count(task) for task in ("car", "dog", "bus")} == {"car": 1, "dog": 2, "bus": 1}
    assert f"{images / '2007_000001.jpg'} (no known image format)" in message
    assert "1 × image of too many pixels (cut it into parts" in message
    assert f"{masks / '2007_000002.png'} (10000×10000)" in message
    assert "1 × link that leads nowhere (fetch what it points to" in message


@pytest.mark.parametrize("name", ["", "SegmentationClass", "JPEGImages"])
def test_folders_that_may_not_be_read_are_named(roots, name):
    (roots[0] / name).chmod(0)
    try:
        with rights_mean_something(), pytest.raises(DataError, match="may not be read: chmod u\\+rx it") as caught:
            PascalSource(*roots, SPLIT, image_size=SIZE, min_images=1)
    finally:
        (roots[0] / name).chmod(0o700)
    assert str(roots[0] / name) in str(caught.value)


def test_a_class_with_too_few_images(roots):
    source, message = warned(*roots, min_images=2, splits=SPLIT | {"val": []} | {"train": ["car", "dog"]})
    assert list(source.names("train")) == ["car"]
    assert "1 × class with too few images (add sbd_root, " in message
    assert "dog (1 of at least 2, 0 too small, 0 of a later split)" in message
    with pytest.raises(DataError, match="(?s)the val split has no sound class in .*dog \\(1 of at least 2, "):
        PascalSource(*roots, SPLIT, SIZE, min_images=2)


@pytest.mark.parametrize("key", ["voc_root", "sbd_root"])
@pytest.mark.parametrize("exists", [True, False])
def test_missing_roots_say_where_the_data_are_to_be_had(roots, tmp_path, key, exists):
    wrong = tmp_path / "wrong"
    if exists:
        wrong.mkdir()
    arguments = {"voc_root": roots[0], "sbd_root": roots[1], key: wrong}
    says = "does not hold (JPEGImages and SegmentationClass|img and cls)" if exists else "is not a folder"
    with pytest.raises(DataError, match=f"{key}: {wrong} {says}: unpack .*dataset.{key}=/path/to/"):
        PascalSource(**arguments, splits=SPLIT)


def test_a_class_that_pascal_does_not_have(roots):
    with pytest.raises(DataError, match="PASCAL VOC has no class 'tv_monitor'; did you mean tvmonitor"):
        PascalSource(*roots, SPLIT | {"train": ["tv_monitor"]})


# FP-k


@pytest.fixture
def fpk_roots(tmp_path):
    """A class of each split beside FP-k's five, of ten images; PASCAL with three of each of the five."""
    fss = write_tree(tmp_path / "fewshot_data", ["abacus", "ac_wall", "accordion", *FPK_CLASSES])
    numbers = [PASCAL_CLASSES.index(name) + 1 for name in FPK_CLASSES.values()]
    voc = write_voc(tmp_path, {f"2007_{n:06}": stripes(n) for n in numbers})
    sbd = write_sbd(tmp_path, {f"2008_{10 * n + i:06}": stripes(n) for n in numbers for i in range(2)})
    return fss, voc, sbd


def fpk(*roots, **settings) -> FpkSource:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*class without a folder")
        return FpkSource(*roots, **{"image_size": SIZE} | settings)


def test_fpk_unites_both_data_sets(fpk_roots):
    source = fpk(*fpk_roots)
    assert list(source.names("test")) == ["airliner", "bus", "motorbike", "potted_plant", "television"]
    assert [source.count(task) for task in source.names("test")] == [13] * 5
    images, masks = source.load("television", [11, 0, 9, 12])
    assert images.shape == (4, SIZE, SIZE, 3)
    assert masks.dtype == images.dtype == np.uint8
    for row, number in ((1, 1), (2, 10)):
        np.testing.assert_array_equal(masks[row], read_mask(fpk_roots[0] / "television" / f"{number}.png", SIZE))
    assert masks[[0, 3]].mean() == pytest.approx(0.9, abs=0.04)
    assert np.median(images[[0, 3]][masks[[0, 3]] == 1]) == 10 * TV
    assert source.load("bus", [])[0].shape == (0, SIZE, SIZE, 3)
    with pytest.raises(IndexError):
        source.load("bus", [13])
    assert "test: airliner 13, bus 13, motorbike 13, potted_plant 13, television 13" in describe(source)
    assert "PASCAL for test: " in source.report()
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load("television", [11, 0, 9, 12])[0], images)


def test_fpk_holds_its_classes_out_of_meta_training(fpk_roots):
    source = fpk(*fpk_roots)
    splits = fss1000_splits()
    for split in ("train", "val"):
        names = set(source.names(split))
        assert names
        assert names <= set(splits[split]) - set(FPK_CLASSES)
    # they all have folders, and some are FSS-1000's own training and validation classes
    assert {"airliner", "television", "potted_plant"} <= {*splits["train"], *splits["val"]}
    name = source.names("train")[0]
    assert source.count(name) == 10
    assert source.load(name, [0])[0].shape == (1, SIZE, SIZE, 3)


def test_near_classes_stay_in_meta_training():
    """As the presets' headers say."""
    splits = fss1000_splits(exclude=list(FPK_CLASSES))
    assert {"monitor", "trolleybus", "motor_scooter", "flowerpot"} <= {*splits["train"]}
    assert "school_bus" in splits["val"]


def test_fpk_and_fss1000_are_one_family(fpk_roots):
    """So that a θ of all of FSS-1000's training classes is not tested on FP-k."""
    tested = task_ids(fpk(*fpk_roots), "test")
    with pytest.warns(UserWarning, match="class without a folder"):
        source = Fss1000Source(fpk_roots[0], SIZE)
    assert {*tested} & {*task_ids(source, "train"), *task_ids(source, "val")}
    with pytest.warns(UserWarning, match="class without a folder"):
        source = Fss1000Source(fpk_roots[0], SIZE, exclude=list(FPK_CLASSES))
    assert not {*tested} & {*task_ids(source, "train"), *task_ids(source, "val")}


def test_fpk_without_sbd(fpk_roots):
    assert [fpk(*fpk_roots[:2], None).count(task) for task in FPK_CLASSES] == [11] * 5


def test_fpk_lists_what_is_broken_and_uses_the_rest(fpk_roots):
    (fpk_roots[0] / "bus" / "3.png").write_bytes(b"")
    (broken, *_) = sorted((fpk_roots[2] / "cls").iterdir())
    broken.write_bytes(b"")
    with pytest.warns(UserWarning, match="the rest is used"):
        source = FpkSource(*fpk_roots, image_size=SIZE)
    assert source.count("bus") == 12
    assert source.count("airliner") == 12
    assert {"3.png", broken.name} <= {fault.path.name for fault in source.faults}


def test_fpk_needs_all_of_its_classes(fpk_roots):
    shutil.rmtree(fpk_roots[0] / "television")
    for path in (fpk_roots[1] / "SegmentationClass").glob("2007_000006.png"):
        path.unlink()  # the bus
    with (
        pytest.warns(UserWarning, match="the rest is used"),
        pytest.raises(DataError, match="no sound image: television of FSS-1000, bus of PASCAL"),
    ):
        FpkSource(*fpk_roots[:2], None, image_size=SIZE)


def test_fpk_names_the_root_that_is_missing(fpk_roots, tmp_path):
    with pytest.raises(DataError, match="dataset.fss_root=/path/to/fewshot_data"):
        FpkSource(tmp_path / "nowhere", *fpk_roots[1:])
    with pytest.raises(DataError, match="dataset.voc_root="):
        FpkSource(fpk_roots[0], tmp_path / "nowhere", fpk_roots[2])


# FSS-1000 without FP-k's classes


def test_excluded_classes_are_in_no_split(fpk_roots):
    with pytest.warns(UserWarning, match="class without a folder"):
        source = Fss1000Source(fpk_roots[0], SIZE, exclude=OmegaConf.create(["bus", "ac_wall"]))
    assert not {"bus", "ac_wall"} & {task for split in SPLITS for task in source.names(split)}
    assert "motorbike" in source.names("test")
    assert [len(fss1000_splits(list(FPK_CLASSES))[split]) for split in SPLITS] == [519, 238, 238]


def test_an_unknown_class_to_exclude_is_refused(tmp_path):
    write_tree(tmp_path, ["bus"])
    with pytest.raises(DataError, match="FSS-1000 has no class 'potted_plants'; did you mean potted_plant"):
        Fss1000Source(tmp_path, exclude=["bus", "potted_plants"])
    with pytest.raises(DataError, match=r"give a list of class names, dataset.exclude=\[bus\]"):
        Fss1000Source(tmp_path, exclude="bus")


# The presets


def preset(*overrides: str):
    check_overrides(overrides)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides)).dataset


def test_the_presets_build_the_sources(fpk_roots, tmp_path):
    fss, voc, sbd = fpk_roots
    pascal = [f"dataset.voc_root={voc}", f"dataset.sbd_root={sbd}", f"dataset.image_size={SIZE}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = instantiate(preset("dataset=fpk", f"dataset.fss_root={fss}", *pascal))
        assert source.count("bus") == 13
        source = instantiate(preset("dataset=fss1000_fpk", f"dataset.root={fss}"))
        assert not set(FPK_CLASSES) & {task for split in SPLITS for task in source.names(split)}
        splits = write_splits(tmp_path / "splits.json", [], ["bus"], ["tvmonitor"])
        binary = preset("dataset=binary_pascal", *pascal, f"dataset.splits={splits}", "dataset.min_images=3")
        assert [list(instantiate(binary).names(split)) for split in SPLITS] == [[], ["bus"], ["tvmonitor"]]


def test_the_presets_name_the_right_classes():
    splits = preset("dataset=binary_pascal").splits
    assert sorted(task for split in SPLITS for task in splits[split]) == sorted(PASCAL_CLASSES)
    assert list(splits.test) == sorted(FPK_CLASSES.values())
    assert list(preset("dataset=fss1000_fpk").exclude) == sorted(FPK_CLASSES)
