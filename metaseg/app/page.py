"""What the page shows, and which part of a `Session` each of its buttons calls."""

import html
import os
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from metaseg.app.session import VIEW, Session
from metaseg.data.faults import fault_lines
from metaseg.data.opening import opened
from metaseg.data.source import UInt8
from metaseg.errors import UserError
from metaseg.practice import Initialisation

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing here asks the network

import gradio as gr

PAINT, OPACITY = (224, 0, 224), 0.6  # few objects are magenta
LARGEST = 4 * VIEW  # side of what the editor may send, which is VIEW on a plain screen
BRUSH = 16  # radius, in pixels of the view
DAY = 86_400  # seconds after which Gradio's copies of uploads are removed; sessions have their own
ALIKE = 2  # levels of 255 that a browser may render an image off
HEIGHT = 490  # of the gallery and the editor, in pixels of the screen
STEPS = {"steps as recommended": 0} | {f"{n} steps": n for n in (10, 20, 50, 100, 200)}
DOWNLOADS = {".zip": "Masks", ".onnx": "Model, ONNX", ".safetensors": "Model, safetensors"}

THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container main { max-width: 1400px; margin: 0 auto; padding: 8px 24px }
#images .caption-label { left: 0; bottom: 0; max-width: 100%; border-radius: 0; padding: 1px 6px; font-size: 11px }
#editor button:is([aria-label="Clear canvas"], [aria-label="Color"]) { display: none } /* it clears the image, too */
"""
FETCH = """file => {
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""

File: TypeAlias = dict[str, Any]  # "path", and what else Gradio says of it
Drawn: TypeAlias = dict[str, Any] | None  # the editor's value: "background" and "layers", each a `File`

ended = threading.Event()  # set as the command ends; Python aborts where a thread goes on in PyTorch


def build(init: Initialisation, folder: Path) -> gr.Blocks:
    """The page; each visitor has a `Session` of their own.

    Args:
        init: what all sessions adapt; it stays as it is.
        folder: the sessions' own folders are made in it.
    """
    paint = (f"rgb{PAINT}", OPACITY)
    page = gr.Blocks(title="metaseg", analytics_enabled=False, fill_width=True, delete_cache=(3600, DAY))
    with page:
        session = gr.State(None, delete_callback=_close)
        # the image in the editor: a component, so that the browser sends its name and what is drawn on it together,
        # as they were when a button was pressed; whatever sets one of them sets the other, too
        opened = gr.Textbox(visible="hidden")
        said = gr.State("")
        gr.Markdown("**metaseg**: paint an object on a few images, and get its mask on all the others.")
        with gr.Row():
            with gr.Column(scale=5):
                gr.Markdown("**1 Add images.** Masks show here: painted green, predicted red.")
                upload = gr.UploadButton("Add images", size="md", file_count="multiple")
                gallery = gr.Gallery(
                    elem_id="images",
                    show_label=False,
                    columns=3,
                    height=HEIGHT,
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    format="png",
                )
            with gr.Column(scale=6):
                gr.Markdown("**2 Paint** all of the object: choose an image, then brush; the eraser mends.")
                editor = gr.ImageEditor(
                    elem_id="editor",
                    label="no image yet",
                    placeholder=" ",
                    image_mode="RGBA",
                    format="png",  # the default is lossy
                    canvas_size=(VIEW, VIEW),
                    height=HEIGHT,
                    interactive=True,
                    sources=(),
                    transforms=(),
                    layers=False,
                    buttons=[],
                    brush=gr.Brush(
                        default_size=BRUSH,
                        colors=[paint],
                        default_color=paint,
                        color_mode="fixed",
                    ),
                )
                use = gr.Button("Use this mask", size="md")
        with gr.Row():
            with gr.Column(scale=5):
                gr.Markdown("**3 Adapt.** Then mend or use a predicted mask, and adapt again.")
                adapt = gr.Button("Adapt", variant="primary", size="md")
                with gr.Row():
                    steps = gr.Dropdown(list(STEPS.items()), value=0, show_label=False, container=False, min_width=100)
                    tile = gr.Checkbox(label="tiles, for small objects", container=False, min_width=100)
                status = gr.Markdown(elem_id="status", min_height=24)
            with gr.Column(scale=6):
                gr.Markdown("**4 Download** the masks, 0 and 255 at each image's own size, or the model.")
                with gr.Row():
                    makers = {suffix: gr.Button(label, size="md", min_width=100) for suffix, label in DOWNLOADS.items()}
                made = gr.File(visible="hidden")

        painting = [session, opened, editor]
        shown = [opened, gallery, editor]
        # Gradio's preprocessing would decode whatever pictures an event names, at any size and all at once
        hidden: dict[str, Any] = {"api_visibility": "private", "preprocess": False}
        upload.upload(partial(_add, init, folder), [upload, *painting], [session, *shown], **hidden)
        # by default what is clicked while the last one still opens would be ignored
        gallery.select(_open, painting, shown, trigger_mode="always_last", show_progress="hidden", **hidden)
        use.click(_use, painting, gallery, show_progress="hidden", **hidden)
        adapted = adapt.click(
            _adapt,
            [*painting, steps, tile],
            [gallery, said],
            show_progress_on=status,
            concurrency_limit=1,
            **hidden,
        )
        adapted.then(_refresh, [*painting, said], [*shown, status], show_progress="hidden", **hidden)
        for suffix, button in makers.items():
            ready = button.click(partial(_make, suffix), painting, made, show_progress_on=button, **hidden)
            ready.success(None, made, js=FETCH, **hidden)
    return page


def _close(session: Session | None) -> None:
    if session is not None:
        session.close()


def _add(
    init: Initialisation,
    folder: Path,
    files: list[File] | None,
    session: Session | None,
    opened: str | None,
    drawn: Drawn,
) -> tuple[Any, ...]:
    session = session or Session(init, Path(tempfile.mkdtemp(dir=folder)))
    _keep(session, opened, drawn)
    faults = session.add([Path(file["path"]) for file in files or ()])
    if faults:
        _warn(["These files are left out:", *fault_lines(faults)])
    if not opened and session.pictures:
        first = next(iter(session.pictures))
        return session, first, session.thumbnails(), _editor(session, first)
    return session, gr.skip(), session.thumbnails(), gr.skip()


def _open(session: Session | None, opened: str | None, drawn: Drawn, event: gr.SelectData) -> Any:
    if session is None:  # the page is an older one than the command that serves it now
        return _warn(["Add images first."])
    name = list(session.pictures)[event.index]
    if name == opened:
        return gr.skip()
    changed = _keep(session, opened, drawn)
    return name, session.thumbnails() if changed else gr.skip(), _editor(session, name)


def _use(session: Session | None, opened: str | None, drawn: Drawn) -> Any:
    if session is None or not opened:
        return _warn(["Add images first."])
    painted = _painted(session, opened, drawn)
    if painted is None:
        return _warn([f"{opened} is still being opened: wait until the editor shows it"])
    session.paint(opened, painted)
    try:
        session.confirm(opened)
    except UserError as error:
        _warn([str(error)])
    return session.thumbnails()


def _adapt(
    session: Session | None,
    opened: str | None,
    drawn: Drawn,
    steps: int,
    tile: bool,
    progress: gr.Progress = gr.Progress(),  # noqa: B008  # how Gradio passes it
) -> Any:
    if session is None or not opened:
        _warn(["Add images first."])
        return gr.skip(), ""
    if steps not in STEPS.values():
        raise gr.Error("The number of steps is none of those to choose from.", title="metaseg", print_exception=False)

    def tell(done: float, doing: str) -> None:
        if ended.is_set():
            raise gr.Error("The page has ended.", title="metaseg", print_exception=False)
        progress(done, desc=doing)

    _keep(session, opened, drawn)
    try:
        said = session.adapt(steps=steps or None, tile=tile, tell=tell)
    except UserError as error:
        _warn([str(error)])
        said = ""
    return session.thumbnails(), said


def _refresh(session: Session | None, opened: str | None, drawn: Drawn, said: str) -> Any:
    """Show the new mask of the image that is open after an adaptation, whichever it is by then."""
    if session is None or not opened or not said:
        return gr.skip()
    changed = _keep(session, opened, drawn)
    return opened, session.thumbnails() if changed else gr.skip(), _editor(session, opened), said


def _make(suffix: str, session: Session | None, opened: str | None, drawn: Drawn) -> str:
    """The file to download. An error is raised here, so that no older file is fetched instead."""
    if session is None:
        raise gr.Error("Add images first.", title="metaseg", print_exception=False)
    _keep(session, opened, drawn)
    try:
        return str(session.masks_zip() if suffix == ".zip" else session.model(suffix))
    except UserError as error:
        raise gr.Error(html.escape(str(error)), title="metaseg", print_exception=False) from error


def _warn(lines: Sequence[str]) -> Any:
    gr.Warning("<br>".join(html.escape(line) for line in lines), title="metaseg")
    return gr.skip()


def _keep(session: Session, opened: str | None, drawn: Drawn) -> bool:
    """Take what was painted on the open image; nobody has to save it. Whether anything was."""
    painted = _painted(session, opened, drawn)
    return opened is not None and painted is not None and session.paint(opened, painted)


def _painted(session: Session, opened: str | None, drawn: Drawn) -> UInt8 | None:
    """What is painted on the open image, (h, w) of its view, {0, 1}; None if the editor does not show that image."""
    if not drawn or not drawn["background"] or not drawn["layers"] or opened not in session.pictures:
        return None
    height, width = session.pictures[opened].view.shape[:2]
    painted = np.zeros((VIEW, VIEW), np.uint8)
    try:
        if not _shows(session, opened, _read(drawn["background"])):
            return None
        for layer in drawn["layers"]:
            opaque = (_read(layer)[..., 3] > 255 * OPACITY / 2).astype(np.uint8)
            painted |= cv2.resize(opaque, (VIEW, VIEW), interpolation=cv2.INTER_NEAREST) > 0
    except Exception:  # Pillow's are of all kinds: the file is not of this page's editor
        return None
    top, left = (VIEW - height) // 2, (VIEW - width) // 2
    return painted[top : top + height, left : left + width]


def _read(file: File) -> UInt8:
    """A picture (h, w, 4) that the editor sends."""
    with opened(Path(file["path"]), ["PNG"]) as picture:
        if max(picture.size) > LARGEST:
            raise ValueError(f"a picture of {picture.size} pixels")
        return np.asarray(picture.convert("RGBA"))


def _shows(session: Session, name: str, background: UInt8) -> bool:
    """Whether it is this image that the editor shows: for a moment it has an image's name, and still the last one."""

    def small(picture: UInt8) -> NDArray[np.float32]:
        return cv2.resize(picture[..., :3], (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)

    seen = small(background)

    def off(name: str) -> float:
        return float(np.abs(seen - small(_squared(session.pictures[name].view, 255))).mean())

    own = off(name)
    return own <= ALIKE or all(own <= off(other) for other in session.pictures)


def _editor(session: Session, name: str) -> Any:
    """The editor with an image and its mask. On a square: the editor would displace a layer of any other shape."""
    view = session.pictures[name].view
    paint = np.zeros((*view.shape[:2], 4), np.uint8)
    paint[session.open(name) == 1] = (*PAINT, round(255 * OPACITY))
    value: Any = {"background": _squared(view, 255), "layers": [_squared(paint, 0)], "composite": None}
    return gr.ImageEditor(value, label=name)


def _squared(picture: UInt8, margin: int) -> UInt8:
    """A picture (h, w, …) in the middle of a square of VIEW."""
    height, width = picture.shape[:2]
    square = np.full((VIEW, VIEW, *picture.shape[2:]), margin, np.uint8)
    top, left = (VIEW - height) // 2, (VIEW - width) // 2
    square[top : top + height, left : left + width] = picture
    return square
