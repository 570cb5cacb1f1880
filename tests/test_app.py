"""The page in the browser: what a session does, what the command says, and the whole of it in a Chromium."""

import io
import os
import re
import signal
import socket
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import png_of_size
from test_practice import SIZE, labelled

import metaseg
from metaseg.app import __main__ as command
from metaseg.app.session import VIEW, Session
from metaseg.data.source import UInt8
from metaseg.errors import ConfigError, DataError
from metaseg.initialisation import read_about
from metaseg.metrics import iou
from metaseg.practice import Initialisation

sys.path.append(str(Path(__file__).parents[1] / "experiments"))


@pytest.fixture(scope="module")
def init(theta: Path) -> Initialisation:
    return metaseg.load(theta, device="cpu")


@pytest.fixture
def session(init: Initialisation, tmp_path: Path) -> Iterator[Session]:
    folder = tmp_path / "session"
    folder.mkdir()
    session = Session(init, folder)
    yield session
    session.close()
    assert not folder.exists()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three images, 40 × 56, of a box."""
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, image in zip(paths, labelled(3)[0], strict=True):
        Image.fromarray(image).save(path)
    return paths


def box(height: int, width: int) -> UInt8:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    return mask


def masks_in(path: Path) -> dict[str, UInt8]:
    with zipfile.ZipFile(path) as archive:
        return {name: np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()}


# A session


def test_masks_of_all_images_after_adapting_to_one(session: Session, files: list[Path]) -> None:
    told: list[tuple[float, str]] = []
    assert session.add(files) == []
    session.label("a.png", box(40, 56))
    said = session.adapt(tell=lambda done, doing: told.append((done, doing)))
    assert said.startswith("Adapted to 1 image in 2 steps and ")
    assert told[0][1].startswith("adapting: step 1 of 2, support loss ")
    assert told[-1] == (0.5, "predicting image 2 of 2")
    masks = masks_in(session.masks_zip())
    assert masks.keys() == {"a.png", "b.png", "c.png"}
    np.testing.assert_array_equal(masks["a.png"], 255 * box(40, 56))
    assert all(mask.shape == (40, 56) and set(np.unique(mask)) <= {0, 255} for mask in masks.values())
    captions = [caption for _, caption in session.thumbnails()]
    assert captions == ["labelled · a.png", "predicted · b.png", "predicted · c.png"]


def test_a_correction_is_one_more_shot(session: Session, files: list[Path]) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt(steps=1)
    assert session.adapted is not None
    assert (session.adapted.about.shots, session.adapted.steps) == (1, 1)
    painted = session.layer("b.png")
    painted[:200, :200] = 1 - painted[:200, :200]
    assert session.paint("b.png", painted)
    session.adapt()
    assert session.adapted.about.shots == 2


def test_a_predicted_mask_becomes_a_label_only_if_it_is_confirmed_or_mended(
    session: Session, files: list[Path]
) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt()
    picture = session.pictures["b.png"]
    picture.prediction = session.pictures["a.png"].label  # an object, whatever this θ would find
    assert not session.paint("b.png", session.layer("b.png"))
    assert picture.label is None
    session.confirm("b.png")
    assert picture.label == picture.prediction


def test_erasing_all_of_a_label_takes_it_back(session: Session, files: list[Path]) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt()
    assert session.paint("a.png", np.zeros_like(session.layer("a.png")))
    picture = session.pictures["a.png"]
    assert picture.label is None
    assert picture.prediction is not None


def test_an_erased_prediction_does_not_come_back_as_a_label(session: Session, files: list[Path]) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt()
    picture = session.pictures["b.png"]
    picture.prediction = session.pictures["a.png"].label  # an object, whatever this θ would find
    empty = np.zeros_like(session.open("b.png"))
    assert session.paint("b.png", empty)
    with pytest.raises(DataError, match=r"the mask of b\.png is empty: paint the object first"):
        session.confirm("b.png")
    assert picture.mask is None
    assert masks_in(session.masks_zip()).keys() == {"a.png", "c.png"}
    stroke = empty.copy()
    stroke[-100:] = 1
    session.paint("b.png", stroke)
    assert picture.label is not None
    assert not masks_in(session.masks_zip())["b.png"][:30].any()


def test_an_erased_label_does_not_come_back_by_the_prediction(session: Session, files: list[Path]) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt()
    picture = session.pictures["a.png"]
    before = picture.label
    session.paint("a.png", np.zeros_like(session.open("a.png")))
    picture.prediction = before  # as if it were found again
    with pytest.raises(DataError, match="is empty: paint the object first"):
        session.confirm("a.png")


def test_strokes_on_a_mask_that_has_changed_since_are_all_that_is_taken(session: Session, files: list[Path]) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt()
    picture = session.pictures["b.png"]
    picture.prediction = session.pictures["a.png"].label
    shown = session.open("b.png")
    session.adapt(steps=1)  # it predicts b.png anew, which the editor does not show yet
    assert not session.paint("b.png", shown)
    assert picture.label is None


def test_a_thumbnail_is_made_once_a_mask(session: Session, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    before = [small for small, _ in session.thumbnails()]
    monkeypatch.setattr("metaseg.app.session._decoded", lambda mask: pytest.fail("a mask is read again"))
    assert all(one is two for one, (two, _) in zip(before, session.thumbnails(), strict=True))
    monkeypatch.undo()
    session.pictures["b.png"].prediction = session.pictures["a.png"].label
    predicted = session.thumbnails()[1][0]
    session.confirm("b.png")
    labelled = session.thumbnails()[1][0]
    assert (before[1] != predicted).any()
    assert (predicted != labelled).any()  # green instead of red


@pytest.mark.parametrize("size", [(30, 64), (64, 30), (900, 1600)], ids=str)
def test_a_mask_painted_on_the_view_has_the_images_own_size(
    session: Session, tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size[::-1]).save(tmp_path / "x.png")
    session.add([tmp_path / "x.png"])
    assert max(session.layer("x.png").shape) == VIEW
    session.paint("x.png", box(*session.layer("x.png").shape))
    mask = masks_in(session.masks_zip())["x.png"] > 0
    assert mask.shape == size
    assert (mask ^ (box(*size) == 1)).sum() <= sum(size)  # but for a pixel along the outline


def test_only_what_is_brushed_changes_a_large_images_mask(session: Session, tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000)).save(tmp_path / "x.png")
    session.add([tmp_path / "x.png"])
    fine = (np.indices((1000, 2000)) % 3 == 0).all(axis=0).astype(np.uint8)  # dots which the view cannot show
    session.label("x.png", fine)
    painted = session.layer("x.png")
    painted[:32, :64] = 1
    session.paint("x.png", painted)
    mask = masks_in(session.masks_zip())["x.png"] > 0
    assert mask[:95, :195].all()
    np.testing.assert_array_equal(mask[110:], fine[110:] == 1)


def test_bad_files_are_named_and_the_others_used(session: Session, files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 no more")
    faults = session.add([broken, files[0], png_of_size(tmp_path / "huge.png", 10_000, 10_000)])
    assert list(session.pictures) == ["a.png"]
    assert [(fault.path.name, fault.kind) for fault in faults] == [
        ("broken.jpg", "unreadable file"),
        ("huge.png", "image of too many pixels"),
    ]


def test_images_of_one_stem_have_masks_of_two_names(session: Session, files: list[Path], tmp_path: Path) -> None:
    Image.open(files[0]).save(tmp_path / "A.jpg")
    session.add([files[0], files[0], tmp_path / "A.jpg"])
    assert list(session.pictures) == ["a.png", "a (2).png", "A (3).jpg"]
    for name in session.pictures:
        session.label(name, box(40, 56))
    assert masks_in(session.masks_zip()).keys() == {"a.png", "a (2).png", "A (3).png"}


def test_images_added_after_adapting_are_predicted(session: Session, files: list[Path]) -> None:
    session.add(files[:1])
    session.label("a.png", box(40, 56))
    session.adapt()
    session.add(files[1:])
    assert session.pictures["c.png"].prediction is not None


def test_what_cannot_be_done_is_said_with_its_cure(session: Session, files: list[Path]) -> None:
    session.add(files)
    with pytest.raises(DataError, match="paint the object on at least one image first"):
        session.adapt()
    with pytest.raises(DataError, match=r"the mask of a\.png is empty: paint the object first"):
        session.confirm("a.png")
    with pytest.raises(DataError, match="there are no masks yet: paint"):
        session.masks_zip()
    for suffix in (".onnx", ".safetensors"):
        with pytest.raises(DataError, match="there is no adapted model yet: paint"):
            session.model(suffix)
    speck = np.zeros((40, 56), np.uint8)
    speck[2, 0] = 1  # a row that nearest-neighbour shrinking to 32 drops
    session.label("b.png", speck)
    with pytest.raises(
        DataError, match=r"b\.png: its object cannot be seen at the network's 32 pixels: paint all of it"
    ):
        session.adapt()


def test_the_adapted_model_can_be_taken_along(session: Session, files: list[Path]) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt()
    path = session.model(".safetensors")
    assert session.adapted is not None
    assert read_about(path) == session.adapted.about
    assert (read_about(path).shots, read_about(path).image_size, read_about(path).tile) == (1, SIZE, False)
    loaded = metaseg.load(path)
    image = np.asarray(Image.open(files[1]))
    np.testing.assert_array_equal(255 * loaded.predict(image), masks_in(session.masks_zip())["b.png"])


def test_the_adapted_model_as_onnx(session: Session, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt()
    monkeypatch.setattr("metaseg.app.session.export", lambda net, size, path: path.write_text(f"{size}"))
    assert session.model(".onnx").read_text() == str(SIZE)
    monkeypatch.undo()
    monkeypatch.setattr("metaseg.export._installed", lambda package, least: False)
    with pytest.raises(ConfigError, match=r'pip install "metaseg-lightning\[export\]"'):
        session.model(".onnx")


def test_a_model_adapted_with_tiles_is_taken_along_with_them_or_not_at_all(session: Session, files: list[Path]) -> None:
    session.add(files)
    session.label("a.png", box(40, 56))
    session.adapt(tile=True)
    with pytest.raises(ConfigError, match=r"adapted with tiles.*download it as safetensors.*or adapt without tiles"):
        session.model(".onnx")
    assert read_about(session.model(".safetensors")).tile
    np.testing.assert_array_equal(
        255 * metaseg.load(session.model(".safetensors")).predict(np.asarray(Image.open(files[1]))),
        masks_in(session.masks_zip())["b.png"],
    )


def test_sessions_share_nothing_but_the_initialisation(init: Initialisation, files: list[Path], tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in init.net.state_dict().items()}
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        folder.mkdir()
    one, two = (Session(init, folder) for folder in folders)
    one.add(files)
    one.label("a.png", box(40, 56))
    one.adapt()
    assert not two.pictures
    assert two.adapted is None
    assert not list(folders[1].iterdir())
    assert all(torch.equal(value, before[key]) for key, value in init.net.state_dict().items())


# The editor


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    from metaseg.app import page

    monkeypatch.setattr(page.gr, "Warning", lambda said, **_: pytest.fail(said))
    return page


def drawn(page: ModuleType, session: Session, name: str, painted: UInt8 | None = None) -> dict[str, Any]:
    """The editor's value as the browser sends it, with a mask (h, w) of the image's view or the one that it has."""
    mask = session.open(name) if painted is None else painted
    pictures = {
        "background": page._squared(session.pictures[name].view, 255),
        "layer": page._squared(np.stack([mask * 255] * 4, axis=-1), 0),
    }
    paths = {key: session.folder / f"{key} of {name}" for key in pictures}
    for key, picture in pictures.items():
        Image.fromarray(picture).save(paths[key])
    return {"background": {"path": str(paths["background"])}, "layers": [{"path": str(paths["layer"])}]}


def test_what_is_painted_on_one_image_is_never_anothers_label(
    page: ModuleType, session: Session, files: list[Path]
) -> None:
    session.add(files)
    value = drawn(page, session, "a.png", box(*session.layer("a.png").shape))
    assert not page._keep(session, "b.png", value)
    assert not page._keep(session, "gone.png", value)
    assert session.pictures["b.png"].label is None
    assert page._keep(session, "a.png", value)
    assert not page._keep(session, "a.png", value)  # the same once more
    assert session.pictures["a.png"].label is not None


def test_an_adaptation_leaves_open_what_is_open_when_it_ends(
    page: ModuleType, session: Session, files: list[Path]
) -> None:
    session.add(files)
    painted = drawn(page, session, "a.png", box(*session.layer("a.png").shape))
    _, said = page._adapt(session, "a.png", painted, 0, False, lambda *_, **__: None)
    assert said.startswith("Adapted to 1 image")
    name, _, editor, status = page._refresh(session, "b.png", drawn(page, session, "b.png"), said)
    assert (name, editor.label, status) == ("b.png", "b.png", said)


def test_every_event_that_sets_the_editor_says_of_which_image(
    page: ModuleType, init: Initialisation, tmp_path: Path
) -> None:
    blocks = page.build(init, tmp_path)
    opened = next(block for block in blocks.blocks.values() if isinstance(block, page.gr.Textbox))
    editor = next(block for block in blocks.blocks.values() if isinstance(block, page.gr.ImageEditor))
    events = list(blocks.fns.values())
    for blocks_of in [event.inputs for event in events] + [event.outputs for event in events]:
        assert (editor in blocks_of) == (opened in blocks_of)
    assert sum(editor in event.outputs for event in events) == 3


def test_of_gradios_routes_only_those_are_answered_that_the_page_asks_for(
    page: ModuleType, init: Initialisation, tmp_path: Path
) -> None:
    from gradio.routes import App
    from test_app_hostile import Taker, ask

    from metaseg.app.guard import Guard

    guarded = Guard(Taker(), tmp_path, local=True)
    routes = App.create_app(page.build(init, tmp_path)).openapi()["paths"]
    assert {  # a route that is new to this list: does the page need it, and what may it do?
        (method, route)
        for route, methods in routes.items()
        for method in methods
        if ask(guarded, re.sub("{[^}]*}", "x", route), 2, b"{}", method=method.upper()).status == 200
    } == {
        ("get", "/"),
        ("head", "/"),
        ("get", "/assets/{path}"),
        ("get", "/config"),
        ("get", "/favicon.ico"),
        ("get", "/gradio_api/app_id"),
        ("get", "/gradio_api/heartbeat/{session_hash}"),
        ("get", "/gradio_api/info"),
        ("get", "/gradio_api/queue/data"),
        ("post", "/gradio_api/queue/join"),
        ("get", "/gradio_api/startup-events"),
        ("post", "/gradio_api/upload"),
        ("get", "/manifest.json"),
        ("get", "/static/{path}"),
        ("get", "/theme.css"),
    }


def test_no_picture_is_decoded_that_the_editor_would_not_send(
    page: ModuleType, init: Initialisation, session: Session, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session.add(files)
    value = drawn(page, session, "a.png", box(*session.layer("a.png").shape))
    large, other = session.folder / "large.png", session.folder / "other.png"
    Image.new("L", (4 * VIEW + 1, 1)).save(large)
    Image.new("RGB", (8, 8)).save(other, "TIFF")
    bomb = png_of_size(session.folder / "bomb.png", 60_000, 60_000)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("a picture is decoded"))
    for path in (large, other, bomb):
        assert not page._keep(session, "a.png", {**value, "background": {"path": str(path)}})
    events = page.build(init, session.folder).fns.values()
    assert not any(event.preprocess for event in events if event.fn)  # nor does Gradio decode any before


def test_an_erased_mask_cannot_be_used(
    page: ModuleType, session: Session, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(page.gr, "Warning", lambda said, **_: warned.append(said))
    session.add(files)
    session.label("b.png", box(40, 56))
    session.pictures["a.png"].prediction = session.pictures["b.png"].label
    page._use(session, "a.png", drawn(page, session, "a.png", np.zeros_like(session.layer("a.png"))))
    assert warned == ["the mask of a.png is empty: paint the object first"]
    assert session.pictures["a.png"].mask is None


# The command


def test_the_page_is_for_this_computer_alone_unless_told_otherwise(
    theta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[int, str, int]] = []
    monkeypatch.setattr(command, "serve", lambda init, host, port: served.append((init.image_size, host, port)))
    command.main(["--init", str(theta)])
    command.main(["--init", str(theta), "--host", "0.0.0.0", "--port", "80"])
    assert served == [(SIZE, "127.0.0.1", 7860), (SIZE, "0.0.0.0", 80)]


@pytest.fixture
def _environment() -> Iterator[None]:
    """The command sets it for its process: not for other tests."""
    with patch.dict(os.environ):
        yield


@pytest.mark.usefixtures("_environment")
def test_without_gradio_it_says_what_to_install(theta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "metaseg.app.page", raising=False)
    monkeypatch.delattr("metaseg.app.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r'^metaseg: the page needs Gradio: pip install "metaseg-lightning\[app\]"$'):
        command.main(["--init", str(theta)])


@pytest.mark.usefixtures("_environment")
def test_no_setting_of_gradios_opens_more_than_the_page(tmp_path: Path) -> None:
    os.environ |= {"GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_NUM_WORKERS": "2", "GRADIO_DEBUG": "1"}
    command._settle(tmp_path)
    settings = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    assert settings == {"GRADIO_TEMP_DIR": str(tmp_path), "GRADIO_RUN_HISTORY": "False"}


def test_a_bad_initialisation_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^metaseg: .*none\.safetensors: there is no such file"):
        command.main(["--init", str(tmp_path / "none.safetensors")])


@pytest.mark.usefixtures("_environment")
def test_a_port_that_is_taken_is_named_with_another(theta: Path) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            SystemExit, match=rf"^metaseg: nothing can be served at 127\.0\.0\.1:{port}, .*--port {port + 1}"
        ):
            command.main(["--init", str(theta), "--port", str(port)])


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_port_that_cannot_be_is_named(theta: Path, port: int) -> None:
    with pytest.raises(SystemExit, match=rf"^metaseg: --port {port}: ports are 1 … 65535"):
        command.main(["--init", str(theta), "--port", str(port)])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_end_of_the_process_or_of_its_terminal_is_an_interrupt(name: str) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, getattr(signal, name))}
    try:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
        command.interruptible()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(getattr(signal, name))
        signal.raise_signal(getattr(signal, name))  # a second one interrupts no more
        signal.signal(getattr(signal, name), signal.SIG_IGN)
        command.interruptible()  # under nohup
        assert signal.getsignal(getattr(signal, name)) == signal.SIG_IGN
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# The whole of it, in a browser


@pytest.mark.slow
def test_paint_adapt_correct_and_download_in_a_browser(theta: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    pytest.importorskip("playwright.sync_api")
    from app_picture import CHROMIUM, add, browser_page, choose, paint, press, served, state

    if CHROMIUM is None:
        pytest.skip("needs Chromium: no chromium, google-chrome or chromium-browser on the PATH")
    pictures = {}
    for name, colour in {"red": (200, 60, 60), "green": (60, 160, 60), "blue": (60, 60, 200)}.items():
        pictures[name] = np.full((48, 64, 3), colour, np.uint8)
        Image.fromarray(pictures[name]).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    band = np.zeros((48, 64), np.uint8)
    band[16:20, 8:56] = 1  # as high as the brush: one stroke
    requests = []
    refused = []  # by the command, or by the browser since the command says so
    with served(theta) as address, browser_page(900, 800) as page:
        page.on("request", lambda request: requests.append(urlparse(request.url)))
        page.on("response", lambda response: refused.append(response.url) if response.status >= 400 else None)
        page.on("console", lambda said: refused.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(address)
        press(page, "Adapt")
        page.get_by_text("Add images first.").wait_for()
        add(page, [tmp_path / "broken.png", *(tmp_path / f"{name}.png" for name in pictures)], 3)
        page.get_by_text("broken.png (no known image format)").wait_for()
        press(page, "Adapt")
        page.get_by_text("paint the object on at least one image first").wait_for()

        for name in ("red", "green"):
            choose(page, f"{name}.png", pictures[name])
            paint(page, band)
        press(page, "Adapt")
        page.get_by_text("Adapted to 2 images in 2 steps").wait_for()
        assert [state(page, f"{name}.png") for name in pictures] == ["labelled", "labelled", "predicted"]
        width = page.locator("#images img").nth(2).evaluate("async image => (await image.decode(), image.naturalWidth)")
        assert width > 0

        choose(page, "blue.png", pictures["blue"])
        paint(page, band)
        press(page, "Use this mask")
        page.get_by_text("labelled · blue.png").wait_for()
        press(page, "Adapt")
        page.get_by_text("Adapted to 3 images in 2 steps").wait_for()
        with page.expect_download() as download:
            press(page, "Masks")
        masks = masks_in(download.value.path())
    assert masks.keys() == {"red.png", "green.png", "blue.png"}
    for name in ("red", "green"):
        painted = masks[f"{name}.png"] > 0
        assert painted.shape == (48, 64)
        assert iou((painted & (band == 1)).sum(), (painted | (band == 1)).sum()) > 0.6  # a stroke has round ends
    assert not refused
    assert {url.netloc for url in requests if url.scheme not in ("blob", "data")} == {urlparse(address).netloc}
