"""The picture of the page in the README: emoji images of one test class, some of them labelled, adapted to.

    python experiments/app_picture.py --init RUN/init.safetensors --out experiments/practice/app.png

It drives the real page in a Chromium without a window, and takes minutes off nobody: about half of one on two cores.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from metaseg.app.page import BRUSH
from metaseg.app.session import VIEW

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
FLAGS = [
    "--no-sandbox",  # a container's root has none
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
MARGIN = 30  # pixels that the editor leaves around its picture


@contextmanager
def served(init: Path) -> Iterator[str]:
    """The address of the page, served by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "metaseg.app", "--init", str(init), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()  # once it serves
            if not said:
                raise RuntimeError(f"{' '.join(command)} has not started")
            yield said.split()[0]
        finally:
            process.terminate()


@contextmanager
def browser_page(width: int = 1200, height: int = 900) -> Iterator[Page]:
    """A page of a Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


def add(page: Page, files: Sequence[Path], images: int) -> None:
    """Upload files, and wait until the page shows so many images."""
    page.locator("input[type=file]").first.set_input_files(files)
    expect(page.locator("#images img")).to_have_count(images)
    expect(page.locator("#editor canvas").first).to_be_visible()


def choose(page: Page, name: str) -> None:
    """Open an image in the editor."""
    page.locator("#images button", has_text=name).click()
    expect(page.locator("#editor label")).to_contain_text(name)


def paint(page: Page, mask: NDArray[np.uint8]) -> None:
    """Paint a mask (h, w), {0, 1}, of the open image's shape, by strokes along its rows.

    What is thinner than the brush is left out, as in the morphological opening of the mask.
    """
    box = page.locator("#editor canvas").first.bounding_box()
    assert box is not None
    scale = (min(box["width"], box["height"]) - 2 * MARGIN) / VIEW  # from the view's pixels to the screen's
    longer = max(mask.shape)
    height, width = (round(n * VIEW / longer) for n in mask.shape)
    left = box["x"] + (box["width"] - scale * width) / 2
    top = box["y"] + (box["height"] - scale * height) / 2
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * BRUSH + 1, 2 * BRUSH + 1))
    large = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    middle = cv2.erode(large, disc, borderValue=0)  # where the brush may be
    for y in np.flatnonzero(middle.any(axis=1))[::BRUSH]:
        ends = np.flatnonzero(np.diff(middle[y], prepend=0, append=0))
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            page.mouse.move(left + scale * start, top + scale * y)
            page.mouse.down()
            page.mouse.move(left + scale * stop, top + scale * y)
            page.mouse.up()
