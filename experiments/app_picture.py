"""The picture of the page in the README: emoji images of one test class, some painted, the others predicted.

    python experiments/app_picture.py --init runs/main_table/joint-s0/init.safetensors

It drives the real page in a Chromium without a window (pip install "metaseg-lightning[app,dev,demo]").
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from metaseg.app.page import BRUSH, OPACITY, PAINT
from metaseg.app.session import VIEW
from metaseg.data.emoji import EmojiSource
from metaseg.data.source import UInt8

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
FLAGS = [
    "--no-sandbox",  # a container's root has none
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE = 60_000  # milliseconds; without a GPU the editor is slow
MARGIN = 30  # pixels of the screen that the editor leaves around its picture, at least


@contextmanager
def served(init: Path) -> Iterator[str]:
    """The address of the page, served by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "metaseg.app", "--init", str(init), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()  # once it serves
            if not said:
                raise RuntimeError("the page has not started: see above")
            yield said.split()[0]
        finally:
            process.terminate()


@contextmanager
def browser_page(width: int, height: int) -> Iterator[Page]:
    """A page of a Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(PATIENCE)
            expect.set_options(timeout=PATIENCE)
            yield page
        finally:
            browser.close()


def press(page: Page, label: str) -> None:
    """Press the button with this label."""
    page.get_by_role("button", name=label, exact=True).click()


def add(page: Page, files: Sequence[Path], images: int) -> None:
    """Upload files, and wait until the page shows so many images."""
    page.locator("input[type=file]").first.set_input_files(files)
    expect(page.locator("#images img")).to_have_count(images)


def choose(page: Page, name: str, image: UInt8 | None = None) -> None:
    """Open an image in the editor; `image` (h, w, 3) is what the editor is waited for to show."""
    label = page.locator("#editor label")
    for patience_ms in (20_000, 20_000, 60_000):
        page.locator("#images button", has_text=name).click()
        with suppress(AssertionError):  # a busy machine's browser sometimes loses a click; a person clicks again
            expect(label).to_contain_text(name, timeout=patience_ms)
            break
    expect(label).to_contain_text(name)
    while image is not None and not _shown(page, image):
        page.wait_for_timeout(100)


def state(page: Page, name: str) -> str:
    """What the page says of an image: labelled, predicted, or nothing."""
    caption = page.locator("#images button", has_text=name).inner_text()
    return caption.rpartition(" · ")[0].strip()


def paint(page: Page, mask: UInt8) -> None:
    """Paint a mask (h, w), {0, 1}, of the open image's shape, by strokes along its rows.

    What is thinner than the brush is left out, as in the morphological opening of the mask.
    """
    left, top, width, height = _frame(page, mask)
    radius = round(BRUSH * max(width, height) / VIEW)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    large = cv2.resize(mask, (round(width), round(height)), interpolation=cv2.INTER_NEAREST)
    middle = cv2.erode(large, disc, borderValue=0)  # where the brush may be
    rows = np.flatnonzero(middle.any(axis=1))
    for y in rows[:: max(1, radius)]:
        ends = np.flatnonzero(np.diff(middle[y], prepend=0, append=0))
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            page.mouse.move(left + start, top + y)
            page.mouse.down()
            page.mouse.move(left + stop, top + y)
            page.mouse.up()


def _frame(page: Page, picture: UInt8) -> tuple[float, float, float, float]:
    """Where the editor shows a picture (h, w, …): left, top, width and height, in pixels of the screen."""
    box = page.locator("#editor canvas").first.bounding_box()
    assert box is not None
    scale = (min(box["width"], box["height"]) - 2 * MARGIN) / max(picture.shape[:2])
    height, width = scale * picture.shape[0], scale * picture.shape[1]
    return box["x"] + (box["width"] - width) / 2, box["y"] + (box["height"] - height) / 2, width, height


def _shown(page: Page, image: UInt8) -> bool:
    """Whether the editor shows an image (h, w, 3), with paint or without."""
    left, top, width, height = _frame(page, image)
    clip = {"x": left, "y": top, "width": width, "height": height}
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        page.screenshot(path=file.name, clip=clip)
        seen = np.asarray(Image.open(file.name).convert("RGB").resize((32, 32)), np.int16)
    wanted = np.asarray(Image.fromarray(image).resize((32, 32)), np.int16)
    painted = (1 - OPACITY) * wanted + OPACITY * np.array(PAINT)
    off = np.minimum(np.abs(seen - wanted).mean(axis=2), np.abs(seen - painted).mean(axis=2))
    return bool(np.median(off) < 16)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="init.safetensors of a run on the embedded data")
    parser.add_argument("--out", type=Path, default=Path("experiments/five_images/app.png"))
    parser.add_argument("--task", default="strawberry", help="a test class; default: %(default)s")
    parser.add_argument("--images", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--labelled", type=int, default=3, help="how many are painted; default: %(default)s")
    args = parser.parse_args(argv)
    images, masks = EmojiSource().load(args.task, range(args.images))
    with tempfile.TemporaryDirectory() as folder, served(args.init) as address, browser_page(1200, 900) as page:
        files = [Path(folder, f"{args.task} {i + 1}.png") for i in range(args.images)]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image).save(file)
        page.goto(address)
        add(page, files, args.images)
        for i in range(args.labelled):
            choose(page, files[i].name, images[i])
            paint(page, masks[i])
        press(page, "Adapt")
        page.get_by_text(f"Adapted to {args.labelled} images").wait_for()
        choose(page, files[-1].name, images[-1])
        page.mouse.move(0, 0)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=args.out)
    Image.open(args.out).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
