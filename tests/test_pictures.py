"""People's images and masks: what each kind of file means, how folders are laid out, what is said of broken ones."""

import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from PIL import Image

from metaseg.data.faults import STRAY, Fault
from metaseg.data.source import UInt8
from metaseg.errors import ConfigError, DataError
from metaseg.pictures import (
    Labelled,
    PictureError,
    Polygons,
    as_mask,
    as_picture,
    fill,
    find_labelled,
    find_pictures,
    read_mask,
    read_picture,
)


def noise(height: int = 6, width: int = 9, channels: int = 3) -> UInt8:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write(path: Path, values: object, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values))
    image.save(path, **options)
    return path


# Images


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90), (2, np.fliplr)],
)
def test_an_image_is_turned_as_its_exif_data_say(tmp_path: Path, orientation: int, turned: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / "a.png", noise(), exif=exif)
    np.testing.assert_array_equal(read_picture(path), turned(noise()))


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ([0, 65535, 32768], [0, 255, 128]),  # 16 bits
        ([0, 4095, 2048], [0, 255, 128]),  # 12 bits in a file of 16
        ([0, 1000, 300], [0, 249, 75]),  # 10 bits: 1023 is white
        ([0, 255, 9], [0, 255, 9]),  # no more than 8
    ],
)
def test_more_than_eight_bits_are_scaled_by_the_range_that_holds_them(
    tmp_path: Path, stored: list[int], shown: list[int]
) -> None:
    path = write(tmp_path / "a.png", np.array([stored], np.uint16))
    np.testing.assert_array_equal(read_picture(path), np.repeat([[[v] for v in shown]], 3, axis=2))


def test_grey_palette_and_cmyk_become_rgb(tmp_path: Path) -> None:
    grey = noise(channels=1)[..., 0]
    np.testing.assert_array_equal(read_picture(write(tmp_path / "grey.png", grey)), np.stack([grey] * 3, axis=2))

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    np.testing.assert_array_equal(read_picture(write(tmp_path / "p.png", palette)), [[[10, 20, 30], [200, 100, 50]]])

    cmyk = Image.new("CMYK", (4, 3), (0, 255, 255, 0))  # red ink
    shown = read_picture(write(tmp_path / "cmyk.jpg", cmyk, quality=100))
    assert shown.shape == (3, 4, 3)
    assert np.abs(shown.astype(int) - [255, 0, 0]).max() <= 3


def test_transparency_is_on_white_and_colours_under_it_do_not_show(tmp_path: Path) -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    shown = read_picture(write(tmp_path / "a.png", rgba))
    np.testing.assert_array_equal(shown, [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]])
    np.testing.assert_array_equal(as_picture(rgba), shown)


def test_arrays_tensors_and_pil_images_are_the_same_picture() -> None:
    image = noise()
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for same in (image, Image.fromarray(image), tensor, tensor / 255, image / 255, image.astype(np.float32)):
        np.testing.assert_array_equal(as_picture(same), image)
    grey = image[..., :1]
    for same in (grey, grey[..., 0], torch.from_numpy(grey[..., 0]), torch.from_numpy(grey).permute(2, 0, 1)):
        np.testing.assert_array_equal(as_picture(same), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            np.zeros((3, 5, 7), np.uint8),
            r"no picture \(uint8 of shape \(3, 5, 7\)\): give numbers of shape \(h, w\) or",
        ),
        (torch.zeros(5, 7, 3), r"no picture .*\(5, 7, 3\)\).*\(channels, h, w\) as a tensor"),
        (np.zeros((0, 7, 3), np.uint8), "no picture"),
        (np.zeros((5, 7, 3), complex), "no picture"),
        (np.full((5, 7), np.nan), "negative or undefined pixels"),
        (np.full((5, 7), -1), "least -1"),
        (np.full((5, 7), 256.0), r"pixels above 255 \(most 256.0\): give floating-point numbers in 0 … 1 or 0 … 255"),
        (Image.new("F", (3, 3)), "floating-point image file: export it with 8 or 16 bits"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_cure(values: object, said: str) -> None:
    with pytest.raises(PictureError, match=said):
        as_picture(values)


def png_of_size(path: Path, width: int, height: int) -> Path:
    """A PNG whose header alone claims a size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)), struct.pack(">I", 100) + b"IDAT"]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@pytest.mark.parametrize("side", [10_000, 100_000])  # 100 megapixels, and more than Pillow opens
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    with pytest.raises(PictureError, match="image of too many pixels.*at most 89 megapixels"):
        read_picture(png_of_size(tmp_path / "a.png", side, side))


def test_unreadable_files_are_refused_in_words(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jpg", noise(64, 64)).read_bytes()
    write(tmp_path / "whole.png", noise(64, 64))
    for name, content in {
        "text.jpg": b"hello",
        "empty.png": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": (tmp_path / "whole.png").read_bytes()[:2000],
        "photo.heic": b"\x00\x00\x00\x18ftypheic" + bytes(40),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PictureError, match="unreadable file .*: export it again as JPEG or PNG"):
            read_picture(tmp_path / name)
    with pytest.raises(PictureError, match="unreadable file"):
        read_mask(tmp_path / "text.jpg")


# Masks

BRUSH = [0, 20, 130, 255, 255, 255]  # soft edges


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        (np.uint8([0, 1]), [0, 1]),
        (np.uint8([0, 255]), [0, 1]),
        (np.uint8([0, 7, 21]), [0, 1, 1]),  # labels
        (np.uint8([0, 3, 3, 3, 255]), [0, 1, 1, 1, 1]),  # labels with a border of 255
        (np.uint8(BRUSH), [0, 0, 1, 1, 1, 1]),
        (np.uint16([0, 1, 300]), [0, 1, 1]),  # instances
        (np.uint16([0, 200, 65535, 65535]), [0, 0, 1, 1]),
        (np.array([False, True]), [0, 1]),
        (np.array([0.0, 0.4, 0.6, 1.0]), [0, 0, 1, 1]),
        (np.array([0, 5, 5]), [0, 1, 1]),
        (np.uint8([0, 0]), [0, 0]),
    ],
)
def test_a_mask_is_what_is_not_black(tmp_path: Path, values: UInt8, mask: list[int]) -> None:
    for same in (values[None], values[None, :, None], torch.from_numpy(values[None])):
        assert as_mask(same).tolist() == [mask]
        assert as_mask(same).dtype == np.uint8
    if values.dtype in (np.uint8, np.uint16, bool):
        assert read_mask(write(tmp_path / "m.png", values[None])).tolist() == [mask]


def test_masks_in_colour_with_a_palette_or_transparent(tmp_path: Path) -> None:
    colours = np.array([[[0, 0, 0], [128, 0, 0], [0, 64, 0]]], np.uint8)
    assert as_mask(colours).tolist() == [[0, 1, 1]]

    palette = Image.fromarray(np.array([[0, 1, 1, 1, 2]], np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 255, 255, 255, 40, 0, 0])  # no soft brush: dark red is a class
    assert read_mask(write(tmp_path / "p.png", palette)).tolist() == [[0, 1, 1, 1, 1]]

    cut_out = np.array([[[255, 255, 255, 0], [9, 9, 9, 255], [0, 0, 0, 255]]], np.uint8)
    assert as_mask(cut_out).tolist() == [[0, 1, 0]]


# Polygons


def test_a_rectangle_fills_its_area_wherever_it_lies() -> None:
    rectangle = np.array([[2.0, 1], [7, 1], [7, 5], [2, 5]])
    filled = fill(rectangle, 8, 9)
    assert filled.sum() == 5 * 4
    assert filled[1:5, 2:7].all()
    assert fill(rectangle - [4, 3], 8, 9).sum() == 3 * 2  # two sides outside
    assert fill(rectangle - [-100, 0], 8, 9).sum() == 0
    assert fill(np.array([[-1e8, -1e8], [1e8, -1e8], [0, 1e8]]), 4, 4).all()


def test_any_polygon_fills_the_pixels_whose_centres_it_contains() -> None:
    rng = np.random.default_rng(1)
    ys, xs = np.mgrid[:40, :50] + 0.5
    for corners in (3, 4, 7):
        turn = np.sort(rng.uniform(0, 2 * np.pi, corners))
        radius = rng.uniform(5, 30, corners)
        outline = np.stack([25 + radius * np.cos(turn), 20 + radius * np.sin(turn)], axis=1)
        inside = Outline([*outline, outline[0]]).contains_points(np.stack([xs.ravel(), ys.ravel()], axis=1))
        np.testing.assert_array_equal(fill(outline, 40, 50), inside.reshape(40, 50))


# Folders

MASK = np.zeros((6, 9), np.uint8)
MASK[2:4, 3:8] = 1
RECTANGLE = [3, 2, 8, 2, 8, 4, 3, 4]


def coco(*annotations: dict[str, object], name: str = "a.jpg", height: int = 6) -> dict[str, object]:
    drawn = annotations or ({"image_id": 7, "category_id": 1, "segmentation": [RECTANGLE]},)
    return {
        "images": [{"id": 7, "file_name": name, "height": height, "width": 9}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": list(drawn),
    }


def labelme(**more: object) -> dict[str, object]:
    shape = {"label": "cat", "points": np.reshape(RECTANGLE, (4, 2)).tolist(), "shape_type": "polygon"}
    return {"shapes": [{**shape, **more}], "imagePath": "C:\\photos\\a.jpg", "imageHeight": 6, "imageWidth": 9}


def in_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def layout(folder: Path, name: str) -> None:
    image = "images/a.jpg" if name in ("apart", "coco apart") else "a.png" if name == "png" else "a.jpg"
    write(folder / image, noise())
    if name == "beside":
        write(folder / "a.png", MASK * 255)
    elif name == "png":
        write(folder / "a_mask.png", MASK)
    elif name == "apart":
        write(folder / "masks" / "a.png", MASK)
    elif name == "coco":
        in_json(folder / "anything.json", coco(name="../../elsewhere/a.jpg"))
    elif name == "coco apart":
        in_json(folder / "annotations" / "instances.json", coco())
    elif name == "labelme":
        in_json(folder / "a.json", labelme())
    else:
        in_json(folder / "a.json", labelme(points=[[3, 4], [8, 2]], shape_type="rectangle"))


@pytest.mark.parametrize("name", ["beside", "png", "apart", "coco", "coco apart", "labelme", "labelme rectangle"])
def test_every_layout_gives_the_image_with_its_mask(tmp_path: Path, name: str) -> None:
    layout(tmp_path, name)
    (labelled,), faults = find_labelled(tmp_path)
    image, mask = labelled.read()
    assert not faults
    assert image.shape == (6, 9, 3)
    np.testing.assert_array_equal(mask, MASK)
    (picture,), faults = find_pictures(tmp_path)
    assert picture == labelled.image
    assert [fault.kind for fault in faults] == ["taken for a mask"] * (name in ("beside", "png"))


def test_several_shapes_of_one_image_are_one_object(tmp_path: Path) -> None:
    outlines = [np.reshape(RECTANGLE, (4, 2)) - [0.0, y] for y in (0, 1)]
    image, mask = Labelled(write(tmp_path / "a.png", noise()), Polygons([*outlines, np.zeros((0, 2))], None)).read()
    assert image.shape == (6, 9, 3)
    np.testing.assert_array_equal(mask, np.any([fill(o, 6, 9) for o in outlines], axis=0))
    assert (mask.sum(), mask.dtype) == (15, np.uint8)


def test_many_shapes_of_one_image_take_the_memory_of_one_mask(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", np.zeros((500, 500), np.uint8))
    outlines = [np.reshape(RECTANGLE, (4, 2)) + np.array([10.0 * i, 0]) for i in range(40)]
    tracemalloc.start()
    mask = Labelled(path, Polygons(outlines, None)).read()[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask.sum() == 40 * 10
    assert peak < 20 * mask.size  # the image with its copies, not 40 masks


def test_images_come_in_natural_order_and_hidden_files_are_no_matter(tmp_path: Path) -> None:
    for stem in ("10", "9", "1"):
        write(tmp_path / f"{stem}.jpg", noise())
        write(tmp_path / f"{stem}.png", MASK)
    (tmp_path / "._1.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    labelled, faults = find_labelled(tmp_path)
    assert [one.image.stem for one in labelled] == ["1", "9", "10"]
    assert [(fault.kind, fault.path.name) for fault in faults] == [(STRAY, "notes.txt")]
    assert [path.name for path in find_pictures(tmp_path)[0]] == ["1.jpg", "9.jpg", "10.jpg"]
    assert find_pictures(tmp_path / "9.jpg") == ([tmp_path / "9.jpg"], [])


def test_an_image_to_segment_that_is_taken_for_a_mask_is_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.png", "b_mask.png"):
        write(tmp_path / name, noise())
    images, faults = find_pictures(tmp_path)
    assert [path.name for path in images] == ["a.jpg", "b.png"]
    cure = "rename it, or put all images into images/"
    assert set(faults) == {
        Fault("taken for a mask", Path("a.png"), cure, "of a.jpg"),
        Fault("taken for a mask", Path("b_mask.png"), cure, "of b.png"),
    }
    (tmp_path / "images").mkdir()
    for path in [*tmp_path.glob("*.*")]:
        path.rename(tmp_path / "images" / path.name)
    assert len(find_pictures(tmp_path)[0]) == 4
    assert find_pictures(tmp_path)[1] == []


def test_pictures_in_the_folder_itself_go_before_a_folder_of_images(tmp_path: Path) -> None:
    layout(tmp_path, "beside")
    write(tmp_path / "images" / "other.jpg", noise())
    assert [path.name for path in find_pictures(tmp_path)[0]] == ["a.jpg"]


def test_what_has_no_partner_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    layout(tmp_path, "beside")
    write(tmp_path / "alone.jpg", noise())
    write(tmp_path / "bare.png", noise())
    write(tmp_path / "a_mask.png", MASK)
    labelled, faults = find_labelled(tmp_path)
    assert [one.image.name for one in labelled] == ["a.jpg"]
    assert {(f.kind, f.path.name, f.cure) for f in faults} == {
        ("image without a mask", "alone.jpg", "add its mask as alone.png, or remove it"),
        ("image without a mask", "bare.png", "add its mask as bare_mask.png, or remove it"),
        ("second mask of one image", "a_mask.png", "keep one"),
    }


def test_folders_apart_report_masks_without_images_and_second_images(tmp_path: Path) -> None:
    layout(tmp_path, "apart")
    write(tmp_path / "images" / "a.jpeg", noise())
    write(tmp_path / "masks" / "b.png", MASK)
    labelled, faults = find_labelled(tmp_path)
    assert [one.image.name for one in labelled] == ["a.jpeg"]
    assert {(f.kind, f.path.as_posix(), f.detail) for f in faults} == {
        ("mask without an image", "masks/b.png", ""),
        ("second image of one stem", "images/a.jpg", "a.jpeg is used"),
    }
    assert len(find_pictures(tmp_path)[0]) == 2


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (coco({"image_id": 7, "category_id": 1, "segmentation": {"counts": "abc"}}), "run-length annotation"),
        (coco({"image_id": 7, "category_id": 1, "segmentation": [[1, 2, 3]]}), "broken annotation"),
        (coco({"image_id": 7, "category_id": 1, "segmentation": [[float("nan")] * 6]}), "broken annotation"),
        (coco({"image_id": 7, "category_id": 1, "segmentation": [[10**400] * 6]}), "broken annotation"),
        (coco({"image_id": 7, "segmentation": [RECTANGLE]}), "broken annotation"),
        (coco({"image_id": 7, "category_id": 1, "bbox": [3, 2, 5, 2]}), "annotation without an outline"),
        (coco({"image_id": 7, "category_id": 1, "segmentation": []}), "annotation without an outline"),
        (coco(height=float("inf")), "unreadable file"),
        (coco(name="b.jpg"), "polygons without an image"),
        (labelme(shape_type="circle"), "shape that is no polygon"),
        ({"shapes": 3}, "unreadable file"),
        ([1], STRAY),
    ],
)
def test_broken_annotations_cost_their_image_alone(tmp_path: Path, content: object, kind: str) -> None:
    write(tmp_path / "a.jpg", noise())
    in_json(tmp_path / "a.json", content)
    write(tmp_path / "sound.jpg", noise())
    write(tmp_path / "sound.png", MASK)
    labelled, faults = find_labelled(tmp_path)
    assert [one.image.name for one in labelled] == ["sound.jpg"]
    assert kind in {fault.kind for fault in faults}


def test_json_nested_too_deeply_is_unreadable(tmp_path: Path) -> None:
    layout(tmp_path, "beside")
    (tmp_path / "a.json").write_text("[" * 200_000)
    labelled, faults = find_labelled(tmp_path)
    assert len(labelled) == 1
    assert [(fault.kind, fault.path.name) for fault in faults] == [("unreadable file", "a.json")]


@pytest.mark.parametrize("broken", [{"bbox": [3, 2, 5, 2]}, {"segmentation": {"counts": "abc"}, "iscrowd": 1}])
def test_an_annotation_without_polygons_costs_its_image_alone(tmp_path: Path, broken: dict[str, object]) -> None:
    content = coco({"image_id": 7, "category_id": 1, "segmentation": [RECTANGLE]})
    content["images"] += [{"id": 8, "file_name": "b.jpg"}]
    content["annotations"] += [{"image_id": 8, "category_id": 1, "segmentation": [RECTANGLE]}]
    content["annotations"] += [{"image_id": 8, "category_id": 1, **broken}]
    in_json(tmp_path / "all.json", content)
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / name, noise())
    (labelled,), (fault,) = find_labelled(tmp_path)
    assert (labelled.image.name, fault.path) == ("a.jpg", Path("b.jpg"))
    assert fault.cure == "export it as polygons, or the masks as PNG files"


def test_annotations_of_images_that_the_file_does_not_list_cost_nothing(tmp_path: Path) -> None:
    shape = {"category_id": 1, "segmentation": [RECTANGLE]}
    in_json(tmp_path / "all.json", coco(*({"image_id": i, **shape} for i in (77, 7, 77, [7])), shape))
    write(tmp_path / "a.jpg", noise())
    (labelled,), (fault,) = find_labelled(tmp_path)
    np.testing.assert_array_equal(labelled.read()[1], MASK)
    assert fault.kind == "annotation of an image that its file does not list"
    assert (fault.path, fault.detail) == (Path("all.json"), "image_id 77, image_id [7], image_id None")


def test_what_cannot_be_used_counts_in_its_own_category_alone(tmp_path: Path) -> None:
    cat = {"image_id": 7, "category_id": 1, "segmentation": [RECTANGLE]}
    crowd = {"image_id": 7, "category_id": 2, "segmentation": {"counts": "abc"}, "iscrowd": 1}
    drawn = labelme()
    drawn["shapes"] += labelme(label="dog", shape_type="circle", points=[[1, 1], [2, 2]])["shapes"]
    write(tmp_path / "a.jpg", noise())
    for content, kind in ((coco(cat, crowd), "run-length annotation"), (drawn, "shape that is no polygon")):
        in_json(tmp_path / "a.json", content)
        (labelled,), faults = find_labelled(tmp_path, "cat")
        np.testing.assert_array_equal(labelled.read()[1], MASK)
        assert faults == []
        labelled, (fault,) = find_labelled(tmp_path, "dog")
        assert (labelled, fault.kind) == ([], kind)
        with pytest.raises(ConfigError, match="several categories.*: cat, dog"):
            find_labelled(tmp_path)


def test_one_of_several_categories_has_to_be_chosen(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", noise())
    both = [
        {"image_id": 7, "category_id": i, "segmentation": [RECTANGLE if i == 1 else [0, 0, 1, 0, 1, 1]]} for i in (1, 2)
    ]
    in_json(tmp_path / "a.json", coco(*both))
    with pytest.raises(ConfigError, match="several categories: choose one of these.*category=…: cat, dog"):
        find_labelled(tmp_path)
    with pytest.raises(ConfigError, match="category=cow is none of the polygons'.*: cat, dog"):
        find_labelled(tmp_path, "cow")
    (labelled,), _ = find_labelled(tmp_path, "cat")
    np.testing.assert_array_equal(labelled.read()[1], MASK)


def test_sizes_that_differ_are_both_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", noise())
    write(tmp_path / "a.png", MASK.T)
    (labelled,), _ = find_labelled(tmp_path)
    with pytest.raises(PictureError, match=r"mask of another size than its image \(mask 6×9, image 9×6\): export"):
        labelled.read()
    (tmp_path / "a.png").unlink()
    in_json(tmp_path / "a.json", coco(height=10**9))  # no memory is taken at that size
    (labelled,), _ = find_labelled(tmp_path)
    with pytest.raises(PictureError, match=r"mask 9×1000000000, image 9×6"):
        labelled.read()


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    for find in (find_pictures, find_labelled):
        with pytest.raises(DataError, match="there is no such folder"):
            find(tmp_path / "nowhere")
