"""Ways in which a tree of images and masks breaks, or looks broken and is not, each with what it must come to.

The sound tree has three images of each of the classes ant and café (train), cat (val) and dog (test); where a breakage
says nothing else, it is about the image `ant/2`.
"""

import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from trees import write_splits, write_tree

CLASSES = {"train": ["ant", "caf\u00e9"], "val": ["cat"], "test": ["dog"]}
SIZE = 48

Break = Callable[[Path], object]


@dataclass(frozen=True)
class Breakage:
    """What is done to the tree, and what must come of it.

    Attributes:
        name: in the test's name.
        do: given the tree, breaks it; beside it lies `splits.json`.
        kind: of fault, a piece of it; or of the message where nothing can be used. Empty for a tree that is sound.
        place: that is named.
        cure: a piece of it.
        lost: what is not used any more: `class/stem`, or whole classes.
        other: images that are used, and have other pixels.
        lines: of the report, a kind of fault each.
        quiet: it is in the report, but no reason for a warning.
        usable: a data set is left.
        needs: permissions, which mean nothing to root; or bytes, a disk that tells names apart by all of theirs.
    """

    name: str
    do: Break
    kind: str = ""
    place: str = ""
    cure: str = ""
    lost: Sequence[str] = ()
    other: Sequence[str] = ()
    lines: int = 1
    quiet: bool = False
    usable: bool = True
    needs: str = ""


def write_sound(folder: Path) -> None:
    """The unbroken tree and its splits."""
    write_tree(folder / "tree", [name for names in CLASSES.values() for name in names], images=3, size=SIZE)
    write_splits(folder / "splits.json", **CLASSES)


# Tools


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def replaced(name: str, content: bytes | Callable[[bytes], bytes]) -> Break:
    """Other bytes in a file."""

    def do(root: Path) -> None:
        path = root / name
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return do


def image_as(
    kind: str, convert: Callable[[Image.Image], Image.Image] = lambda image: image, **options: object
) -> Break:
    """The image in another format, under its old name."""

    def do(root: Path) -> None:
        with Image.open(root / "ant/2.jpg") as file:
            image = convert(file.copy())
        image.save(root / "ant/2.jpg", kind, **options)

    return do


def mask_as(convert: Callable[[np.ndarray], np.ndarray | Image.Image], **options: object) -> Break:
    """Another mask, made of the sound one (0 and 1)."""

    def do(root: Path) -> None:
        mask = convert(pixels(root / "ant/2.png") // 255)
        file = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        file.save(root / "ant/2.png", "PNG", **options)

    return do


def removed(name: str) -> Break:
    return lambda root: (root / name).unlink()


def renamed(name: str, other: str | bytes) -> Break:
    return lambda root: os.rename(os.fsencode(root / name), os.fsencode(root) + b"/" + os.fsencode(other))


def linked(name: str, target: str) -> Break:
    """A link in place of what was there."""

    def do(root: Path) -> None:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return do


def splits(**others: object) -> Break:
    """Other splits; those that are None are missing."""

    def do(root: Path) -> None:
        kept = {split: names for split, names in {**CLASSES, **others}.items() if names is not None}
        (root.parent / "splits.json").write_text(json.dumps(kept))

    return do


def splits_text(text: str, encoding: str = "utf-8") -> Break:
    return lambda root: (root.parent / "splits.json").write_text(text, encoding)


def rights(name: str, mode: int) -> Break:
    return lambda root: (root / name).chmod(mode)


def several(*steps: Break) -> Break:
    def do(root: Path) -> None:
        for step in steps:
            step(root)

    return do


def turned(orientation: int, width: int = SIZE, upright_mask: bool = False) -> Break:
    """The image `width` wide with an EXIF rotation, and the mask of it as stored or as shown."""

    def do(root: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(root / "ant/2.jpg") as file:
            file.resize((width, SIZE)).save(root / "ant/2.jpg", exif=exif)
        with Image.open(root / "ant/2.png") as file:
            file.resize((SIZE, width) if upright_mask else (width, SIZE)).save(root / "ant/2.png")

    return do


def odd_size(width: int, height: int) -> Break:
    def do(root: Path) -> None:
        mask = np.zeros((height, width), np.uint8)
        mask[: (height + 1) // 2, : (width + 1) // 2] = 255
        Image.new("RGB", (width, height), (200, 90, 30)).save(root / "ant/2.jpg")
        Image.fromarray(mask).save(root / "ant/2.png")

    return do


def png_head(side: int) -> bytes:
    """A PNG whose head alone claims a size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)), struct.pack(">I", 100) + b"IDAT"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\nshowpage\n%%EOF\n"


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def swapped(root: Path) -> None:
    """The image in the mask's file, and the mask in the image's."""
    image, mask = pixels(root / "ant/2.jpg"), pixels(root / "ant/2.png")
    Image.fromarray(image).save(root / "ant/2.png")
    Image.fromarray(mask).save(root / "ant/2.jpg")


def images_are_png(root: Path) -> None:
    """The image as `2.png`, its mask in a folder of masks."""
    (root / "ant/masks").mkdir()
    (root / "ant/2.png").rename(root / "ant/masks/2.png")
    Image.fromarray(pixels(root / "ant/2.jpg")).save(root / "ant/2.png")
    (root / "ant/2.jpg").unlink()


def three_stripes(*values: int) -> Callable[[np.ndarray], np.ndarray]:
    def draw(mask: np.ndarray) -> np.ndarray:
        return np.repeat(np.array(values, np.uint8), SIZE // len(values))[None].repeat(SIZE, axis=0)

    return draw


def in_palette(numbers: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(numbers, mode="P")
    image.putpalette([level for colour in colours for level in colour])
    return image


def two_colours(mask: np.ndarray) -> Image.Image:
    """The object's upper half in red, its lower one in green, on black."""
    numbers = mask.copy()
    numbers[int(np.nonzero(mask)[0].mean()) :] *= 2
    return in_palette(numbers, (0, 0, 0), (128, 0, 0), (0, 128, 0))


def dark_with_a_speck(mask: np.ndarray) -> np.ndarray:
    drawn = mask * np.uint8(100)
    drawn[0, :3] = 255
    return drawn


def bind_socket(root: Path) -> None:
    (root / "ant/2.jpg").unlink()
    here = os.getcwd()
    os.chdir(root / "ant")  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as it:
            it.bind("2.jpg")
    finally:
        os.chdir(here)


def is_folder(root: Path) -> None:
    (root / "ant/2.jpg").unlink()
    (root / "ant/2.jpg").mkdir()


def is_pipe(root: Path) -> None:
    (root / "ant/2.jpg").unlink()
    os.mkfifo(root / "ant/2.jpg")


def second_spelling(root: Path) -> None:
    shutil.copytree(root / "ant", root / "Ant")
    splits(test=["dog", "Ant"])(root)


def second_name(root: Path) -> None:
    (root / "eel").symlink_to("ant")
    splits(test=["dog", "eel"])(root)


def two_spellings_of_a_letter(root: Path) -> None:
    """é as one character and as two: the same class to all who read it."""
    shutil.copytree(root / "caf\u00e9", root / "cafe\u0301")
    splits(test=["dog", "cafe\u0301"])(root)


def elsewhere(root: Path) -> None:
    (root / "ant").rename(root.parent / "elsewhere")
    (root / "ant").symlink_to(root.parent / "elsewhere")


def names(stem: str) -> Break:
    return several(renamed("ant/2.jpg", f"ant/{stem}.jpg"), renamed("ant/2.png", f"ant/{stem}.png"))


def many_pictures(root: Path) -> None:
    """As a phone stores a photo with a second picture of the scene: JPEG to the eye, MPO to Pillow."""
    with Image.open(root / "ant/2.jpg") as file:
        file.save(root / "ant/2.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], quality=95)


def soft(mask: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(mask * np.uint8(255)).filter(ImageFilter.GaussianBlur(1)))


# What is left out, and costs an image

ANT = ["ant/2"]
FORMAT = partial(
    Breakage, kind="image of a format that is not read here", cure="save the image as <stem>.jpg", lost=ANT
)
CLASSED = partial(Breakage, kind="mask of several classes", place="ant/2.png", cure="make a class of each", lost=ANT)
DAMAGED = partial(Breakage, kind="unreadable file", cure="fetch or export it again", lost=ANT)
NO_IMAGE = partial(Breakage, kind="mask without an image", place="ant/2.png", cure="add the image", lost=ANT)
BOMB = partial(Breakage, kind="image of too many pixels", cure="at most 89 megapixels", lost=ANT)
NOWHERE = partial(Breakage, kind="link that leads nowhere", cure="fetch what it points to", lost=ANT)

BREAKAGES = [
    DAMAGED("truncated JPEG", replaced("ant/2.jpg", half), place="ant/2.jpg"),
    DAMAGED("truncated PNG", replaced("ant/2.png", half), place="ant/2.png"),
    DAMAGED("no bytes in an image", replaced("ant/2.jpg", b""), place="ant/2.jpg"),
    DAMAGED("no bytes in a mask", replaced("ant/2.png", b""), place="ant/2.png"),
    DAMAGED("text as an image", replaced("ant/2.jpg", b"404 not found"), place="ant/2.jpg"),
    DAMAGED("PostScript as an image", replaced("ant/2.jpg", EPS), place="ant/2.jpg (no known image format)"),
    DAMAGED("WebP under a JPEG's name", image_as("WEBP"), place="ant/2.jpg (no known image format)"),
    BOMB("bomb as an image", replaced("ant/2.jpg", png_head(40_000)), place="ant/2.jpg"),
    BOMB("bomb as a mask", replaced("ant/2.png", png_head(10_000)), place="ant/2.png (10000×10000)"),
    FORMAT("WebP", renamed("ant/2.jpg", "ant/2.webp"), place="ant/2.webp"),
    FORMAT("TIFF in capitals", renamed("ant/2.jpg", "ant/2.TIF"), place="ant/2.TIF"),
    FORMAT("mask as BMP", renamed("ant/2.png", "ant/2.bmp"), place="ant/2.bmp"),
    FORMAT("images as PNG", images_are_png, place="ant/2.png", lines=2),
    NO_IMAGE("no image", removed("ant/2.jpg")),
    NO_IMAGE("image with a text's suffix", renamed("ant/2.jpg", "ant/2.txt"), lines=2),
    NO_IMAGE("image that is a folder", is_folder, lines=2),
    NO_IMAGE("image that is a pipe", is_pipe, lines=2),
    NO_IMAGE("image that is a socket", bind_socket, lines=2),
    Breakage("no mask", removed("ant/2.png"), "image without a mask", "ant/2.jpg", "add the mask", ANT),
    Breakage("swapped", swapped, "mask that is a photograph", "ant/2.png", "swap it with its image", ANT),
    Breakage(
        "16-bit image",
        image_as("PNG", lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)),
        *("image of more than 8 bits", "ant/2.jpg", "save it with 8 bits", ANT),
    ),
    Breakage(
        "mask drawn on the upright photo",
        turned(6, width=32, upright_mask=True),
        *("mask of another size", "ant/2.png (48×32, its image 32×48)", "EXIF rotation: as the pixels are stored", ANT),
    ),
    Breakage(
        "mask of another size",
        mask_as(lambda mask: mask[:, 1:].copy()),
        *("mask of another size", "ant/2.png (47×48, its image 48×48)", "at its image's size", ANT),
    ),
    Breakage(
        "black mask", mask_as(lambda mask: mask * 0), "mask without an object", "ant/2.png", "draw the object", ANT
    ),
    Breakage(
        "white mask",
        mask_as(lambda mask: mask * 0 + np.uint8(255)),
        *("mask without a background", "ant/2.png", "draw what is not the object as 0", ANT),
    ),
    CLASSED("classes 0 1 2", mask_as(three_stripes(0, 1, 2))),
    CLASSED("classes 0 128 255", mask_as(three_stripes(0, 128, 255))),
    CLASSED("classes 0 1 255", mask_as(three_stripes(0, 1, 255))),
    CLASSED("classes by colour", mask_as(two_colours)),
    NOWHERE("link to what is not there", linked("ant/2.jpg", "../../cache/2.jpg"), place="ant/2.jpg"),
    NOWHERE("link to itself", linked("ant/2.png", "2.png"), place="ant/2.png"),
    Breakage(
        *("unreadable file", rights("ant/2.jpg", 0), "file that may not be read", "ant/2.jpg", "chmod u+r"),
        lost=ANT,
        needs="rights",
    ),
    # costs a class
    Breakage(
        *("no folder", lambda root: shutil.rmtree(root / "ant"), "class without a folder", "ant", "take it out of"),
        lost=["ant"],
    ),
    Breakage(
        *(
            "folder of another case",
            renamed("ant", "Ant"),
            "class without a folder",
            "ant (did you mean Ant?)",
            "add it",
        ),
        lost=["ant"],
        needs="bytes",
    ),
    Breakage(
        *("folder misspelt", renamed("ant", "ants"), "class without a folder", "ant (did you mean ants?)", "add it"),
        lost=["ant"],
    ),
    Breakage(
        *("class name that is no text", splits(train=["ant", "caf\u00e9", "\ud800"])),
        *("class without a folder", r"\ud800", "take it out of the splits"),
    ),
    Breakage(
        *("class name too long for a disk", splits(train=["ant", "caf\u00e9", "x" * 5000])),
        *("class without a folder", "x" * 5000, "take it out of the splits"),
    ),
    NOWHERE("class that links to itself", linked("ant", "ant"), place="ant", lost=["ant"]),
    NOWHERE("class that links to nothing", linked("ant", "/mnt/nowhere/ant"), place="ant", lost=["ant"]),
    Breakage(
        *("class with one image", several(*(removed(f"ant/{i}.{end}") for i in (1, 3) for end in ("jpg", "png")))),
        *("class with too few images", "ant (1 sound of at least 2)", "add or mend images", ["ant"]),
    ),
    Breakage(
        *("unreadable class", rights("ant", 0), "folder that may not be read", "ant", "chmod u+rx", ["ant"]),
        needs="rights",
    ),
    Breakage(
        *("class that may not be entered", rights("ant", 0o400), "file that may not be read", "ant/1.jpg", "chmod"),
        lost=["ant"],
        lines=2,
        needs="rights",
    ),
    # costs nothing
    Breakage(
        *("classes but for case", second_spelling, "second class of one name but for case", "Ant (ant is used)"),
        cure="rename one",
        needs="bytes",
    ),
    Breakage(
        *(
            "classes but for code points",
            two_spellings_of_a_letter,
            "second class of one name",
            "is used",
            "rename one",
        ),
        needs="bytes",
    ),
    Breakage("two names of a class", second_name, "second name of one folder", "eel (of ant)", "out of the splits"),
    Breakage(
        *("two images of a stem", lambda root: shutil.copy(root / "ant/2.jpg", root / "ant/2.jpeg")),
        *("second file of one stem", "ant/2.jpg (2.jpeg is used)", "a stem of its own"),
    ),
    Breakage(
        *("stray files", lambda root: [(root / "ant" / name).write_bytes(b"x") for name in ("Thumbs.db", "._2.jpg")]),
        *("2 × stray file", "ant/._2.jpg, ant/Thumbs.db", "nothing to do"),
        quiet=True,
    ),
    Breakage(
        *("a second format beside", lambda root: shutil.copy(root / "ant/2.jpg", root / "ant/2.webp")),
        *("stray file", "ant/2.webp", "nothing to do"),
        quiet=True,
    ),
    Breakage("turned", turned(3), "image with an EXIF rotation", "ant/2.jpg", "save it upright", other=ANT),
    *(
        Breakage(
            f"turned as {number}",
            turned(number),
            "image with an EXIF rotation",
            "ant/2.jpg",
            "save it upright",
            other=ANT,
        )
        for number in (2, 4)
    ),
    Breakage(
        *("dark object and a white speck", mask_as(dark_with_a_speck), "mask with an area too dark", "ant/2.png"),
        cure="draw the object in white",
        other=ANT,
    ),
    Breakage("turned square", turned(6), "image with an EXIF rotation", "ant/2.jpg", "save it upright", other=ANT),
    Breakage(
        *("name that is no UTF-8", renamed("ant/2.png", b"ant/\xff.png"), "mask without an image", r"ant/\udcff.png"),
        cure="add the image",
        lost=ANT,
        lines=2,
        needs="bytes",
    ),
    Breakage(
        *("name that a terminal obeys", renamed("ant/2.png", "ant/\x1b[2J\n.png"), "mask without an image"),
        *(r"ant/\x1b[2J\n.png", "add the image", ANT),
        lines=2,
    ),
]

# Nothing can be used

ESCAPES = partial(Breakage, kind="no folders inside the root", cure="give its class folders' names", usable=False)
NO_JSON = partial(Breakage, kind="is not JSON", place="splits.json", cure="write a JSON file", usable=False)
BREAKAGES += [
    Breakage(
        *("a split without a class", lambda root: shutil.rmtree(root / "cat"), "the val split has no sound class"),
        *("class without a folder (add it, or take it out of the splits): cat", "mend these, or the splits"),
        usable=False,
    ),
    Breakage(
        *("no root", lambda root: root.rename(root.with_name("gone")), "is not a folder", "tree", "dataset.root names"),
        usable=False,
    ),
    Breakage(
        *("root that links to itself", lambda root: (shutil.rmtree(root), root.symlink_to(root)), "is not a folder"),
        *("tree", "dataset.root names"),
        usable=False,
    ),
    Breakage("unreadable root", rights(".", 0), "may not be read", "tree", "chmod u+rx", usable=False, needs="rights"),
    Breakage("missing split", splits(val=None), "splits must be exactly", "val", "write a JSON file", usable=False),
    Breakage(
        *("splits that overlap", splits(test=["dog", "ant"]), "listed more than once", "ant", "keep each class in one"),
        usable=False,
    ),
    Breakage("splits of NaN", splits(val=float("nan")), "is not a list", "val split", "JSON file", usable=False),
    Breakage("splits of numbers", splits(val=[3]), "is not a list", "val split", "JSON file", usable=False),
    NO_JSON("splits cut", splits_text('{"train": ["ant"')),
    NO_JSON("splits nested too deeply", splits_text('{"train":' + "[" * 100_000)),
    NO_JSON("splits in another encoding", splits_text('{"train": ["Ähre"]}', "latin-1")),
    Breakage(
        *("unreadable splits", rights("../splits.json", 0), "cannot be read (Permission denied)", "splits.json"),
        cure="write a JSON file",
        usable=False,
        needs="rights",
    ),
    ESCAPES("class above the root", splits(val=["../tree/cat"]), place="'../tree/cat'"),
    ESCAPES("class of an absolute path", splits(val=["/etc"]), place="'/etc'"),
    ESCAPES("class of no name", splits(val=["", "."]), place="'', '.'"),
    ESCAPES("class with a zero byte", splits(val=["cat\0"]), place=r"'cat\x00'"),
]

# Sound: used without a word

LONG = "n" * 251
BREAKAGES += [
    Breakage("mask of 0 and 1", mask_as(lambda mask: mask)),
    Breakage("mask of 1 bit", mask_as(lambda mask: mask.astype(bool))),
    Breakage("mask of 16 bits", mask_as(lambda mask: mask.astype(np.uint16) * 65535)),
    Breakage("mask in a dark colour", mask_as(lambda mask: in_palette(mask, (0, 0, 0), (64, 0, 0)))),
    Breakage("mask in RGB", mask_as(lambda mask: np.stack([mask * np.uint8(255)] * 3, axis=2))),
    Breakage("mask in red", mask_as(lambda mask: np.stack([mask * np.uint8(255), 0 * mask, 0 * mask], axis=2))),
    Breakage("mask with a palette", mask_as(lambda mask: in_palette(mask, (0, 0, 0), (200, 30, 30)))),
    Breakage(
        "mask with a transparent palette",
        mask_as(lambda mask: in_palette(mask, (0, 0, 0), (200, 30, 30)), transparency=b"\x00\xff"),
    ),
    Breakage(
        "mask with alpha",
        mask_as(lambda mask: np.stack([mask * np.uint8(255)] * 3 + [128 + 0 * mask], axis=2)),
    ),
    Breakage("grey mask with alpha", mask_as(lambda mask: np.stack([mask * np.uint8(255), 128 + 0 * mask], axis=2))),
    Breakage(
        "mask of 0, 254 and 255", mask_as(lambda mask: mask * (254 + np.indices(mask.shape).sum(0) % 2).astype("u1"))
    ),
    Breakage("soft mask", mask_as(soft), other=ANT),
    Breakage("grey JPEG", image_as("JPEG", lambda image: image.convert("L")), other=ANT),
    Breakage("CMYK JPEG", image_as("JPEG", lambda image: image.convert("CMYK")), other=ANT),
    Breakage("progressive JPEG", image_as("JPEG", progressive=True, quality=90), other=ANT),
    Breakage("PNG under a JPEG's name", image_as("PNG")),
    Breakage("palette under a JPEG's name", image_as("PNG", lambda image: image.quantize(16)), other=ANT),
    Breakage("alpha under a JPEG's name", image_as("PNG", lambda image: image.convert("RGBA"))),
    Breakage("a phone's JPEG of two pictures", many_pictures, other=ANT),
    Breakage("turned, and its mask as stored", turned(6, width=32), other=ANT),
    Breakage("tiny", odd_size(2, 1), other=ANT),
    Breakage("narrow", odd_size(1, 301), other=ANT),
    Breakage("not square", odd_size(63, 47), other=ANT),
    Breakage("suffixes in capitals", several(renamed("ant/2.jpg", "ant/2.JPG"), renamed("ant/2.png", "ant/2.PNG"))),
    Breakage("names of any script", names("2 Ähre 中文 🐜 :ant: [b]"), other=ANT),
    Breakage("names of 255 bytes", names(f"2{LONG[1:]}"), other=ANT),
    Breakage("class that is a link", elsewhere),
    Breakage("splits that begin with a mark", splits_text(json.dumps(CLASSES), "utf-8-sig")),
    Breakage(
        "files beside the classes",
        lambda root: (
            (root / "README.txt").write_text("…"),
            (root / "up").symlink_to(".."),
            (root / "x").symlink_to("x"),
        ),
    ),
]
